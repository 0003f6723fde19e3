"""Where every array lives on a mesh of devices: axes, path rules, constraints.

    data    rows of the batch; parameters are repeated along it
    fsdp    rows of the batch too, while parameters and optimizer state are split and gathered where
            they are used (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, stage 3)
    tensor  attention heads, feed-forward columns, vocabulary (Shoeybi et al. 2019,
            https://arxiv.org/abs/1909.08053)

The compiler does the rest: arrays are placed by the rules below, activations are held to them at a
few points by `constrain`, and XLA puts in the collectives (GSPMD, Xu et al. 2021,
https://arxiv.org/abs/2105.04663). Where it cannot know that devices need nothing of each other, which
rows of a cache are read being data, `by_device` says so.

Programs find the mesh in their context (`with use(mesh):`). Without one, and inside `pmap` or
`shard_map`, where devices are handled by the caller, `constrain` and its kin change nothing.

A dimension that an axis does not divide stays whole on that axis: a vocabulary of 509 is not split.
"""

import concurrent.futures
import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share out the rows of a batch

Axis = str | tuple[str, ...] | None

# End of a leaf's path → axes of its dimensions; () is whole everywhere. The leading None of layer
# leaves is their depth. Optimizer moments carry their parameter's path and so its rule.
RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/attention/(q|k|v|joined)/kernel", (None, "fsdp", "tensor")),
    (r"layers/attention/(q|k|v|joined)/bias", (None, "tensor")),
    (r"layers/attention/o/kernel", (None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up|joined)/kernel", (None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel", (None, "tensor", "fsdp")),
    (r"layers/\w+/(q|k|v|gate|up)/lora_a", (None, "fsdp", None)),
    (r"layers/\w+/(q|k|v|gate|up)/lora_b", (None, None, "tensor")),
    (r"layers/\w+/(o|down)/lora_a", (None, "tensor", None)),
    (r"layers/\w+/(o|down)/lora_b", (None, None, "fsdp")),
    (r"(\w+_)?norm/scale", ()),
    (r"value_head/(kernel|bias)", ()),
)

CACHE_AXES: tuple[Axis, ...] = (None, ROWS, "tensor")  # [N layers, S slots, K heads, ...]


class ShardingError(ValueError):
    """A mesh that the devices do not make, or a parameter that no rule places."""


def make_mesh(
    *, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """The mesh of a run; None when it is one device, which needs none.

    Args:
        data, fsdp, tensor: sizes of the axes; one of them may be −1: all devices that are left.
        devices: default all devices of all processes. Several processes must use all of them, a
            single one may leave some idle.

    Raises:
        ShardingError: sizes that the devices do not make.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_shape((data, fsdp, tensor), len(devices))
    used = math.prod(shape)
    if used == 1 and len({device.process_index for device in devices}) == 1:
        return None
    if used != len(devices) and jax.process_count() > 1:
        raise ShardingError(
            f"mesh {dict(zip(AXES, shape, strict=True))} is {used} devices but the "
            f"{jax.process_count()} processes have {len(devices)}: use all of them, for example by "
            "mesh.data = -1."
        )
    return _mesh(np.array(devices[:used]).reshape(shape))


def mesh_of_one(device: jax.Device) -> Mesh:
    """For what is to say which device it is of: a run on one has no mesh."""
    return _mesh(np.array([[[device]]]))


def resolve_shape(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Sizes of the axes with a −1 replaced by what is left of `num_devices`."""
    sizes = dict(zip(AXES, shape, strict=True))
    wrong = [f"mesh.{name} is {size}" for name, size in sizes.items() if size < 1 and size != -1]
    if wrong or sum(size == -1 for size in shape) > 1:
        raise ShardingError(
            f"{', '.join(wrong) or 'several axes of the mesh are -1'}: every axis is a positive "
            "number, and one of them may be -1 (all devices left)."
        )
    given = math.prod(size for size in shape if size != -1)
    if given > num_devices or (-1 in shape and num_devices % given):
        raise ShardingError(
            f"mesh {sizes} does not fit the {num_devices} devices there are. Lower an axis, or on "
            "CPU make more of them: XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )
    return tuple(num_devices // given if size == -1 else size for size in shape)


def decoding_mesh(mesh: Mesh) -> Mesh:
    """This process's devices for sampling: no fsdp, since gathering a layer for every token would
    cost more than the token, and no other process, since episodes end at different times.

    Raises:
        ShardingError: a tensor group spans processes.
    """
    tensor = mesh.shape["tensor"]
    groups = mesh.devices.reshape(-1, tensor)
    if any(len({device.process_index for device in group}) > 1 for group in groups):
        raise ShardingError(
            f"mesh.tensor is {tensor}, which puts devices of several processes in one tensor group: "
            "lower it to a divisor of the number of devices that each process has."
        )
    mine = [group for group in groups if group[0].process_index == jax.process_index()]
    return _mesh(np.array(mine).reshape(-1, 1, tensor))


def _mesh(devices: np.ndarray) -> Mesh:
    # Auto: the compiler propagates. (What newer versions of jax would otherwise choose differs.)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Programs compiled and called in this context are partitioned over the mesh."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Undoes `use` for code that has a mesh of its own."""
    if not active():
        yield
        return
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("alone",))):
        yield


def active() -> bool:
    """True within `use` of a mesh, and not inside pmap or shard_map. Inside `by_device`, if an axis is
    left there."""
    return bool(axes_in_use())


def row_shards_in_use() -> int:
    """Parts that the rows of a batch are split into by the mesh in use."""
    return math.prod(axes_in_use().get(axis, 1) for axis in ROWS)


def head_shards_in_use() -> int:
    """Size of `tensor` on the mesh in use: heads are split into so many parts if it divides their number."""
    return axes_in_use().get("tensor", 1)


def num_row_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Parts that the rows of a batch are split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def padded_rows(num_rows: int, mesh: Mesh | None) -> int:
    """`num_rows`, up to what is split evenly."""
    shards = num_row_shards(mesh)
    return -(-num_rows // shards) * shards


def outside(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` without the mesh in use, for arrays on single devices of it, and apart from what is
    being traced: jax keeps both by thread."""
    thread = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return thread.submit(function, *arguments).result()
    finally:
        thread.shutdown(wait=False)  # who interrupts the saving of a model is not to wait for its end


def axes_of(path: str, ndim: int) -> tuple[Axis, ...]:
    """Axes of a parameter's (or its moment's) dimensions by its path, such as
    "policy/layers/mlp/up/kernel". Scalars (counters) are whole everywhere.

    Raises:
        ShardingError: no rule names it, or the rule has another number of dimensions.
    """
    if ndim == 0:
        return ()
    stacked = re.sub(r"(^|/)layers/\d+/", r"\1layers/", path)
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", stacked):
            if stacked != path:  # a layer on its own lies as it does in the stack
                axes = axes[1:]
            if axes and len(axes) != ndim:
                raise ShardingError(
                    f"the parameter {path} has {ndim} dimensions, but its rule {pattern!r} in "
                    f"models/sharding.py places {len(axes)}: correct the rule."
                )
            return axes
    raise ShardingError(
        f"no rule places the parameter {path} ({ndim} dimensions): add one to RULES in "
        "models/sharding.py."
    )


def spec(axes: Sequence[Axis], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Axes with those left out that do not divide their dimension.

    Spelled as a compiled program spells the places of its results: without axes of size 1, and without
    None at the end. Places that are equal and spelled otherwise are another program to jax.
    """

    def fitting(axis: Axis, size: int) -> Axis:
        names = (axis,) if isinstance(axis, str) else axis or ()
        names = tuple(name for name in names if sizes[name] > 1)
        return names if names and size % math.prod(sizes[name] for name in names) == 0 else None

    found = [fitting(axis, size) for axis, size in zip(axes, shape, strict=False)]
    while found and found[-1] is None:
        found.pop()
    return PartitionSpec(*found)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of parameters, optimizer state or both (`TrainState`).

    Raises:
        ShardingError: naming every leaf that no rule places.
    """
    return _by_path(
        tree, lambda axes, leaf: NamedSharding(mesh, spec(axes, leaf.shape, mesh.shape))
    )


def abstract_cache(cache: Any, mesh: Mesh) -> Any:
    """Shapes and types of the arrays [N, S, K, ...] of a KV cache on the mesh: slots over rows, heads over
    tensor."""
    return _abstract_by(CACHE_AXES, cache, mesh)


def abstract_rows(tree: Any, mesh: Mesh) -> Any:
    """Shapes and types of arrays [B, ...] on the mesh, rows shared out."""
    return _abstract_by((ROWS,), tree, mesh)


def _abstract_by(axes: Sequence[Axis], tree: Any, mesh: Mesh) -> Any:
    def at(x: Any) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec(axes, x.shape, mesh.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(at, tree)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Puts parameters or a state on the mesh by the rules.

    Every process holds the same values. Without a mesh the tree comes back as it is.
    """
    return tree if mesh is None else jax.tree.map(_put, tree, shardings(tree, mesh))


def abstract(tree: Any, mesh: Mesh | None) -> Any:
    """Shapes and types of a tree of arrays with their places on the mesh, to restore into."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        shardings(tree, mesh),
    )


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Puts host arrays [B, ...] on the mesh, rows shared out.

    Every process knows all rows and feeds those that its devices hold.
    """
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(
        lambda x: _put(x, NamedSharding(mesh, spec((ROWS,), np.shape(x), mesh.shape))), tree
    )


def for_decoding(params: Any, mesh: Mesh | None) -> Any:
    """The parameters on the `decoding_mesh`, gathered once for a whole rollout.

    Every tensor group holds all of them and a device its part of the group's: none holds more of
    them even while they are gathered. Parameters that lie so already are not copied. A collective
    when there are several processes.
    """
    if mesh is None:
        return params
    local = decoding_mesh(mesh)
    leaves, treedef = jax.tree.flatten(params)
    places = jax.tree.leaves(decoding_shardings(params, mesh))
    moving = [i for i, x in enumerate(leaves) if not lies_at(x, places[i])]
    moved = _move([leaves[i] for i in moving], [places[i] for i in moving])
    for i, leaf in zip(moving, moved, strict=True):
        leaves[i] = leaf
    return jax.tree.map(_own_part, treedef.unflatten(leaves), shardings(params, local))


def decoding_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where parameters lie for decoding, on the mesh that they are trained on: split over tensor and
    repeated along the other axes."""

    def split(axes: tuple[Axis, ...], leaf: Any) -> NamedSharding:
        kept = [axis if axis == "tensor" else None for axis in axes]
        return NamedSharding(mesh, spec(kept, leaf.shape, mesh.shape))

    return _by_path(tree, split)


def lies_at(leaf: Any, where: NamedSharding) -> bool:
    """Whether an array, or what is to be one, is on the devices as `where` says."""
    return leaf.sharding is not None and leaf.sharding.is_equivalent_to(where, leaf.ndim)


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Every leaf whole on every device; a collective when there are several processes."""
    if mesh is None:
        return tree
    return _move(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """Whole numpy arrays on every host; a collective when there are several processes."""
    if mesh is None or jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(np.asarray, gather(tree, mesh))


def to_first(tree: Any, mesh: Mesh | None) -> Any:
    """The leaves within reach of the first process: numpy arrays in its memory, None elsewhere.

    A collective, during which devices hold one tensor at a time whole, of stacked layers one layer's.

    One process reaches all of its devices: the tree comes back as it is.
    """
    if mesh is None or jax.process_count() == 1:
        return tree
    is_first = jax.process_index() == 0

    def collect(path: Any, leaf: jax.Array) -> np.ndarray | None:
        stacked = any(key.key == "layers" for key in path)
        found = np.empty(leaf.shape, leaf.dtype) if is_first else None
        for index in np.ndindex(leaf.shape[:1] if stacked else ()):
            # Waited for, lest a process that only takes part runs ahead and piles them up.
            part = jax.block_until_ready(gather(_at(leaf, *index) if index else leaf, mesh))
            if is_first:
                found[index] = part.addressable_data(0)
        return found

    return jax.tree_util.tree_map_with_path(collect, tree)


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Holds an activation to these axes of the mesh in use; axes that do not divide are left out."""
    sizes = axes_in_use()
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes)) if sizes else x


def gathered(x: jax.Array, *axes: Axis) -> jax.Array:
    """A parameter that lies by `axes`, whole along fsdp for all of its uses; its gradient, of all devices'
    rows, is split along fsdp while it is summed.

    `constrain` alone would hold the gradient to be whole, too: twice the traffic, and on every device.
    """
    if not active():
        return x
    whole = [None if axis == "fsdp" else axis for axis in axes]

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        # Split first: what makes the parameter (a cast) is otherwise done after it is gathered.
        return constrain(constrain(x, *axes), *whole)

    gather.defvjp(lambda x: (gather(x), None), lambda _, slope: (constrain(slope, *axes),))
    return gather(x)


def constrain_rows(tree: Any) -> Any:
    """Holds every leaf [B, ...] to rows shared out over the mesh in use."""
    return jax.tree.map(lambda x: constrain(x, ROWS), tree) if active() else tree


def constrain_params(tree: Any) -> Any:
    """Holds parameters, gradients or optimizer state to their rules on the mesh in use."""
    return _by_path(tree, lambda axes, leaf: constrain(leaf, *axes)) if active() else tree


def axes_in_use() -> dict[str, int]:
    """Sizes of the axes of the mesh in use, 1 of those that `by_device` has taken; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = mesh.axis_types
    if mesh.axis_names != AXES or AxisType.Auto not in kinds or AxisType.Explicit in kinds:
        return {}
    return {axis: 1 if axis in mesh.manual_axes else size for axis, size in mesh.shape.items()}


def _by_path(tree: Any, make: Callable[[tuple[Axis, ...], Any], Any]) -> Any:
    """`make` of (axes, leaf) for every leaf; all leaves without a rule in one error."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    made, problems = [], []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        try:
            made.append(make(axes_of(name, leaf.ndim), leaf))
        except ShardingError as error:
            problems.append(str(error))
    if problems:
        raise ShardingError(" ".join(problems))
    return jax.tree_util.tree_unflatten(treedef, made)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # on the mesh already
        return _move(x, where)
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _move(tree: Any, where: Any) -> Any:
    """Arrays on the mesh in other places of it, by the devices' own connections. (`device_put` goes
    through the host.)"""
    return jax.jit(_same, out_shardings=where)(tree)


def _same(tree: Any) -> Any:
    """A function with a name: what is compiled for it is found again at the next call."""
    return tree


@jax.jit
def _at(stacked: jax.Array, layer: int) -> jax.Array:
    return stacked[layer]


def _own_part(x: jax.Array, where: NamedSharding) -> jax.Array:
    """What this process's devices hold of an array, as an array of their own. Nothing is copied."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, where, shards)
