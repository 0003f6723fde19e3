"""Compiled programs of learning: score, accumulate, apply.

A batch lives on the device as whole arrays [B, L]. Each program takes the rows it works on and a
static length, so that short trajectories are not computed at the longest one's width. Every token
carries its weight in the global loss, computed once for the whole batch: sums over micro-batches
are then the gradient of the whole, whatever the split, the padding or the order.

Parameters are a dict {"policy": decoder tree} with, for PPO, "value_head" and possibly "critic".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxagentrl import logprobs as token_scores
from jaxagentrl import losses
from jaxagentrl.models import decoder
from jaxagentrl.types import Array, TrainState, TrajectoryBatch

CRITICS = ("none", "head", "separate")

Params = dict[str, Any]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the training graph says of a batch; entry t describes token t, entry 0 is 0."""

    logprobs: Array  # [B, L] float32, at the sampler's temperature
    entropies: Array  # [B, L] float32, nats
    values: Array  # [B, L] float32, read before token t is emitted; zeros without a critic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What an update aims at, per token; all [B, L] float32."""

    advantages: Array
    returns: Array  # value targets
    old_logprobs: Array
    old_values: Array
    ref_logprobs: Array  # zeros when no reference is used
    weights: Array  # of action tokens in the global loss
    observation_weights: Array  # of prompt and observation tokens in the auxiliary loss


def init_params(config: decoder.DecoderConfig, key: jax.Array, *, critic: str) -> Params:
    """Policy parameters, and with a critic its own: "head" shares the trunk, "separate" does not."""
    if critic not in CRITICS:
        raise ValueError(f"critic must be one of {', '.join(CRITICS)}, got {critic!r}.")
    return with_critic({"policy": decoder.init(config, key)}, config, critic=critic)


def with_critic(params: Params, config: decoder.DecoderConfig, *, critic: str) -> Params:
    """Adds a critic that predicts 0 everywhere; a separate one starts as a copy of the policy."""
    if critic == "none":
        return params
    head = {"kernel": jnp.zeros((config.hidden_size,)), "bias": jnp.zeros(())}
    params = params | {"value_head": head}
    if critic == "separate":
        params = params | {"critic": jax.tree.map(jnp.copy, params["policy"])}
    return params


def forward(
    config: decoder.DecoderConfig,
    params: Params,
    tokens: Array,
    *,
    temperature: float,
    remat: bool = False,
) -> Scores:
    """Scores [B, L] tokens with the policy and, if there is one, the critic."""
    x = decoder.hidden(config, params["policy"], tokens, remat=remat)
    logprobs, entropies = token_scores.token_logprobs(
        x, decoder.unembedding(params["policy"]), tokens, temperature=temperature
    )
    values = jnp.zeros_like(logprobs)
    if "value_head" in params:
        if "critic" in params:
            x = decoder.hidden(config, params["critic"], tokens, remat=remat)
        head = params["value_head"]
        read = x[:, :-1].astype(jnp.float32) @ head["kernel"] + head["bias"]
        values = jnp.pad(read, ((0, 0), (1, 0)))
    return Scores(logprobs, entropies, values)


def make_score(config: decoder.DecoderConfig, *, temperature: float) -> Callable[..., Scores]:
    """Program (params, tokens [B, L], rows [R], scores, *, length) → scores with those rows set.

    `scores` [B, L] is donated; rows out of range are dropped.
    """

    @functools.partial(jax.jit, static_argnames="length", donate_argnames="scores")
    def score(params: Params, tokens: Array, rows: Array, scores: Scores, *, length: int) -> Scores:
        new = forward(config, params, take_rows(tokens, rows, length), temperature=temperature)
        return jax.tree.map(
            lambda whole, part: whole.at[rows, :length].set(part, mode="drop"), scores, new
        )

    return score


def empty_scores(shape: tuple[int, int]) -> Scores:
    return Scores(*(jnp.zeros(shape) for _ in dataclasses.fields(Scores)))


def take_rows(tree: Any, rows: Array, length: int) -> Any:
    """Rows [R] of every [B, L] leaf, cut to `length`; a row out of range is all zeros."""
    return jax.tree.map(
        lambda x: jnp.take(x[:, :length], rows, axis=0, mode="fill", fill_value=0), tree
    )


def make_sft_loss(config: decoder.DecoderConfig, *, remat: bool) -> Callable[..., Any]:
    """Cross-entropy on action tokens, and with a weight of its own on everything read."""

    def loss_fn(params: Params, batch: TrajectoryBatch, targets: Targets) -> tuple[Array, Metrics]:
        scores = forward(config, params, batch.tokens, temperature=1.0, remat=remat)
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
    old_is_current: bool,
    remat: bool,
) -> Callable[..., Any]:
    """Policy-gradient loss of one micro-batch; sums weighted by `Targets.weights`.

    Args:
        surrogate: "clipped" (PPO, GRPO, RLOO, REINFORCE++), "gspo", "cispo" or "policy_gradient".
        kl_coefficient: of the KL term in the loss; 0 leaves it out.
        old_is_current: the batch gets one update only, so the old log-probs are the current ones
            and the scoring pass that would give them is saved. The gradient is the same.
    """

    def loss_fn(params: Params, batch: TrajectoryBatch, targets: Targets) -> tuple[Array, Metrics]:
        scores = forward(config, params, batch.tokens, temperature=temperature, remat=remat)
        mask, weights = batch.action_mask, targets.weights
        old = jax.lax.stop_gradient(scores.logprobs) if old_is_current else targets.old_logprobs
        clips = {"clip_low": clip_low, "clip_high": clip_high}
        rows = (scores.logprobs, old, targets.advantages)
        if surrogate == "clipped":
            per_token = losses.clipped_surrogate(
                *rows, **clips, dual_clip=dual_clip, action_mask=mask
            )
        elif surrogate == "gspo":
            per_token = losses.sequence_surrogate(*rows, mask, **clips, dual_clip=dual_clip)
        elif surrogate == "cispo":
            per_token = losses.cispo(*rows, **clips, action_mask=mask)
        else:
            per_token = losses.policy_gradient(rows[0], rows[2], action_mask=mask)
        policy = jnp.sum(weights * per_token)
        entropy = jnp.sum(weights * scores.entropies)
        observation = -jnp.sum(targets.observation_weights * scores.logprobs)
        loss = policy - entropy_coefficient * entropy + observation
        log_ratio = jnp.where(mask, scores.logprobs - old, 0.0)
        outside = (jnp.exp(log_ratio) < 1 - clip_low) | (jnp.exp(log_ratio) > 1 + clip_high)
        gap = jnp.where(mask, jnp.abs(old - batch.sampler_logprobs), 0.0)
        metrics = {
            "loss/policy": policy,
            "loss/observation": observation,
            "policy/entropy": entropy,
            "policy/clip_fraction": jnp.sum(weights * outside),
            "policy/old_kl": jnp.sum(weights * (jnp.exp(log_ratio) - 1 - log_ratio)),
            "policy/sampler_gap_mean": jnp.sum(weights * gap),
            "policy/sampler_gap_max": jnp.max(gap),
        }
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
            metrics["loss/value"] = jnp.sum(weights * value)
            loss = loss + value_coefficient * metrics["loss/value"]
        return loss, metrics

    return loss_fn


def make_accumulate(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Program (params, grads, batch, targets, rows [R], *, length) → (grads + ∇loss, metrics).

    `grads` is donated. Metrics are weighted sums over the rows; add them over micro-batches
    (those ending in "_max": take the largest).
    """

    @functools.partial(jax.jit, static_argnames="length", donate_argnames="grads")
    def accumulate(params, grads, batch, targets, rows, *, length):
        rows_of = functools.partial(take_rows, rows=rows, length=length)
        part = TrajectoryBatch(
            **{
                field.name: rows_of(getattr(batch, field.name))
                for field in dataclasses.fields(batch)
                if field.name != "group_ids"
            },
            group_ids=jnp.take(batch.group_ids, rows, mode="fill", fill_value=0),
        )
        (_, metrics), new = jax.value_and_grad(loss_fn, has_aux=True)(params, part, rows_of(targets))
        return jax.tree.map(jnp.add, grads, new), metrics

    return accumulate


def make_apply(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Program (state, grads) → (state, {"optimizer/grad_norm"}). The state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, grads: Params) -> tuple[TrainState, Metrics]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state
        )
        return state, {"optimizer/grad_norm": optax.tree.norm(grads)}

    return apply


def update(
    state: TrainState,
    batch: TrajectoryBatch,
    targets: Targets,
    parts: list[tuple[Any, int]],
    *,
    accumulate: Callable[..., Any],
    apply: Callable[..., Any],
) -> tuple[TrainState, Metrics]:
    """One optimizer step from micro-batches (rows, length) of one batch."""
    grads = jax.tree.map(jnp.zeros_like, state.params)
    total: Metrics = {}
    for rows, length in parts:
        grads, metrics = accumulate(state.params, grads, batch, targets, rows, length=length)
        for key, value in metrics.items():
            if key not in total:
                total[key] = value
            else:
                join = jnp.maximum if key.endswith("_max") else jnp.add
                total[key] = join(total[key], value)
    state, metrics = apply(state, grads)
    return state, total | metrics
