"""Attention of whole sequences against a float64 loop, and what the fused kernel would be given."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import logprobs
from jaxagentrl.models import attention

B, L, H, K, E = 2, 10, 4, 2, 8
SCALE = 0.3


def tensors(dtype="float32", length=L):
    rng = np.random.default_rng(0)
    shapes = (B, length, H, E), (B, length, K, E), (B, length, K, E)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def masks():
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]])
    index = np.arange(L)
    return {
        "causal": None,
        "packed": jnp.asarray(segments[:, None, :] == segments[:, :, None]),
        "window": jnp.asarray((index[:, None] - index[None, :] < 3)[None]),
    }


def oracle(q, k, v, mask, softcap=None):
    """Token by token, in float64, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            for t in range(L):
                rows = mask[b % len(mask), t] if mask is not None else np.ones(L, bool)
                seen = [s for s in range(t + 1) if rows[s]]
                z = np.array([SCALE * q[b, t, h] @ k[b, s, h * K // H] for s in seen])
                z = z if softcap is None else softcap * np.tanh(z / softcap)
                p = np.exp(z - z.max())
                out[b, t, h] = sum(w * v[b, s, h * K // H] for w, s in zip(p / p.sum(), seen))
    return out


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_products_against_the_definition(name, softcap):
    q, k, v = tensors()
    mask = masks()[name]
    out = attention.attend(q, k, v, mask, scale=SCALE, softcap=softcap)
    wanted = oracle(q, k, v, None if mask is None else np.asarray(mask), softcap)
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def plain(q, k, v, mask, softcap):
    """The definition in whole arrays, for jax's own derivative: no blocks, no rule of ours."""
    length = q.shape[1]
    keys, values = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    z = logprobs.cap(SCALE * jnp.einsum("bthe,bshe->bhts", q, keys), softcap)
    seen = jnp.tril(jnp.ones((1, length, length), bool)) & mask
    weights = jax.nn.softmax(jnp.where(seen[:, None], z, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "softcap"), [(64, None), (65, None), (150, 0.5), (300, None)]
)  # 1, 2, 3 and 4 blocks of queries
def test_blocks_of_queries_change_neither_values_nor_gradients(length, softcap):
    inputs = tensors(length=length)
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(0, 4, (B, length)), axis=1)  # they straddle blocks
    mask = jnp.asarray(segments[:, None, :] == segments[:, :, None])
    weights = jnp.asarray(rng.standard_normal((B, length, H, E)), jnp.float32)

    def with_gradients(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(weights * attend(*x)), (0, 1, 2))(*inputs)

    ours = with_gradients(lambda *x: attention.attend(*x, mask, scale=SCALE, softcap=softcap))
    wanted = with_gradients(lambda *x: plain(*x, mask, softcap))
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_no_scores_of_later_blocks_are_computed():
    """Of four blocks 5/8 of the scores are left, so of the arithmetic too."""

    def flops(attend, length):
        q, k, v = tensors(length=length)
        return jax.jit(attend).lower(q, k, v).compile().cost_analysis()["flops"]

    blocked = flops(lambda *x: attention.attend(*x, None, scale=SCALE), 1024)
    whole = flops(lambda *x: plain(*x, jnp.ones((1, 1024, 1024), bool), None), 1024)
    assert blocked < 0.7 * whole


def test_sixteen_bits_are_rounded_once():
    """Sums and the division are float32; what is rounded is what products read, and the result."""
    q, k, v = tensors("bfloat16")
    out = attention.attend(q, k, v, None, scale=SCALE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), oracle(q, k, v, None), atol=0.02)

    # Equal scores and whole numbers leave one inexact step, the rounding of the mean.
    whole = jnp.asarray(np.random.default_rng(2).integers(-200, 200, v.shape), jnp.bfloat16)
    out = attention.attend(jnp.zeros_like(q), k, whole, None, scale=SCALE)
    means = np.cumsum(np.asarray(whole, np.float64), axis=1) / np.arange(1, L + 1)[:, None, None]
    wanted = jnp.asarray(np.repeat(means, H // K, axis=2), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.parametrize("name", masks())
def test_the_fused_kernel_is_asked_for_the_same(name):
    """The call that cuDNN would answer on a GPU, answered here by its reference: same values, same
    gradients."""
    q, k, v = tensors()
    mask = masks()[name]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, L, H, E)), jnp.float32)

    def with_gradients(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(weights * attend(*x)), (0, 1, 2))(q, k, v)

    ours = with_gradients(lambda *x: attention.attend(*x, mask, scale=SCALE))
    theirs = with_gradients(
        lambda *x: attention._attend_fused(*x, mask, scale=SCALE, implementation="xla")
    )
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_kernel_follows_the_backend_and_what_it_takes(monkeypatch):
    fits = (jnp.dtype(jnp.bfloat16), 128, 64, None)
    assert attention.kernel_for(*fits) == "products"  # CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability in ("7.5", "gfx942", "8.0", "9.0", "10.3"):  # T4, AMD, A100, H100, B300
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        expected = "products" if capability in ("7.5", "gfx942") else "cudnn"
        assert attention.kernel_for(*fits) == expected, capability
    for index, other in enumerate((jnp.dtype(jnp.float32), 127, 256, 50.0)):
        unfit = (*fits[:index], other, *fits[index + 1 :])
        assert attention.kernel_for(*unfit) == "products", unfit


def test_the_kernels_name_reaches_jax(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **options: asked.update(options))
    q, k, v = tensors("bfloat16")
    attention.attend(q, k, v, masks()["packed"], scale=SCALE, kernel="cudnn")
    assert asked["implementation"] == "cudnn" and asked["is_causal"] and asked["scale"] == SCALE
    assert asked["mask"].shape == (B, 1, L, L)
