"""A decoder's weights laid out for decode steps: the same numbers in fewer, larger products.

`decoder.hidden_cached` takes either layout. Training keeps the stacked, separate one: joined
projections made its step slower, on an H200 (573 ms against 548) and on CPU.
"""

import functools

import jax
import jax.numpy as jnp

from jaxagentrl.models import sharding
from jaxagentrl.models.decoder import Params

_JOINED = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}


def for_decoding(params: Params, dtype: str) -> Params:
    """The weights as decode steps are fastest with: in the dtype of the computation, and on one GPU
    joined and layer by layer. To be made once for many steps; the weights themselves where they are
    so already."""
    is_one_gpu = jax.default_backend() == "gpu" and not sharding.active()
    if not is_one_gpu and all(x.dtype == dtype for x in jax.tree.leaves(params)):
        return params
    return _lay_out(params, dtype, is_one_gpu)


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


@functools.partial(jax.jit, static_argnums=(1, 2))
def _lay_out(params: Params, dtype: str, is_one_gpu: bool) -> Params:
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return unstacked(joined(params)) if is_one_gpu else params
