"""Keys and values of every slot, on the device for the whole rollout.

N layers, S slots, M positions, K heads, E head size. A slot's first `length` positions are filled;
what lies beyond is junk that no mask lets anyone read. Reads and writes touch one layer at a time so
that the cache can be a scan carry, which XLA updates in place.

Layers with a window have a cache of their own, in which a row is a ring: position p lies at p modulo M, where
M is what the window and the new tokens of a call need, however long an episode grows. Who cuts a row back, or
copies the beginning of another, asks `Ring` whether that is still there.

Keys have their positions last, values their head size: that is how each is read in a decode step, a
vector against a matrix that lies in memory in the order of the sum's result. On a CPU it took
0.55 of the time of attention against positions first for both (`tools/bench_cache_layout.py`).

Decode steps on CPU read a mirror of the filled positions, made once for all steps of a call: of what
is stacked and longer than filled, XLA would write a copy in every step and layer. In it the keys are
blocks of 64 positions, each [E, 64]: read as one stretch of memory, at 27 GB/s where [E, M] gave 10
(`docs/performance_log.md`; `tools/bench_cache_layout.py` times whole steps of attention). Steps write to the
mirrors alone; when the call ends, the cache is `settled`.

Of a ring only the positions that new tokens see are read, in whole blocks (`near`), and mirrored.

On TPUs rows are written and read one after the other (`kv_rows`), and decode steps write to a tail (`kv_tail`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxagentrl.models import by_device, kv_numbers, kv_rows, kv_tail, sharding

DTYPES = ("float32", "bfloat16", "int8")

NOWHERE = 2**30  # a position that nothing is written at

_BLOCK = 64  # positions of a mirror's block of keys; 32 is as fast, 16 and 128 are not


def in_blocks(size: int) -> int:
    """So many positions, in whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


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


class Stretch(NamedTuple):
    """Which positions of rows are read."""

    starts: jax.Array | None  # [R] int32, each row's first, a block's beginning; None: all begin at 0
    size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Of all layers that see equally far."""

    keys: jax.Array  # [N, S, K, E, M]
    values: jax.Array  # [N, S, K, M, E]
    key_scales: jax.Array | None = None  # [N, S, K, M] float32, of an int8 cache
    value_scales: jax.Array | None = None  # [N, S, K, M] float32, of an int8 cache
    mirrors: tuple[Mirror, ...] | None = None  # [N], within a call that has them
    tail: kv_tail.Tail | None = None  # within a call that has one
    # How many tokens a token sees, itself included; None is all. With a window rows are rings.
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def size(self) -> int:
        """M."""
        return self.keys.shape[-1]


@dataclasses.dataclass(frozen=True)
class Ring:
    """What a row has left of what was written into it: its last `size` positions.

    >>> ring = Ring(size=128, window=20)
    >>> ring.shortest(np.array([100, 128, 200]))
    array([ 0,  0, 91])
    """

    size: int
    window: int

    def shortest(self, reached: np.ndarray) -> np.ndarray:
        """The fewest positions that rows can be cut to with the next token's whole window still in the ring.

        Args:
            reached: [...], the positions that were written of each row, cut or not.
        """
        lost = reached - self.size
        return np.where(lost > 0, lost + self.window - 1, 0)


def ring(window: int | None, *, most: int, max_length: int) -> Ring | None:
    """How long a row of layers with this window is, in whole blocks; None where rows are no rings.

    Args:
        most: new tokens of one call.
        max_length: of a slot.
    """
    if window is None:
        return None
    return Ring(_whole(in_blocks(min(max_length, window + most + _BLOCK - 1))), window)


def _whole(size: int) -> int:
    """So many positions as this backend has them: on TPUs in whole vectors, or keys would lie otherwise than they
    are read."""
    return -(-size // kv_rows.LANES) * kv_rows.LANES if kv_rows.are_better() else size


def init(
    num_layers: int,
    num_slots: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    window: int | None = None,
    most: int = 1,
) -> KVCache:
    """An empty cache of layers with this window. `dtype` is one of `DTYPES`; `most` as of `ring`."""
    size = _whole(max_length) if window is None else ring(window, most=most, max_length=max_length).size
    rows = (num_layers, num_slots, num_kv_heads)
    scales = [jnp.zeros((*rows, size)) for _ in range(2)] if dtype == "int8" else [None, None]
    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        dtype = "uint16"
    cache = KVCache(
        jnp.zeros((*rows, head_dim, size), dtype),
        jnp.zeros((*rows, size, head_dim), dtype),
        *scales,
        window=window,
    )
    return _placed(cache)


def near(cache: KVCache, lengths: jax.Array, *, width: int, filled: int) -> Stretch:
    """What `width` tokens behind the `lengths` [R] of their rows see, in whole blocks.

    Args:
        filled: bound on what is filled with the new tokens.

    Raises:
        ValueError: the cache's rings were made for fewer new tokens at once.
    """
    if cache.window is None:
        return Stretch(None, filled)
    # The first position that is seen may be the last of its block.
    reach = in_blocks(cache.window + width + _BLOCK - 2)
    if reach >= filled:
        reach = filled
    if reach > cache.size:
        raise ValueError(
            f"rows of {cache.size} positions for a window of {cache.window} are not long enough for {width} "
            "new tokens at once; make the cache with a larger `most`."
        )
    if reach == filled:
        return Stretch(None, filled)
    return Stretch(jnp.maximum(lengths + 1 - cache.window, 0) // _BLOCK * _BLOCK, reach)


def begun(
    cache: KVCache,
    slots: jax.Array | None,
    lengths: jax.Array,
    filled: int,
    dtype: jnp.dtype,
    *,
    most: int,
) -> KVCache:
    """The cache as the steps of a call take it, until it is `settled`: with mirrors where these are for some of the
    slots and in float32, on TPUs with a tail. Arguments as of `mirrored`."""
    if slots is not None and dtype == jnp.float32:
        return mirrored(cache, slots, lengths, filled, dtype, most=most)
    return with_tail(cache, lengths, filled, dtype, most=most) if kv_rows.are_better() else cache


def mirrored(
    cache: KVCache,
    slots: jax.Array,
    lengths: jax.Array,
    filled: int,
    dtype: jnp.dtype,
    *,
    most: int,
) -> KVCache:
    """The cache with mirrors, in `dtype`, of what up to `most` tokens behind the `lengths` [R] of `slots` [R]
    see of the first `filled` positions, in whole blocks."""
    stretch = near(cache, lengths, width=most, filled=in_blocks(filled))
    size = stretch.size

    def held(array: jax.Array, axis: int) -> jax.Array:
        """[S, ...], of rows that begin at 0 in whole blocks: the last may reach beyond a row."""
        if stretch.starts is not None:
            return array
        array = jax.lax.slice_in_dim(array, 0, min(size, cache.size), axis=axis)
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, size - array.shape[axis])
        return jnp.pad(array, missing)

    def of_keys(array: jax.Array) -> jax.Array:
        return _blocks(held(array, array.ndim - 1), slots, stretch)

    def of_values(array: jax.Array) -> jax.Array:
        array = held(array, 2)
        if stretch.starts is None:
            return jnp.take(array, slots, axis=0, mode="clip")
        return _joined_blocks(array, slots, stretch)

    def mirror(layer: int) -> Mirror:
        at_layer = jax.tree.map(lambda array: array[layer], cache)
        return Mirror(*_read(at_layer, of_keys, of_values, dtype), stretch.starts)

    return dataclasses.replace(cache, mirrors=tuple(map(mirror, range(cache.keys.shape[0]))))


def with_tail(cache: KVCache, lengths: jax.Array, filled: int, dtype: jnp.dtype, *, most: int) -> KVCache:
    """The cache with an empty tail, in `dtype`, for up to `most` tokens behind the `lengths` [R] of all slots;
    `filled` as of `near`."""
    num_layers, heads, before = cache.keys.shape[0], cache.keys.shape[2:4], None
    stretch = near(cache, lengths, width=most, filled=filled)
    if stretch.starts is not None:
        held = jax.lax.map(lambda layer: read(cache, layer, None, stretch, dtype), jnp.arange(num_layers))
        before = kv_tail.Before(*held, stretch.starts)
    return dataclasses.replace(cache, tail=kv_tail.empty(num_layers, lengths, heads, most, dtype, before))


def settled(
    cache: KVCache, slots: jax.Array | None, lengths: jax.Array, ends: jax.Array, *, most: int
) -> KVCache:
    """The cache without its mirrors or its tail, with the positions from `lengths` [R] to `ends` [R] as they hold
    them, which are `most` at the most."""
    positions = lengths[:, None] + jnp.arange(most)[None]
    rows = jnp.arange(positions.shape[0])[:, None]
    targets = jnp.where(positions < ends[:, None], positions, NOWHERE)
    mirrors, tail, cache = cache.mirrors, cache.tail, dataclasses.replace(cache, mirrors=None, tail=None)
    if tail is not None:

        def settle(layer: jax.Array, cache: KVCache) -> KVCache:
            keys = tail.keys[layer].transpose(0, 3, 1, 2)
            return write(cache, layer, slots, targets, keys, tail.values[layer].transpose(0, 2, 1, 3))

        return jax.lax.fori_loop(0, cache.keys.shape[0], settle, cache)
    for layer, mirror in enumerate(mirrors or ()):
        places = mirror.place(positions)
        block, inside = jnp.divmod(places, _BLOCK)
        keys, values = mirror.keys[rows, block, :, :, inside], mirror.values[rows, :, places]
        cache = write(cache, layer, slots, targets, keys, values)
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

    Positions of a row follow each other, up to those that are `NOWHERE`. `slots` None means all slots in order.
    Nothing is written at a slot out of range, or at `NOWHERE`. Of a cache with mirrors only these are written,
    until it is `settled`; it takes its layer as an int.
    """
    if slots is None:
        slots = jnp.arange(positions.shape[0])
    if cache.mirrors is not None:
        return _write_to_mirror(cache, layer, positions, keys, values)
    if cache.tail is not None:
        new = (kv_numbers.as_kept(x[:, 0], cache.keys.dtype) for x in (keys, values))
        tail = kv_tail.write(cache.tail, layer, positions[:, 0] != NOWHERE, positions[:, 0], *new)
        return dataclasses.replace(cache, tail=tail)
    if cache.window is not None:
        positions = jnp.where(positions == NOWHERE, NOWHERE, positions % cache.size)
    # The compiler does not see that heads, which index the cache here, have nothing to do with each other.
    put = _put_rows if kv_rows.are_better() and positions.shape[1] > 1 else _put
    put = by_device.over_heads(put, keys.shape[2], (2, None, None, None, 2, 2), 2)
    return _placed(put(cache, layer, slots, positions, keys, values))


def _write_to_mirror(
    cache: KVCache, layer: int, positions: jax.Array, keys: jax.Array, values: jax.Array
) -> KVCache:
    mirror = cache.mirrors[layer]
    rows, heads = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(keys.shape[2])[None, None]
    inside_of = mirror.place(positions)[:, :, None]
    block, inside = jnp.divmod(inside_of, _BLOCK)
    keys, values = (kv_numbers.as_kept(x, cache.keys.dtype) for x in (keys, values))
    mirror = mirror._replace(
        keys=mirror.keys.at[rows, block, heads, :, inside].set(keys, mode="drop"),
        values=mirror.values.at[rows, heads, inside_of].set(values, mode="drop"),
    )
    mirrors = (*cache.mirrors[:layer], mirror, *cache.mirrors[layer + 1 :])
    return dataclasses.replace(cache, mirrors=mirrors)


def _put_rows(
    cache: KVCache,
    layer: jax.Array | int,
    slots: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> KVCache:
    """`write` without mirrors, row by row; see `kv_rows`."""
    counts = jnp.where(slots < cache.keys.shape[1], jnp.sum(positions != NOWHERE, axis=1), 0)
    starts = jnp.where(counts > 0, positions[:, 0], 0)
    new = _stored(cache, keys, values)
    axes = {"keys": 4, "values": 3, "key_scales": 3, "value_scales": 3}
    put = functools.partial(kv_rows.put, is_ring=cache.window is not None)

    def put_row(row: jax.Array, cache: KVCache) -> KVCache:
        where = (layer, slots[row], starts[row], counts[row])
        arrays = {name: put(getattr(cache, name), *where, x[row], axes[name]) for name, x in new.items()}
        return dataclasses.replace(cache, **arrays)

    return jax.lax.fori_loop(0, len(slots), put_row, cache)


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
    where = dict.fromkeys(("values", "key_scales", "value_scales"), (layer, rows, heads, places))
    where["keys"] = (layer, rows, heads, slice(None), places)
    new = _stored(cache, keys, values)
    arrays = {name: getattr(cache, name).at[where[name]].set(x, mode="drop") for name, x in new.items()}
    return dataclasses.replace(cache, **arrays)


def _stored(cache: KVCache, keys: jax.Array, values: jax.Array) -> dict[str, jax.Array]:
    """Keys and values [R, W, K, E] as the cache's arrays hold them, by the names of these."""
    kept_keys, key_scales = kv_numbers.stored(keys, cache.keys.dtype)
    kept_values, value_scales = kv_numbers.stored(values, cache.values.dtype)
    new = {"keys": kept_keys, "values": kept_values, "key_scales": key_scales, "value_scales": value_scales}
    return {name: x for name, x in new.items() if x is not None}


def read(
    cache: KVCache,
    layer: jax.Array | int,
    slots: jax.Array | None,
    stretch: Stretch,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer in `dtype`, as `attention.attend_cached` takes them: [R, K, E, size], where
    they do not begin at 0 in blocks [R, C, K, E, 64], and [R, K, size, E].

    `slots` None means all slots in order. Of a cache with mirrors, the layer's mirror. Of one with a tail, what
    was there before it.
    """
    if cache.mirrors is not None:
        return cache.mirrors[layer][:2]
    if cache.tail is not None and cache.tail.before is not None:
        keys, values, _ = cache.tail.before
        return keys[layer], values[layer]

    if stretch.starts is None:
        from_0 = functools.partial(_from_0, layer, slots, stretch.size)
        return _read(cache, functools.partial(from_0, -1), functools.partial(from_0, 3), dtype)
    rows = jnp.arange(len(stretch.starts)) if slots is None else slots
    if kv_rows.are_better():
        keys, values = (
            functools.partial(
                kv_rows.stretch, layer=layer, slots=rows, starts=stretch.starts, size=stretch.size, axis=axis
            )
            for axis in (-1, 3)
        )
        return _read(cache, keys, values, dtype)
    parts = (functools.partial(part, slots=rows, stretch=stretch) for part in (_blocks, _joined_blocks))
    at_layer = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), cache
    )
    return _read(at_layer, *parts, dtype)


def _from_0(
    layer: jax.Array | int, slots: jax.Array | None, size: int, axis: int, array: jax.Array
) -> jax.Array:
    """[R, ...] of [N, S, ...]: the first `size` positions, which are dimension `axis`, of these slots."""
    sizes = [1, array.shape[1] if slots is None else 1, *array.shape[2:]]
    sizes[axis] = size

    def held(slot: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_slice(array, (layer, slot, *[0] * (array.ndim - 2)), sizes)[0]

    return held(0) if slots is None else jax.vmap(held)(slots)[:, 0]


def _read(
    at_layer: KVCache,
    of_keys: Callable[[jax.Array], jax.Array],
    of_values: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Numbers of what the two functions take of a layer's arrays [S, ...]: `of_keys` of those that have their
    positions last, `of_values` of those that have them third."""
    keys, values = of_keys(at_layer.keys), of_values(at_layer.values)
    if at_layer.key_scales is None:
        return kv_numbers.numbers(keys, dtype), kv_numbers.numbers(values, dtype)
    key_scales, value_scales = of_keys(at_layer.key_scales), of_values(at_layer.value_scales)
    return (
        kv_numbers.numbers(keys, dtype, key_scales[..., None, :]),
        kv_numbers.numbers(values, dtype, value_scales[..., None]),
    )


def _blocks(array: jax.Array, slots: jax.Array, stretch: Stretch) -> jax.Array:
    """[R, C, ..., 64] of [S, ..., M]: the stretch of each slot, in a ring, by blocks."""

    def block(slot: jax.Array, start: jax.Array) -> jax.Array:
        begin = (slot, *[0] * (array.ndim - 2), start)
        return jax.lax.dynamic_slice(array, begin, (1, *array.shape[1:-1], _BLOCK))[0]

    # One gather: of a gather that is transposed XLA makes two copies.
    return jax.vmap(jax.vmap(block, (None, 0)))(slots, _begins(stretch, len(slots), array.shape[-1]))


def _joined_blocks(array: jax.Array, slots: jax.Array, stretch: Stretch) -> jax.Array:
    """[R, K, C · 64, ...] of [S, K, M, ...]: the stretch of each slot, in a ring."""

    def block(slot: jax.Array, start: jax.Array) -> jax.Array:
        begin = (slot, 0, start, *[0] * (array.ndim - 3))
        sizes = (1, array.shape[1], _BLOCK, *array.shape[3:])
        return jax.lax.dynamic_slice(array, begin, sizes)[0]

    begins = _begins(stretch, len(slots), array.shape[2])
    found = jax.vmap(jax.vmap(block, (None, 0), 1))(slots, begins)  # [R, K, C, 64, ...]
    return found.reshape(*found.shape[:2], -1, *found.shape[4:])


def _begins(stretch: Stretch, num_rows: int, size: int) -> jax.Array:
    """[R, C] where the blocks of each row's stretch begin, in rows of `size` positions."""
    starts = jnp.zeros(num_rows, jnp.int32) if stretch.starts is None else stretch.starts
    return (starts[:, None] + jnp.arange(0, stretch.size, _BLOCK)[None]) % size


def copy_rows(cache: KVCache, sources: jax.Array, targets: jax.Array, filled: int) -> KVCache:
    """Copies the first `filled` positions of rows `sources` [R] to rows `targets` [R]: of rings what they have left.

    A target out of range is dropped. Layer by layer: what is copied is in memory once more meanwhile.
    """
    size = min(filled, cache.size)

    def copy(array: jax.Array, layer: jax.Array, axis: int) -> jax.Array:
        if kv_rows.are_better():
            return kv_rows.copy(array, layer, sources, targets, size, axis)
        block = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        block = jax.lax.slice_in_dim(block, 0, size, axis=axis - 1)
        block = jnp.take(block, sources, axis=0, mode="clip")
        index = (layer, targets, *[slice(None)] * (axis - 2), slice(0, size))
        return array.at[index].set(block, mode="drop")

    def copy_layer(layer: jax.Array, cache: KVCache) -> KVCache:
        scales = {
            name: copy(getattr(cache, name), layer, 3)
            for name in ("key_scales", "value_scales")
            if getattr(cache, name) is not None
        }
        keys, values = copy(cache.keys, layer, 4), copy(cache.values, layer, 3)
        return dataclasses.replace(cache, keys=keys, values=values, **scales)

    return _placed(jax.lax.fori_loop(0, cache.keys.shape[0], copy_layer, cache))


def _placed(cache: KVCache) -> KVCache:
    """Slots and heads shared out over the mesh in use."""
    return jax.tree.map(lambda x: sharding.constrain(x, *sharding.CACHE_AXES), cache)
