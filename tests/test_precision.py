"""Products are as exact as their dtype allows, and asked for so that a device has instructions for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import precision
from jaxagentrl.models import layers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (1, 48), (1, 1, 48), (48,)])
@pytest.mark.parametrize("wanted", [None, "float32"])
def test_bfloat16_is_rounded_once(shape, wanted):
    x, y = normal(0, *shape), normal(1, 48, 7)
    found = precision.matmul(x, y, wanted)
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    assert found.shape == exact.shape and found.dtype == (wanted or "bfloat16")
    # Half a unit in the last place; sums are in float32.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8 if wanted is None else 0, atol=2e-5)


def test_of_two_dtypes_the_wider_is_computed_in():
    x, y = normal(0, 5, 48), normal(1, 48, 7).astype(jnp.float32) + 1e-4
    found = precision.matmul(x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, x.astype(jnp.float32) @ y)


def test_float32_is_the_plain_product():
    x, y = (normal(seed, 6, 6).astype(jnp.float32) for seed in (0, 1))
    np.testing.assert_array_equal(precision.matmul(x, y), x @ y)


@pytest.mark.parametrize("backend, result", [("cpu", "f32"), ("gpu", "bf16")])
def test_a_layers_products_are_asked_for_as_the_device_has_them(backend, result, monkeypatch):
    """On CPU all of a projection's, forward and backward: of others XLA makes float32 of both sides first."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loss = jax.grad(lambda x, kernel: layers.product(x, kernel).astype(jnp.float32).sum(), (0, 1))
    text = jax.jit(loss).lower(normal(0, 2, 3, 8), normal(1, 8, 4)).as_text()
    forward = jax.jit(lambda *given: layers.product(*given)).lower(normal(0, 2, 3, 8), normal(1, 8, 4)).as_text()
    found = re.findall(r"dot_general .*\(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>", text + forward)
    assert len(found) >= 3 and set(found) == {("bf16", "bf16", result)}


@pytest.mark.parametrize(
    "backend, dtype, wanted",
    [
        ("cpu", "float32", None),
        ("gpu", "float32", "float32"),
        ("tpu", "float32", "float32"),
        ("gpu", "bfloat16", None),
    ],
)
def test_float32_is_kept_on_accelerators(backend, dtype, wanted, monkeypatch):
    updates = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    precision.keep_float32(dtype)
    assert updates.get("jax_default_matmul_precision") == wanted
