"""Programs that every device of a mesh runs by itself, on its part of the arrays.

The compiler splits a program by what it can see. It cannot see that devices need nothing of each other where
which rows of a cache are read is data, and a kernel it cannot split at all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxagentrl.models import sharding


def over_rows(program: Callable, arguments: Any, results: Any) -> Callable:
    """`program` as every group of devices runs it, on the rows that it holds and without the others.

    Of a mesh in use only `tensor` is left to the compiler, and where that is 1 nothing.

    Args:
        program: takes positional arguments. Of rows it sees its group's, numbered from 0.
        arguments: which dimension of each argument rows are, or of trees below it; None is none: every
            group has it whole.
        results: the same of its results. What is whole must be equal in all groups (`sum_over_rows`).
    """
    return _apart(program, sharding.ROWS, _along(sharding.ROWS), arguments, results)


def over_data(program: Callable, arguments: Any, results: Any) -> Callable:
    """`program` as every part of the mesh along `data` runs it, on the rows that it holds and without the other
    parts; fsdp and tensor are left to the compiler. The rest as of `over_rows`, but for whole results: those are
    made equal by `jax.lax`'s collectives along "data"."""
    return _apart(program, ("data",), _along("data"), arguments, results)


def over_heads(program: Callable, num_heads: int, arguments: Any, results: Any) -> Callable:
    """`program` as every device runs it on the heads that it holds, `num_heads` over all of them. The rest
    as of `over_rows`."""
    is_split = num_heads % sharding.head_shards_in_use() == 0
    return _apart(program, ("tensor",), _along("tensor"), arguments, results) if is_split else program


def over_rows_and_heads(
    program: Callable, shape: Sequence[int], arguments: Any, results: Any
) -> Callable:
    """`program` as every device runs it on the rows and heads that it holds of whole sequences.

    Args:
        shape: of the keys, [B, L, K, E]: they decide, so that queries find theirs beside them. Of rows or heads
            that the mesh does not divide every device has all.
        arguments, results: True for arrays [B, L, heads, E], False for [B, ...].
    """
    if not sharding.active():
        return program
    whole = sharding.spec((sharding.ROWS, None, "tensor"), shape[:3], sharding.axes_in_use())

    def spec(has_heads: bool) -> PartitionSpec:
        return whole if has_heads else PartitionSpec(*whole[:1])

    return _apart(program, sharding.AXES, spec, arguments, results)


def _along(axis: sharding.Axis) -> Callable[[int | None], PartitionSpec]:
    return lambda dimension: PartitionSpec() if dimension is None else PartitionSpec(*[None] * dimension, axis)


def _apart(
    program: Callable,
    axes: tuple[str, ...],
    spec: Callable[[Any], PartitionSpec],
    arguments: Any,
    results: Any,
) -> Callable:
    """`program` by the devices along these axes of the mesh in use, each with its part of the arrays. Inside,
    these axes and all of size 1 are manual: where no other is left, kernels see plain local arrays."""
    sizes = sharding.axes_in_use()
    if math.prod(sizes.get(axis, 1) for axis in axes) == 1:
        return program
    manual = jax.sharding.get_abstract_mesh().manual_axes
    taken = {axis for axis in sharding.AXES if axis not in manual and (axis in axes or sizes[axis] == 1)}
    in_specs, out_specs = (
        jax.tree.map(spec, dimensions, is_leaf=lambda x: x is None) for dimensions in (arguments, results)
    )
    return jax.shard_map(
        program,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=taken,
        check_vma=False,  # else each loop would have to declare over which axes its carry varies
    )


def sum_over_rows(x: jax.Array) -> jax.Array:
    """The sum over all groups of a number that each has, inside `over_rows`; `x` itself elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    is_inside = mesh.axis_names == sharding.AXES and set(sharding.ROWS) <= set(mesh.manual_axes)
    return jax.lax.psum(x, sharding.ROWS) if is_inside else x
