"""The TPU's attention kernel, interpreted on the CPU, and lowered for the TPU that is not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxagentrl.models import attention, decoder, sharding, splash

B, L, H, K, E = 4, 256, 4, 2, 16
SCALE = 0.25


def segments():
    return jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 3, (B, L)), 1), jnp.int32)


def mask_of(segment_ids, window):
    """[B, L, L] bool, from the definition."""
    back = np.arange(L)[:, None] - np.arange(L)[None]
    near = back[None] < (L if window is None else window)
    ids = np.zeros((B, L)) if segment_ids is None else np.asarray(segment_ids)
    return jnp.asarray(near & (ids[:, :, None] == ids[:, None, :]))


def with_gradients(attend):
    rng = np.random.default_rng(0)
    shapes = (B, L, H, E), (B, L, K, E), (B, L, K, E)
    q, k, v = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def loss(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(weights * out), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("on_a_mesh", [False, True], ids=["alone", "fsdp 2 x tensor 2"])
@pytest.mark.parametrize(
    "packed, window, softcap", [(False, None, None), (True, None, 2.0), (True, 100, None)]
)
def test_the_kernel_is_attention(packed, window, softcap, on_a_mesh):
    """Values and gradients, with fewer key/value heads than query heads."""
    ids = segments() if packed else None
    shape = dict(scale=SCALE, softcap=softcap)
    wanted = with_gradients(
        lambda *x: attention.attend(*x, mask_of(ids, window), **shape)
    )
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=devices) if on_a_mesh else None
    with sharding.use(mesh):
        got = with_gradients(
            lambda *x: splash.attend(*x, ids, window=window, interpret=True, **shape)
        )
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_it_is_chosen_on_a_tpu_for_whole_blocks_and_one_window(monkeypatch):
    fits = (jnp.dtype(jnp.float32), 256, 64, 30.0)
    assert attention.kernel_for(*fits) == "products"  # CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention.kernel_for(*fits) == "splash"
    assert attention.kernel_for(*fits, one_window=False) == "products"
    assert attention.kernel_for(*fits, is_tree=True) == "products"
    assert attention.kernel_for(fits[0], 200, *fits[2:]) == "products"


@pytest.mark.parametrize("on_a_mesh", [False, True], ids=["alone", "fsdp 2 x tensor 2"])
@pytest.mark.parametrize("window, local, kernels", [
    (None, None, True), (96, None, True), (96, (True, False), False),
])
def test_the_decoder_is_lowered_for_a_tpu(window, local, kernels, on_a_mesh, monkeypatch):
    """Forward and backward of packed rows, all the way to the kernel's own program."""
    config = decoder.DecoderConfig(
        vocab_size=64, hidden_size=64, num_layers=2, num_heads=H, num_kv_heads=K, head_dim=E,
        intermediate_size=64, sliding_window=window, window_layers=local,
    )
    params = decoder.init(config, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def loss(params, tokens, segment_ids):
        return jnp.sum(decoder.hidden(config, params, tokens, segment_ids=segment_ids))

    devices = jax.devices()[:4]
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=devices) if on_a_mesh else None
    with sharding.use(mesh):
        lowered = export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(params, tokens, tokens)
    assert ("tpu_custom_call" in lowered.mlir_module()) == kernels
