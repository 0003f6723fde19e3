"""Policy-gradient losses, value loss, entropy and aggregation.

KL estimators (`divergences`), corrections for sampler mismatch (`importance`) and implicit process
rewards (`preference`) are public here too.

Losses are per token and to be minimized; `aggregate` turns them into a scalar. The token axis is
last, leading axes are batch, arithmetic is float32. `action_mask` is optional in the functions
that work token by token: with it, what lies off the mask is replaced before any arithmetic, so
NaN or −∞ there reaches neither value nor gradient, and the result there is exactly 0. Without it
every entry is taken to be meaningful.

Gradient flows through `logprobs` and `values` only: old log-probs, reference log-probs, old values,
advantages and returns are stopped here.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.divergences import (
    MAX_LOG_RATIO,
    adaptive_kl_coefficient,
    fixed_kl_coefficient,
    kl,
    kl_loss,
)
from jaxagentrl.importance import importance_mask, importance_ratios, truncated_importance_weights
from jaxagentrl.preference import implicit_step_rewards, trajectory_dpo
from jaxagentrl.types import Array

__all__ = [
    "adaptive_kl_coefficient",
    "aggregate",
    "aggregation_weights",
    "cispo",
    "clipped_surrogate",
    "entropy",
    "fixed_kl_coefficient",
    "implicit_step_rewards",
    "importance_mask",
    "importance_ratios",
    "kl",
    "kl_loss",
    "policy_gradient",
    "sequence_surrogate",
    "trajectory_dpo",
    "truncated_importance_weights",
    "value_loss",
]

AGGREGATION_MODES = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "constant",
)


def clipped_surrogate(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    action_mask: Array | None = None,
) -> Array:
    """PPO's clipped surrogate with separate low and high clips, and optional dual clip.

        ρₜ = exp(log πₜ − log π_oldₜ)
        ℓₜ = −min(ρₜ Aₜ, clip(ρₜ, 1 − clip_low, 1 + clip_high) Aₜ)
        ℓₜ ← min(ℓₜ, −c Aₜ)  where Aₜ < 0                          with dual clip c > 1

    Eq. 7 of Schulman et al. 2017, https://arxiv.org/abs/1707.06347; clip-higher (0.2, 0.28) from
    DAPO, https://arxiv.org/abs/2503.14476; dual clip from https://arxiv.org/abs/1912.09729 eq. 5.
    The exponent is clamped to ±20. At ρ = 1 the gradient is −A ∇log π, REINFORCE's.

    Args:
        logprobs: [..., L] float, current policy.
        old_logprobs: [..., L] float, policy the batch was scored with.
        advantages: [..., L] float.
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: c, 3 in verl, 10 in DAPO-style recipes; None switches it off.
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 loss per token.
    """
    rows = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = masking.clean(rows, action_mask, differentiable=1)
    return _clip(_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high, dual_clip)


def sequence_surrogate(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    action_mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    turn_ids: Array | None = None,
) -> Array:
    """GSPO: the clipped surrogate with one ratio per sequence, by trajectory or by turn.

        sᵢ = exp(1/nᵢ Σₜ mₜ (log πₜ − log π_oldₜ))          nᵢ action tokens of sequence i
        ℓₜ = −min(sᵢ Aₜ, clip(sᵢ, 1 − clip_low, 1 + clip_high) Aₜ)

    Zheng et al. 2025, https://arxiv.org/abs/2507.18071, eqs. 5 and 7. The gradient takes the
    paper's token form (eq. 13), sᵢ,ₜ = sg[sᵢ] · πₜ / sg[πₜ]: it equals the sequence form when A is
    the same on all tokens of the sequence and keeps token-level credit when it is not. Clips are
    far smaller than PPO's, about 3e-4 and 4e-4. The paper's objective is this with
    `aggregate(..., mode="sequence_mean_token_mean")`.

    Args:
        logprobs: [..., L] float, current policy.
        old_logprobs: [..., L] float.
        advantages: [..., L] float.
        action_mask: [..., L] bool.
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: as in `clipped_surrogate`.
        turn_ids: [..., L] int in [0, L); given, each turn is a sequence of its own (iStar's step
            ratio). None: the trajectory is.

    Returns:
        [..., L] float32 loss per token, 0 off the mask.
    """
    rows = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = masking.clean(rows, action_mask, differentiable=1)
    summed = masking.sequence_sum(logprobs - old_logprobs, action_mask, turn_ids=turn_ids)
    mean = summed * _inverse_length(action_mask, turn_ids)
    # Value of the sequence's ratio, gradient of the token's own log-prob.
    log_ratio = jax.lax.stop_gradient(mean - logprobs) + logprobs
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    loss = _clip(ratio, advantages, clip_low, clip_high, dual_clip)
    return jnp.where(action_mask, loss, 0.0)


def cispo(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_low: float,
    clip_high: float,
    action_mask: Array | None = None,
) -> Array:
    """CISPO: the clipped ratio is a constant weight, so clipping never removes the gradient.

        ℓₜ = −sg[clip(ρₜ, 1 − clip_low, 1 + clip_high)] Aₜ log πₜ

    MiniMax-M1, https://arxiv.org/abs/2506.13585, eqs. 4 and 5 (there without a lower clip:
    clip_low = 1), with group-relative A and `aggregate(..., mode="token_mean")`.

    Args:
        logprobs: [..., L] float, current policy.
        old_logprobs: [..., L] float.
        advantages: [..., L] float.
        clip_low: ε below 1.
        clip_high: ε above 1.
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 loss per token.
    """
    rows = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs, advantages = masking.clean(rows, action_mask, differentiable=1)
    ratio = jnp.clip(_ratio(logprobs, old_logprobs), 1.0 - clip_low, 1.0 + clip_high)
    return -jax.lax.stop_gradient(ratio) * advantages * logprobs


def policy_gradient(
    logprobs: Array, advantages: Array, *, action_mask: Array | None = None
) -> Array:
    """Plain policy gradient, ℓₜ = −Aₜ log πₜ (REINFORCE; GPG). On-policy only.

    Args:
        logprobs: [..., L] float, current policy.
        advantages: [..., L] float.
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 loss per token.
    """
    logprobs, advantages = masking.clean(
        dict(logprobs=logprobs, advantages=advantages), action_mask, differentiable=1
    )
    return -advantages * logprobs


def value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    *,
    clip: float | None,
    action_mask: Array | None = None,
) -> Array:
    """Squared error of the value, clipped around the old value as PPO's code does.

        ℓₜ = ½ max((V − G)², (V_old + clip(V − V_old, ±c) − G)²)

    The max is pessimistic: clipping can only raise the loss. PPO's public code and verl (c = 0.5);
    the ½ is in verl and in OpenAI's baselines, absent in others.

    Args:
        values: [..., L] float, current value.
        old_values: [..., L] float, value when the batch was scored.
        returns: [..., L] float, targets A + V_old (not whitened).
        clip: c, or None for the plain squared error.
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 loss per token.
    """
    rows = dict(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = masking.clean(rows, action_mask, differentiable=1)
    error = jnp.square(values - returns)
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error


def entropy(logits: Array) -> Array:
    """Entropy −Σ p log p of each distribution, in nats.

    Args:
        logits: [..., V] float; −∞ marks impossible tokens.

    Returns:
        [...] float32.
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    possible = logits != -jnp.inf
    # Large and finite: its p log p and the slope of that are 0, where −∞ would give NaN.
    logprobs = jax.nn.log_softmax(jnp.where(possible, logits, -1e30), axis=-1)
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def aggregate(
    per_token: Array,
    mask: Array,
    *,
    mode: str,
    constant: float | None = None,
    sequence_ids: Array | None = None,
    axis_name: masking.AxisName = None,
) -> Array:
    """Per-token losses to one number, with denominators over the global batch.

        token_mean                 Σᵢₜ m ℓ / Σᵢₜ m                          DAPO, verl's default
        sequence_mean_token_mean   1/N Σᵢ (Σₜ m ℓ / Σₜ m)                   GRPO, GSPO
        sequence_mean_token_sum    1/N Σᵢ Σₜ m ℓ                            Dr.GRPO without constant
        constant                   1/N Σᵢ Σₜ m ℓ / constant                 Dr.GRPO, TRL's "dr_grpo"

    N counts sequences that have a token on the mask: fully masked rows drop out. "constant" is
    usually the longest possible action length; verl's variant of it leaves the 1/N out.

    For gradient accumulation take `aggregation_weights` of the whole batch instead and add up
    Σ weight · ℓ over its parts: dividing each part by its own count changes the loss.

    Args:
        per_token: [B, L] float.
        mask: [B, L] bool.
        mode: one of the four above.
        constant: denominator of mode "constant"; an error with any other mode.
        sequence_ids: [B, L] int in [0, L); given, a sequence is the tokens of one id in one row,
            for instance `turn_ids`. None: a sequence is a row.
        axis_name: mapped axis over which the batch is spread. The returned number is then the
            global loss on every device. Of its gradients take the sum within `shard_map`; under `pmap`,
            `vmap` or without `check_vma` a psum's gradient is a psum: take their mean there.

    Returns:
        [] float32; 0 for an empty mask.
    """
    arguments.check(per_token=(per_token, float, "B L"), mask=(mask, bool, "B L"))
    weights = aggregation_weights(
        mask, mode=mode, constant=constant, sequence_ids=sequence_ids, axis_name=axis_name
    )
    return masking.masked_sum(weights * per_token, mask, axis_name=axis_name)


def aggregation_weights(
    mask: Array,
    *,
    mode: str,
    constant: float | None = None,
    sequence_ids: Array | None = None,
    axis_name: masking.AxisName = None,
) -> Array:
    """Weights wᵢₜ with which `aggregate` is Σᵢₜ wᵢₜ ℓᵢₜ.

    Computed once for the whole batch and sliced with it, they make the sum over any split into
    micro-batches equal the loss of the whole.

    Args:
        mask: [B, L] bool.
        mode, constant, sequence_ids, axis_name: as in `aggregate`.

    Returns:
        [B, L] float32, 0 off the mask.
    """
    if mode not in AGGREGATION_MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(AGGREGATION_MODES)}")
    if (constant is not None) != (mode == "constant"):
        raise ValueError(
            f'constant: got {constant!r} with mode {mode!r}; mode "constant" needs a number, '
            "the other modes take none"
        )
    if constant is not None and not constant > 0:
        raise ValueError(f"constant: got {constant}, expected a number of tokens above 0")
    arguments.check(mask=(mask, bool, "B L"))
    ones = mask.astype(jnp.float32)
    if mode == "token_mean":
        return masking.divide(ones, masking.masked_count(mask, axis_name=axis_name))
    # 1/n on each of a sequence's n tokens sums to the number of sequences.
    inverse_length = _inverse_length(mask, sequence_ids)
    num_sequences = masking.masked_sum(inverse_length, mask, axis_name=axis_name)
    per_token = inverse_length if mode == "sequence_mean_token_mean" else ones
    if mode == "constant":
        per_token = per_token / constant
    return masking.divide(per_token, num_sequences)


def _inverse_length(mask: Array, sequence_ids: Array | None) -> Array:
    """[..., L] float32, 1 / (masked tokens in the token's sequence), 0 off the mask."""
    ones = mask.astype(jnp.float32)
    return masking.divide(ones, masking.sequence_sum(ones, mask, turn_ids=sequence_ids))


def _ratio(logprobs: Array, old_logprobs: Array) -> Array:
    """exp(log π − log π_old), exponent clamped."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clip(
    ratio: Array,
    advantages: Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Array:
    """−min(ρA, clip(ρ)A), and no more than −cA where A < 0.

    By comparisons, not by minima: at a bound, which the ratio 1 may be, those would halve the gradient.
    """
    low, high = 1.0 - clip_low, 1.0 + clip_high
    is_over = jnp.where(advantages < 0, ratio < low, ratio > high)
    bounded = jnp.where(is_over, jnp.where(advantages < 0, low, high), ratio)
    if dual_clip is not None:
        bounded = jnp.where((advantages < 0) & (bounded > dual_clip), dual_clip, bounded)
    return -bounded * advantages
