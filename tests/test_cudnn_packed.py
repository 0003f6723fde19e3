"""Attention of packed rows by cuDNN: what the kernel is given, answered here by its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxagentrl import packing
from jaxagentrl.models import attention, cudnn_packed, sharding


def test_sizes_and_starts_of_segments():
    ids = jnp.array([[0, 0, 1, 2, 2, -1], [0, 0, 0, 0, 0, 0], [-1] * 6])
    sizes, starts = cudnn_packed.segments_of(ids, 4)
    # Padding is a segment of its own; jax wants −1 where there is none, and one more start than sizes.
    assert sizes.tolist() == [[2, 1, 2, 1, -1], [6, -1, -1, -1, -1], [6, -1, -1, -1, -1]]
    assert starts.tolist() == [[0, 2, 3, 5, -1, -1], [0] + [-1] * 5, [0] + [-1] * 5]


def by_definition(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """cuDNN's kernel as jax documents it: causal within the segments that sizes and offsets name."""
    assert mask_type is cudnn.MaskType.PADDING_CAUSAL
    assert q.shape == k.shape  # jax's addresses of keys are wrong where heads differ
    assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
    index = jnp.arange(q.shape[1])

    def of(sizes, starts):
        at = index[None, None]
        inside = (at >= starts[:, :-1, None]) & (at < (starts[:, :-1] + sizes)[..., None])
        return inside & (sizes > 0)[..., None]  # [B, M, L]

    q_in, kv_in = of(q_seqlen, q_offsets), of(kv_seqlen, kv_offsets)
    mask = jnp.any(q_in[:, :, :, None] & kv_in[:, :, None, :], axis=1)
    mask &= (index[:, None] >= index[None])[None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    return jnp.where(jnp.any(q_in, axis=1)[..., None, None], out, jnp.nan)  # never written


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
def test_the_kernel_is_asked_for_the_same(heads, monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", by_definition)
    monkeypatch.setattr(cudnn_packed, "_is_hopper", lambda: True)
    *arrays, ids = cudnn_packed.trial_inputs(*heads, 8, "float32")
    mask = jnp.asarray(ids[:, None] == ids[:, :, None])
    made_of = {"scale": 8**-0.5, "segment_ids": ids, "max_segments": 4}

    def run(kernel):
        attend = functools.partial(attention.attend, mask=mask, kernel=kernel, **made_of)
        return jax.jit(cudnn_packed.with_gradients(lambda *x: attend(*x[:3])))(*arrays, ids)

    assert cudnn_packed.takes(*heads, 8, "float32")  # the trial of this kernel
    kernels = ("cudnn", "products")
    for one, two in zip(*(jax.tree.leaves(run(kernel)) for kernel in kernels), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, two, atol=2e-5)
    cudnn_packed._passes.cache_clear()


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (1, 1, 4)], ids=str)
def test_on_a_mesh_every_device_attends_for_its_rows_and_heads(sizes, monkeypatch):
    asked = []

    def recorded(q, *arrays, **options):
        asked.append(q.shape)
        return by_definition(q, *arrays, **options)

    monkeypatch.setattr(cudnn, "dot_product_attention", recorded)
    monkeypatch.setattr(cudnn_packed, "takes", lambda *heads: (heads[0], *heads[1:]) == (*local, 8, "float32"))
    monkeypatch.setattr(attention, "_attend_fused", lambda q, k, v, mask, **_: products(q, k, v))
    *arrays, ids = cudnn_packed.trial_inputs(4, 2, 8, "float32")
    made_of = {"scale": 8**-0.5, "segment_ids": ids, "max_segments": 4}
    local = (4 // sizes[2], 2 // sizes[2])

    def products(q, k, v):  # of heads that the mesh does not split
        return cudnn_packed.products(q, k, v, ids)

    def run(kernel):
        attend = functools.partial(attention.attend, mask=mask, kernel=kernel, **made_of)
        return jax.jit(cudnn_packed.with_gradients(lambda *x: attend(*x[:3])))(*arrays, ids)

    mask = jnp.asarray(ids[:, None] == ids[:, :, None])
    wanted = run("products")
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    with sharding.use(mesh):
        ours = run("cudnn")
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    split = (2 // (sizes[0] * sizes[1]), 256, local[0], 8)
    assert set(asked) == ({split} if sizes[2] < 4 else set())


def test_a_kernel_that_looks_across_segments_fails_its_trial(monkeypatch):
    def across(q, k, v, *, scale, **_):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale)

    monkeypatch.setattr(cudnn, "dot_product_attention", across)
    with pytest.warns(UserWarning, match="packed rows is not used.*results differ"):
        assert not cudnn_packed._passes(4, 2, 8, "float32")
    cudnn_packed._passes.cache_clear()


def test_on_cpu_it_does_not_run_and_says_why():
    with pytest.warns(UserWarning, match="packed rows is not used.*cpu"):
        assert not cudnn_packed._passes(4, 2, 64, "bfloat16")
    cudnn_packed._passes.cache_clear()


def packed():
    return packing.pack(
        np.arange(2), np.array([3, 4]), shape=(2, 8), length=8, tokens_per_part=8, row_multiple=1
    )


def test_only_hoppers_have_a_bound_on_segments(monkeypatch):
    assert cudnn_packed.segment_bound(5) is None
    assert packed().max_segments is None
    monkeypatch.setattr(cudnn_packed, "_is_hopper", lambda: True)
    assert [cudnn_packed.segment_bound(n) for n in (1, 4, 5, 64, 65)] == [4, 4, 8, 64, 128]
    assert packed().max_segments == 4
