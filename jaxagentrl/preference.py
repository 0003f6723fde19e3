"""Implicit process rewards: trajectory-DPO and the step rewards it teaches. Public in `losses`."""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.types import Array


def trajectory_dpo(
    logprobs: Array,
    old_logprobs: Array,
    action_mask: Array,
    succeeded: Array,
    group_ids: Array,
    *,
    num_groups: int,
    beta: float,
    axis_name: masking.AxisName = None,
) -> Array:
    """DPO between the successes and the failures of each group, summed over whole trajectories.

        s_i = β Σₜ mₜ (log π_φ − log π_old)
        loss = mean over pairs (i succeeded, j failed, same group) of −log σ(sᵢ − sⱼ)

    The loss of iStar's implicit process reward model, Liu et al. 2025,
    https://arxiv.org/abs/2509.19199, eq. 6, whose minimizer is a step-wise Bradley-Terry reward.
    π_old is the *rolling* policy that drew the trajectories. Public code averages over steps
    where the paper sums, and detaches log π_φ before the loss so that nothing is learned; here
    the gradient reaches φ through `logprobs`. All pairs count; B² numbers are formed.

    Args:
        logprobs: [B, L] float, log π_φ of the reward model.
        old_logprobs: [B, L] float, no gradient.
        action_mask: [B, L] bool.
        succeeded: [B] bool.
        group_ids: [B] int.
        num_groups: static number of groups.
        beta: β, 0.05 in the paper.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [] float32, 0 when no group has both a success and a failure.
    """
    arguments.check(
        logprobs=(logprobs, float, "B L"), succeeded=(succeeded, bool, "B"), group_ids=(group_ids, int, "B")
    )
    new, old = masking.clean(dict(logprobs=logprobs, old_logprobs=old_logprobs), action_mask, differentiable=1)
    scores = beta * jnp.sum(new - old, axis=1)
    inside = masking.in_group(group_ids, num_groups=num_groups)
    others = (scores, succeeded, group_ids, inside)
    if axis_name is not None:
        others = jax.lax.all_gather(others, axis_name, tiled=True)
    other_scores, other_succeeded, other_groups, other_inside = others
    winners = (inside & succeeded)[:, None]
    losers = (other_inside & ~other_succeeded)[None, :]
    pairs = winners & losers & (group_ids[:, None] == other_groups[None, :])
    losses = -jax.nn.log_sigmoid(scores[:, None] - other_scores[None, :])
    return masking.masked_mean(losses, pairs, axis_name=axis_name)


def implicit_step_rewards(
    logprobs: Array,
    old_logprobs: Array,
    action_mask: Array,
    turn_ids: Array,
    turn_ends: Array,
    *,
    beta: float,
) -> Array:
    """Step rewards of an implicit reward model, on each turn's last action token.

        r(turn k) = β Σ over its action tokens of (log π_φ − log π_old)

    https://arxiv.org/abs/2509.19199, eq. 7; for `advantages.istar`. No gradient.

    Args:
        logprobs: [..., L] float, log π_φ of the reward model.
        old_logprobs: [..., L] float.
        action_mask: [..., L] bool.
        turn_ids: [..., L] int.
        turn_ends: [..., L] bool.
        beta: β.

    Returns:
        [..., L] float32, 0 but on turn ends.
    """
    new, old = masking.clean(dict(logprobs=logprobs, old_logprobs=old_logprobs), action_mask, differentiable=0)
    summed = masking.sequence_sum(beta * (new - old), action_mask, turn_ids=turn_ids)
    return masking.zero_off(summed, masking.closed_turn_ends(action_mask, turn_ends))
