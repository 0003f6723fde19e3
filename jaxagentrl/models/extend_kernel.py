"""An extend's attention on the KV cache as one kernel for GPUs (Pallas, by Triton).

By products, the scores of 32 rows of 512 new tokens on 3,072 positions are 2.8 GB in every layer of a 0.5B model,
written and read again several times. Here they never exist (flash attention, Dao et al. 2022, arXiv:2205.14135):
keys and values are read where they lie, of each row as far as its new tokens see, and the softmax is joined block by
block.

Shapes: R rows, W new tokens of a row, H query heads, K key/value heads with K dividing H, G = H / K, E head size, M
positions, N layers, S slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxagentrl.logprobs import cap
from jaxagentrl.models import attention, decode_kernel, kv_cache, sharding, trial

_BLOCK = 64  # positions that a program reads at once
_QUERIES = 128  # of a program: new tokens of the heads that share keys, head by head

# Bytes of a layer's scores from which on they are worth a kernel. Below, products keep more of a GPU busy: a program
# reads its row's positions one block after the other.
_LEAST_SCORES = 64 << 20

_LOWEST = -1e30

_TRIAL_SCALE = 0.2
_TOLERANCE = 2e-2  # bfloat16's sums are of 8 bits


def takes(
    cache: kv_cache.KVCache, num_heads: int, dtype: jnp.dtype, *, num_rows: int, width: int, filled: int
) -> bool:
    """Whether an extend of so many rows and new tokens attends by the kernel, on a mesh by every device for its
    rows, which are then `by_device.over_rows`, and for its heads.

    Of caches that `decode_kernel.fits`, without a window, where the scores are many, and after it passed its trial.
    """
    if jax.default_backend() != "gpu" or sharding.row_shards_in_use() > 1 or cache.window is not None:
        return False
    shards = sharding.head_shards_in_use()
    num_kv_heads, head_dim = cache.keys.shape[2:4]
    scores = 4 * num_rows * width * num_heads * filled // shards
    if num_kv_heads % shards or scores < _LEAST_SCORES or not decode_kernel.fits(cache, dtype):
        return False
    return _passes(num_heads // shards, num_kv_heads // shards, head_dim, dtype.name, cache.keys.dtype.name)


def attend(
    q: jax.Array,
    cache: kv_cache.KVCache,
    layer: jax.Array | int,
    slots: jax.Array,
    lengths: jax.Array,
    *,
    filled: int,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of new tokens, whose keys and values are in the cache already.

    Args:
        q: [R, W, H, E].
        cache: `takes` holds.
        layer: [] int32.
        slots: [R] int32, the cache row of each row. One out of range stands for the nearest.
        lengths: [R] int32, the position of each row's first new token.
        filled: static bound on the positions that real tokens see.
        scale, softcap: as in `attention.attend`.
        interpret: run the kernel's program on any backend, slowly: for tests.

    Returns:
        [R, W, H, E].
    """
    rows, width, heads, size = q.shape
    num_slots, num_kv_heads = cache.keys.shape[1:3]
    group = heads // num_kv_heads
    count = min(_QUERIES, pl.next_power_of_2(max(group * width, 16)))
    blocks = pl.cdiv(group * width, count)
    # Head by head, so that a block's queries are neighbours where a row has as many.
    queries = q.reshape(rows, width, num_kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(rows, num_kv_heads, group * width, size)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, blocks * count - group * width), (0, 0)))
    number = pl.BlockSpec((1,), lambda b, k, r: (r,))
    block = pl.BlockSpec((None, None, count, size), lambda b, k, r: (r, k, b, 0))
    attended = pl.pallas_call(
        functools.partial(
            _kernel, width=width, count=count, most=pl.cdiv(filled, _BLOCK), scale=scale, softcap=softcap
        ),
        grid=(blocks, num_kv_heads, rows),
        in_specs=[
            pl.BlockSpec((1,), lambda b, k, r: (0,)), number, number, block, pl.no_block_spec, pl.no_block_spec
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4 if size <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="extend_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1), jnp.clip(slots, 0, num_slots - 1), lengths,
        queries, cache.keys, cache.values,
    )
    attended = attended[:, :, : group * width].reshape(rows, num_kv_heads, group, width, size)
    return attended.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _kernel(
    layer_ref, slot_ref, length_ref, q_ref, keys_ref, values_ref, attended_ref,
    *, width: int, count: int, most: int, scale: float, softcap: float | None,
) -> None:
    """One row, one key/value head, one block of queries; the positions that any of them sees."""
    first, head = pl.program_id(0) * count, pl.program_id(1)
    layer, slot, length = layer_ref[0], slot_ref[0], length_ref[0]
    q = q_ref[...]
    offsets = (first + jnp.arange(count)) % width
    inside = first % width + count  # past the last new token of the block, unless it goes on to the next head
    last = jnp.where(inside <= width, inside, width)
    high = jnp.minimum(pl.cdiv(length + last, _BLOCK), most)

    def body(block, carry):
        sums, maximum, normalizer = carry
        where = pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK)
        keys = keys_ref[layer, slot, head, :, where].astype(q.dtype)
        scores = cap(triton.dot(q, keys) * scale, softcap)
        positions = block * _BLOCK + jnp.arange(_BLOCK)
        seen = positions[None] <= (length + offsets)[:, None]
        scores = jnp.where(seen, scores, _LOWEST)
        higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - higher[:, None])
        shrink = jnp.exp(maximum - higher)
        values = values_ref[layer, slot, head, where, :].astype(q.dtype)
        sums = sums * shrink[:, None] + triton.dot(weights.astype(q.dtype), values)
        return sums, higher, normalizer * shrink + jnp.sum(weights, axis=1)

    # Every query sees the first position, so that its maximum is of something after the first block.
    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(count, _LOWEST), jnp.zeros(count))
    sums, _, normalizer = jax.lax.fori_loop(0, high, body, nothing)
    attended_ref[...] = (sums / normalizer[:, None]).astype(attended_ref.dtype)


@functools.cache
def _passes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, cache_dtype: str) -> bool:
    inputs = trial_inputs(num_heads, num_kv_heads, head_dim, dtype, cache_dtype)
    return trial.agrees("the extend kernel", attend_all, products, inputs, tolerance=_TOLERANCE)


def trial_inputs(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, cache_dtype: str
) -> tuple[Any, ...]:
    """q, the cache, its layer, slots and lengths: rows with nothing before them and with several blocks, in other
    slots than their own, and one of padding."""
    rng = np.random.default_rng(0)
    rows, width, positions = 4, 2 * _BLOCK + 16, 6 * _BLOCK
    q = rng.standard_normal((rows, width, num_heads, head_dim)).astype(dtype)
    shape = (2, rows + 1, num_kv_heads, head_dim, positions)
    keys = rng.standard_normal(shape).astype(cache_dtype)
    values = rng.standard_normal(shape).swapaxes(3, 4).astype(cache_dtype)
    lengths = np.array([0, _BLOCK - 1, 3 * _BLOCK + 5, 7], np.int32)
    return q, kv_cache.KVCache(keys, values), np.int32(1), np.array([3, 0, 4, rows + 1], np.int32), lengths


def attend_all(q, cache, layer, slots, lengths, **options):
    """`attend` as the trial wants it, of a wide block of queries and of one that is cut off."""
    attended = functools.partial(
        attend, cache=cache, layer=layer, slots=slots, lengths=lengths, filled=cache.size, scale=_TRIAL_SCALE, **options
    )
    return attended(q), attended(q[:, :3])


def products(q, cache, layer, slots, lengths):
    """`attend_all` by a read and two products."""
    stretch = kv_cache.Stretch(None, cache.size)
    keys, values = kv_cache.read(cache, layer, jnp.clip(slots, 0, cache.keys.shape[1] - 1), stretch, q.dtype)
    positions = lengths[:, None] + jnp.arange(q.shape[1])[None]
    seen = jnp.arange(cache.size)[None, None] <= positions[:, :, None]
    attended = attention.attend_cached(q, [(keys, values, seen)], scale=_TRIAL_SCALE)
    return attended, attended[:, :3]
