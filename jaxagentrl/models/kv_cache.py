"""Keys and values of every slot, on the device for the whole rollout.

N layers, S slots, M positions, K heads, E head size. A slot's first `length` positions are filled;
what lies beyond is junk that no mask lets anyone read. Reads and writes touch one layer at a time so
that the cache can be a scan carry, which XLA updates in place.

Keys have their positions last, values their head size: that is how each is read in a decode step, a
vector against a matrix that lies in memory in the order of the sum's result. On a CPU it took
0.55 of the time of attention against positions first for both (`tools/bench_cache_layout.py`).

Decode steps on CPU read a mirror of the filled positions, made once for all steps of a call: of what
is stacked and longer than filled, XLA would write a copy in every step and layer. In it the keys are
blocks of 64 positions, each [E, 64]: read as one stretch of memory, at 27 GB/s where [E, M] gave 10
(`docs/performance.md`; `tools/bench_cache_layout.py` times whole steps of attention). Steps write to the
mirrors alone; when the call ends, the cache is `settled`.

Of a layer with a window only the positions that new tokens see are read (`near`), and mirrored. All are
kept: a row may be rewound, and another may copy what is further back.

On CPU a bfloat16 cache holds its numbers as integers of their bits: to write some bfloat16 numbers into an array,
XLA makes float32 of the whole array and bfloat16 again, which takes 500 times as long.

An int8 cache keeps one float32 scale per layer, slot, position and head: a vector x is stored as
round(x / s) with s = max |x| / 127, so each entry is off by at most s / 2.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxagentrl.models import sharding

DTYPES = ("float32", "bfloat16", "int8")

_BLOCK = 64  # positions of a mirror's block of keys; 32 is as fast, 16 and 128 are not


class Mirror(NamedTuple):
    """The filled positions of one layer that are read, C blocks of 64, for the R rows of a call, as they are
    computed with."""

    keys: jax.Array  # [R, C, K, E, 64]
    values: jax.Array  # [R, K, C · 64, E]
    starts: jax.Array | None = None  # [R] int32, each row's first position; None: all begin at 0

    def place(self, positions: jax.Array) -> jax.Array:
        """Where positions [R, W] are in it; beyond its end if they are before its beginning."""
        if self.starts is None:
            return positions
        places = positions - self.starts[:, None]
        return jnp.where(places < 0, self.values.shape[2], places)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    keys: jax.Array  # [N, S, K, E, M]
    values: jax.Array  # [N, S, K, M, E]
    key_scales: jax.Array | None = None  # [N, S, K, M] float32, of an int8 cache
    value_scales: jax.Array | None = None  # [N, S, K, M] float32, of an int8 cache
    mirrors: tuple[Mirror, ...] | None = None  # [N], within a call that has them

    @property
    def max_length(self) -> int:
        return self.keys.shape[-1]


def init(
    num_layers: int, num_slots: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: str
) -> KVCache:
    """An empty cache. `dtype` is one of `DTYPES`."""
    rows = (num_layers, num_slots, num_kv_heads)
    scales = [jnp.zeros((*rows, max_length)) for _ in range(2)] if dtype == "int8" else [None, None]
    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        dtype = "uint16"
    cache = KVCache(
        jnp.zeros((*rows, head_dim, max_length), dtype),
        jnp.zeros((*rows, max_length, head_dim), dtype),
        *scales,
    )
    return _placed(cache)


def near(
    lengths: jax.Array, *, width: int, window: int, filled: int
) -> tuple[jax.Array | None, int]:
    """What `width` tokens behind the `lengths` [R] of their rows see through a window.

    Args:
        window: how many tokens a token sees, itself included.
        filled: bound on what is filled with the new tokens.

    Returns:
        Each row's first position [R] and how many there are from it on; None and `filled` where these are
        all.
    """
    reach = window + width - 1
    if reach >= filled:
        return None, filled
    return jnp.clip(lengths + 1 - window, 0, filled - reach), reach


def mirrored(
    cache: KVCache,
    slots: jax.Array,
    lengths: jax.Array,
    filled: int,
    dtype: jnp.dtype,
    *,
    most: int,
    windows: Sequence[int | None],
) -> tuple[KVCache, int]:
    """The cache with mirrors, in `dtype`, of the first `filled` positions of `slots` [R], and how many positions
    those are in whole blocks. Of a layer with a window, what up to `most` tokens behind `lengths` [R] see.

    `windows` [N] are the layers'.
    """
    size = -(-filled // _BLOCK) * _BLOCK

    def held(array: jax.Array, axis: int) -> jax.Array:
        array = jax.lax.slice_in_dim(array, 0, min(size, cache.max_length), axis=axis)
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, max(size - cache.max_length, 0))
        return jnp.pad(array, missing)

    def block(array: jax.Array, slot: jax.Array, start: jax.Array) -> jax.Array:
        """[..., 64] of [S, ..., M]."""
        begin = (slot, *[0] * (array.ndim - 2), start)
        return jax.lax.dynamic_slice(array, begin, (1, *array.shape[1:-1], _BLOCK))[0]

    def mirror(layer: int, window: int | None) -> Mirror:
        reach = size if window is None else -(-(window + most - 1) // _BLOCK) * _BLOCK
        if reach >= size:
            # One gather: of a gather that is transposed XLA makes two copies.
            blocks = jax.vmap(jax.vmap(block, (None, None, 0)), (None, 0, None))
            starts, places = None, jnp.arange(0, size, _BLOCK)
        else:
            blocks = jax.vmap(jax.vmap(block, (None, None, 0)), (None, 0, 0))
            starts = jnp.clip(lengths + 1 - window, 0, size - reach)
            places = starts[:, None] + jnp.arange(0, reach, _BLOCK)[None]

        def in_blocks(array: jax.Array) -> jax.Array:
            return blocks(held(array, array.ndim - 1), slots, places)

        def in_a_row(array: jax.Array) -> jax.Array:
            array = held(array, 2)
            if starts is None:
                return jnp.take(array, slots, axis=0, mode="clip")
            return _stretches(array, slots, starts, reach, axis=1)

        keys, values = in_blocks(cache.keys[layer]), in_a_row(cache.values[layer])
        if cache.key_scales is None:
            return Mirror(_numbers(keys, dtype), _numbers(values, dtype), starts)
        key_scales, value_scales = in_blocks(cache.key_scales[layer]), in_a_row(cache.value_scales[layer])
        return Mirror(
            _numbers(keys, dtype, key_scales[..., None, :]),
            _numbers(values, dtype, value_scales[..., None]),
            starts,
        )

    mirrors = tuple(map(mirror, range(cache.keys.shape[0]), windows))
    return dataclasses.replace(cache, mirrors=mirrors), size


def settled(cache: KVCache, slots: jax.Array, lengths: jax.Array, *, most: int) -> KVCache:
    """The cache without its mirrors, with the `most` positions from `lengths` [R] on as they hold them.

    Of these as many as were written are new. Behind them both hold the same, or junk.
    """
    positions = lengths[:, None] + jnp.arange(most)[None]
    rows = jnp.arange(positions.shape[0])[:, None]
    mirrors, cache = cache.mirrors, dataclasses.replace(cache, mirrors=None)
    for layer, mirror in enumerate(mirrors):
        places = mirror.place(positions)
        block, inside = jnp.divmod(places, _BLOCK)
        keys, values = mirror.keys[rows, block, :, :, inside], mirror.values[rows, :, places]
        cache = write(cache, layer, slots, positions, keys, values)
    return cache


def write(
    cache: KVCache,
    layer: jax.Array | int,
    slots: jax.Array | None,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> KVCache:
    """Writes [R, W, K, E] keys and values of one layer at (slots [R], positions [R, W]).

    `slots` None means all slots in order. A slot or position out of range is dropped. Of a cache with
    mirrors only these are written, until it is `settled`; it takes its layer as an int.
    """
    if slots is None:
        slots = jnp.arange(positions.shape[0])
    if cache.mirrors is not None:
        return _write_to_mirror(cache, layer, positions, keys, values)
    # The compiler does not see that heads, which index the cache here, have nothing to do with each other.
    put = sharding.over_heads(_put, keys.shape[2], (2, None, None, None, 2, 2), 2)
    return _placed(put(cache, layer, slots, positions, keys, values))


def _write_to_mirror(
    cache: KVCache, layer: int, positions: jax.Array, keys: jax.Array, values: jax.Array
) -> KVCache:
    mirror = cache.mirrors[layer]
    rows, heads = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[2])[None, None]
    is_dropped = positions >= cache.max_length
    inside_of = jnp.where(is_dropped, mirror.values.shape[2], mirror.place(positions))[:, :, None]
    block, inside = jnp.divmod(inside_of, _BLOCK)
    keys, values = _as_kept(cache, keys), _as_kept(cache, values)
    mirror = mirror._replace(
        keys=mirror.keys.at[rows, block, heads, :, inside].set(keys, mode="drop"),
        values=mirror.values.at[rows, heads, inside_of].set(values, mode="drop"),
    )
    mirrors = (*cache.mirrors[:layer], mirror, *cache.mirrors[layer + 1 :])
    return dataclasses.replace(cache, mirrors=mirrors)


def _put(
    cache: KVCache,
    layer: jax.Array | int,
    slots: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> KVCache:
    """`write` without mirrors."""
    rows, heads = slots[:, None, None], jnp.arange(keys.shape[2])[None, None]
    places = positions[:, :, None]  # [R, W, 1], against heads [1, 1, K]

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[layer, rows, heads, places].set(_stored(new, array.dtype), mode="drop")

    def put_keys(array: jax.Array, new: jax.Array) -> jax.Array:
        where = (layer, rows, heads, slice(None), places)
        return array.at[where].set(_stored(new, array.dtype), mode="drop")

    if cache.key_scales is None:
        return KVCache(put_keys(cache.keys, keys), put(cache.values, values))
    (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
    return KVCache(
        put_keys(cache.keys, keys),
        put(cache.values, values),
        put(cache.key_scales, key_scales),
        put(cache.value_scales, value_scales),
    )


def read(
    cache: KVCache,
    layer: jax.Array | int,
    slots: jax.Array | None,
    size: int,
    dtype: jnp.dtype,
    *,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keys [R, K, E, size] and values [R, K, size, E] of one layer in `dtype`, the first positions or, with
    `starts` [R], those from there on.

    `slots` None means all slots in order. Of a cache with mirrors, the layer's mirror.
    """
    if cache.mirrors is not None:
        return cache.mirrors[layer][:2]

    def take(array: jax.Array, axis: int) -> jax.Array:
        block = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        if starts is not None:
            return _stretches(block, slots, starts, size, axis=axis - 1)
        block = jax.lax.slice_in_dim(block, 0, size, axis=axis)
        return block if slots is None else jnp.take(block, slots, axis=0, mode="clip")

    keys, values = take(cache.keys, 3), take(cache.values, 2)
    if cache.key_scales is None:
        return _numbers(keys, dtype), _numbers(values, dtype)
    key_scales, value_scales = take(cache.key_scales, 2), take(cache.value_scales, 2)
    return (
        _numbers(keys, dtype, key_scales[:, :, None, :]),
        _numbers(values, dtype, value_scales[..., None]),
    )


def _stretches(
    array: jax.Array, slots: jax.Array | None, starts: jax.Array, size: int, *, axis: int
) -> jax.Array:
    """Of each slot, `size` positions from its start on; they are on `axis` of a slot's part of the array."""

    def stretch(row: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, start, size, axis=axis)

    if slots is None:
        return jax.vmap(stretch)(array, starts)

    def of_slot(slot: jax.Array, start: jax.Array) -> jax.Array:
        begin, sizes = [slot, *[0] * (array.ndim - 1)], [1, *array.shape[1:]]
        begin[axis + 1], sizes[axis + 1] = start, size
        return jax.lax.dynamic_slice(array, begin, sizes)[0]

    return jax.vmap(of_slot)(slots, starts)


def copy_rows(cache: KVCache, sources: jax.Array, targets: jax.Array, filled: int) -> KVCache:
    """Copies the first `filled` positions of rows `sources` [R] to rows `targets` [R].

    A target out of range is dropped. Layer by layer: what is copied is in memory once more meanwhile.
    """

    def copy(array: jax.Array, layer: jax.Array, axis: int) -> jax.Array:
        block = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        block = jax.lax.slice_in_dim(block, 0, filled, axis=axis - 1)
        block = jnp.take(block, sources, axis=0, mode="clip")
        index = (layer, targets, *[slice(None)] * (axis - 2), slice(0, filled))
        return array.at[index].set(block, mode="drop")

    def copy_layer(layer: jax.Array, cache: KVCache) -> KVCache:
        scales = (cache.key_scales, cache.value_scales)
        return KVCache(
            copy(cache.keys, layer, 4),
            copy(cache.values, layer, 3),
            *(array if array is None else copy(array, layer, 3) for array in scales),
        )

    return _placed(jax.lax.fori_loop(0, cache.keys.shape[0], copy_layer, cache))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 vectors and their float32 scales: x [..., E] ≈ int8 [..., E] · scale [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    safe = jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(x / safe).astype(jnp.int8), scale


def _stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers as a cache whose arrays have this dtype holds them."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def _numbers(x: jax.Array, dtype: jnp.dtype, scales: jax.Array | None = None) -> jax.Array:
    """What a cache holds, as numbers of this dtype."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(dtype) if scales is None else x.astype(dtype) * scales.astype(dtype)


def _as_kept(cache: KVCache, x: jax.Array) -> jax.Array:
    """Vectors [..., E] as a later call will read them."""
    if cache.key_scales is None:
        return _numbers(_stored(x, cache.keys.dtype), x.dtype)
    kept, scales = quantize(x)
    return _numbers(kept, x.dtype, scales[..., None])


def _placed(cache: KVCache) -> KVCache:
    """Slots and heads shared out over the mesh in use."""
    return jax.tree.map(lambda x: sharding.constrain(x, *sharding.CACHE_AXES), cache)
