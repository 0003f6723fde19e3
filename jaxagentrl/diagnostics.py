"""What to watch during multi-turn RL, as pure functions of arrays.

All are plain numbers (or one per turn) over the global batch; `axis_name` names the mapped axis
that holds the rest of it. Nothing here takes part in a gradient.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.divergences import MAX_LOG_RATIO, kl
from jaxagentrl.group_advantages import center, check_choice, group_std
from jaxagentrl.types import Array

_ROUNDING = 1e-11  # of a variance, relative: that of its terms, some 50 units of 2⁻²⁴, squared


def explained_variance(
    values: Array, returns: Array, mask: Array, *, axis_name: masking.AxisName = None
) -> Array:
    """1 − var(returns − values) / var(returns): 1 for a perfect critic, 0 for a constant one.

    Args:
        values: [...] float.
        returns: [...] float.
        mask: [...] bool.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [] float32; 0 where the returns do not vary.
    """
    values, returns = masking.clean(dict(values=values, returns=returns), mask, differentiable=0)
    mean, total = masking.masked_mean_and_var(returns, mask, axis_name=axis_name)
    _, spread = masking.masked_mean_and_var(values, mask, axis_name=axis_name)
    total = _but_rounding(total, jnp.square(mean) + spread)
    _, left = masking.masked_mean_and_var(returns - values, mask, axis_name=axis_name)
    return masking.divide(total - left, total)


def explained_variance_per_turn(
    values: Array,
    returns: Array,
    action_mask: Array,
    turn_ids: Array,
    *,
    num_turns: int,
    axis_name: masking.AxisName = None,
) -> Array:
    """`explained_variance` of the action tokens of each turn index by itself.

    A critic that only knows which turn it is explains the variance between turns and none within.

    Args:
        values, returns: [B, L] float.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        num_turns: T, static.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [T] float32; 0 where the returns of a turn do not vary.
    """
    values, returns = masking.clean(dict(values=values, returns=returns), action_mask, differentiable=0)
    ids = jnp.where(action_mask, masking.as_ids(turn_ids), -1).reshape(-1)

    def squares(x):
        centered, _ = center(x.reshape(-1), ids, num_turns, axis_name)
        return masking.group_sum(
            jnp.square(centered), ids, num_groups=num_turns, axis_name=axis_name
        )

    sizes = masking.group_sum(
        jnp.square(returns.reshape(-1)), ids, num_groups=num_turns, axis_name=axis_name
    )
    total, left = squares(returns), squares(returns - values)
    total = _but_rounding(total, sizes + squares(values))
    return masking.divide(total - left, total)


def _but_rounding(variation: Array, sizes: Array) -> Array:
    """Squares of what returns vary by, without those of rounding. Returns are A + V: where they are all one
    number they differ by what V was rounded by, whose squares are a part of `sizes`."""
    return masking.zero_idle(variation, variation <= _ROUNDING * sizes)


def clip_fractions(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    action_mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    axis_name: masking.AxisName = None,
) -> dict[str, Array]:
    """Share of action tokens whose gradient the clipped surrogate has removed.

    Returns:
        "low": ρ < 1 − clip_low with A < 0; "high": ρ > 1 + clip_high with A > 0; "dual": ρ > c with
        A < 0 (0 without dual clip). [] float32 each. Arguments as in `losses.clipped_surrogate`.
    """
    rows = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = masking.clean(rows, action_mask, differentiable=0)
    ratio = jnp.exp(logprobs - old_logprobs)

    def share(hit):
        return masking.masked_mean(hit.astype(jnp.float32), action_mask, axis_name=axis_name)

    dual = jnp.zeros_like(ratio, bool) if dual_clip is None else ratio > dual_clip
    return {
        "low": share((ratio < 1.0 - clip_low) & (advantages < 0)),
        "high": share((ratio > 1.0 + clip_high) & (advantages > 0)),
        "dual": share(dual & (advantages < 0)),
    }


def is_clipped(
    surrogate: str,
    log_ratio: Array,
    advantages: Array,
    action_mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    sequence_ids: Array | None = None,
) -> Array:
    """Where a surrogate's clip acts: on the ratio of the token or, GSPO, of its sequence, and, where the clip
    is of an objective, on the side that the advantage would go on to. Dual clip apart.

    Args:
        surrogate: "clipped", "gspo", "cispo" or "policy_gradient".
        log_ratio: [B, L] float, log π − log π_old, 0 off the mask.
        advantages: [B, L] float.
        action_mask: [B, L] bool.
        clip_low, clip_high: as in `losses.clipped_surrogate`.
        sequence_ids: [B, L] int in [0, L), of GSPO's sequences where a row holds several; None: each is one.

    Returns:
        [B, L] bool.

    Raises:
        ValueError: an unknown surrogate.
    """
    check_choice("surrogate", surrogate, ("clipped", "gspo", "cispo", "policy_gradient"))
    if surrogate == "policy_gradient":
        return jnp.zeros_like(action_mask)
    if surrogate == "gspo":
        summed, length = (
            masking.sequence_sum(x, action_mask, turn_ids=sequence_ids)
            for x in (log_ratio, action_mask.astype(jnp.float32))
        )
        log_ratio = masking.divide(summed, length)
    ratio = jnp.exp(log_ratio)
    above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
    if surrogate != "cispo":
        above, below = above & (advantages > 0), below & (advantages < 0)
    return above | below


def approximate_kl(
    old_logprobs: Array,
    logprobs: Array,
    action_mask: Array,
    *,
    axis_name: masking.AxisName = None,
) -> dict[str, Array]:
    """How far the policy has moved: mean k1, k2 and k3 of KL(old‖current) on tokens drawn by old.

    Args:
        old_logprobs: [..., L] float, the policy that drew the tokens.
        logprobs: [..., L] float.
        action_mask: [..., L] bool.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        "k1", "k2", "k3": [] float32.
    """
    return {
        name: masking.masked_mean(
            jax.lax.stop_gradient(
                kl(old_logprobs, logprobs, estimator=name, action_mask=action_mask)
            ),
            action_mask,
            axis_name=axis_name,
        )
        for name in ("k1", "k2", "k3")
    }


def effective_sample_size(
    ratios: Array, mask: Array, *, axis_name: masking.AxisName = None
) -> Array:
    """(Σ w)² / (n Σ w²) = 1 / mean((w / mean w)²), in (0, 1]; 1 when all weights are equal.

    Args:
        ratios: [...] float, importance ratios ≥ 0.
        mask: [...] bool.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [] float32; 0 for an empty mask.
    """
    ratios = masking.zero_off(ratios, mask)
    # Divided by the largest weight first: squares of e²⁰ would leave float32.
    largest = jnp.max(ratios, initial=0.0)
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    scaled = masking.divide(ratios, largest)
    mean = masking.masked_mean(scaled, mask, axis_name=axis_name)
    mean_square = masking.masked_mean(jnp.square(scaled), mask, axis_name=axis_name)
    return masking.divide(jnp.square(mean), mean_square)


def sampler_mismatch(
    old_logprobs: Array,
    sampler_logprobs: Array,
    action_mask: Array,
    *,
    axis_name: masking.AxisName = None,
) -> dict[str, Array]:
    """How far the scoring graph is from the sampler on the same parameters.

    Args:
        old_logprobs: [..., L] float, π_old.
        sampler_logprobs: [..., L] float, μ.
        action_mask: [..., L] bool.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [] float32 each: "max_abs" largest |log π_old − log μ|; "k1" and "k3" of KL(μ‖π_old);
        "max_ratio" largest w = π_old/μ; "ess" effective sample size of w.
    """
    rows = dict(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs)
    old_logprobs, sampler_logprobs = masking.clean(rows, action_mask, differentiable=0)
    gap = old_logprobs - sampler_logprobs
    ratios = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    ratios = jnp.where(action_mask, ratios, 0.0)

    def largest(x):
        found = jnp.max(x, initial=0.0)
        return found if axis_name is None else jax.lax.pmax(found, axis_name)

    moved = approximate_kl(sampler_logprobs, old_logprobs, action_mask, axis_name=axis_name)
    return {
        "max_abs": largest(jnp.abs(gap)),
        "k1": moved["k1"],
        "k3": moved["k3"],
        "max_ratio": largest(ratios),
        "ess": effective_sample_size(ratios, action_mask, axis_name=axis_name),
    }


def group_signal(
    scores: Array, group_ids: Array, *, num_groups: int, axis_name: masking.AxisName = None
) -> dict[str, Array]:
    """What there is to learn from comparing within groups; the first thing to fall in a collapse.

    Args:
        scores: [B] float.
        group_ids: [B] int.
        num_groups: static number of groups.
        axis_name: mapped axis over which groups are spread.

    Returns:
        [] float32 each: "std_mean" mean over non-empty groups of the std of scores (sample std);
        "zero_signal" share of non-empty groups whose scores are all equal (groups of one included);
        "num_groups" how many are non-empty.
    """
    centered, _ = center(scores, group_ids, num_groups, axis_name)
    std = group_std(centered, group_ids, num_groups, 1, axis_name)
    size = masking.group_count(group_ids, num_groups=num_groups, axis_name=axis_name)
    present = size > 0
    return {
        "std_mean": masking.masked_mean(std, present),
        "zero_signal": masking.masked_mean((std == 0).astype(jnp.float32), present),
        "num_groups": masking.masked_count(present),
    }


def mean_entropy(
    entropies: Array, action_mask: Array, *, axis_name: masking.AxisName = None
) -> Array:
    """[] float32, mean entropy per action token in nats, from `[..., L]` entropies."""
    return masking.masked_mean(entropies, action_mask, axis_name=axis_name)


def credit_by_turn(
    advantages: Array,
    action_mask: Array,
    turn_ids: Array,
    *,
    num_turns: int,
    axis_name: masking.AxisName = None,
) -> dict[str, Array]:
    """Where the credit lands: advantages by turn index.

    Args:
        advantages: [B, L] float.
        action_mask: [B, L] bool.
        turn_ids: [B, L] int.
        num_turns: T, static.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [T] float32 each: "mean" advantage per token of turn k; "share" of the batch's Σ|A| that
        falls on turn k; "tokens" number of action tokens.
    """
    arguments.check(
        advantages=(advantages, float, "B L"), action_mask=(action_mask, bool, "B L"), turn_ids=(turn_ids, int, "B L")
    )
    credit = jnp.asarray(advantages).reshape(-1)
    ids = jnp.where(action_mask, masking.as_ids(turn_ids), -1).reshape(-1)

    def per_turn(x):
        return masking.group_sum(x, ids, num_groups=num_turns, axis_name=axis_name)

    tokens, weight = per_turn(jnp.ones_like(credit)), per_turn(jnp.abs(credit))
    return {
        "mean": masking.divide(per_turn(credit), tokens),
        "share": masking.divide(weight, masking.masked_sum(jnp.abs(advantages), action_mask, axis_name=axis_name)),
        "tokens": tokens,
    }
