"""Masked and grouped reductions, shared by the estimators and the losses.

Three habits hold for everything here. Values off the mask are replaced *before* any arithmetic, so
that NaN or infinity there reaches neither the value nor the gradient; on the mask they come through. Arithmetic
is float32. A reduction over nothing is 0, not NaN. Where a statistic spans the global batch, `axis_name` names
the mapped axis (of `vmap`, `pmap` or `shard_map`) that holds the rest of it.
"""

import math

import jax
import jax.numpy as jnp

from jaxagentrl import arguments
from jaxagentrl.types import Array

AxisName = str | tuple[str, ...] | None


def zero_off(x: Array, mask: Array) -> Array:
    """`x` in float32 on the mask and exactly 0 off it, whatever `x` holds there.

    >>> zero_off(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    Array([1., 0.], dtype=float32)
    """
    return jnp.where(mask, jnp.asarray(x).astype(jnp.float32), 0.0)


def zero_idle(x: Array, idle: Array) -> Array:
    """`x`, and 0 where it is `idle`, a finite number that carries no signal: NaN and infinity stay.

    >>> zero_idle(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([False, True, True]))
    Array([ 1.,  0., nan], dtype=float32)
    """
    return jnp.where(idle & jnp.isfinite(x), 0.0, x)


def clean(rows: dict[str, Array], action_mask: Array | None, *, differentiable: int) -> list[Array]:
    """Float32 rows, 0 off the mask, with gradient through the first `differentiable` only.

    Args:
        rows: arrays [...] float by the names of arguments, all of one shape.
        action_mask: [...] bool, or None where every entry counts.
        differentiable: how many of the rows keep their gradient.
    """
    mask = {} if action_mask is None else dict(action_mask=(action_mask, bool, "..."))
    arguments.check(**{name: (row, float, "...") for name, row in rows.items()}, **mask)
    cleaned = [jnp.asarray(row).astype(jnp.float32) for row in rows.values()]
    if action_mask is not None:
        cleaned = [jnp.where(action_mask, row, 0.0) for row in cleaned]
    return [
        row if index < differentiable else jax.lax.stop_gradient(row)
        for index, row in enumerate(cleaned)
    ]


def total(x: Array, axis_name: AxisName = None) -> Array:
    """`x` summed over the mapped axis `axis_name`; `x` itself when there is none."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def divide(x: Array, y: Array) -> Array:
    """x / y, and 0 where y ≤ 0; the division by 0 happens in neither value nor gradient."""
    nothing = y <= 0  # which NaN is not
    return jnp.where(nothing, 0.0, x / jnp.where(nothing, 1.0, y))


def masked_sum(x: Array, mask: Array, *, axis=None, axis_name: AxisName = None) -> Array:
    """Σ x over the mask.

    Args:
        x: [...] float.
        mask: [...] bool, same shape.
        axis: axes to sum, all by default.
        axis_name: mapped axis to sum over as well.
    """
    arguments.check(x=(x, None, "..."), mask=(mask, bool, "..."))
    return total(jnp.sum(zero_off(x, mask), axis=axis), axis_name)


def masked_count(mask: Array, *, axis=None, axis_name: AxisName = None) -> Array:
    """Number of True entries, in float32 (exact to 16,777,216 per device)."""
    arguments.check(mask=(mask, bool, "..."))
    return total(jnp.sum(mask, axis=axis, dtype=jnp.float32), axis_name)


def masked_mean(x: Array, mask: Array, *, axis=None, axis_name: AxisName = None) -> Array:
    """Σ x / n over the mask, 0 where the mask is empty.

    >>> masked_mean(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([True, True, False]))
    Array(2., dtype=float32)
    """
    count = masked_count(mask, axis=axis, axis_name=axis_name)
    return divide(masked_sum(x, mask, axis=axis, axis_name=axis_name), count)


def masked_min(x: Array, mask: Array, *, axis_name: AxisName = None) -> Array:
    """Smallest entry on the mask, 0 when there is none; without gradient, as `pmin` has none."""
    arguments.check(x=(x, None, "..."), mask=(mask, bool, "..."))
    x = jax.lax.stop_gradient(jnp.asarray(x).astype(jnp.float32))
    smallest = jnp.min(jnp.where(mask, x, jnp.inf), initial=jnp.inf)
    if axis_name is not None:
        smallest = jax.lax.pmin(smallest, axis_name)
    return jnp.where(masked_count(mask, axis_name=axis_name) > 0, smallest, 0.0)


def masked_mean_and_var(
    x: Array, mask: Array, *, ddof: int = 0, axis_name: AxisName = None
) -> tuple[Array, Array]:
    """Mean and variance over the whole mask: Σ (x − mean)² / (n − ddof).

    Sums run over x − min(x), so that entries which are all equal have a variance of exactly 0 and
    a mean of exactly their value.

    Returns:
        ([], []) float32; (0, 0) for an empty mask, variance 0 when n ≤ ddof.
    """
    shift = masked_min(x, mask, axis_name=axis_name)
    shifted = zero_off(x, mask) - shift
    mean = masked_mean(shifted, mask, axis_name=axis_name)
    count = masked_count(mask, axis_name=axis_name)
    squares = masked_sum(jnp.square(shifted - mean), mask, axis_name=axis_name)
    return mean + shift, divide(squares, count - ddof)


def zero_carry(rows: list[Array]) -> Array:
    """[...] zeros to start a scan over the last axis of [..., L] rows.

    Each row contributes a 0 (even where it is NaN), because `shard_map` wants the carry of a scan
    to vary over the same mesh axes at the start as at the end.
    """
    # A row without tokens has no first one to take.
    return sum(jnp.sum(jnp.isnan(row[..., :1]).astype(jnp.float32) * 0.0, axis=-1) for row in rows)


def scan_back(step, start, rows: list[Array]) -> Array:
    """Runs `step(carry, tokens) -> (carry, out)` over the last axis from right to left.

    Args:
        step: function of a carry and one entry of each row.
        start: carry after the last token, of leaves [...].
        rows: arrays [..., L].

    Returns:
        [..., L] outputs.
    """
    time_major = tuple(jnp.moveaxis(jnp.asarray(row), -1, 0) for row in rows)
    _, out = jax.lax.scan(step, start, time_major, reverse=True)
    return jnp.moveaxis(out, 0, -1)


# --- turns -------------------------------------------------------------------------------------


def closed_turn_ends(action_mask: Array, turn_ends: Array) -> Array:
    """Turn ends on the action mask, where the last action token of a row always ends its turn."""
    arguments.check(action_mask=(action_mask, bool, "... L"), turn_ends=(turn_ends, bool, "... L"))
    after = jnp.flip(jnp.cumsum(jnp.flip(action_mask, -1), axis=-1, dtype=jnp.int32), -1)
    return action_mask & (turn_ends | (after == 1))


def count_turns(action_mask: Array, turn_ends: Array) -> Array:
    """Turn of each action token, counted from 0 by the turn ends before it.

    >>> count_turns(jnp.ones(4, bool), jnp.array([False, True, False, True]))
    Array([0, 0, 1, 1], dtype=int32)
    """
    ends = closed_turn_ends(action_mask, turn_ends)
    return jnp.cumsum(ends, axis=-1, dtype=jnp.int32) - ends


def turn_firsts(action_mask: Array, turn_ends: Array) -> Array:
    """[..., L] bool, True on the first action token of each turn; arguments as of `count_turns`."""
    turn_ids, shape = count_turns(action_mask, turn_ends), action_mask.shape
    first = turn_first_position(turn_ids, action_mask, num_turns=shape[-1])
    of_mine = spread_turns(first.astype(jnp.float32), turn_ids, action_mask)
    return action_mask & (of_mine == jax.lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1))


def turn_sum(x: Array, turn_ids: Array, mask: Array, *, num_turns: int) -> Array:
    """Σ x over the masked tokens of each turn.

    Args:
        x: [..., L] float or bool.
        turn_ids: [..., L] int; entries off the mask or out of [0, num_turns) are dropped.
        mask: [..., L] bool.
        num_turns: T, a static number.

    Returns:
        [..., T] float32.
    """
    arguments.check(x=(x, None, "... L"), turn_ids=(turn_ids, int, "... L"), mask=(mask, bool, "... L"))
    return _scatter_turns(jnp.asarray(x).astype(jnp.float32), turn_ids, mask, num_turns, "add")


def turn_last_position(turn_ids: Array, mask: Array, *, num_turns: int) -> Array:
    """[..., T] int32, position of the last masked token of each turn; −1 for a turn without."""
    place = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    return _scatter_turns(place, turn_ids, mask, num_turns, "max")


def turn_first_position(turn_ids: Array, mask: Array, *, num_turns: int) -> Array:
    """[..., T] int32, position of the first masked token of each turn; −1 for a turn without."""
    length = mask.shape[-1]
    backwards = length - 1 - jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), mask.shape)
    found = _scatter_turns(backwards, turn_ids, mask, num_turns, "max")
    return jnp.where(found >= 0, length - 1 - found, -1)


def take_positions(x: Array, places: Array) -> Array:
    """x at `places` along the last axis, 0 where the place is −1.

    Args:
        x: [..., L] float.
        places: [..., T] int, in [−1, L).
    """
    found = jnp.take_along_axis(x, jnp.maximum(places, 0), axis=-1)
    return jnp.where(places >= 0, found, jnp.zeros_like(found))


def spread_turns(per_turn: Array, turn_ids: Array, mask: Array) -> Array:
    """Every masked token gets the number of its turn; 0 off the mask and out of range.

    Args:
        per_turn: [..., T] float.
        turn_ids: [..., L] int.
        mask: [..., L] bool.

    Returns:
        [..., L] float32.
    """
    turn_ids = as_ids(turn_ids)
    inside = mask & (turn_ids >= 0) & (turn_ids < per_turn.shape[-1])
    per_turn = jnp.asarray(per_turn).astype(jnp.float32)
    return take_positions(per_turn, jnp.where(inside, turn_ids, -1))


def sequence_sum(x: Array, mask: Array, *, turn_ids: Array | None = None) -> Array:
    """Σ x over the masked tokens of the row, or of the turn, given back to each of them.

    Args:
        x: [..., L] float.
        mask: [..., L] bool.
        turn_ids: [..., L] int; None for the whole row.

    Returns:
        [..., L] float32, 0 off the mask.
    """
    if turn_ids is None:
        return zero_off(masked_sum(x, mask, axis=-1)[..., None], mask)
    sums = turn_sum(x, turn_ids, mask, num_turns=mask.shape[-1])
    return spread_turns(sums, turn_ids, mask)


def as_ids(ids: Array) -> Array:
    """Ids as int32: in narrower integers bounds and products of ids would wrap around."""
    return jnp.asarray(ids).astype(jnp.int32)


def _scatter_turns(x: Array, turn_ids: Array, mask: Array, num_turns: int, how: str) -> Array:
    """Reduces [..., L] to [..., T] by turn; "max" starts from −1."""
    *batch_shape, length = mask.shape
    rows, turn_ids = math.prod(batch_shape), as_ids(turn_ids)
    inside = mask & (turn_ids >= 0) & (turn_ids < num_turns)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    # One slot past the end takes everything that belongs to no turn; it is cut off again below.
    slot = jnp.where(inside, turn_ids, num_turns).reshape(rows, length)
    x = x.reshape(rows, length)
    if how == "add":
        out = jnp.zeros((rows, num_turns + 1), x.dtype).at[row, slot].add(x)
    else:
        out = jnp.full((rows, num_turns + 1), -1, x.dtype).at[row, slot].max(x)
    return out[:, :num_turns].reshape((*batch_shape, num_turns))


# --- groups ------------------------------------------------------------------------------------


def group_sum(
    x: Array, group_ids: Array, *, num_groups: int, axis_name: AxisName = None
) -> Array:
    """Σ x over each group; rows whose id is out of [0, num_groups) are dropped.

    Args:
        x: [N] float.
        group_ids: [N] int, neither sorted nor contiguous.
        num_groups: static number of groups.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [num_groups] float32.
    """
    arguments.check(x=(x, None, "N"), group_ids=(group_ids, int, "N"))
    inside = in_group(group_ids, num_groups=num_groups)
    slots = jnp.where(inside, as_ids(group_ids), num_groups)
    return total(jax.ops.segment_sum(zero_off(x, inside), slots, num_groups), axis_name)


def group_count(group_ids: Array, *, num_groups: int, axis_name: AxisName = None) -> Array:
    """[num_groups] float32, number of rows in each group."""
    ones = jnp.ones(group_ids.shape, jnp.float32)
    return group_sum(ones, group_ids, num_groups=num_groups, axis_name=axis_name)


def group_min(
    x: Array, group_ids: Array, *, num_groups: int, axis_name: AxisName = None
) -> Array:
    """[num_groups] float32, each group's smallest entry, without gradient; +inf for empty ones."""
    arguments.check(x=(x, None, "N"), group_ids=(group_ids, int, "N"))
    inside = in_group(group_ids, num_groups=num_groups)
    slots = jnp.where(inside, as_ids(group_ids), num_groups)
    x = jax.lax.stop_gradient(zero_off(x, inside))
    smallest = jax.ops.segment_min(x, slots, num_groups)
    return smallest if axis_name is None else jax.lax.pmin(smallest, axis_name)


def take_group(per_group: Array, group_ids: Array) -> Array:
    """Every row gets the number of its group; 0 for rows that belong to none.

    Args:
        per_group: [num_groups] float.
        group_ids: [N] int.

    Returns:
        [N] float.
    """
    inside = in_group(group_ids, num_groups=per_group.shape[0])
    return jnp.where(inside, jnp.asarray(per_group)[as_ids(group_ids)], 0.0)


def in_group(group_ids: Array, *, num_groups: int) -> Array:
    """[N] bool, False on rows whose id is out of range (padding rows)."""
    group_ids = as_ids(group_ids)
    return (group_ids >= 0) & (group_ids < num_groups)
