"""A decode step's attention on the KV cache as one kernel for GPUs (Pallas, by Triton).

Matrix products would need the layer's filled part of the cache as an array of its own, which XLA
writes and reads again: three times the bytes. The kernel reads keys and values where they lie, of
each row as far as that row is filled, and puts the new token's beside them. Positions of a row are
shared out over programs, whose parts are joined by their log-sum-exps (flash decoding, Dao et al.
2023, https://pytorch.org/blog/flash-decoding/).

Shapes: S rows, H query heads, K key/value heads with K dividing H, G = H / K, E head size, M
positions, N layers, P parts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxagentrl.logprobs import cap
from jaxagentrl.models import attention, kv_cache, sharding, trial

_BLOCK = 64  # positions that a program reads at once
_MIN_GROUP = 16  # query rows of the smallest matrix product that Triton has
_PROGRAMS = 512  # about four for every multiprocessor of a large GPU

_LOWEST = -1e30

_TRIAL_SCALE = 0.2
_TOLERANCE = 2e-2  # bfloat16's sums are of 8 bits


def takes(cache: kv_cache.KVCache, num_heads: int, dtype: jnp.dtype) -> bool:
    """Whether decode steps attend by the kernel, on a mesh by every device for its rows, which are then
    `by_device.over_rows`, and for its heads: on GPUs, if it `fits` and passes its trial on heads like these."""
    if jax.default_backend() != "gpu" or sharding.row_shards_in_use() > 1:
        return False
    shards = sharding.head_shards_in_use()
    num_kv_heads, head_dim = cache.keys.shape[2:4]
    if num_kv_heads % shards or num_heads // num_kv_heads > _MIN_GROUP or not fits(cache, dtype):
        return False
    return _passes(num_heads // shards, num_kv_heads // shards, head_dim, dtype.name, cache.keys.dtype.name)


def fits(cache: kv_cache.KVCache, dtype: jnp.dtype) -> bool:
    """Whether kernels by Triton can read this cache: its blocks are powers of two. Not in float32, of which its
    products keep 10 bits."""
    head_dim, size = cache.keys.shape[3:]
    sizes_fit = head_dim >= 16 and head_dim & (head_dim - 1) == 0 and size % _BLOCK == 0
    return dtype in (jnp.bfloat16, jnp.float16) and sizes_fit and cache.key_scales is None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: kv_cache.KVCache,
    layer: jax.Array | int,
    lengths: jax.Array,
    is_real: jax.Array,
    *,
    filled: int,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, kv_cache.KVCache]:
    """Attention of one new token per row, on the row's cache and on itself, and its keys' and values'
    place in the cache.

    Args:
        q: [S, H, E]. k, v: [S, K, E], of the new tokens.
        cache: `takes(cache, H)` holds. With a window its rows are rings, of which no more is read.
        layer: [] int32.
        lengths: [S] int32, positions that are filled already.
        is_real: [S] bool, rows whose new token is kept; of the others nothing is written.
        filled: static bound on lengths + 1.
        scale, softcap: as in `attention.attend`.
        interpret: run the kernel's program on any backend, slowly: for tests.

    Returns:
        [S, H, E] and the cache.
    """
    rows, heads, size = q.shape
    num_kv_heads, window = cache.keys.shape[2], cache.window
    group = heads // num_kv_heads
    blocks = pl.cdiv(filled, _BLOCK)
    if window is not None:  # the first and the last of them in part
        blocks = min(blocks, pl.cdiv(window, _BLOCK) + 1)
    parts = min(pl.cdiv(_PROGRAMS, rows * num_kv_heads), blocks)
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths + 1 - window, 0)
    places = jnp.where(is_real, lengths % cache.size, cache.size)
    k, v = k.astype(cache.keys.dtype), v.astype(cache.values.dtype)
    number = pl.BlockSpec((1,), lambda s, k, p: (s,))
    vector = pl.BlockSpec((None, None, size), lambda s, k, p: (s, k, 0))
    part = (None, None, None, _MIN_GROUP)
    shape = (rows, num_kv_heads, parts, group)
    attended, weights, keys, values = pl.pallas_call(
        functools.partial(
            _kernel,
            group=group,
            blocks_per_part=pl.cdiv(blocks, parts),
            scale=scale,
            softcap=softcap,
        ),
        grid=(rows, num_kv_heads, parts),
        in_specs=[
            pl.BlockSpec((1,), lambda s, k, p: (0,)),
            number,
            number,
            number,
            pl.BlockSpec((None, None, _MIN_GROUP, size), lambda s, k, p: (s, k, 0, 0)),
            vector,
            vector,
            pl.no_block_spec,
            pl.no_block_spec,
        ],
        out_specs=[
            pl.BlockSpec((*part, size), lambda s, k, p: (s, k, p, 0, 0)),
            pl.BlockSpec(part, lambda s, k, p: (s, k, p, 0)),
            pl.no_block_spec,
            pl.no_block_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, size), q.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(cache.keys.shape, cache.keys.dtype),
            jax.ShapeDtypeStruct(cache.values.shape, cache.values.dtype),
        ],
        input_output_aliases={7: 2, 8: 3},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1), first, lengths, places,
        q.reshape(rows, num_kv_heads, group, size), k, v,
        cache.keys, cache.values,
    )
    if parts > 1:
        weights = jax.nn.softmax(weights, axis=2)
        attended = jnp.sum(weights[..., None] * attended, axis=2)
    attended = attended.reshape(rows, heads, size).astype(q.dtype)
    return attended, dataclasses.replace(cache, keys=keys, values=values)


def _kernel(
    layer_ref, first_ref, length_ref, place_ref, q_ref, k_ref, v_ref, keys_ref, values_ref,
    attended_ref, weights_ref, keys_out_ref, values_out_ref,
    *, group: int, blocks_per_part: int, scale: float, softcap: float | None,
) -> None:
    """One row, one key/value head, one part of the positions. The first part has the new token too.

    Writes the part's attention and the logarithm of its weight among the parts.
    """
    row, head, part = (pl.program_id(axis) for axis in range(3))
    layer, first, length, place = layer_ref[0], first_ref[0], length_ref[0], place_ref[0]
    is_query = jnp.arange(_MIN_GROUP) < group
    q = triton.load(q_ref.at[:, :], mask=is_query[:, None], other=0.0)

    @pl.when((part == 0) & (place < keys_ref.shape[-1]))
    def _() -> None:
        keys_out_ref[layer, row, head, :, place] = k_ref[...]
        values_out_ref[layer, row, head, place, :] = v_ref[...]

    k, v = k_ref[...].astype(jnp.float32), v_ref[...].astype(jnp.float32)
    own = cap(jnp.sum(q.astype(jnp.float32) * k[None], axis=1) * scale, softcap)
    has_own = part == 0
    carry = (
        jnp.where(has_own, jnp.broadcast_to(v[None], q.shape), 0.0),
        jnp.where(has_own, own, _LOWEST),
        jnp.where(has_own, jnp.ones_like(own), 0.0),
    )
    offsets, num_blocks = jnp.arange(_BLOCK), keys_ref.shape[-1] // _BLOCK

    def body(block, carry):
        sums, maximum, normalizer = carry
        where = pl.ds(pl.multiple_of(block % num_blocks * _BLOCK, _BLOCK), _BLOCK)
        keys = keys_ref[layer, row, head, :, where].astype(q.dtype)
        scores = cap(triton.dot(q, keys) * scale, softcap)
        positions = block * _BLOCK + offsets
        seen = ((positions >= first) & (positions < length))[None]
        scores = jnp.where(seen, scores, _LOWEST)
        higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        shrink = jnp.exp(maximum - higher)
        values = values_ref[layer, row, head, where, :].astype(q.dtype)
        sums = sums * shrink[:, None] + triton.dot(weights.astype(q.dtype), values)
        return sums, higher, normalizer * shrink + jnp.sum(weights, axis=1)

    low = first // _BLOCK + part * blocks_per_part
    high = jnp.minimum(low + blocks_per_part, pl.cdiv(length, _BLOCK))
    sums, maximum, normalizer = jax.lax.fori_loop(low, high, body, carry)
    # A part may have nothing to see: 0, of weight 0.
    safe = jnp.where(normalizer > 0, normalizer, 1.0)
    attended = (sums / safe[:, None]).astype(attended_ref.dtype)
    triton.store(attended_ref.at[:, :], attended, mask=is_query[:, None])
    weight = jnp.where(normalizer > 0, maximum + jnp.log(safe), _LOWEST)
    triton.store(weights_ref.at[:], weight, mask=is_query)


@functools.cache
def _passes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, cache_dtype: str) -> bool:
    inputs = trial_inputs(num_heads, num_kv_heads, head_dim, dtype, cache_dtype)
    return trial.agrees("the decode kernel", attend_all, products, inputs, tolerance=_TOLERANCE)


def trial_inputs(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, cache_dtype: str
) -> tuple[Any, ...]:
    """q, k, v, the cache, its layer, lengths and who is real: rows with nothing, with one block, with
    several, and an idle one."""
    rng = np.random.default_rng(0)
    rows, positions = 5, 4 * _BLOCK
    new = [
        rng.standard_normal((rows, heads, head_dim)).astype(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    shape = (2, rows, num_kv_heads, head_dim, positions)
    keys = rng.standard_normal(shape).astype(cache_dtype)
    values = rng.standard_normal(shape).swapaxes(3, 4).astype(cache_dtype)
    lengths = np.array([0, _BLOCK - 1, 2 * _BLOCK + 3, 4 * _BLOCK - 1, 7], np.int32)
    is_real = np.array([True, True, True, True, False])
    return *new, kv_cache.KVCache(keys, values), np.int32(1), lengths, is_real


def attend_all(q, k, v, cache, layer, lengths, is_real, **options):
    """`attend` as the trial wants it: what real rows give, with a row's positions shared out and, where
    one block is all, not; and the cache."""
    new = (q, k, v, cache, layer, lengths, is_real)
    shared, written = attend(*new, filled=cache.size, scale=_TRIAL_SCALE, **options)
    alone, _ = attend(*new, filled=_BLOCK, scale=_TRIAL_SCALE, **options)
    return _compared(shared, alone, lengths, is_real), written


def products(q, k, v, cache, layer, lengths, is_real):
    """`attend_all` by a write, a read and two products."""
    filled = cache.size
    places = jnp.where(is_real, lengths, kv_cache.NOWHERE)[:, None]
    cache = kv_cache.write(cache, layer, None, places, k[:, None], v[:, None])
    keys, values = kv_cache.read(cache, layer, None, kv_cache.Stretch(None, filled), q.dtype)
    seen = (jnp.arange(filled)[None] <= lengths[:, None])[:, None]
    attended = attention.attend_cached(q[:, None], [(keys, values, seen)], scale=_TRIAL_SCALE)[:, 0]
    return _compared(attended, attended, lengths, is_real), cache


def _compared(
    shared: jax.Array, alone: jax.Array, lengths: jax.Array, is_real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    is_short = is_real & (lengths < _BLOCK)
    return tuple(
        jnp.where(kept[:, None, None], x, 0) for kept, x in ((is_real, shared), (is_short, alone))
    )
