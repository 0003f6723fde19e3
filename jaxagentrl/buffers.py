"""Rollout buffers as pure functions over pytrees of fixed capacity.

    buffer = init(capacity, example)
    buffer = add(buffer, rows)
    drawn  = sample(buffer, key, num)
    order  = minibatches(key, num_rows, size)

Rows are stacked along the leading axis of every leaf. Nothing here is jitted; under `jit` donate
the buffer (`jax.jit(add, donate_argnums=0)`) so that the storage is updated in place, and shard it
along its leading axis to spread it over devices: indices are global, XLA moves the rows.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from jaxagentrl import arguments
from jaxagentrl.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffer:
    """A ring of rows; the oldest are overwritten first."""

    rows: PyTree  # leaves [capacity, ...]
    stamps: Array  # [capacity] int32, clock at which a row was added; −1 where there is none
    head: Array  # [] int32, where the next row goes
    clock: Array  # [] int32, stamp of the next rows: calls of `add` so far, or the caller's count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows drawn from a buffer."""

    rows: PyTree  # leaves [num, ...]
    indices: Array  # [num] int32, place in the buffer
    ages: Array  # [num] int32, clock now − clock when added: 1 for what came with the last `add`
    valid: Array  # [num] bool, False where the buffer had too few rows; such rows mean nothing


def init(capacity: int, example: PyTree) -> Buffer:
    """An empty buffer.

    Args:
        capacity: number of rows it holds.
        example: one row, leaves [...] without the leading axis; only shapes and dtypes are read.

    Raises:
        ValueError: for a capacity below 1, or an example without arrays.

    >>> buffer = init(4, {"x": jnp.zeros(2)})
    >>> buffer = add(buffer, {"x": jnp.ones((3, 2))})
    >>> int(num_rows(buffer)), buffer.rows["x"].shape
    (3, (4, 2))
    """
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity}, expected at least 1 row")
    if not jax.tree.leaves(example):
        raise ValueError(f"example: got {example!r}, expected at least one array")
    rows = jax.tree.map(
        lambda leaf: jnp.zeros((capacity, *jnp.shape(leaf)), jnp.result_type(leaf)), example
    )
    none = jnp.full(capacity, -1, jnp.int32)
    return Buffer(rows, none, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(
    buffer: Buffer, batch: PyTree, *, valid: Array | None = None, clock: Array | None = None
) -> Buffer:
    """Appends rows, over the oldest where the buffer is full.

    Args:
        buffer: the buffer.
        batch: the same tree as the example, leaves [n, ...] with n ≤ capacity.
        valid: [n] bool, rows to add; all by default. Padding rows need not take space.
        clock: [] int, stamp of these rows, such as the iteration whose parameters drew them; never
            lower than before. By default the number of earlier calls.

    Returns:
        The buffer with the rows added and its clock at the stamp + 1.

    Raises:
        ValueError: for more rows than the capacity, which would partly overwrite themselves, and for
            leaves that are not rows as in the example.
    """
    capacity = buffer.stamps.shape[0]
    chex.assert_trees_all_equal_structs(buffer.rows, batch)
    first = jax.tree.leaves(batch)[0]
    if not jnp.ndim(first):
        raise ValueError("batch: got a leaf without a leading axis, expected rows [n, ...]")
    count = first.shape[0]
    jax.tree.map(lambda old, new: _check_leaf(old, new, count), buffer.rows, batch)
    if count > capacity:
        raise ValueError(f"batch: got {count} rows, but the buffer holds {capacity}")
    valid = jnp.ones(count, bool) if valid is None else valid
    arguments.check(valid=(valid, bool, str(count)))
    place = jnp.cumsum(valid, dtype=jnp.int32) - 1
    # Invalid rows are sent past the end, where a scatter in "drop" mode ignores them.
    place = jnp.where(valid, (buffer.head + place) % capacity, capacity)
    rows = jax.tree.map(lambda old, new: old.at[place].set(new, mode="drop"), buffer.rows, batch)
    stamp = buffer.clock if clock is None else jnp.asarray(clock, jnp.int32)
    return Buffer(
        rows=rows,
        stamps=buffer.stamps.at[place].set(stamp, mode="drop"),
        head=(buffer.head + jnp.sum(valid, dtype=jnp.int32)) % capacity,
        clock=stamp + 1,
    )


def num_rows(buffer: Buffer) -> Array:
    """[] int32, rows held."""
    return jnp.sum(buffer.stamps >= 0, dtype=jnp.int32)


def ages(buffer: Buffer) -> Array:
    """[capacity] int32, clock now − clock when added; −1 where there is no row.

    Rows of the latest `add` are 1 old (they were drawn by the parameters *before* the next
    update). Off-policy corrections read how stale a row is from this.
    """
    return jnp.where(buffer.stamps >= 0, buffer.clock - buffer.stamps, -1)


def sample(buffer: Buffer, key: Array, num: int, *, replace: bool = False) -> Sample:
    """Draws rows uniformly.

    Args:
        buffer: the buffer.
        key: PRNG key.
        num: rows to draw, at most the capacity unless `replace`.
        replace: draw with replacement. Without it, no row comes twice, and when fewer than `num`
            are held the surplus is marked invalid.

    Returns:
        A `Sample`; from an empty buffer all of it is invalid.
    """
    capacity = buffer.stamps.shape[0]
    held = buffer.stamps >= 0
    if replace:
        logits = jnp.where(held | ~jnp.any(held), 0.0, -jnp.inf)
        indices = jax.random.categorical(key, logits, shape=(num,)).astype(jnp.int32)
    elif num > capacity:
        raise ValueError(
            f"num: got {num}, but the buffer holds {capacity} rows; ask for fewer or set replace"
        )
    elif num < 0:
        raise ValueError(f"num: got {num}, expected a number of rows")
    else:
        # A random order of all places with those that hold rows in front.
        noise = jnp.where(held, jax.random.uniform(key, (capacity,)), 2.0)
        indices = jnp.argsort(noise)[:num].astype(jnp.int32)
    rows = jax.tree.map(lambda leaf: leaf[indices], buffer.rows)
    return Sample(rows, indices, ages(buffer)[indices], held[indices])


def minibatches(key: Array, num_rows: int, size: int) -> Array:
    """A random order of the rows in minibatches: every row exactly once.

    Args:
        key: PRNG key.
        num_rows: number of rows.
        size: rows per minibatch; must divide `num_rows`.

    Returns:
        [num_rows / size, size] int32 row indices.

    Raises:
        ValueError: when some minibatch would be short.
    """
    if size < 1 or num_rows % size:
        raise ValueError(
            f"size: got {size} for {num_rows} rows, expected a divisor (pad the batch with padding "
            "rows, which weigh nothing, to a multiple of the minibatch)"
        )
    order = jax.random.permutation(key, num_rows)
    return order.reshape(num_rows // size, size).astype(jnp.int32)


def _check_leaf(old: Array, new: Array, count: int) -> None:
    """The leaf of a batch must be `count` rows of what the buffer holds."""
    # As jax has it: an example in numpy's float64 became float32.
    if new.shape != (count, *old.shape[1:]) or jax.dtypes.canonicalize_dtype(new.dtype) != old.dtype:
        raise ValueError(
            f"batch: got a leaf of shape {new.shape} and dtype {new.dtype}, expected "
            f"{(count, *old.shape[1:])} and {old.dtype} as in the buffer's example"
        )
