"""What a step minimises: the losses of one micro-batch, for `learner.make_step`.

A loss is (params, batch, targets, **layout) → (loss, metrics): it scores the micro-batch and sums its terms, each
token's with its weight in the loss of the whole batch (`learner.Targets`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxagentrl import diagnostics, learner, losses
from jaxagentrl.learner import Metrics, Params, Scores, Targets
from jaxagentrl.models import decoder
from jaxagentrl.types import Array, TrajectoryBatch

SURROGATES = ("clipped", "gspo", "cispo", "policy_gradient")


def make_sft_loss(
    config: decoder.DecoderConfig, *, remat: str = "none", compute_dtype: str = "float32"
) -> Callable[..., Any]:
    """Cross-entropy on action tokens, and with a weight of its own on everything read."""
    forward_part = functools.partial(
        learner.forward, config, temperature=1.0, remat=remat, compute_dtype=compute_dtype
    )

    def loss_fn(
        params: Params, batch: TrajectoryBatch, targets: Targets, **layout: Any
    ) -> tuple[Array, Metrics]:
        scores = forward_part(params, batch.tokens, _needed(batch, targets), **layout)
        action = -jnp.sum(targets.weights * scores.logprobs)
        observation = -jnp.sum(targets.observation_weights * scores.logprobs)
        metrics = {"loss/action": action, "loss/observation": observation}
        return action + observation, metrics

    return loss_fn


def make_rl_loss(
    config: decoder.DecoderConfig,
    *,
    surrogate: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    temperature: float,
    kl_coefficient: float,
    kl_estimator: str,
    entropy_coefficient: float,
    value_coefficient: float,
    value_clip: float | None,
    importance_cap: float | None,
    old_is_current: bool,
    remat: str = "none",
    compute_dtype: str = "float32",
) -> Callable[..., Any]:
    """Policy-gradient loss of one micro-batch; sums weighted by `Targets.weights`.

    Args:
        surrogate: of `SURROGATES`. "clipped" is that of PPO, GRPO, RLOO and REINFORCE++. The sequence of "gspo"
            is what the policy reads as one text: the episode or, where that is several contexts, each of them.
        kl_coefficient: of the KL term in the loss; 0 leaves it out.
        importance_cap: C of truncated importance sampling: every token's term is multiplied by
            min(π_old/μ, C), where μ is what the sampler drew it from (`importance`); None leaves that out.
        old_is_current: the batch gets one update only, so the old log-probs are the current ones
            and the scoring pass that would give them is saved. The gradient is the same.

    Raises:
        ValueError: an unknown surrogate.
    """
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    surrogate_loss = _make_surrogate(surrogate, **clips, dual_clip=dual_clip)
    forward_part = functools.partial(
        learner.forward, config, temperature=temperature, remat=remat, compute_dtype=compute_dtype
    )

    def loss_fn(
        params: Params, batch: TrajectoryBatch, targets: Targets, **layout: Any
    ) -> tuple[Array, Metrics]:
        scores = forward_part(params, batch.tokens, _needed(batch, targets), **layout)
        mask, weights = batch.action_mask, targets.weights
        old = jax.lax.stop_gradient(scores.logprobs) if old_is_current else targets.old_logprobs
        texts = layout.get("segment_ids")  # of a packed row
        per_token = surrogate_loss(scores.logprobs, old, targets.advantages, mask, texts)
        metrics = _policy_metrics(surrogate, scores, old, batch, targets, texts, **clips)
        if importance_cap is not None:
            ratios = losses.importance_ratios(old, batch.sampler_logprobs, mask)
            per_token *= losses.truncated_importance_weights(ratios, cap=importance_cap)
            metrics["policy/importance_capped"] = jnp.sum(targets.mean_weights * (ratios > importance_cap))
        metrics["loss/policy"] = jnp.sum(weights * per_token)
        metrics["loss/observation"] = -jnp.sum(targets.observation_weights * scores.logprobs)
        loss = metrics["loss/policy"] - entropy_coefficient * jnp.sum(weights * scores.entropies)
        loss = loss + metrics["loss/observation"]
        if kl_coefficient:
            kl = losses.kl_loss(
                scores.logprobs, targets.ref_logprobs, estimator=kl_estimator, action_mask=mask
            )
            metrics["loss/kl"] = jnp.sum(weights * kl)
            loss = loss + kl_coefficient * metrics["loss/kl"]
        if "value_head" in params:
            value = losses.value_loss(
                scores.values,
                targets.old_values,
                targets.returns,
                clip=value_clip,
                action_mask=mask,
            )
            metrics["loss/value"] = jnp.sum(targets.value_weights * value)
            loss = loss + value_coefficient * metrics["loss/value"]
        return loss, metrics

    return loss_fn


def _make_surrogate(
    name: str, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> Callable[..., Array]:
    """(logprobs, old_logprobs, advantages, action_mask, texts), all [B, L] → [B, L] loss of every token. `texts`
    are the numbers of the texts that a row holds; None: it is one."""
    clips = {"clip_low": clip_low, "clip_high": clip_high}

    def clipped(logprobs: Array, old: Array, advantages: Array, mask: Array, _: Array | None) -> Array:
        return losses.clipped_surrogate(
            logprobs, old, advantages, **clips, dual_clip=dual_clip, action_mask=mask
        )

    def gspo(logprobs: Array, old: Array, advantages: Array, mask: Array, texts: Array | None) -> Array:
        return losses.sequence_surrogate(
            logprobs, old, advantages, mask, **clips, dual_clip=dual_clip, turn_ids=texts
        )

    def cispo(logprobs: Array, old: Array, advantages: Array, mask: Array, _: Array | None) -> Array:
        return losses.cispo(logprobs, old, advantages, **clips, action_mask=mask)

    def policy_gradient(logprobs: Array, _: Array, advantages: Array, mask: Array, __: Array | None) -> Array:
        return losses.policy_gradient(logprobs, advantages, action_mask=mask)

    if name not in SURROGATES:
        raise ValueError(f"rl.loss.surrogate must be one of {', '.join(SURROGATES)}, got {name!r}.")
    return {
        "clipped": clipped, "gspo": gspo, "cispo": cispo, "policy_gradient": policy_gradient
    }[name]


def _policy_metrics(
    surrogate: str,
    scores: Scores,
    old: Array,
    batch: TrajectoryBatch,
    targets: Targets,
    texts: Array | None,
    *,
    clip_low: float,
    clip_high: float,
) -> Metrics:
    """Means over action tokens of how the policy stands to those of before."""
    mask, weights = batch.action_mask, targets.mean_weights
    log_ratio = jnp.where(mask, scores.logprobs - old, 0.0)
    is_clipped = diagnostics.is_clipped(
        surrogate, log_ratio, targets.advantages, mask, clip_low=clip_low, clip_high=clip_high, sequence_ids=texts
    )
    gap = jnp.where(mask, jnp.abs(old - batch.sampler_logprobs), 0.0)
    return {
        "policy/entropy": jnp.sum(weights * scores.entropies),
        "policy/clip_fraction": jnp.sum(weights * is_clipped),
        "policy/old_kl": jnp.sum(weights * losses.kl(old, scores.logprobs, estimator="k3", action_mask=mask)),
        "policy/sampler_gap_mean": jnp.sum(weights * gap),
        "policy/sampler_gap_max": jnp.max(gap),
    }


def _needed(batch: TrajectoryBatch, targets: Targets) -> Array:
    """Tokens whose log-probs a loss or a metric reads: actions, and observations that are trained on."""
    return batch.action_mask | (targets.observation_weights != 0)
