"""Policy-gradient losses, value loss, KL estimators and their aggregation.

Losses are per token and to be minimized; `aggregate` turns them into a scalar. The token axis is
last, leading axes are batch, arithmetic is float32. `action_mask` is optional in the functions
that work token by token: with it, what lies off the mask is replaced before any arithmetic, so
NaN or −∞ there reaches neither value nor gradient, and the result there is exactly 0. Without it
every entry is taken to be meaningful.

Gradient flows through `logprobs` and `values` only: old log-probs, reference log-probs, old values,
advantages and returns are stopped here.
"""

import chex
import jax
import jax.numpy as jnp

from jaxagentrl import masking
from jaxagentrl.types import Array

# exp of more than this is no longer a usable weight in float32 (verl clamps at the same place).
MAX_LOG_RATIO = 20.0
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
    logprobs, old_logprobs, advantages = _clean(
        [logprobs, old_logprobs, advantages], action_mask, differentiable=1
    )
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
        turn_ids: [..., L] int; given, each turn is a sequence of its own (iStar's step ratio).
            None: the trajectory is.

    Returns:
        [..., L] float32 loss per token, 0 off the mask.
    """
    logprobs, old_logprobs, advantages = _clean(
        [logprobs, old_logprobs, advantages], action_mask, differentiable=1
    )
    mean = sequence_mean(logprobs - old_logprobs, action_mask, turn_ids=turn_ids)
    # Value of the sequence's ratio, gradient of the token's own log-prob.
    log_ratio = jax.lax.stop_gradient(mean - logprobs) + logprobs
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    loss = _clip(ratio, advantages, clip_low, clip_high, dual_clip)
    return jnp.where(action_mask, loss, 0.0)


def sequence_mean(x: Array, action_mask: Array, *, turn_ids: Array | None = None) -> Array:
    """Mean over the action tokens of the row, or of the turn, given back to each of them.

    Args:
        x: [..., L] float.
        action_mask: [..., L] bool.
        turn_ids: [..., L] int, or None for the whole row.

    Returns:
        [..., L] float32, 0 off the mask.
    """
    if turn_ids is None:
        mean = masking.masked_mean(x, action_mask, axis=-1)
        return masking.zero_off(mean[..., None], action_mask)
    length = action_mask.shape[-1]
    ones = jnp.ones(action_mask.shape, jnp.float32)
    sums = masking.turn_sum(x, turn_ids, action_mask, num_turns=length)
    counts = masking.turn_sum(ones, turn_ids, action_mask, num_turns=length)
    return masking.spread_turns(sums / jnp.maximum(counts, 1.0), turn_ids, action_mask)


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
    logprobs, old_logprobs, advantages = _clean(
        [logprobs, old_logprobs, advantages], action_mask, differentiable=1
    )
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
    logprobs, advantages = _clean([logprobs, advantages], action_mask, differentiable=1)
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
    values, old_values, returns = _clean(
        [values, old_values, returns], action_mask, differentiable=1
    )
    error = jnp.square(values - returns)
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, jnp.square(near - returns))
    return 0.5 * error


def kl(
    logprobs: Array, ref_logprobs: Array, *, estimator: str, action_mask: Array | None = None
) -> Array:
    """Per-token estimate of KL(π‖π_ref) from sampled tokens (Schulman's k1, k2, k3).

    With u = log π − log π_ref and q = exp(−u):

        k1 = u                  unbiased; the one to put in the *reward*
        k2 = u²/2               biased value, but its gradient is that of KL(π‖π_ref)
        k3 = q − 1 + u          unbiased and ≥ 0 as a value; its gradient is that of KL(π_ref‖π)
        k3_straight_through     value of k3, gradient of k2; the one to put in the *loss*

    http://joschu.net/blog/kl-approx.html; on the gradients https://arxiv.org/abs/2512.21852. All of
    this holds on-policy, for the expectation over tokens drawn from π. The exponent is clamped to
    ±20. For use as a loss call `kl_loss`, which refuses k1.

    Args:
        logprobs: [..., L] float, current policy.
        ref_logprobs: [..., L] float, frozen reference.
        estimator: "k1", "k2", "k3" or "k3_straight_through".
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 per token.

    >>> kl(jnp.array([-1.0]), jnp.array([-1.5]), estimator="k2")
    Array([0.125], dtype=float32)
    """
    logprobs, ref_logprobs = _clean([logprobs, ref_logprobs], action_mask, differentiable=1)
    u = logprobs - ref_logprobs
    k2 = 0.5 * jnp.square(u)
    k3 = jnp.exp(jnp.clip(-u, -MAX_LOG_RATIO, MAX_LOG_RATIO)) - 1.0 + u
    estimates = {
        "k1": u,
        "k2": k2,
        "k3": k3,
        "k3_straight_through": k2 + jax.lax.stop_gradient(k3 - k2),
    }
    if estimator not in estimates:
        raise ValueError(f"estimator: got {estimator!r}, expected one of {', '.join(estimates)}")
    return estimates[estimator]


def kl_loss(
    logprobs: Array, ref_logprobs: Array, *, estimator: str, action_mask: Array | None = None
) -> Array:
    """`kl` for use as a loss term; refuses "k1".

    Raises:
        ValueError: for "k1", whose gradient is zero on average: E[∇ log π] = 0, so the penalty
            would be shown in the metrics and do nothing.
    """
    if estimator == "k1":
        raise ValueError(
            'estimator "k1" cannot be a loss: its gradient is E[∇ log π] = 0 on average, so it '
            'regularizes nothing. Put k1 in the reward, or use "k2" or "k3_straight_through" here.'
        )
    return kl(logprobs, ref_logprobs, estimator=estimator, action_mask=action_mask)


def entropy(logits: Array) -> Array:
    """Entropy −Σ p log p of each distribution, in nats.

    Args:
        logits: [..., V] float; −∞ marks impossible tokens.

    Returns:
        [...] float32.
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    possible = logits > -jnp.inf
    logprobs = jax.nn.log_softmax(jnp.where(possible, logits, -1e30), axis=-1)
    terms = jnp.where(possible, jnp.exp(logprobs) * jnp.where(possible, logprobs, 0.0), 0.0)
    return -jnp.sum(terms, axis=-1)


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
        sequence_ids: [B, L] int; given, a sequence is a run of tokens of one id in one row, for
            instance `turn_ids`. None: a sequence is a row.
        axis_name: mapped axis over which the batch is spread. The returned number is then the
            global loss on every device.

    Returns:
        [] float32; 0 for an empty mask.
    """
    chex.assert_equal_shape([per_token, mask])
    chex.assert_type([per_token, mask], [float, bool])
    weights = aggregation_weights(
        mask, mode=mode, constant=constant, sequence_ids=sequence_ids, axis_name=axis_name
    )
    return masking.masked_sum(weights * masking.zero_off(per_token, mask), mask, axis_name=axis_name)


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
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    ones = mask.astype(jnp.float32)
    if mode == "token_mean":
        return ones / jnp.maximum(masking.masked_count(mask, axis_name=axis_name), 1.0)
    # 1/n on each of a sequence's n tokens sums to the number of sequences.
    inverse_length = _inverse_length(mask, sequence_ids)
    num_sequences = masking.masked_sum(inverse_length, mask, axis_name=axis_name)
    per_token = inverse_length if mode == "sequence_mean_token_mean" else ones
    if mode == "constant":
        per_token = per_token / constant
    return per_token / jnp.maximum(num_sequences, 1.0)


def _inverse_length(mask: Array, sequence_ids: Array | None) -> Array:
    """[B, L] float32, 1 / (number of masked tokens in the token's sequence), 0 off the mask."""
    if sequence_ids is None:
        length = jnp.broadcast_to(masking.masked_count(mask, axis=-1)[:, None], mask.shape)
    else:
        chex.assert_equal_shape([mask, sequence_ids])
        ones = jnp.ones(mask.shape, jnp.float32)
        counts = masking.turn_sum(ones, sequence_ids, mask, num_turns=mask.shape[-1])
        length = masking.spread_turns(counts, sequence_ids, mask)
    return jnp.where(mask, 1.0 / jnp.maximum(length, 1.0), 0.0)


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
    """−min(ρA, clip(ρ)A), and no more than −cA where A < 0."""
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def _clean(rows: list[Array], action_mask: Array | None, *, differentiable: int) -> list[Array]:
    """Float32 rows, 0 off the mask, with gradient through the first `differentiable` only."""
    chex.assert_equal_shape(rows)
    chex.assert_type(rows, float)
    rows = [jnp.asarray(row).astype(jnp.float32) for row in rows]
    if action_mask is not None:
        chex.assert_equal_shape([rows[0], action_mask])
        chex.assert_type(action_mask, bool)
        rows = [jnp.where(action_mask, row, 0.0) for row in rows]
    return [
        row if index < differentiable else jax.lax.stop_gradient(row)
        for index, row in enumerate(rows)
    ]
