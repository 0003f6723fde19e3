"""A decoder's weights laid out for decode steps: the same numbers, in products that a step is faster with.

On a GPU fewer and larger products; on CPU, for calls of few rows, kernels transposed. `decoder.hidden_cached`
takes every layout. Training keeps the stacked, separate one: joined projections made its step slower,
on an H200 (573 ms against 548) and on CPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxagentrl.models import sharding
from jaxagentrl.models.decoder import Params

_JOINED = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}

# On CPU, calls of up to so many rows take transposed kernels, of layers of at least so many bytes: of more rows
# or fewer bytes, which processors cache, steps are as fast or faster as they are (`docs/performance_log.md`).
_FEW_ROWS = 64
_UNCACHED = 4 << 20


def for_decoding(params: Params, dtype: str) -> Params:
    """The weights as decode steps are fastest with, to be made once for many steps.

    In the dtype of the computation; a weight itself where it is so already. On GPUs layers are apart, which copies
    them, and joined where no axis splits heads: side by side, every device would need its part of each. On CPU in
    float32, unless they are few, with a transposed copy in `few_rows` that `for_rows` takes: extends and calls of
    more rows read the others. On a mesh of other devices, as they are.
    """
    if jax.default_backend() == "gpu":
        others = {name: part for name, part in params.items() if name != "layers"}
        is_joined = sharding.head_shards_in_use() == 1
        return _in_dtype(others, dtype) | _for_gpu({"layers": params["layers"]}, dtype, is_joined)
    params = _in_dtype(params, dtype)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layers"]))
    is_cpu = jax.default_backend() == "cpu" and not sharding.active()
    if is_cpu and dtype == "float32" and size >= _UNCACHED:
        return params | {"few_rows": _transposed(params)}
    return params


def for_rows(params: Params, num_rows: int) -> Params:
    """Of what `for_decoding` made, the weights for decode steps of so many rows, layer by layer."""
    few_rows = params.get("few_rows")
    if few_rows is None or num_rows > _FEW_ROWS:
        return unstacked(params)
    # The embedding lies as its transpose is to.
    tied = {"lm_head": {"transposed": params["embed"]["embedding"]}}
    return params | tied | few_rows


def joined(params: Params) -> Params:
    """The same weights with the kernels of q, k, v and of gate, up side by side: fewer products.

    Stays as it is with adapters, which belong to one projection each.
    """
    layers = dict(params["layers"])
    for block, names in _JOINED.items():
        parts = [layers[block][name] for name in names]
        if any("lora_a" in part for part in parts):
            return params
        others = {name: leaf for name, leaf in layers[block].items() if name not in names}
        side_by_side = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)
        layers[block] = others | {"joined": side_by_side}
    return params | {"layers": layers}


def unstacked(params: Params) -> Params:
    """The same weights with a tuple of layers instead of stacked ones; as they are if they are so.

    A slice of stacked weights is an array of its own, which is written and read again in every
    decode step.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    depth = jax.tree.leaves(layers)[0].shape[0]
    apart = tuple(jax.tree.map(lambda x: x[index], layers) for index in range(depth))
    return params | {"layers": apart}


def _in_dtype(params: Params, dtype: str) -> Params:
    """The tree, if all of it is so; else a new one. A program copies what it gives back unchanged, so
    that only those leaves go through one that are not: of a model under adapters, the adapters."""
    leaves, treedef = jax.tree.flatten(params)
    others = [index for index, x in enumerate(leaves) if x.dtype != dtype]
    if not others:
        return params
    for index, cast in zip(others, _cast([leaves[i] for i in others], dtype), strict=True):
        leaves[index] = cast
    return treedef.unflatten(leaves)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(leaves: list[jax.Array], dtype: str) -> list[jax.Array]:
    return [x.astype(dtype) for x in leaves]


@functools.partial(jax.jit, static_argnames=("dtype", "is_joined"))
def _for_gpu(params: Params, dtype: str, is_joined: bool) -> Params:
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return sharding.constrain_params(unstacked(joined(params) if is_joined else params))


@jax.jit
def _transposed(params: Params) -> Params:
    """The layers, and the unembedding where it is one of its own, with kernels [F, D]."""

    def turn(node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(map(turn, node))
        if not isinstance(node, dict):
            return node
        others = {name: turn(child) for name, child in node.items() if name != "kernel"}
        return others | {"transposed": node["kernel"].T} if "kernel" in node else others

    return turn(unstacked({name: params[name] for name in ("layers", "lm_head") if name in params}))
