"""Before a run: how many bytes each device will hold, and a refusal when that is too many.

Parameters, optimizer state and cache are counted from their shapes and places: first alone, before any
of them is on a device (`of_shapes`). What the programs need on top is what the compiler reserved for
them (`memory_analysis`), read from those of sampling (`plan_sampling`) and from the run's optimizer
steps, imitation's and RL's. A plan beyond the limit is refused there and then; the steps of one that
fits are executed, before anything else: a run that fits now does not run out of memory in its third
hour.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil

from jaxagentrl import batching, hosts, imitate, learner, reinforce, trees
from jaxagentrl.models import decoder, sharding
from jaxagentrl.optimizer import make as make_optimizer
from jaxagentrl.types import TrainState, TrajectoryBatch

Stage = Literal["imitation", "RL", "evaluation"]  # the last is of a run that trains nothing

# The policy among what is trained, of which a KL term keeps a copy: the model or its adapters.
POLICY = ("policy", "adapters")

# Variables by which jax is told how much of a GPU to take, its own name for it and the one before.
_GPU_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
GPU_SHARE_ADVICE = f"{_GPU_SHARES[0]}=0.95 in the environment: jax takes three quarters of a GPU unless it is told"
_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")

ADVICE = {
    "parameters": "a larger mesh.fsdp or mesh.tensor, or adapters (lora.rank) over a model in "
    "learner.compute_dtype='bfloat16'",
    "reference": "a larger mesh.fsdp, adapters (lora.rank), or rl.kl.placement='none'",
    "optimizer": "a larger mesh.fsdp, {section}.optimizer.moment_dtype='bfloat16', or adapters (lora.rank)",
    "update": "a smaller learner.tokens_per_part, learner.remat='full', "
    "learner.compute_dtype='bfloat16', or, of the gradients, a larger mesh.fsdp or adapters (lora.rank)",
    "cache": "fewer sampling.num_slots, a smaller sampling.max_length, or "
    "sampling.cache_dtype='bfloat16'",
    "decoding copy": "a larger mesh.tensor",
    "sampling": "fewer sampling.num_slots, more sampling.num_waves, narrower sampling.width_buckets, or "
    "sampling.row_divisors without 1",
    "batch": "fewer rl.tasks_per_iteration, in imitation a smaller sft.batch_size",
}


class PlanError(ValueError):
    """The run does not fit the memory; the message says what takes it and what would help."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Bytes per device."""

    cache: int  # while the run lasts
    needed: Mapping[str, int]  # during sampling, on top


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes per device."""

    stage: str  # a `Stage`
    always: Mapping[str, int]  # while the stage lasts
    updating: Mapping[str, int]  # during an update, on top
    sampling: Mapping[str, int]  # during sampling, on top
    limit: int  # what a device has

    @property
    def while_updating(self) -> int:
        return sum(self.always.values()) + sum(self.updating.values())

    @property
    def peak(self) -> int:
        return max(
            self.while_updating, sum(self.always.values()) + sum(self.sampling.values())
        )

    def text(self) -> str:
        """One line per item and the sum."""
        items = [
            *self.always.items(),
            *((f"{name} (updating)", size) for name, size in self.updating.items()),
            *((f"{name} (sampling)", size) for name, size in self.sampling.items()),
        ]
        lines = [f"  {name:24} {size / 2**20:12,.1f} MiB" for name, size in items if size]
        sizes = f"{self.peak / 2**20:,.1f} MiB of {self.limit / 2**20:,.1f}"
        head = f"memory per device in {self.stage}: {sizes}"
        return "\n".join([head, *lines])

    def check(self) -> None:
        """Refuses a plan beyond the limit.

        Raises:
            PlanError: with the plan, and advice for its largest items.
        """
        if self.peak <= self.limit:
            return
        sizes = dict(self.always)
        for part in (self.updating, self.sampling):
            for name, size in part.items():
                sizes[name] = sizes.get(name, 0) + size
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        section = "sft" if self.stage.startswith("imitation") else "rl"
        advice = "; ".join(f"{name}: {ADVICE[name].format(section=section)}" for name in largest)
        if self.limit == _reserved() and jax.default_backend() == "gpu" and not gpu_share():
            advice += f"; {GPU_SHARE_ADVICE}"
        raise PlanError(
            f"the run does not fit the memory of a device.\n{self.text()}\nWhat would help: {advice}."
        )


def of_shapes(
    config: Mapping[str, Any],
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    frozen: learner.Params | None,
    *,
    mesh: jax.sharding.Mesh | None,
    stages: Sequence[Stage],
    at_sampling: Sampling,
    limit: int,
) -> Iterator[Plan]:
    """What the stages' plans will say at least: without batches, and without what programs take.

    Args:
        trainable, frozen: shapes and places of the parameters, without the critic.
        stages: of which to say it.
        at_sampling: of `plan_sampling.counted`.
        limit: bytes that a device has, see `device_limit`.
    """

    rl = config["rl"]
    for stage in stages:
        params, optimizer, needs_reference = trainable, optax.identity(), False
        if stage == "imitation":
            optimizer = make_optimizer(**config["sft"]["optimizer"])
        if stage == "RL":
            params = _with_critic(trainable, model, mesh, critic=rl["critic"])
            optimizer, needs_reference = reinforce.make_optimizer(rl), reinforce.needs_reference(rl)
        state = _state(params, optimizer, mesh)
        always = _always(state, frozen, at_sampling.cache, needs_reference=needs_reference)
        yield Plan(f"{stage}, batch and programs aside", always, {}, at_sampling.needed, limit)


def of_evaluation(
    trainable: learner.Params,
    *,
    mesh: jax.sharding.Mesh | None,
    frozen: learner.Params | None,
    at_sampling: Sampling,
    limit: int,
) -> Plan:
    """The plan of a run that trains nothing; see `make`.

    Raises:
        PlanError: the plan is beyond the limit.
    """
    state = _state(trainable, optax.identity(), mesh)
    always = _always(state, frozen, at_sampling.cache, needs_reference=False)
    made = Plan("evaluation", always, {}, at_sampling.needed, limit)
    made.check()
    return made


def of_imitation(
    config: Mapping[str, Any],
    imitation: imitate.Imitation,
    trainable: learner.Params,
    *,
    mesh: jax.sharding.Mesh | None,
    **shared: Any,
) -> Plan:
    """The plan of imitation; `shared` are further arguments of `make`."""
    num_rows = sharding.padded_rows(config["sft"]["batch_size"], mesh)
    demonstrations = imitation.demonstrations
    works = largest_works(
        num_rows,
        width=demonstrations.width,
        longest_context=demonstrations.longest_context,
        **reinforce.part_shapes(config["learner"], mesh),
    )
    return make(
        "imitation",
        imitation.update,
        optimizer=imitation.optimizer,
        trainable=trainable,
        at_hand=per_device(trainable),
        mesh=mesh,
        num_rows=num_rows,
        width=demonstrations.width,
        works=works,
        **shared,
    )


def of_rl(
    config: Mapping[str, Any],
    programs: reinforce.Programs,
    optimizer: optax.GradientTransformation,
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    *,
    mesh: jax.sharding.Mesh | None,
    **shared: Any,
) -> Plan:
    """The plan of RL, whose critic is not there yet: it is known by its shapes."""
    num_rows = reinforce.num_rows(config["rl"], mesh)
    shapes = reinforce.part_shapes(config["learner"], mesh)
    several = config["rollout"]["context"] != "end"
    works = largest_works(
        num_rows,
        longest_context=config["sampling"]["max_length"] if several else None,
        tree_length=reinforce.tree_length(config),
        **shapes,
    )
    return make(
        "RL",
        programs.update,
        optimizer=optimizer,
        trainable=_with_critic(trainable, model, mesh, critic=config["rl"]["critic"]),
        at_hand=per_device(trainable),
        mesh=mesh,
        num_rows=num_rows,
        width=max(shapes["length_buckets"]),
        works=works,
        needs_reference=programs.needs_reference,
        **shared,
    )


def make(
    stage: str,
    update: Callable[..., Any],
    *,
    optimizer: optax.GradientTransformation,
    trainable: learner.Params,
    frozen: learner.Params | None,
    at_hand: int,
    mesh: jax.sharding.Mesh | None,
    num_rows: int,
    width: int,
    works: Sequence[learner.Work],
    at_sampling: Sampling,
    limit: int,
    needs_reference: bool = False,
    is_executed: bool = True,
) -> Plan:
    """Compiles a stage's updates that may be the largest and adds everything up; of a plan within the
    limit the largest is then executed.

    Args:
        update: the program of the stage's optimizer steps, of `learner.make_step`.
        trainable: parameters to be trained, critic included, or their shapes and places.
        at_hand: bytes per device of those that are there already; they are not changed.
        num_rows, width: shape of the stage's batches.
        works: of which one is the largest, see `largest_works`.
        at_sampling: what `plan_sampling.measured` found.
        limit: bytes that a device has, see `device_limit`.
        needs_reference: whether a copy of the policy (of its adapters) is kept for a KL term.
        is_executed: False for devices that are not there (`tools/plan_for.py`).

    Raises:
        PlanError: the plan is beyond the limit. Nothing was executed.
    """
    state = _state(trainable, optimizer, mesh)
    rows = _nothing(num_rows, width)
    arguments = _abstract_rows(rows, mesh)
    sizes = [program_bytes(update.lower(state, *arguments, work, frozen), "update") for work in works]
    always = _always(state, frozen, at_sampling.cache, needs_reference=needs_reference)
    always["batch"] = per_device(arguments) + max(map(per_device, works))
    made = Plan(stage, always, {"update": max(sizes)}, at_sampling.needed, limit)
    made.check()
    # A step changes the state it is given: it is executed on one of zeros, beside the parameters. There
    # is no reference yet.
    if is_executed and made.while_updating - always["reference"] + at_hand <= limit:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state)
        work = works[int(np.argmax(sizes))]
        jax.block_until_ready(update(zeros, *sharding.place_rows(rows, mesh), work, frozen))
    return made


def largest_works(
    num_rows: int,
    *,
    length_buckets: Sequence[int],
    tokens_per_part: int,
    row_multiple: int,
    packing: bool,
    width: int | None = None,
    tree_length: int = 0,
    longest_context: int | None = None,
) -> list[learner.Work]:
    """Work of which one takes the most memory of all that may come; see `imitate.split`, or with a
    `tree_length` `trees.grow`. It has one micro-batch of every length, and the shapes of the run's: what
    is compiled for it is compiled for the run. `width` is the batch's, by default the largest length.

    There is one, except where episodes consist of several texts, the longest of `longest_context`
    tokens: then packed rows are as long as the longest text of a step. Memory grows with a
    micro-batch's tokens (logits) and with the length of its rows (attention). A shorter length has
    more rows, and with them more tokens where the longest does not fill `tokens_per_part`: all are
    candidates but those that a longer one has as many tokens as.
    """
    width = max(length_buckets) if width is None else width
    if tree_length:
        tree = trees.grow(
            np.arange(num_rows, dtype=np.int32),
            np.zeros((num_rows, width), np.int32),
            np.full(num_rows, min(width, tree_length)),
            length=tree_length,
            tokens_per_part=tokens_per_part,
            row_multiple=row_multiple,
            most_rows=num_rows,
        )
        return [(tree,)]
    longest = width if longest_context is None else batching.bucket(longest_context, length_buckets)
    lengths = [width]
    if longest_context is not None:
        lengths = sorted({length for length in length_buckets if length <= longest}, reverse=True)
    found: dict[int, learner.Work] = {}
    for length in lengths:
        contexts = None
        if longest_context is not None:  # as many in a row as there may be of the longest
            contexts = [[(0, length)] * (width // longest)] * num_rows
        work = imitate.split(
            np.arange(num_rows, dtype=np.int32),
            np.full(num_rows, length),
            shape=(num_rows, width),
            most_rows=num_rows,
            length_buckets=length_buckets,
            tokens_per_part=tokens_per_part,
            row_multiple=row_multiple,
            packing=packing,
            contexts=contexts,
        )
        # How many micro-batches are executed is data, and the memory the same.
        work = tuple(dataclasses.replace(stack, count=np.int32(1)) for stack in work)
        tokens = max(math.prod(stack.shape) for stack in work)
        if tokens > max(found, default=0):
            found[tokens] = work
    return list(found.values())


def per_device(tree: Any) -> int:
    """Bytes of a tree's leaves on one device, by their shardings; whole without."""

    def leaf_bytes(leaf: Any) -> int:
        where = getattr(leaf, "sharding", None)
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def device_limit(memory_limit_gb: float | None) -> int:
    """Bytes that one device may use: what the config says, else the least that a process has.

    A collective when there are several processes: all of them refuse a run, or none does.
    """
    if memory_limit_gb is not None:
        return int(memory_limit_gb * 1e9)
    return min(hosts.gather(_device_limit()))


def _device_limit() -> int:
    """Bytes that one device of this process may use.

    Accelerators say so themselves. CPU devices share what is free on the host, cgroup included, and
    what this process holds already.
    """
    if reserved := _reserved():
        return reserved
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if _CGROUP_LIMIT.exists() and _CGROUP_LIMIT.read_text().strip().isdigit():
        free = min(free, int(_CGROUP_LIMIT.read_text()))
    return free // jax.local_device_count()


def _reserved() -> int | None:
    """What the backend took of a device's memory, where it says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def gpu_share() -> str | None:
    """How much of a GPU jax is told to take; None if it is not told."""
    return next((os.environ[name] for name in _GPU_SHARES if os.environ.get(name)), None)


def program_bytes(program: jax.stages.Lowered, name: str) -> int:
    """What a program needs on a device beside its arguments. It is compiled.

    Args:
        name: of what it is for, in `ADVICE`.

    Raises:
        PlanError: the compiler found that it has no room, as that of TPUs does.
    """
    try:
        sizes = program.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise PlanError(
            f"the run does not fit the memory of a device, by the compiler of its programs ({name}): {said}\nWhat would "
            f"help: {ADVICE[name]}."
        ) from error
    return (
        sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def _with_critic(
    trainable: learner.Params,
    model: decoder.DecoderConfig,
    mesh: jax.sharding.Mesh | None,
    *,
    critic: str,
) -> learner.Params:
    """Shapes and places of the parameters that RL trains."""
    made = jax.eval_shape(lambda x: learner.with_critic(x, model, critic=critic), trainable)
    return sharding.abstract(made, mesh)


def _state(
    trainable: learner.Params,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None,
) -> TrainState:
    """Shapes and places of a stage's state."""
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.eval_shape(lambda x: x, trainable),
        jax.eval_shape(optimizer.init, trainable),
    )
    return sharding.abstract(state, mesh)


def _always(
    state: TrainState, frozen: learner.Params | None, cache: int, *, needs_reference: bool
) -> dict[str, int]:
    """What a stage holds as long as it lasts, but for its batch."""
    reference = [state.params[key] for key in POLICY if key in state.params and needs_reference]
    return {
        "parameters": per_device((state.params, frozen)),
        "reference": per_device(reference),
        "optimizer": per_device(state.opt_state),
        "batch": 0,
        "cache": cache,
    }


def _abstract_rows(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Shapes and types of host arrays [B, ...] as `sharding.place_rows` puts them."""
    return sharding.abstract(tree, None) if mesh is None else sharding.abstract_rows(tree, mesh)


def _nothing(rows: int, width: int) -> tuple[TrajectoryBatch, learner.Targets]:
    """A batch of padding and targets of weight zero."""

    def zeros(dtype: type) -> np.ndarray:
        return np.zeros((rows, width), dtype)

    batch = TrajectoryBatch(
        tokens=zeros(np.int32),
        valid_mask=zeros(bool),
        action_mask=zeros(bool),
        turn_ids=zeros(np.int32),
        turn_ends=zeros(bool),
        sampler_logprobs=zeros(np.float32),
        rewards=zeros(np.float32),
        discounts=zeros(np.float32),
        group_ids=np.zeros(rows, np.int32),
    )
    fields = dataclasses.fields(learner.Targets)
    return batch, learner.Targets(*(zeros(np.float32) for _ in fields))
