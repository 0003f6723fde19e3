"""Corrections for a sampler that is not quite the trainer's policy. Public in `losses`.

Three policies: μ drew the tokens (`sampler_logprobs`), π_old is the trainer's graph at the same
parameters (`old_logprobs`), π is being updated. The surrogate handles π/π_old; what is here
handles w = π_old/μ, which differs from 1 by precision, caching, temperature or staleness.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.divergences import MAX_LOG_RATIO
from jaxagentrl.types import Array

LEVELS = ("token", "turn", "sequence")


def importance_ratios(
    old_logprobs: Array,
    sampler_logprobs: Array,
    action_mask: Array,
    *,
    level: str = "token",
    turn_ids: Array | None = None,
    geometric: bool = False,
) -> Array:
    """w = π_old/μ of each token, or of the turn or sequence it belongs to.

        token      wₜ = exp(log π_oldₜ − log μₜ)
        turn       Π wₜ over the turn's action tokens, on each of them
        sequence   Π wₜ over the row's action tokens, on each of them
        geometric  the same to the power 1/n, n the number of tokens in the product

    The exponent is clamped to ±20 (after summing). Products over a long sequence are rarely usable:
    their logarithm is a sum of hundreds of small errors. No gradient flows through any of it.

    Args:
        old_logprobs: [..., L] float.
        sampler_logprobs: [..., L] float, of the distribution that was actually sampled
            (temperature and truncation included).
        action_mask: [..., L] bool.
        level: "token", "turn" or "sequence".
        turn_ids: [..., L] int, needed for level "turn".
        geometric: mean instead of sum of the logarithms; no effect at level "token".

    Returns:
        [..., L] float32, 0 off the mask.
    """
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    if (turn_ids is not None) != (level == "turn"):
        got = "turn_ids" if turn_ids is not None else "no turn_ids"
        raise ValueError(f'got {got} with level {level!r}; level "turn" needs them, others do not')
    rows = masking.clean(
        dict(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs), action_mask, differentiable=0
    )
    log_ratio = rows[0] - rows[1]
    if level != "token":
        log_ratio = masking.sequence_sum(log_ratio, action_mask, turn_ids=turn_ids)
        if geometric:
            ones = jnp.ones(action_mask.shape, jnp.float32)
            count = masking.sequence_sum(ones, action_mask, turn_ids=turn_ids)
            log_ratio = masking.divide(log_ratio, count)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.where(action_mask, ratio, 0.0)


def truncated_importance_weights(ratios: Array, *, cap: float = 2.0) -> Array:
    """TIS: factors min(w, C) for the per-token loss, without gradient.

    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; C = 2 in verl.

    Args:
        ratios: [..., L] float from `importance_ratios`.
        cap: C.

    Returns:
        [..., L] float32.
    """
    arguments.check(ratios=(ratios, float, "..."))
    return jax.lax.stop_gradient(jnp.minimum(jnp.asarray(ratios, jnp.float32), cap))


def importance_mask(
    ratios: Array,
    action_mask: Array,
    *,
    low: float = 0.5,
    high: float = 2.0,
    veto: float | None = None,
    token_ratios: Array | None = None,
) -> Array:
    """MIS (IcePop): the action mask without what the sampler would hardly have said.

        keep token t    iff low ≤ wₜ ≤ high
        keep a row      iff no token of it has wₜ < veto

    Use the result as the *mask* of the loss, so that denominators shrink with it. Zero weights
    under an unchanged mask would count the dropped tokens as if they had earned nothing.

    Args:
        ratios: [..., L] float from `importance_ratios`, at the level at which to drop.
        action_mask: [..., L] bool.
        low, high: bounds on w, 1/C and C.
        veto: a far smaller bound, about 1e-4; None for none.
        token_ratios: [..., L] float, ratios at token level for the veto; `ratios` by default.

    Returns:
        [..., L] bool.
    """
    arguments.check(ratios=(ratios, float, "..."), action_mask=(action_mask, bool, "..."))
    kept = action_mask & (ratios >= low) & (ratios <= high)
    if veto is None:
        return kept
    token_ratios = ratios if token_ratios is None else token_ratios
    arguments.check(action_mask=(action_mask, bool, "..."), token_ratios=(token_ratios, float, "..."))
    vetoed = jnp.any(action_mask & (token_ratios < veto), axis=-1)
    return kept & ~vetoed[..., None]
