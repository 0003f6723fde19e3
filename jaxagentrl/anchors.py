"""GiGPO: turns that answered the same observation, compared. Public in `advantages`.

Deterministic text worlds bring the trajectories of a group back to the same observations again and
again. What was done there, and what came of it, is a comparison that costs no extra rollout.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.group_advantages import center, check_choice, group_std
from jaxagentrl.turn_credit import check_rows, returns_to_go, turn_returns
from jaxagentrl.types import Array


def gigpo(
    rewards: Array,
    action_mask: Array,
    turn_ids: Array,
    anchor_ids: Array,
    group_ids: Array,
    *,
    num_groups: int,
    num_anchors: int,
    turn_discount: float = 0.95,
    step_weight: float = 1.0,
    scale: str = "std",
    episode_mean_over: str = "trajectories",
    first_visit: bool = False,
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """GiGPO: an episode's credit against its group, plus a turn's against its anchor state.

        Aᵢₖ = A_E(i) + ω A_S(i, k)          A_E = (Rᵢ − mean over the group) / F
        Gᵢₖ = Σ_{l≥k} γ^(l−k) rᵢₗ           A_S = (Gᵢₖ − mean over turns of the group that started
                                                   from the same observation) / F

    with F = std + ε (scale "std") or 1 (scale "none"). Feng et al. 2025,
    https://arxiv.org/abs/2505.10978, eqs. 3 and 6 to 8. An anchor met once gives A_S = 0. Peers
    differ in three ways, all offered: verl-agent takes the episode mean over step rows, so that
    long episodes weigh more (`episode_mean_over="steps"`), where the paper takes it over
    trajectories; F may be 1; and visits of one trajectory to one anchor all count, so that loops
    dominate a group, unless `first_visit` admits only each trajectory's first visit to the
    anchor's mean (later visits are still measured against it; the std is that of all visits).

    `gigpo_steps` is the same for batches with one row per turn.

    Args:
        rewards: [B, L] float.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        anchor_ids: [B, T] int, id in [0, num_anchors) of the observation that each turn answers;
            equal where and only where two observations of one *group* are taken to be equal (other
            groups may use the same ids). −1: no anchor, A_S = 0. T bounds the turn ids.
        group_ids: [B] int.
        num_groups: static number of groups.
        num_anchors: static bound on anchor ids.
        turn_discount: γ of the step returns, per turn.
        step_weight: ω.
        scale: "std" or "none".
        episode_mean_over: "trajectories" or "steps".
        first_visit: see above.
        ddof: degrees of freedom taken off in variances.
        epsilon: added to stds.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B, L] float32, the same on all action tokens of a turn, 0 off the mask.
    """
    check_rows(rewards, action_mask, turn_ids, group_ids)
    arguments.check(rewards=(rewards, float, "B L"), anchor_ids=(anchor_ids, int, "B T"))
    num_rows, num_turns = anchor_ids.shape
    discounts = jnp.full(rewards.shape, turn_discount, jnp.float32)
    returns, present = turn_returns(
        rewards, discounts, action_mask, turn_ids, num_turns=num_turns
    )
    scores = masking.masked_sum(rewards, action_mask, axis=1)
    shape = (num_rows, num_turns)
    step_groups = jnp.where(present, jnp.broadcast_to(masking.as_ids(group_ids)[:, None], shape), -1)
    credit = _episode_and_step(
        jnp.broadcast_to(scores[:, None], shape).reshape(-1),
        returns.reshape(-1),
        step_groups.reshape(-1),
        anchor_ids.reshape(-1),
        jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[:, None], shape).reshape(-1),
        jnp.broadcast_to(jnp.arange(num_turns, dtype=jnp.int32)[None, :], shape).reshape(-1),
        num_groups=num_groups,
        num_anchors=num_anchors,
        num_trajectories=num_rows,
        step_weight=step_weight,
        scale=scale,
        episode_mean_over=episode_mean_over,
        first_visit=first_visit,
        ddof=ddof,
        epsilon=epsilon,
        axis_name=axis_name,
    )
    return masking.spread_turns(credit.reshape(shape), turn_ids, action_mask)


def gigpo_steps(
    step_rewards: Array,
    trajectory_ids: Array,
    steps: Array,
    anchor_ids: Array,
    group_ids: Array,
    *,
    num_groups: int,
    num_anchors: int,
    num_trajectories: int,
    num_steps: int,
    turn_discount: float = 0.95,
    step_weight: float = 1.0,
    scale: str = "std",
    episode_mean_over: str = "trajectories",
    first_visit: bool = False,
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """`gigpo` for batches with one row per turn, each with its own prompt (verl-agent's layout).

    All rows of one trajectory must be on one device when `axis_name` is used.

    Args:
        step_rewards: [N] float, reward of each turn.
        trajectory_ids: [N] int in [0, num_trajectories), on padding rows anything out of range.
        steps: [N] int in [0, num_steps), number of the turn in its trajectory; each at most once.
        anchor_ids: [N] int, as in `gigpo`.
        group_ids: [N] int.
        num_groups, num_anchors, num_trajectories, num_steps: static bounds on the ids.
        turn_discount, step_weight, scale, episode_mean_over, first_visit, ddof, epsilon,
            axis_name: as in `gigpo`.

    Returns:
        [N] float32, 0 on padding rows.
    """
    ids = dict(trajectory_ids=trajectory_ids, steps=steps, anchor_ids=anchor_ids, group_ids=group_ids)
    arguments.check(
        step_rewards=(step_rewards, float, "N"), **{name: (of_rows, int, "N") for name, of_rows in ids.items()}
    )
    trajectory_ids, steps, anchor_ids, group_ids = map(masking.as_ids, ids.values())
    inside = (
        masking.in_group(group_ids, num_groups=num_groups)
        & masking.in_group(trajectory_ids, num_groups=num_trajectories)
        & masking.in_group(steps, num_groups=num_steps)
    )
    place = jnp.where(inside, trajectory_ids * num_steps + steps, -1)
    # [trajectories, steps] and back: every (trajectory, step) holds at most one row.
    shape = (num_trajectories, num_steps)
    grid = masking.group_sum(step_rewards, place, num_groups=shape[0] * shape[1]).reshape(shape)
    present = masking.group_count(place, num_groups=shape[0] * shape[1]).reshape(shape) > 0
    gammas = jnp.full(shape, turn_discount, jnp.float32)
    returns = masking.take_group(returns_to_go(grid, gammas, present).reshape(-1), place)
    scores = masking.take_group(jnp.sum(grid, axis=1), trajectory_ids)
    return _episode_and_step(
        scores,
        returns,
        jnp.where(inside, group_ids, -1),
        anchor_ids,
        trajectory_ids,
        steps,
        num_groups=num_groups,
        num_anchors=num_anchors,
        num_trajectories=num_trajectories,
        step_weight=step_weight,
        scale=scale,
        episode_mean_over=episode_mean_over,
        first_visit=first_visit,
        ddof=ddof,
        epsilon=epsilon,
        axis_name=axis_name,
    )


def _episode_and_step(
    scores: Array,
    returns: Array,
    group_ids: Array,
    anchor_ids: Array,
    trajectory_ids: Array,
    steps: Array,
    *,
    num_groups: int,
    num_anchors: int,
    num_trajectories: int,
    step_weight: float,
    scale: str,
    episode_mean_over: str,
    first_visit: bool,
    ddof: int,
    epsilon: float,
    axis_name: masking.AxisName,
) -> Array:
    """A_E + ω A_S for [N] step rows; group id −1 marks rows that are none."""
    check_choice("scale", scale, ("std", "none"))
    check_choice("episode_mean_over", episode_mean_over, ("trajectories", "steps"))
    group_ids, anchor_ids, trajectory_ids = map(masking.as_ids, (group_ids, anchor_ids, trajectory_ids))
    inside = masking.in_group(group_ids, num_groups=num_groups)
    if episode_mean_over == "steps":
        counted = inside
    else:  # each trajectory counts once, by its first row
        counted = inside & _is_first(trajectory_ids, steps, inside, num_trajectories)
    options = {"scale": scale, "ddof": ddof, "epsilon": epsilon, "axis_name": axis_name}
    episode = _against(
        scores, group_ids, counted, std_over=counted, num_groups=num_groups, **options
    )

    met = inside & masking.in_group(anchor_ids, num_groups=num_anchors)
    cells = jnp.where(met, group_ids * num_anchors + anchor_ids, -1)
    num_cells = num_groups * num_anchors
    counted = met
    if first_visit:
        visits = trajectory_ids * num_anchors + anchor_ids
        counted = met & _is_first(visits, steps, met, num_trajectories * num_anchors)
    # First visits may all but tie: divided by their std, a later one's credit would have no bound.
    step = _against(returns, cells, counted, std_over=met, num_groups=num_cells, **options)
    return episode + step_weight * step


def _against(
    x: Array,
    group_ids: Array,
    mean_over: Array,
    *,
    std_over: Array,
    num_groups: int,
    scale: str,
    ddof: int,
    epsilon: float,
    axis_name: masking.AxisName,
) -> Array:
    """x less its group's mean over some rows, over the std of some; 0 where the mean is of fewer than two."""
    centered, size = center(x, group_ids, num_groups, axis_name, mean_over)
    centered = masking.zero_idle(centered, size <= 1)
    if scale == "none":
        return centered
    ids = jnp.where(std_over, group_ids, -1)
    around, _ = center(x, ids, num_groups, axis_name)
    std = group_std(around, ids, num_groups, ddof, axis_name)
    return centered / (masking.take_group(std, group_ids) + epsilon)


def _is_first(ids: Array, steps: Array, inside: Array, num_ids: int) -> Array:
    """[N] bool, True on the row with the lowest step among the rows of one id."""
    slots = jnp.where(inside, ids, num_ids)
    earliest = jax.ops.segment_min(steps, slots, num_ids + 1)
    return inside & (steps == earliest[slots])
