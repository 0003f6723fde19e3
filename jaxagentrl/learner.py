"""Compiled programs of learning: score, accumulate, apply; or, on packed rows, score and step.

A batch lives on the device as whole arrays [B, L]. A program takes the rows it works on and a
static length, so that short trajectories are not computed at the longest one's width; or an index
of packed rows (`packing`), and then one program is the whole optimizer step. Every token carries
its weight in the global loss, computed once for the whole batch: sums over micro-batches are then
the gradient of the whole, whatever the split, the padding or the order.

Parameters are a dict {"policy": decoder tree} with, for PPO, "value_head" and possibly "critic".
With low-rank adapters, what is trained is {"adapters": tree}, and "policy" and "lora_scale" come as a
second dict, `frozen`.

On a mesh (`models.sharding`) rows are shared out over devices, and gradients, parameters and
optimizer state are held to their rules.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxagentrl import logprobs as token_scores
from jaxagentrl import diagnostics, losses
from jaxagentrl.models import decoder, lora, sharding
from jaxagentrl.packing import Packed
from jaxagentrl.types import Array, TrainState, TrajectoryBatch

CRITICS = ("none", "head", "separate")
SURROGATES = ("clipped", "gspo", "cispo", "policy_gradient")

Params = dict[str, Any]
Metrics = dict[str, Array]
# What a program works off: packed rows, or micro-batches (rows of the batch, static length).
Work = Packed | Sequence[tuple[Any, int]]


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
    value_weights: Array  # of the tokens whose value is trained
    observation_weights: Array  # of prompt and observation tokens in the auxiliary loss


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
    remat: str = "none",
    compute_dtype: str = "float32",
    positions: Array | None = None,
    segment_ids: Array | None = None,
    max_segments: int | None = None,
) -> Scores:
    """Scores [B, L] tokens with the policy and, if there is one, the critic.

    Args:
        remat: what the backward pass recomputes, a name of `decoder.REMAT`.
        compute_dtype: of activations and of the weights they meet; "bfloat16" halves both. Norms,
            softmax and log-probs are float32 all the same, and so are gradients and parameters.
        positions, segment_ids, max_segments: of packed rows, see `packing`.
    """

    def hidden(weights: Params) -> Array:
        return decoder.hidden(
            config,
            weights,
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            max_segments=max_segments,
            remat=remat,
        )

    policy = in_dtype(policy_of(params), compute_dtype)
    x = hidden(policy)
    logprobs, entropies = token_scores.token_logprobs(
        x,
        decoder.unembedding(policy),
        tokens,
        temperature=temperature,
        softcap=config.logit_softcap,
        chunk_size=token_scores.chunk_size(config.vocab_size) * sharding.row_shards_in_use(),
    )
    values = jnp.zeros_like(logprobs)
    if "value_head" in params:
        if "critic" in params:
            x = hidden(in_dtype(params["critic"], compute_dtype))
        head = params["value_head"]
        read = x[:, :-1].astype(jnp.float32) @ head["kernel"] + head["bias"]
        values = jnp.pad(read, ((0, 0), (1, 0)))
    scores = Scores(logprobs, entropies, values)
    if positions is None:
        return scores
    # A packed sequence's first token has another sequence before it, which says nothing of it.
    return jax.tree.map(lambda x: jnp.where(positions > 0, x, 0.0), scores)


def policy_of(params: Params) -> Params:
    """The decoder's parameters, its adapters beside their kernels if there are any."""
    if "adapters" not in params:
        return params["policy"]
    return lora.attach(params["policy"], params["adapters"], params["lora_scale"])


def in_dtype(params: Params, dtype: str) -> Params:
    """Parameters in the dtype of the computation. One cast up front, not one in every layer: what
    the layers of a sharded model gather is then the narrow copy."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def make_score(
    config: decoder.DecoderConfig, *, temperature: float, compute_dtype: str = "float32"
) -> Callable[..., Scores]:
    """Function (params, tokens [B, L], work) → `Scores` [B, L], zeros where `work` has no token."""

    forward_part = functools.partial(
        forward, config, temperature=temperature, compute_dtype=compute_dtype
    )

    @functools.partial(jax.jit, static_argnames="length", donate_argnames="scores")
    def score_rows(
        params: Params, tokens: Array, rows: Array, scores: Scores, *, length: int
    ) -> Scores:
        part = sharding.constrain_rows(take_rows(tokens, rows, length))
        return jax.tree.map(
            lambda whole, new: whole.at[rows, :length].set(new, mode="drop"),
            scores,
            forward_part(params, part),
        )

    @jax.jit
    def score_packed(params: Params, tokens: Array, packed: Packed) -> Scores:
        def body(index: Array, flat: Scores) -> Scores:
            places, layout = _layout(packed, index)
            new = forward_part(params, take_places(tokens, places), **layout)
            return jax.tree.map(lambda x, y: x.at[places].set(y, mode="drop"), flat, new)

        flat = jax.lax.fori_loop(0, packed.count, body, empty_scores((tokens.size,)))
        return jax.tree.map(lambda x: x.reshape(tokens.shape), flat)

    def score(params: Params, tokens: Array, work: Work) -> Scores:
        if isinstance(work, Packed):
            return score_packed(params, tokens, work)
        scores = empty_scores(tokens.shape)
        for rows, length in work:
            scores = score_rows(params, tokens, rows, scores, length=length)
        return scores

    return score


@functools.partial(jax.jit, static_argnums=0)
def empty_scores(shape: tuple[int, ...]) -> Scores:
    return Scores(*(jnp.zeros(shape) for _ in dataclasses.fields(Scores)))


def take_rows(tree: Any, rows: Array, length: int) -> Any:
    """Rows [R] of every [B, L] leaf, cut to `length`; a row out of range is all zeros."""
    return jax.tree.map(
        lambda x: jnp.take(x[:, :length], rows, axis=0, mode="fill", fill_value=0), tree
    )


def take_places(tree: Any, places: Array) -> Any:
    """Entries of every [B, L] leaf at flat indices [R, L']; out of range is zero."""
    return jax.tree.map(
        lambda x: sharding.constrain(
            jnp.take(x.reshape(-1), places, mode="fill", fill_value=0), sharding.ROWS
        ),
        tree,
    )


def _layout(packed: Packed, index: Array) -> tuple[Array, dict[str, Any]]:
    """Flat indices, and positions and segments, of one micro-batch."""
    places, positions, segment_ids = (
        sharding.constrain(jax.lax.dynamic_index_in_dim(x, index, keepdims=False), sharding.ROWS)
        for x in (packed.places, packed.positions, packed.segment_ids)
    )
    layout = {"positions": positions, "segment_ids": segment_ids}
    return places, layout | {"max_segments": packed.max_segments}


def make_sft_loss(
    config: decoder.DecoderConfig, *, remat: str = "none", compute_dtype: str = "float32"
) -> Callable[..., Any]:
    """Cross-entropy on action tokens, and with a weight of its own on everything read."""
    forward_part = functools.partial(
        forward, config, temperature=1.0, remat=remat, compute_dtype=compute_dtype
    )

    def loss_fn(
        params: Params, batch: TrajectoryBatch, targets: Targets, **layout: Any
    ) -> tuple[Array, Metrics]:
        scores = forward_part(params, batch.tokens, **layout)
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
    remat: str = "none",
    compute_dtype: str = "float32",
) -> Callable[..., Any]:
    """Policy-gradient loss of one micro-batch; sums weighted by `Targets.weights`.

    Args:
        surrogate: of `SURROGATES`. "clipped" is that of PPO, GRPO, RLOO and REINFORCE++.
        kl_coefficient: of the KL term in the loss; 0 leaves it out.
        old_is_current: the batch gets one update only, so the old log-probs are the current ones
            and the scoring pass that would give them is saved. The gradient is the same.

    Raises:
        ValueError: an unknown surrogate.
    """
    if surrogate not in SURROGATES:
        raise ValueError(
            f"rl.loss.surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}."
        )
    forward_part = functools.partial(
        forward, config, temperature=temperature, remat=remat, compute_dtype=compute_dtype
    )

    def loss_fn(
        params: Params, batch: TrajectoryBatch, targets: Targets, **layout: Any
    ) -> tuple[Array, Metrics]:
        scores = forward_part(params, batch.tokens, **layout)
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
        is_clipped = diagnostics.is_clipped(surrogate, log_ratio, targets.advantages, mask, **clips)
        gap = jnp.where(mask, jnp.abs(old - batch.sampler_logprobs), 0.0)
        metrics = {
            "loss/policy": policy,
            "loss/observation": observation,
            "policy/entropy": entropy,
            "policy/clip_fraction": jnp.sum(weights * is_clipped),
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
            metrics["loss/value"] = jnp.sum(targets.value_weights * value)
            loss = loss + value_coefficient * metrics["loss/value"]
        return loss, metrics

    return loss_fn


def make_accumulate(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Program (params, grads, batch, targets, rows [R], *, length, frozen={}) → (grads + ∇loss,
    metrics).

    `grads` is donated. Metrics are weighted sums over the rows; add them over micro-batches
    (those ending in "_max": take the largest).
    """

    @functools.partial(jax.jit, static_argnames="length", donate_argnames="grads")
    def accumulate(params, grads, batch, targets, rows, *, length, frozen=None):
        rows_of = functools.partial(take_rows, rows=rows, length=length)
        part = _part(batch, rows_of)
        new, metrics = _gradient(loss_fn, params, frozen, part, rows_of(targets), {})
        return jax.tree.map(jnp.add, grads, new), metrics

    return accumulate


def make_apply(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """Program (state, grads) → (state, {"optimizer/grad_norm"}). The state is donated."""
    return functools.partial(jax.jit, donate_argnums=0)(functools.partial(_apply, optimizer))


def make_step(
    loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Program (state, batch, targets, packed, frozen={}) → (state, metrics): a whole optimizer step.

    The state is donated. The number of micro-batches is data, so steps of different size share one
    program as long as `packed` has one shape.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState,
        batch: TrajectoryBatch,
        targets: Targets,
        packed: Packed,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        def gradient(index: Array) -> tuple[Params, Metrics]:
            places, layout = _layout(packed, index)
            places_of = functools.partial(take_places, places=places)
            part = _part(batch, places_of)
            return _gradient(loss_fn, state.params, frozen, part, places_of(targets), layout)

        def body(index: Array, total: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
            grads, metrics = gradient(index)
            return jax.tree.map(jnp.add, total[0], grads), _join(total[1], metrics)

        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, jnp.int32(0))
        )
        nothing = (sharding.constrain_params(nothing[0]), nothing[1])
        grads, total = jax.lax.fori_loop(0, packed.count, body, nothing)
        new_state, metrics = _apply(optimizer, state, grads)
        return new_state, total | metrics

    return step


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer step on whatever `work` is. Made by `make_update`."""

    accumulate: Callable[..., Any]
    apply: Callable[..., Any]
    step: Callable[..., Any]

    def __call__(
        self,
        state: TrainState,
        batch: TrajectoryBatch,
        targets: Targets,
        work: Work,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """The new state and the metrics; the old state is donated."""
        if isinstance(work, Packed):
            return self.step(state, batch, targets, work, frozen)
        grads = zeros_like(state.params)
        total: Metrics = {}
        for rows, length in work:
            grads, metrics = self.accumulate(
                state.params, grads, batch, targets, rows, length=length, frozen=frozen
            )
            total = _join(total, metrics)
        state, metrics = self.apply(state, grads)
        return state, total | metrics


def make_update(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation) -> Update:
    return Update(make_accumulate(loss_fn), make_apply(optimizer), make_step(loss_fn, optimizer))


@jax.jit
def zeros_like(params: Params) -> Params:
    """Zeros of the shapes, types and places of parameters: empty gradients."""
    return sharding.constrain_params(jax.tree.map(jnp.zeros_like, params))


def _gradient(
    loss_fn: Callable[..., Any],
    params: Params,
    frozen: Params | None,
    part: TrajectoryBatch,
    targets: Targets,
    layout: dict[str, Any],
) -> tuple[Params, Metrics]:
    def loss(params: Params) -> tuple[Array, Metrics]:
        whole = params if frozen is None else frozen | params
        return loss_fn(whole, part, sharding.constrain_rows(targets), **layout)

    grads, metrics = jax.grad(loss, has_aux=True)(params)
    return sharding.constrain_params(grads), metrics


def _part(batch: TrajectoryBatch, take: Callable[[Any], Any]) -> TrajectoryBatch:
    """A micro-batch; `take` cuts [B, L] arrays. Losses see no groups: estimators came before."""
    fields = {
        field.name: take(getattr(batch, field.name))
        for field in dataclasses.fields(batch)
        if field.name != "group_ids"
    }
    rows = fields["tokens"].shape[0]
    return sharding.constrain_rows(
        TrajectoryBatch(**fields, group_ids=jnp.zeros(rows, batch.group_ids.dtype))
    )


def _apply(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params
) -> tuple[TrainState, Metrics]:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=sharding.constrain_params(params),
        opt_state=sharding.constrain_params(opt_state),
    )
    return state, {"optimizer/grad_norm": optax.tree.norm(grads)}


def _join(total: Metrics, new: Metrics) -> Metrics:
    """Sums over micro-batches; the largest of what ends in "_max"."""
    joined = dict(total)
    for key, value in new.items():
        if key in total:
            join = jnp.maximum if key.endswith("_max") else jnp.add
            value = join(total[key], value)
        joined[key] = value
    return joined
