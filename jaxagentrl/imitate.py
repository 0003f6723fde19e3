"""Imitation: cross-entropy on demonstrations, through the same batches and programs as RL."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxagentrl import batching, chat, demos, learner, losses, objectives, optimizer, rules
from jaxagentrl.models import decoder, sharding
from jaxagentrl.packing import Rows, pack, rows_per_part
from jaxagentrl.trajectory import Trajectory
from jaxagentrl.types import TrainState, TrajectoryBatch


# For every row of a batch the (start, size) of its contexts; None where a row is one context.
Contexts = Sequence[Sequence[tuple[int, int]]] | None


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """All demonstrations, on the host: the devices see those of one step at a time."""

    batch: TrajectoryBatch  # numpy; a last row is padding, for steps that have to be filled
    lengths: np.ndarray  # tokens of each row
    contexts: Contexts  # of each row

    @property
    def width(self) -> int:
        return self.batch.tokens.shape[1]

    @property
    def longest_context(self) -> int | None:
        """Tokens of the longest; None where every row is one context."""
        if self.contexts is None:
            return None
        return max(size for pieces in self.contexts for _, size in pieces)


@dataclasses.dataclass(frozen=True)
class Imitation:
    """What the stage works with, made by `make`."""

    demonstrations: Demonstrations
    optimizer: optax.GradientTransformation
    update: Callable[..., Any]  # of `learner.make_step`, compiled once per run


def make(
    config: Mapping[str, Any],
    model: decoder.DecoderConfig,
    chat_format: chat.ChatFormat,
    replays: Sequence[demos.Replay],
) -> Imitation:
    """What the config asks for."""
    sft, shapes = config["sft"], config["learner"]
    trajectories = demos.encode(
        replays,
        chat_format,
        rules.of_config(config),
        max_length=config["sampling"]["max_length"],
        max_turn_tokens=config["sampling"]["max_turn_tokens"],
    )
    chain = optimizer.make(**sft["optimizer"])
    loss = objectives.make_sft_loss(
        model, remat=shapes["remat"], compute_dtype=shapes["compute_dtype"]
    )
    demonstrations = load(trajectories, length_buckets=shapes["length_buckets"])
    return Imitation(demonstrations, chain, learner.make_step(loss, chain))


def load(
    trajectories: Sequence[Trajectory], *, length_buckets: Sequence[int]
) -> Demonstrations:
    batch = batching.to_batch(
        trajectories,
        None,
        discount=1.0,
        length_buckets=length_buckets,
        row_multiple=1,
        num_rows=len(trajectories) + 1,
    )
    lengths = np.array([trajectory.num_tokens for trajectory in trajectories])
    return Demonstrations(batch, lengths, contexts_of(trajectories))


def contexts_of(trajectories: Sequence[Trajectory]) -> Contexts:
    """Their contexts, if the context of any of them ever opened anew."""
    contexts = [trajectory.contexts for trajectory in trajectories]
    return contexts if any(len(pieces) > 1 for pieces in contexts) else None


def starts_of(shape: tuple[int, int], contexts: Contexts) -> np.ndarray:
    """[B, L] bool, the tokens that a text begins with, which nothing predicts."""
    starts = np.zeros(shape, bool)
    starts[:, 0] = True
    for row, pieces in enumerate(contexts or ()):
        starts[row, [start for start, _ in pieces]] = True
    return starts


def step_rows(num_rows: int, *, batch_size: int, seed: int, step: int) -> np.ndarray:
    """int32 [batch_size] rows of one step, a pure function of (seed, step).

    Every epoch is a new order cut into full batches; the rows that do not fill a last one wait for
    the next epoch.
    """
    if batch_size > num_rows:
        raise ValueError(
            f"sft.batch_size is {batch_size} but there are only {num_rows} demonstrations; lower it "
            "or raise the number of seeds in splits.demo."
        )
    steps_per_epoch = num_rows // batch_size
    epoch, index = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    return order[index * batch_size : (index + 1) * batch_size].astype(np.int32)


def split(
    rows: np.ndarray,
    lengths: np.ndarray,
    *,
    shape: tuple[int, int],
    most_rows: int,
    length_buckets: Sequence[int],
    tokens_per_part: int,
    row_multiple: int,
    packing: bool,
    contexts: Contexts = None,
) -> learner.Work:
    """The rows of one step as the learner takes them: packed, or in micro-batches by length.

    Args:
        rows: rows of the batch to work on.
        lengths: tokens of every real row of the batch.
        shape: (B, width) of the batch's arrays.
        most_rows: an upper bound of `len(rows)` over all steps. The shapes of what is returned, and with them the program, are
            the same whichever rows, and however few, these are (but for `Packed.max_segments`).
        contexts: of `contexts_of`; rows of several contexts are always packed, each context by
            itself, in rows of the smallest length that holds the longest. How many there are is not
            known beforehand: these steps share a few programs.

    Raises:
        ValueError: the batch is not as wide as the bucket of its longest row.
    """
    if packing or contexts is not None:
        length = max(length_buckets)
        if contexts is not None:
            sizes = [size for row in rows for _, size in contexts[row]]
            length = batching.bucket(max(sizes, default=1), length_buckets)
        packed = pack(
            rows,
            lengths,
            shape=shape,
            length=length,
            most_rows=most_rows,
            contexts=contexts,
            tokens_per_part=tokens_per_part,
            row_multiple=row_multiple,
        )
        return (packed,)
    groups = batching.length_groups(
        lengths[rows].tolist(),
        length_buckets=length_buckets,
        tokens_per_batch=tokens_per_part,
        row_multiple=row_multiple,
    )
    if groups and (longest := max(group.length for group in groups)) > shape[1]:
        raise ValueError(
            f"shape: the batch is {shape[1]} tokens wide, but its longest rows are worked off as {longest}: make it as "
            f"wide as one of the length buckets {tuple(length_buckets)}."
        )
    stacks = []
    # No row of the batch is longer than its width.
    for length in sorted((size for size in set(length_buckets) if size <= shape[1]), reverse=True):
        mine = [group for group in groups if group.length == length]
        per_part = rows_per_part(
            length, tokens_per_part=tokens_per_part, row_multiple=row_multiple
        )
        # Only the last group of all may have rows to spare, so there are no more of one length.
        index = np.full((-(-most_rows // per_part), per_part), shape[0], np.int32)
        for part, group in zip(index[: len(mine)], mine, strict=True):
            part[: len(group.indices)] = rows[list(group.indices)]
        stacks.append(Rows(index, np.int32(len(mine)), length))
    return tuple(stacks)


def targets(
    batch: TrajectoryBatch, starts: jax.Array, *, observation_weight: float
) -> learner.Targets:
    """Weights of one step: the mean over its action tokens, and over its other tokens.

    Args:
        batch: the rows of the step.
        starts: [B, L] bool, of `starts_of`.
        observation_weight: of the mean over prompt and observation tokens; 0 is plain imitation.
    """
    read = batch.valid_mask & ~batch.action_mask & ~starts
    zeros = jnp.zeros(batch.tokens.shape)
    weights = losses.aggregation_weights(batch.action_mask, mode="token_mean")
    made = learner.Targets(
        advantages=zeros,
        returns=zeros,
        old_logprobs=zeros,
        old_values=zeros,
        ref_logprobs=zeros,
        weights=weights,
        mean_weights=weights,
        value_weights=zeros,
        observation_weights=observation_weight
        * losses.aggregation_weights(read, mode="token_mean"),
    )
    return sharding.constrain_rows(made)


targets = jax.jit(targets, static_argnames="observation_weight")


def with_observation_mean(values: dict[str, float], observation_weight: float) -> dict[str, float]:
    """Metrics of a step whose "loss/observation" is the mean in nats, as "loss/action" is, and not what of it is in
    the loss; without it where nothing but actions is trained on."""
    others = {key: value for key, value in values.items() if key != "loss/observation"}
    if not observation_weight or "loss/observation" not in values:
        return others
    return others | {"loss/observation": values["loss/observation"] / observation_weight}


def train(
    state: TrainState,
    imitation: Imitation,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    batch_size: int,
    observation_weight: float,
    length_buckets: Sequence[int],
    tokens_per_part: int,
    row_multiple: int,
    packing: bool,
    frozen: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[int, TrainState, Mapping[str, jax.Array]]]:
    """Yields (steps done, state, metrics) after every optimizer step.

    `frozen` are the parameters that are not trained, see `learner`.
    """
    demonstrations = imitation.demonstrations
    lengths, contexts = demonstrations.lengths, demonstrations.contexts
    num_rows = sharding.padded_rows(batch_size, mesh)
    everything = (demonstrations.batch, starts_of(demonstrations.batch.tokens.shape, contexts))
    for step in range(first_step, num_steps):
        rows = step_rows(len(lengths), batch_size=batch_size, seed=seed, step=step)
        work = split(
            np.arange(batch_size, dtype=np.int32),
            lengths[rows],
            shape=(num_rows, demonstrations.width),
            most_rows=batch_size,
            length_buckets=length_buckets,
            tokens_per_part=tokens_per_part,
            row_multiple=row_multiple,
            packing=packing,
            contexts=None if contexts is None else [contexts[row] for row in rows],
        )
        taken = np.pad(rows, (0, num_rows - batch_size), constant_values=-1)
        mine = jax.tree.map(lambda x: x[taken], everything)
        batch, starts = sharding.place_rows(mine, mesh)
        weighed = targets(batch, starts, observation_weight=observation_weight)
        state, metrics = imitation.update(state, batch, weighed, work, frozen)
        yield step + 1, state, metrics
