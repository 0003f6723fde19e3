"""Rows of a cache's arrays [N, S, ...], written one after the other as stretches: what TPUs are fast with.

A scatter of several positions has the compiler lay the array out anew there, all layers of it and in every
layer, before and after; what is written by `dynamic_update_slice` stays as it lies. Elsewhere scatters do.
"""

import jax
import jax.numpy as jnp

LANES = 128  # numbers in a TPU's vector


def are_better() -> bool:
    """Whether this backend is one for rows."""
    return jax.default_backend() == "tpu"


def put(
    array: jax.Array,
    layer: jax.Array | int,
    slot: jax.Array,
    start: jax.Array,
    count: jax.Array,
    new: jax.Array,
    axis: int,
    *,
    is_ring: bool,
) -> jax.Array:
    """The array [N, S, K, ...] with the first `count` of the `new` tokens [W, K, ...] from `start` on.

    Args:
        slot: may be out of range where `count` is 0.
        axis: which dimension of the array positions are.
        is_ring: what does not fit its end goes on at its beginning.
    """
    if _lies_flipped(array, axis):
        flipped = array.swapaxes(3, 4)
        return put(flipped, layer, slot, start, count, new, 4, is_ring=is_ring).swapaxes(3, 4)
    size = array.shape[axis]
    # Whole vectors: around a narrower stretch the compiler would lay the array out anew after all.
    width = max(new.shape[0], min(LANES, size))
    new = jnp.pad(new, [(0, width - new.shape[0])] + [(0, 0)] * (new.ndim - 1))
    new = jnp.moveaxis(new, 0, axis - 2)[None, None]

    def merged(array: jax.Array, begin: jax.Array | int, start: jax.Array) -> jax.Array:
        """With what is new in the positions from `begin` on, as many as there are tokens."""
        at = [layer, slot, *[0] * (array.ndim - 2)]
        at[axis] = begin
        offsets = begin - start + jnp.arange(width)
        is_new = (offsets >= 0) & (offsets < count)
        is_new = jnp.expand_dims(is_new, [d for d in range(array.ndim) if d != axis])
        held = jax.lax.dynamic_slice(array, at, new.shape)
        held = jnp.where(is_new, jnp.roll(new, start - begin, axis), held)
        return jax.lax.dynamic_update_slice(array, held, at)

    array = merged(array, jnp.minimum(start, size - width), start)
    return merged(array, 0, start - size) if is_ring else array


def stretch(
    array: jax.Array, layer: jax.Array | int, slots: jax.Array, starts: jax.Array, size: int, axis: int
) -> jax.Array:
    """[R, K, ...] of an array [N, S, K, ...] of rings: `size` positions from `starts` [R] on of rows `slots` [R]."""
    sizes = [1, 1, *array.shape[2:]]
    axis = axis % array.ndim - 2  # of a row

    def of(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        slot, start = row
        held = jax.lax.dynamic_slice(array, (layer, slot, *[0] * (array.ndim - 2)), sizes)[0, 0]
        return jax.lax.slice_in_dim(jnp.roll(held, -start, axis), 0, size, axis=axis)

    return jax.lax.map(of, (slots, starts % array.shape[axis + 2]))


def copy(
    array: jax.Array, layer: jax.Array, sources: jax.Array, targets: jax.Array, size: int, axis: int
) -> jax.Array:
    """The array with the first `size` positions of rows `sources` [R] in rows `targets` [R], of one layer;
    a target out of range is dropped."""
    if _lies_flipped(array, axis):
        return copy(array.swapaxes(3, 4), layer, sources, targets, size, 4).swapaxes(3, 4)
    sizes = [1, 1, *array.shape[2:]]
    sizes[axis] = size
    rest = [0] * (array.ndim - 2)

    def held_of(array: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, (layer, slot, *rest), sizes)

    new = jax.vmap(held_of, (None, 0))(array, sources)  # all, before any is written

    def write(index: jax.Array, array: jax.Array) -> jax.Array:
        target = targets[index]
        held = jnp.where(target < array.shape[1], new[index], held_of(array, target))
        return jax.lax.dynamic_update_slice(array, held, (layer, target, *rest))

    return jax.lax.fori_loop(0, len(targets), write, array)


def _lies_flipped(array: jax.Array, axis: int) -> bool:
    """Whether an array whose positions are dimension `axis` lies with them last, whatever it is called: as heads
    that fill no vector do. Written the other way it would be laid out anew."""
    return axis == 3 and array.ndim == 5 and array.shape[4] % LANES != 0
