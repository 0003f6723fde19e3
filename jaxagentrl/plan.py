"""Before a run: how many bytes each device will hold, and a refusal when that is too many.

Parameters, optimizer state and cache are counted from their shapes and places. What the programs
need on top is what the compiler reserved for them (`memory_analysis`), read from the run's optimizer
steps, imitation's and RL's. They are executed here, before anything else: a run that fits now does not
run out of memory in its third hour.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil

from jaxagentrl import batching, dispatch, imitate, learner, reinforce, sampling, trees
from jaxagentrl.models import decoder, decoding_layout, sharding
from jaxagentrl.types import TrainState, TrajectoryBatch

# The policy among what is trained, of which a KL term keeps a copy: the model or its adapters.
POLICY = ("policy", "adapters")

# Below this share of the memory the decode program is not compiled twice only to be measured.
_SMALL_SHARE = 0.05
_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")

ADVICE = {
    "parameters": "a larger mesh.fsdp or mesh.tensor, or adapters (lora.rank) over a model in "
    "learner.compute_dtype='bfloat16'",
    "reference": "a larger mesh.fsdp, adapters (lora.rank), or rl.kl.placement='none'",
    "optimizer": "a larger mesh.fsdp, optimizer.moment_dtype='bfloat16', or adapters (lora.rank)",
    "update": "a smaller learner.tokens_per_part, learner.remat='full', "
    "learner.compute_dtype='bfloat16', or, of the gradients, a larger mesh.fsdp or adapters (lora.rank)",
    "cache": "fewer sampling.num_slots, a smaller sampling.max_length, or "
    "sampling.cache_dtype='bfloat16'",
    "decoding copy": "a larger mesh.tensor",
    "sampling": "fewer sampling.num_slots or more sampling.num_waves",
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

    stage: str  # "imitation" or "RL"
    always: Mapping[str, int]  # while the stage lasts
    updating: Mapping[str, int]  # during an update, on top
    sampling: Mapping[str, int]  # during sampling, on top
    limit: int  # what a device has

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(
            sum(self.updating.values()), sum(self.sampling.values())
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
        advice = "; ".join(f"{name}: {ADVICE[name]}" for name in largest)
        raise PlanError(
            f"the run does not fit the memory of a device.\n{self.text()}\nWhat would help: {advice}."
        )


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
    """The plan of RL, to whose `trainable` parameters its critic is added."""
    num_rows = reinforce.num_rows(config["rl"], mesh)
    shapes = reinforce.part_shapes(config["learner"], mesh)
    several = config["rollout"]["context"] != "end"
    works = largest_works(
        num_rows,
        longest_context=config["sampling"]["max_length"] if several else None,
        tree_length=reinforce.tree_length(config),
        **shapes,
    )
    with_critic = learner.with_critic(trainable, model, critic=config["rl"]["critic"])
    return make(
        "RL",
        programs.update,
        optimizer=optimizer,
        trainable=sharding.place(with_critic, mesh),
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
    mesh: jax.sharding.Mesh | None,
    num_rows: int,
    width: int,
    works: Sequence[learner.Work],
    at_sampling: Sampling,
    limit: int,
    needs_reference: bool = False,
) -> Plan:
    """Compiles a stage's updates that may be the largest, executes the one that is, adds everything up.

    Args:
        update: the program of the stage's optimizer steps, of `learner.make_step`.
        trainable: parameters to be trained, critic included; they are not changed.
        num_rows, width: shape of the stage's batches.
        works: of which one is the largest, see `largest_works`.
        at_sampling: what `for_sampling` found.
        limit: bytes that a device has, see `device_limit`.
        needs_reference: whether a copy of the policy (of its adapters) is kept for a KL term.
    """
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.eval_shape(lambda: trainable),
        jax.eval_shape(optimizer.init, trainable),
    )
    state = sharding.abstract(state, mesh)
    batch, targets = sharding.place_rows(_nothing(num_rows, width), mesh)
    reference = [trainable[key] for key in POLICY if key in trainable and needs_reference]
    always = {
        "parameters": per_device(trainable) + per_device(frozen),
        "reference": per_device(reference),
        "optimizer": per_device(state.opt_state),
        "batch": per_device((batch, targets)) + max(map(per_device, works)),
        "cache": at_sampling.cache,
    }
    inputs = (trainable, batch, targets, works, frozen)
    updating = {"update": _update_bytes(update, state, *inputs, limit=limit)}
    return Plan(stage, always, updating, at_sampling.needed, limit)


def for_sampling(
    model: decoder.DecoderConfig,
    trainable: learner.Params,
    frozen: learner.Params | None,
    mesh: jax.sharding.Mesh | None,
    *,
    options: Mapping[str, Any],
    compute_dtype: str,
    limit: int,
) -> Sampling:
    """What sampling takes; where that may be much, its decode program is compiled to be measured.

    Args:
        options: `config.sampling`.
        compute_dtype: `config.learner.compute_dtype`, which sampling shares.
        limit: bytes that a device has.
    """
    local = None if mesh is None else sharding.decoding_mesh(mesh)
    slots = options["num_slots"] // options["num_waves"]
    held = jax.eval_shape(
        lambda: sampling.init(model, slots, options["max_length"], options["cache_dtype"])
    )
    given = sharding.abstract(
        jax.eval_shape(learner.policy_of, (frozen or {}) | trainable), mesh
    )
    with sharding.use(mesh):
        policy = jax.eval_shape(lambda x: decoding_layout.for_decoding(x, compute_dtype), given)
    if local is not None:
        held = sampling.Held(
            sharding.abstract_cache(held.cache, local), sharding.abstract_rows(held.hidden, local)
        )
        policy = sharding.abstract(policy, local)
    cache_bytes = per_device(held) * options["num_waves"]
    needed = {"decoding copy": _copy_bytes(given, policy, mesh)}
    if cache_bytes + per_device(policy) > _SMALL_SHARE * limit:
        with sharding.use(local):
            decode = sampling.make_decode(model, max_turn_tokens=options["max_turn_tokens"])
            compiled = decode.lower(
                policy,
                held,
                *_decode_inputs(slots),
                filled=options["max_length"],
                restricted=False,
            ).compile()
            at_once = dispatch.side_by_side(options["num_waves"])
        needed["sampling"] = at_once * program_bytes(compiled)
    return Sampling(cache_bytes, needed)


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


def device_limit() -> int:
    """Bytes that one device of this process may use.

    Accelerators say so themselves. CPU devices share what is free on the host, cgroup included, and
    what this process holds already.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if _CGROUP_LIMIT.exists() and _CGROUP_LIMIT.read_text().strip().isdigit():
        free = min(free, int(_CGROUP_LIMIT.read_text()))
    return free // jax.local_device_count()


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs on a device beside its arguments."""
    sizes = compiled.memory_analysis()
    return (
        sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def _update_bytes(
    update: Callable[..., Any],
    state: TrainState,
    trainable: learner.Params,
    batch: TrajectoryBatch,
    targets: learner.Targets,
    works: Sequence[learner.Work],
    frozen: learner.Params | None,
    *,
    limit: int,
) -> int:
    """Of a whole step, gradients included.

    A step changes the state it is given, so that it is executed on one of zeros, beside the
    parameters. Where only one of the two fits, the step is compiled and not executed.
    """
    sizes = [
        program_bytes(update.lower(state, batch, targets, work, frozen).compile())
        for work in works
    ]
    largest = int(np.argmax(sizes))
    held = per_device((trainable, frozen, batch, targets, state, works[largest]))
    if held + sizes[largest] <= limit:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state)
        jax.block_until_ready(update(zeros, batch, targets, works[largest], frozen))
    return sizes[largest]


def _copy_bytes(given: Any, policy: Any, mesh: jax.sharding.Mesh | None) -> int:
    """Of the decoder's parameters as sampling takes them, without those that are at hand so."""
    if mesh is None:
        at_hand = dict(jax.tree_util.tree_flatten_with_path(given)[0])
        leaves = jax.tree_util.tree_flatten_with_path(policy)[0]
        return per_device([x for path, x in leaves if x != at_hand.get(path)])
    places = sharding.decoding_shardings(given, mesh)
    is_copied = jax.tree.map(
        lambda x, y, where: x.dtype != y.dtype or not sharding.lies_at(x, where),
        given, policy, places,
    )
    kept = jax.tree.map(lambda x, copied: x if copied else None, policy, is_copied)
    return per_device(kept)


def _decode_inputs(slots: int) -> tuple[Any, ...]:
    """Shapes of the decode program's slots, pending, lengths, is_ready, controls and until."""

    def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    whole, real = shape(jnp.int32, slots), shape(jnp.float32, slots)
    controls = sampling.Controls(
        budgets=whole,
        temperatures=real,
        top_k=whole,
        top_p=real,
        min_p=real,
        stop_ids=shape(jnp.int32, slots, 1),
        streams=shape(jnp.uint32, slots, 2),
    )
    told = whole if sampling.decodes_some_rows() else None
    return told, whole, whole, shape(jnp.bool_, slots), controls, shape(jnp.int32)


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
