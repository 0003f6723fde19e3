"""KL estimators, as value, reward or loss, and the controllers of their coefficient.

Public in `losses`.
"""

import jax
import jax.numpy as jnp

from jaxagentrl import masking
from jaxagentrl.types import Array

# exp of more than this is no longer a usable weight in float32 (verl clamps at the same place).
MAX_LOG_RATIO = 20.0

ESTIMATORS = ("k1", "k2", "k3", "k3_straight_through")


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
    this holds on-policy, for the expectation over tokens drawn from π. In k3 a u below −20 counts as
    −20. For use as a loss call `kl_loss`, which refuses k1.

    Args:
        logprobs: [..., L] float, current policy.
        ref_logprobs: [..., L] float, frozen reference.
        estimator: of `ESTIMATORS`.
        action_mask: [..., L] bool, optional.

    Returns:
        [..., L] float32 per token.

    >>> kl(jnp.array([-1.0]), jnp.array([-1.5]), estimator="k2")
    Array([0.125], dtype=float32)
    """
    rows = dict(logprobs=logprobs, ref_logprobs=ref_logprobs)
    logprobs, ref_logprobs = masking.clean(rows, action_mask, differentiable=1)
    u = logprobs - ref_logprobs
    k2 = 0.5 * jnp.square(u)
    # Both terms of the bounded u: the slope of the second alone would drive the policies further apart.
    bounded = jnp.maximum(u, -MAX_LOG_RATIO)
    # exp(−u) − 1 would leave nothing of k3 but rounding where the policies are close.
    k3 = jnp.expm1(-bounded) + bounded
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


def fixed_kl_coefficient(coefficient: Array, measured_kl: Array) -> Array:
    """The coefficient of next iteration: the same, whatever was measured.

    Args:
        coefficient: [] float, β.
        measured_kl: [] float, ignored; here so that both controllers are called alike.

    Returns:
        [] float32.
    """
    del measured_kl
    return jnp.asarray(coefficient, jnp.float32)


def adaptive_kl_coefficient(
    coefficient: Array,
    measured_kl: Array,
    *,
    target: float,
    horizon: float,
    num_episodes: int,
    limit: float = 0.2,
) -> Array:
    """The coefficient of next iteration, steered so that the KL approaches a target.

        β ← β (1 + clip(KL/target − 1, ±limit) · min(n/horizon, 1))

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2. The cap of n/horizon at 1 is
    ours: beyond horizon/limit episodes per iteration the factor could reach 0, where β would stay.

    Args:
        coefficient: [] float, β.
        measured_kl: [] float, mean k1 (or k3) per token over the global batch.
        target: KL to hold.
        horizon: episodes over which the full correction is applied (10,000 in the paper).
        num_episodes: n, episodes of this iteration.
        limit: largest relative error that counts.

    Returns:
        [] float32.
    """
    error = jnp.clip(jnp.asarray(measured_kl, jnp.float32) / target - 1.0, -limit, limit)
    factor = 1.0 + error * min(num_episodes / horizon, 1.0)
    return jnp.asarray(coefficient, jnp.float32) * factor
