"""Pure transforms of a batch between rollout and estimation: filters, reward shaping, penalties.

Shapes stay as they are, so that nothing recompiles: a dropped row becomes a padding row, it does
not vanish. Every filter counts what it dropped, and a batch of which nothing is left says so in
`Filtered.is_empty` instead of becoming a batch of zeros. A run has the filters by
`rl.filter`; its rewards are those of `rewards`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.group_advantages import center, group_std
from jaxagentrl.types import Array, TrajectoryBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filtered:
    """Which rows a filter keeps, and its counts."""

    keep: Array  # [B] bool
    kept_groups: Array  # [] int32
    dropped_groups: Array  # [] int32, groups that had rows and lost them all
    is_empty: Array  # [] bool, nothing is left: sample again, there is nothing to learn from


# --- filters -----------------------------------------------------------------------------------


def dynamic_sampling(
    succeeded: Array,
    group_ids: Array,
    *,
    num_groups: int,
    axis_name: masking.AxisName = None,
) -> Filtered:
    """DAPO's dynamic sampling: keep the groups with some, but not only, successes.

        keep group g  iff  0 < #success(g) < #rows(g)

    Unanimous groups have no gradient in group estimators and only dilute token means. Yu et al.
    2025, https://arxiv.org/abs/2503.14476, eq. 11; there the rollout is repeated until the batch is
    full (`compact` brings the kept rows to the front for that).

    Args:
        succeeded: [B] bool.
        group_ids: [B] int, out of range on padding rows.
        num_groups: static number of groups.
        axis_name: mapped axis over which groups are spread.
    """
    arguments.check(succeeded=(succeeded, bool, "B"), group_ids=(group_ids, int, "B"))
    wins = masking.group_sum(
        succeeded.astype(jnp.float32), group_ids, num_groups=num_groups, axis_name=axis_name
    )
    size = masking.group_count(group_ids, num_groups=num_groups, axis_name=axis_name)
    return _filtered((wins > 0) & (wins < size), size, group_ids)


def uncertainty_filter(
    scores: Array,
    group_ids: Array,
    *,
    num_groups: int,
    fraction: float,
    keep_flat: bool = True,
    ddof: int = 1,
    axis_name: masking.AxisName = None,
) -> Filtered:
    """StarPO-S: keep the fraction of groups whose scores differ most.

        U(g) = std of the scores of group g;  keep the ⌊fraction · groups⌋ largest, at least one

    RAGEN, https://arxiv.org/abs/2504.20073, section 4.2 (0.25 by default there). Ties go to the
    lower id.

    Args:
        scores: [B] float.
        group_ids: [B] int, out of range on padding rows.
        num_groups: static number of groups; empty ones are not counted.
        fraction: in (0, 1].
        keep_flat: False drops groups with U = 0 even where the fraction would admit them.
        ddof: degrees of freedom taken off in the variance.
        axis_name: mapped axis over which groups are spread.

    Raises:
        ValueError: the fraction is none.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, expected a share of the groups, above 0 and at most 1")
    centered, _ = center(scores, group_ids, num_groups, axis_name)
    std = group_std(centered, group_ids, num_groups, ddof, axis_name)
    size = masking.group_count(group_ids, num_groups=num_groups, axis_name=axis_name)
    present = size > 0
    # The small term keeps 0.3 · 10 from being 2.9999998.
    wanted = jnp.floor(fraction * jnp.sum(present) + 1e-4).astype(jnp.int32)
    order = jnp.argsort(jnp.where(present, -std, jnp.inf), stable=True)
    rank = jnp.zeros(num_groups, jnp.int32).at[order].set(jnp.arange(num_groups, dtype=jnp.int32))
    kept = present & (rank < jnp.maximum(wanted, 1))
    return _filtered(kept if keep_flat else kept & (std > 0), size, group_ids)


def drop_rows(batch: TrajectoryBatch, keep: Array, *, num_groups: int) -> TrajectoryBatch:
    """The batch with all rows but the kept ones turned into padding rows.

    Args:
        batch: [B, L] rows.
        keep: [B] bool.
        num_groups: number of groups, the id that padding rows carry.
    """
    arguments.check(group_ids=(batch.group_ids, int, "B"), keep=(keep, bool, "B"))
    rows = jnp.broadcast_to(keep[:, None], batch.valid_mask.shape)
    return dataclasses.replace(
        batch,
        valid_mask=batch.valid_mask & rows,
        action_mask=batch.action_mask & rows,
        turn_ids=jnp.where(rows, batch.turn_ids, -1),
        turn_ends=batch.turn_ends & rows,
        sampler_logprobs=masking.zero_off(batch.sampler_logprobs, rows),
        rewards=masking.zero_off(batch.rewards, rows),
        group_ids=jnp.where(keep, masking.as_ids(batch.group_ids), num_groups),
    )


def compact(batch: TrajectoryBatch, keep: Array) -> tuple[TrajectoryBatch, Array]:
    """The same rows with the kept ones first, in their order, and how many they are.

    Args:
        batch: [B, L] rows.
        keep: [B] bool.

    Returns:
        (batch with its rows permuted, [] int32 number of kept rows).
    """
    arguments.check(group_ids=(batch.group_ids, int, "B"), keep=(keep, bool, "B"))
    order = jnp.argsort(~keep)
    moved = jax.tree.map(lambda leaf: leaf[order], batch)
    return moved, jnp.sum(keep, dtype=jnp.int32)


def overlong_filter(action_mask: Array, truncated: Array) -> tuple[Array, Array]:
    """DAPO's overlong filtering: truncated episodes leave the loss.

    Args:
        action_mask: [B, L] bool.
        truncated: [B] bool.

    Returns:
        ([B, L] bool mask without the truncated rows, [] int32 number of rows that were masked).
    """
    arguments.check(action_mask=(action_mask, bool, "B L"), truncated=(truncated, bool, "B"))
    dropped = truncated & jnp.any(action_mask, axis=1)
    return action_mask & ~truncated[:, None], jnp.sum(dropped, dtype=jnp.int32)


# --- rewards -----------------------------------------------------------------------------------


def overlong_penalty(
    lengths: Array, *, max_length: float, margin: float, penalty: float = 1.0
) -> Array:
    """DAPO's soft overlong punishment, to be added to the score.

         0                                      l ≤ max − margin
        −penalty · (l − (max − margin)) / margin     up to max
        −penalty                                above

    https://arxiv.org/abs/2503.14476, eq. 13. For agents l is the number of action tokens of the
    whole episode, or of turns.

    Args:
        lengths: [...] float or int.
        max_length: longest length without the full penalty.
        margin: width of the ramp below it, > 0.
        penalty: size of the full penalty.

    Returns:
        [...] float32, in [−penalty, 0].

    >>> overlong_penalty(jnp.array([6, 9, 12]), max_length=10, margin=4)
    Array([-0.  , -0.75, -1.  ], dtype=float32)
    """
    if margin <= 0:
        raise ValueError(f"margin: got {margin}, expected a width above 0")
    over = jnp.asarray(lengths, jnp.float32) - (max_length - margin)
    return -penalty * jnp.clip(over / margin, 0.0, 1.0)


def penalize_turns(
    rewards: Array, action_mask: Array, turn_ids: Array, flagged: Array, *, penalty: float
) -> tuple[Array, Array]:
    """Takes a penalty off the last action token of each flagged turn (invalid action, bad format).

    Args:
        rewards: [B, L] float.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        flagged: [B, T] bool, T a bound on turn ids.
        penalty: taken off, so a positive number punishes.

    Returns:
        ([B, L] float32 rewards, [] int32 number of turns that were penalized).
    """
    arguments.check(
        rewards=(rewards, float, "B L"),
        action_mask=(action_mask, bool, "B L"),
        turn_ids=(turn_ids, int, "B L"),
        flagged=(flagged, bool, "B T"),
    )
    num_turns = flagged.shape[1]
    last = masking.turn_last_position(turn_ids, action_mask, num_turns=num_turns)
    hit = flagged & (last >= 0)
    penalties = masking.spread_turns(-penalty * hit.astype(jnp.float32), turn_ids, action_mask)
    shaped = masking.zero_off(rewards, action_mask) + _on_last(
        penalties, last, turn_ids, action_mask
    )
    return shaped, jnp.sum(hit, dtype=jnp.int32)


def normalize_dense_rewards(
    rewards: Array, max_scores: Array, action_mask: Array
) -> tuple[Array, Array]:
    """Divides every reward by the game's maximum score, on wins and losses alike.

    (Public code divides by the number of rewarded turns on a win and by 1 on a loss, so that a lost
    game with six subgoals returns 6 and a won one returns 1.)

    Args:
        rewards: [B, L] float, increases of the game's score.
        max_scores: [B] float, what the game's score sums to when everything is done.
        action_mask: [B, L] bool.

    Returns:
        ([B, L] float32 rewards, [] int32 number of non-empty rows without a positive finite
        maximum, whose rewards become 0).
    """
    arguments.check(
        rewards=(rewards, float, "B L"), action_mask=(action_mask, bool, "B L"), max_scores=(max_scores, float, "B")
    )
    known = (max_scores > 0) & jnp.isfinite(max_scores)
    scale = masking.divide(1.0, masking.zero_off(max_scores, known))
    unknown = jnp.any(action_mask, axis=1) & ~known
    shaped = masking.zero_off(rewards, action_mask) * scale[:, None]
    return shaped, jnp.sum(unknown, dtype=jnp.int32)


def potential_shaping(
    rewards: Array,
    discounts: Array,
    action_mask: Array,
    turn_ids: Array,
    potentials: Array,
    final_potentials: Array,
) -> Array:
    """Potential-based shaping, which leaves the best policy as it is.

        rₖ ← rₖ + γₖ Φ(sₖ₊₁) − Φ(sₖ)          on the last action token of turn k

    Ng, Harada and Russell 1999, theorem 1. After the last turn Φ is `final_potentials`; a
    terminated episode has γₖ = 0 there, hence Φ(terminal) = 0 as the theorem needs. With γ = 1 the
    return changes by −Φ(s₀), plus the final potential where the episode was truncated.

    Args:
        rewards: [B, L] float.
        discounts: [B, L] float, read on the last action token of each turn.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        potentials: [B, T] float, Φ of the state that turn k starts from; T bounds the turn ids.
        final_potentials: [B] float, Φ of the state after the last turn.

    Returns:
        [B, L] float32 rewards.
    """
    arguments.check(
        rewards=(rewards, float, "B L"),
        discounts=(discounts, float, "B L"),
        action_mask=(action_mask, bool, "B L"),
        turn_ids=(turn_ids, int, "B L"),
        potentials=(potentials, float, "B T"),
        final_potentials=(final_potentials, float, "B"),
    )
    num_turns = potentials.shape[1]
    last = masking.turn_last_position(turn_ids, action_mask, num_turns=num_turns)
    present = last >= 0
    potentials = masking.zero_off(potentials, present)

    def step(following, inputs):
        phi, here = inputs
        return jnp.where(here, phi, following), following

    final = masking.zero_off(final_potentials, jnp.any(present, axis=1))
    following = masking.scan_back(
        step, final + masking.zero_carry([potentials]), [potentials, present]
    )
    gammas = masking.take_positions(discounts, last)
    change = gammas * masking.zero_off(following, gammas != 0) - potentials
    spread = masking.spread_turns(change, turn_ids, action_mask)
    return masking.zero_off(rewards, action_mask) + _on_last(spread, last, turn_ids, action_mask)


def shape_with_kl(
    rewards: Array, divergence: Array, action_mask: Array, *, coefficient: Array | float
) -> Array:
    """KL in the reward: rₜ ← rₜ − β k1ₜ on every action token.

    k1 = log π_old − log π_ref is the estimator to use here (`losses.kl`): k3 in the reward is
    biased. Group estimators sum the result to the score, so their baseline sees the cost as well.

    Args:
        rewards: [..., L] float.
        divergence: [..., L] float, k1.
        action_mask: [..., L] bool.
        coefficient: β.

    Returns:
        [..., L] float32.
    """
    rows = dict(rewards=rewards, divergence=divergence)
    rewards, divergence = masking.clean(rows, action_mask, differentiable=1)
    return rewards - coefficient * divergence


def _on_last(spread: Array, last: Array, turn_ids: Array, action_mask: Array) -> Array:
    """[B, L] values spread over turns, kept on the last action token of each (`last` [B, T])."""
    places = jnp.arange(action_mask.shape[1], dtype=jnp.float32)[None]
    # Off the mask the spread position is 0, but so is the value.
    wanted = masking.spread_turns(last.astype(jnp.float32), turn_ids, action_mask)
    return jnp.where(wanted == places, spread, 0.0)


def _filtered(kept: Array, size: Array, group_ids: Array) -> Filtered:
    """Counts for [num_groups] `kept`; everything here is already global."""
    present = size > 0
    keep = masking.take_group(kept.astype(jnp.float32), group_ids) > 0
    num_kept = jnp.sum(kept & present, dtype=jnp.int32)
    num_dropped = jnp.sum(present & ~kept, dtype=jnp.int32)
    return Filtered(keep, num_kept, num_dropped, num_kept == 0)
