"""Critic-free credit per turn: each turn compared with turns of its group. Public in `advantages`.

Which turns are compared is what distinguishes the estimators: those of the same number
(`rewards_to_go_group`, `mt_grpo`), all of the group (`istar`), or those that answered the same
observation (`gigpo`, in `anchors`). The conventions of `group_advantages` hold here too.
"""

import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.group_advantages import (
    center,
    check_choice,
    group_normalized,
    group_std,
    leave_one_out,
    without_self,
)
from jaxagentrl.types import Array


def rewards_to_go_group(
    rewards: Array,
    discounts: Array,
    action_mask: Array,
    turn_ids: Array,
    group_ids: Array,
    *,
    num_groups: int,
    num_turns: int | None = None,
    horizon: str = "episode",
    baseline: str = "mean",
    scale: str = "none",
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """Dense turn rewards without a critic: reward-to-go of a turn against the group at that turn.

        Ĝᵢₖ = Rᵢₖ + γᵢₖ Ĝᵢ,ₖ₊₁          Aᵢₖ = Ĝᵢₖ − mean of Ĝⱼₖ over the group's rows j that have
                                              a turn k

    Rᵢₖ is the sum of the rewards on the action tokens of turn k, γᵢₖ the discount on its last one
    (0 where the episode terminates). Summing dense rewards to one score per trajectory would throw
    their density away. A turn index that only one row of the group reached has no baseline: 0.

    Args:
        rewards: [B, L] float.
        discounts: [B, L] float, read on the last action token of each turn: γ per turn.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int, turn a token belongs to.
        group_ids: [B] int.
        num_groups: static number of groups.
        num_turns: static bound on turn ids, at most L and by default L. Tokens of turns beyond it
            get 0, so give the run's turn limit or leave it out.
        horizon: "episode" for rewards-to-go, "turn" for the turn's own immediate reward.
        baseline: "mean", or "leave_one_out" for the mean of the other rows.
        scale: "none", or "std" to divide by the std at equal group and turn.
        ddof: degrees of freedom taken off in that std's variance.
        epsilon: added to that std.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B, L] float32, the same on all action tokens of a turn, 0 off the mask.
    """
    check_choice("horizon", horizon, ("episode", "turn"))
    check_choice("baseline", baseline, ("mean", "leave_one_out"))
    check_choice("scale", scale, ("none", "std"))
    check_rows(rewards, action_mask, turn_ids, group_ids)
    num_turns = rewards.shape[1] if num_turns is None else num_turns
    returns, present = turn_returns(
        rewards, discounts, action_mask, turn_ids, num_turns=num_turns, horizon=horizon
    )
    cells = turn_cells(present, group_ids, num_groups=num_groups)
    num_cells = num_groups * num_turns
    centered, size = center(returns.reshape(-1), cells, num_cells, axis_name)
    credit = centered if baseline == "mean" else without_self(centered, size)
    if scale == "std":
        std = group_std(centered, cells, num_cells, ddof, axis_name)
        credit = credit / (masking.take_group(std, cells) + epsilon)
    return masking.spread_turns(credit.reshape(present.shape), turn_ids, action_mask)


def mt_grpo(
    turn_rewards: Array,
    outcome_scores: Array,
    action_mask: Array,
    turn_ids: Array,
    group_ids: Array,
    *,
    num_groups: int,
    num_turns: int | None = None,
    turn_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """MT-GRPO: a turn's own reward and the outcome, normalized apart and then added.

        Aᵢₖ = w_I A_I(i, k) + w_O A_O(i)     on every turn but the last
        Aᵢₖ = A_O(i)                         on the last turn

    A_O is the outcome normalized over the group; A_I(i, k) the reward of turn k normalized over the
    group's *non-final* turns k. A row with a single turn never acted on a tool's answer: it gets
    the advantage of the summed reward, normalized over the group. Zeng et al. 2025,
    https://arxiv.org/abs/2505.11821, eqs. 6 and 7 for two turns (there A_I + α A_O; their code
    weighs A_I instead); more turns follow the same rule, turn by turn. Where only one row of the
    group has a non-final turn k, A_I = 0.

    Args:
        turn_rewards: [B, L] float, intermediate rewards on their turn's action tokens; the outcome
            is *not* among them.
        outcome_scores: [B] float.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        group_ids: [B] int.
        num_groups: static number of groups.
        num_turns: static bound on turn ids, L by default.
        turn_weight: w_I.
        outcome_weight: w_O.
        ddof: degrees of freedom taken off in variances.
        epsilon: added to stds.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B, L] float32, the same on all action tokens of a turn, 0 off the mask.
    """
    check_rows(turn_rewards, action_mask, turn_ids, group_ids)
    num_turns = turn_rewards.shape[1] if num_turns is None else num_turns
    discounts = jnp.ones(turn_rewards.shape, jnp.float32)
    per_turn, present = turn_returns(
        turn_rewards, discounts, action_mask, turn_ids, num_turns=num_turns, horizon="turn"
    )
    is_last = present & (jnp.cumsum(present[:, ::-1], axis=1)[:, ::-1] == 1)
    count = jnp.sum(present, axis=1)

    def normalized(x, ids, num):
        return group_normalized(
            x, ids, num_groups=num, ddof=ddof, epsilon=epsilon, axis_name=axis_name
        )

    outcome = normalized(outcome_scores, group_ids, num_groups)
    summed = outcome_scores + masking.masked_sum(turn_rewards, action_mask, axis=1)
    combined = normalized(summed, group_ids, num_groups)
    cells = turn_cells(present & ~is_last, group_ids, num_groups=num_groups)
    turn = normalized(per_turn.reshape(-1), cells, num_groups * num_turns).reshape(present.shape)

    final = jnp.where(count > 1, outcome, combined)
    before = turn_weight * turn + outcome_weight * outcome[:, None]
    credit = jnp.where(is_last, final[:, None], before)
    inside = action_mask & masking.in_group(group_ids, num_groups=num_groups)[:, None]
    return masking.spread_turns(credit, turn_ids, inside)


def istar(
    scores: Array,
    step_rewards: Array,
    action_mask: Array,
    turn_ids: Array,
    group_ids: Array,
    *,
    num_groups: int,
    num_turns: int | None = None,
    step_weight: float = 1.0,
    baseline: str = "mean",
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """iStar: outcome credit plus implicit step rewards compared over *all* turns of the group.

        Aᵢₖ = A_E(i) + α A_S(i, k)

    A_E normalizes the outcome over the group's trajectories, A_S the step reward over all turns of
    all its trajectories; `baseline="leave_one_out"` takes RLOO for both. Liu et al. 2025,
    https://arxiv.org/abs/2509.19199, section 3. (Public code builds the leave-one-out baseline
    from one turn per trajectory.) Step rewards come from `losses.implicit_step_rewards`.

    Args:
        scores: [B] float, outcome of each trajectory.
        step_rewards: [B, L] float, summed over the action tokens of each turn.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        group_ids: [B] int.
        num_groups: static number of groups.
        num_turns: static bound on turn ids, L by default.
        step_weight: α.
        baseline: "mean" (divided by the std) or "leave_one_out" (not divided).
        ddof: degrees of freedom taken off in variances.
        epsilon: added to stds.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B, L] float32, the same on all action tokens of a turn, 0 off the mask.
    """
    check_choice("baseline", baseline, ("mean", "leave_one_out"))
    check_rows(step_rewards, action_mask, turn_ids, group_ids)
    num_turns = step_rewards.shape[1] if num_turns is None else num_turns
    discounts = jnp.ones(step_rewards.shape, jnp.float32)
    per_turn, present = turn_returns(
        step_rewards, discounts, action_mask, turn_ids, num_turns=num_turns, horizon="turn"
    )
    step_groups = jnp.where(present, masking.as_ids(group_ids)[:, None], -1)

    def compared(x, ids):
        if baseline == "leave_one_out":
            return leave_one_out(x, ids, num_groups=num_groups, axis_name=axis_name)
        return group_normalized(
            x, ids, num_groups=num_groups, ddof=ddof, epsilon=epsilon, axis_name=axis_name
        )

    step = compared(per_turn.reshape(-1), step_groups.reshape(-1)).reshape(present.shape)
    episode = compared(scores, group_ids)
    return masking.spread_turns(episode[:, None] + step_weight * step, turn_ids, action_mask)


def turn_returns(
    rewards: Array,
    discounts: Array,
    action_mask: Array,
    turn_ids: Array,
    *,
    num_turns: int,
    horizon: str = "episode",
) -> tuple[Array, Array]:
    """Reward-to-go (or immediate reward) of every turn, and which turns there are.

    Args:
        rewards: [..., L] float.
        discounts: [..., L] float, read on the last action token of each turn.
        action_mask: [..., L] bool.
        turn_ids: [..., L] int.
        num_turns: T, a static number.
        horizon: "episode" for Ĝₖ = Rₖ + γₖ Ĝₖ₊₁, "turn" for Rₖ.

    Returns:
        ([..., T] float32 returns, 0 for absent turns; [..., T] bool, True for turns with actions).

    Raises:
        ValueError: an unknown horizon.
    """
    check_choice("horizon", horizon, ("episode", "turn"))
    last = masking.turn_last_position(turn_ids, action_mask, num_turns=num_turns)
    present = last >= 0
    turn_rewards = masking.turn_sum(rewards, turn_ids, action_mask, num_turns=num_turns)
    if horizon == "turn":
        return turn_rewards, present
    gammas = masking.take_positions(jnp.asarray(discounts).astype(jnp.float32), last)
    return returns_to_go(turn_rewards, gammas, present), present


def returns_to_go(rewards: Array, discounts: Array, mask: Array) -> Array:
    """Gₖ = rₖ + γₖ Gₖ₊₁ over masked entries of the last axis; [..., T] float32, 0 off the mask.

    Off the mask the rows must be finite: a gradient would multiply what is there by 0.
    """

    def step(next_return, inputs):
        reward, gamma, here = inputs
        found = jnp.where(here, reward + gamma * next_return, next_return)
        return found, found

    start = masking.zero_carry([rewards, discounts])
    return masking.zero_off(masking.scan_back(step, start, [rewards, discounts, mask]), mask)


def turn_cells(present: Array, group_ids: Array, *, num_groups: int) -> Array:
    """One id per (group, turn index), −1 for absent turns and padding rows.

    Args:
        present: [B, T] bool.
        group_ids: [B] int.
        num_groups: static number of groups.

    Returns:
        [B·T] int32 in [−1, num_groups · T).
    """
    num_turns = present.shape[1]
    inside = present & masking.in_group(group_ids, num_groups=num_groups)[:, None]
    turns = jnp.arange(num_turns, dtype=jnp.int32)[None, :]
    return jnp.where(inside, masking.as_ids(group_ids)[:, None] * num_turns + turns, -1).reshape(-1)


def check_rows(rewards: Array, action_mask: Array, turn_ids: Array, group_ids: Array) -> None:
    """[B, L] rewards, mask and turn ids that belong with [B] group ids."""
    arguments.check(
        rewards=(rewards, float, "B L"),
        action_mask=(action_mask, bool, "B L"),
        turn_ids=(turn_ids, int, "B L"),
        group_ids=(group_ids, int, "B"),
    )
