"""Critic-free estimators: trajectories compared with others of their group. Public in `advantages`.

A group is the set of rows with one id. Ids are data: they need not be contiguous nor sorted, nor
groups of equal size; ids out of [0, num_groups) mark padding rows, which get 0 and count nowhere.
A group of one has no baseline: it gets 0. A group whose scores are all equal gets exactly 0.
With `axis_name` the groups may be spread over the devices of a mapped axis.
"""

import chex
import jax
import jax.numpy as jnp

from jaxagentrl import masking
from jaxagentrl.types import Array


def group_normalized(
    scores: Array,
    group_ids: Array,
    *,
    num_groups: int,
    scale: str = "std",
    ddof: int = 1,
    epsilon: float = 1e-6,
    axis_name: masking.AxisName = None,
) -> Array:
    """Each score against its group's mean: GRPO, and Dr.GRPO without the scale.

        Aᵢ = (Rᵢ − mean) / (std + ε)     scale "std"   GRPO,    https://arxiv.org/abs/2402.03300
        Aᵢ =  Rᵢ − mean                  scale "none"  Dr.GRPO, https://arxiv.org/abs/2503.20783

    Peers differ in the std: sample (ddof 1) + 1e-6 in verl, TRL and tunix, population (ddof 0) +
    1e-8 elsewhere; for [1, 0, 0, 0] these give 1.5 and 1.73. verl gives a group of one its raw
    score; here it gets 0.

    Args:
        scores: [B] float, one per trajectory.
        group_ids: [B] int.
        num_groups: static number of groups.
        scale: "std" or "none".
        ddof: degrees of freedom taken off in the variance.
        epsilon: added to the std.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B] float32.

    >>> group_normalized(jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([7, 7, 7, 7]), num_groups=8,
    ...                  scale="none")
    Array([ 0.75, -0.25, -0.25, -0.25], dtype=float32)
    """
    if scale not in ("std", "none"):
        raise ValueError(f'scale: got {scale!r}, expected "std" (GRPO) or "none" (Dr.GRPO)')
    centered, _ = _center(scores, group_ids, num_groups, axis_name)
    if scale == "none":
        return centered
    std = _group_std(centered, group_ids, num_groups, ddof, axis_name)
    return centered / (masking.take_group(std, group_ids) + epsilon)


def leave_one_out(
    scores: Array, group_ids: Array, *, num_groups: int, axis_name: masking.AxisName = None
) -> Array:
    """RLOO: each score against the mean of the *others* of its group.

        Aᵢ = Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ = G/(G−1) · (Rᵢ − mean)

    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740. The baseline does not contain the
    trajectory's own score, so the gradient is unbiased. A group of one gets 0.

    Args:
        scores: [B] float, one per trajectory (with the summed k1 penalty, if KL is in the reward).
        group_ids: [B] int.
        num_groups: static number of groups.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B] float32.
    """
    centered, size = _center(scores, group_ids, num_groups, axis_name)
    return centered * size / jnp.maximum(size - 1.0, 1.0)


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
    """Dense turn rewards without a critic: each turn's reward-to-go against its group at equal turn.

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
    _check_choice("horizon", horizon, ("episode", "turn"))
    _check_choice("baseline", baseline, ("mean", "leave_one_out"))
    _check_choice("scale", scale, ("none", "std"))
    chex.assert_rank([rewards, discounts, action_mask, turn_ids, group_ids], [2, 2, 2, 2, 1])
    chex.assert_equal_shape([rewards, discounts, action_mask, turn_ids])
    chex.assert_type([rewards, discounts, action_mask, turn_ids], [float, float, bool, int])
    chex.assert_equal_shape_prefix([rewards, group_ids], 1)
    num_turns = rewards.shape[1] if num_turns is None else num_turns
    returns, present = turn_returns(
        rewards, discounts, action_mask, turn_ids, num_turns=num_turns, horizon=horizon
    )
    # One cell per (group, turn); absent turns and padding rows go to no cell.
    inside = present & masking.in_group(group_ids, num_groups=num_groups)[:, None]
    turns = jnp.arange(num_turns, dtype=jnp.int32)[None, :]
    cells = jnp.where(inside, group_ids[:, None] * num_turns + turns, -1).reshape(-1)
    num_cells = num_groups * num_turns
    if baseline == "mean":
        credit, _ = _center(returns.reshape(-1), cells, num_cells, axis_name)
    else:
        credit = leave_one_out(
            returns.reshape(-1), cells, num_groups=num_cells, axis_name=axis_name
        )
    if scale == "std":
        centered, _ = _center(returns.reshape(-1), cells, num_cells, axis_name)
        std = _group_std(centered, cells, num_cells, ddof, axis_name)
        credit = credit / (masking.take_group(std, cells) + epsilon)
    return masking.spread_turns(credit.reshape(present.shape), turn_ids, action_mask)


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
        ([..., T] float32 returns, 0 for absent turns; [..., T] bool, True for turns with an action).
    """
    last = masking.turn_last_position(turn_ids, action_mask, num_turns=num_turns)
    present = last >= 0
    turn_rewards = masking.turn_sum(rewards, turn_ids, action_mask, num_turns=num_turns)
    if horizon == "turn":
        return turn_rewards, present
    gammas = masking.take_positions(masking.zero_off(discounts, action_mask), last)

    def step(next_return, inputs):
        reward, gamma, here = inputs
        found = reward + gamma * next_return
        # A turn without an action is skipped, as observation tokens are.
        return jnp.where(here, found, next_return), jnp.where(here, found, 0.0)

    time_major = tuple(jnp.moveaxis(x, -1, 0) for x in (turn_rewards, gammas, present))
    start = jnp.isnan(turn_rewards[..., 0] + gammas[..., 0]).astype(jnp.float32) * 0.0
    _, returns = jax.lax.scan(step, start, time_major, reverse=True)
    return jnp.moveaxis(returns, 0, -1), present


def reinforce_plus_plus_baseline(
    scores: Array,
    group_ids: Array,
    action_mask: Array,
    *,
    num_groups: int,
    axis_name: masking.AxisName = None,
) -> Array:
    """REINFORCE++-baseline: group mean taken off, then whitened over all action tokens.

        Aᵢₜ = whiten(Rᵢ − mean of group)     no std per group

    https://arxiv.org/abs/2501.03262. Dividing by one global std instead of one per group keeps
    groups that nearly always win or lose from being blown up.

    Args:
        scores: [B] float.
        group_ids: [B] int.
        action_mask: [B, L] bool.
        num_groups: static number of groups.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [B, L] float32, 0 off the mask.
    """
    centered, _ = _center(scores, group_ids, num_groups, axis_name)
    counted = action_mask & masking.in_group(group_ids, num_groups=num_groups)[:, None]
    return whiten(spread(centered, counted), counted, axis_name=axis_name)


def whiten(
    x: Array,
    mask: Array,
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    epsilon: float = 1e-8,
    axis_name: masking.AxisName = None,
) -> Array:
    """Zero mean and unit variance over the masked entries of the whole (global) batch.

        (x − mean) / √(var + ε)

    verl's convention: sample variance, ε under the root. Other code adds 1e-8 to the std, or takes
    the population variance. Entries that are all equal give exactly 0.

    Args:
        x: [...] float.
        mask: [...] bool, same shape.
        shift_mean: False keeps the mean and only divides.
        ddof: degrees of freedom taken off in the variance.
        epsilon: added to the variance.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [...] float32, 0 off the mask.
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type([x, mask], [float, bool])
    mean, var = masking.masked_mean_and_var(x, mask, ddof=ddof, axis_name=axis_name)
    kept = masking.zero_off(x, mask)
    kept = kept - mean if shift_mean else kept
    return jnp.where(mask, kept * jax.lax.rsqrt(var + epsilon), 0.0)


def spread(scores: Array, action_mask: Array) -> Array:
    """One score per trajectory to every action token of it: [B] → [B, L], 0 off the mask.

    Args:
        scores: [...] float.
        action_mask: [..., L] bool.

    Returns:
        [..., L] float32.
    """
    chex.assert_type([scores, action_mask], [float, bool])
    chex.assert_equal_shape([scores, action_mask[..., 0]])
    return masking.zero_off(jnp.asarray(scores)[..., None], action_mask)


def _center(
    scores: Array, group_ids: Array, num_groups: int, axis_name: masking.AxisName
) -> tuple[Array, Array]:
    """Scores less their group's mean, and the size of each row's group; both [B], 0 for padding.

    Sums run over R − min R, which makes groups of equal scores come out exactly 0.
    """
    chex.assert_rank([scores, group_ids], 1)
    chex.assert_equal_shape([scores, group_ids])
    chex.assert_type([scores, group_ids], [float, int])
    inside = masking.in_group(group_ids, num_groups=num_groups)
    size = masking.group_count(group_ids, num_groups=num_groups, axis_name=axis_name)
    lowest = masking.group_min(scores, group_ids, num_groups=num_groups, axis_name=axis_name)
    lowest = jax.lax.stop_gradient(masking.take_group(lowest, group_ids))
    shifted = masking.zero_off(scores, inside) - lowest
    sums = masking.group_sum(shifted, group_ids, num_groups=num_groups, axis_name=axis_name)
    mean = masking.take_group(sums / jnp.maximum(size, 1.0), group_ids)
    return jnp.where(inside, shifted - mean, 0.0), masking.take_group(size, group_ids)


def _group_std(
    centered: Array,
    group_ids: Array,
    num_groups: int,
    ddof: int,
    axis_name: masking.AxisName,
) -> Array:
    """[num_groups] std of centered scores, √(Σ x² / (n − ddof)); 0 for groups of n ≤ ddof."""
    size = masking.group_count(group_ids, num_groups=num_groups, axis_name=axis_name)
    squares = masking.group_sum(
        jnp.square(centered), group_ids, num_groups=num_groups, axis_name=axis_name
    )
    var = squares / jnp.maximum(size - ddof, 1.0)
    # The root of 0 has an infinite slope; equal scores must have a finite gradient.
    positive = var > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1.0)), 0.0)


def _check_choice(name: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        expected = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: got {got!r}, expected one of {expected}")
