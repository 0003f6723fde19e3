"""Critic-free estimators: trajectories compared with others of their group. Public in `advantages`.

A group is the set of rows with one id. Ids are data: they need not be contiguous nor sorted, nor
groups of equal size; ids out of [0, num_groups) mark padding rows, which get 0 and count nowhere.
A group of one has no baseline: it gets 0. A group whose scores are all equal gets exactly 0. Scores that
are NaN or infinite come through as what is not finite, in groups of one, too.
With `axis_name` the groups may be spread over the devices of a mapped axis.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.types import Array

# Bound of the relative rounding error of a float32 sum of up to some hundred rewards: 32 units of 2⁻²⁴.
ROUNDING = 2.0**-19


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
    check_choice("scale", scale, ("std", "none"))
    centered, _ = center(scores, group_ids, num_groups, axis_name)
    if scale == "none":
        return centered
    std = group_std(centered, group_ids, num_groups, ddof, axis_name)
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
    centered, size = center(scores, group_ids, num_groups, axis_name)
    return without_self(centered, size)


def without_self(centered: Array, size: Array) -> Array:
    """Scores less the mean of all, as scores less the mean of the others; a group of one has 0 of both."""
    return centered * size / jnp.maximum(size - 1.0, 1.0)


def remax(scores: Array, greedy_scores: Array) -> Array:
    """ReMax: each score against that of the greedy (temperature 0) episode of the same task.

        Aᵢ = Rᵢ − R_greedy

    Li et al. 2024, https://arxiv.org/abs/2310.10505, eq. 6. Needs one more episode per task instead
    of a group.

    Args:
        scores: [B] float.
        greedy_scores: [B] float, the greedy score of each row's task.

    Returns:
        [B] float32.
    """
    arguments.check(scores=(scores, float, "..."), greedy_scores=(greedy_scores, float, "..."))
    return jnp.asarray(scores, jnp.float32) - jnp.asarray(greedy_scores, jnp.float32)


def opo(
    scores: Array,
    lengths: Array,
    group_ids: Array,
    *,
    num_groups: int,
    axis_name: masking.AxisName = None,
) -> Array:
    """OPO: each score against its group's length-weighted mean.

        Aᵢ = Rᵢ − Σⱼ lⱼ Rⱼ / Σⱼ lⱼ

    The baseline of least variance when gradient norms grow with length. Hao et al. 2025,
    https://arxiv.org/abs/2505.23585. Equal lengths give Dr.GRPO's advantage.

    Args:
        scores: [B] float.
        lengths: [B] float, action tokens of each trajectory.
        group_ids: [B] int.
        num_groups: static number of groups.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [B] float32.
    """
    arguments.check(scores=(scores, float, "B"), lengths=(lengths, float, "B"), group_ids=(group_ids, int, "B"))
    # Shifting all scores of a group leaves A as it is, so start from the centered ones.
    centered, _ = center(scores, group_ids, num_groups, axis_name)
    weighted = masking.group_sum(
        centered * lengths, group_ids, num_groups=num_groups, axis_name=axis_name
    )
    weight = masking.group_sum(lengths, group_ids, num_groups=num_groups, axis_name=axis_name)
    baseline = masking.divide(weighted, weight)
    return centered - masking.take_group(baseline, group_ids)


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
    centered, _ = center(scores, group_ids, num_groups, axis_name)
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
    the population variance. Entries that are all equal give exactly 0, if the mean is taken off.

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
    arguments.check(x=(x, float, "..."), mask=(mask, bool, "..."))
    kept = masking.zero_off(x, mask)
    # The mean of large numbers is rounded to their last digit, that of what they are above the least is not.
    shifted = kept - masking.masked_min(x, mask, axis_name=axis_name)
    mean, var = masking.masked_mean_and_var(shifted, mask, ddof=ddof, axis_name=axis_name)
    kept = shifted - mean if shift_mean else kept
    return jnp.where(mask, kept * jax.lax.rsqrt(var + epsilon), 0.0)


def spread(scores: Array, action_mask: Array) -> Array:
    """One score per trajectory to every action token of it: [B] → [B, L], 0 off the mask.

    Args:
        scores: [...] float.
        action_mask: [..., L] bool.

    Returns:
        [..., L] float32.
    """
    arguments.check(action_mask=(action_mask, bool, "... L"), scores=(scores, float, "..."))
    return masking.zero_off(jnp.asarray(scores)[..., None], action_mask)


def center(
    scores: Array,
    group_ids: Array,
    num_groups: int,
    axis_name: masking.AxisName,
    counted: Array | None = None,
) -> tuple[Array, Array]:
    """Scores less their group's mean, and the size of each row's group; both [B], 0 for padding.

    Sums run over R − min R, which makes groups of equal scores come out exactly 0; and so do groups whose
    scores differ by no more than `ROUNDING` of the largest. With `counted`
    ([B] bool, True somewhere in every group) mean and size are those of the counted rows; which scores
    are equal is a matter of all rows.
    """
    arguments.check(scores=(scores, float, "B"), group_ids=(group_ids, int, "B"))
    group_ids = masking.as_ids(group_ids)
    inside = masking.in_group(group_ids, num_groups=num_groups)
    ids = group_ids if counted is None else jnp.where(counted, group_ids, -1)
    size = masking.group_count(ids, num_groups=num_groups, axis_name=axis_name)
    lowest = masking.group_min(scores, group_ids, num_groups=num_groups, axis_name=axis_name)
    shifted = masking.zero_off(scores, inside) - masking.take_group(lowest, group_ids)
    sums = masking.group_sum(shifted, ids, num_groups=num_groups, axis_name=axis_name)
    mean = masking.take_group(masking.divide(sums, size), group_ids)
    # Scores that are sums of the same rewards in another order differ by rounding, which is no signal.
    highest = -masking.group_min(-scores, group_ids, num_groups=num_groups, axis_name=axis_name)
    rounding = ROUNDING * jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    same = masking.take_group((highest - lowest <= rounding).astype(jnp.float32), group_ids) > 0
    return masking.zero_idle(shifted - mean, same), masking.take_group(size, group_ids)


def group_std(
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
    var = masking.divide(squares, size - ddof)
    # The root of 0 has an infinite slope; equal scores must have a finite gradient.
    nothing = var <= 0
    return jnp.where(nothing, 0.0, jnp.sqrt(jnp.where(nothing, 1.0, var)))


def check_choice(name: str, got: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `got` is one of `choices`."""
    if got not in choices:
        expected = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}: got {got!r}, expected one of {expected}")
