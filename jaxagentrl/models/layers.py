"""The Flax NNX modules of a layer: norms, projections, attention, feed-forward. `decoder` runs them.

What families of published models do differently are settings of `DecoderConfig`; a setting that is
off adds nothing to the compiled program.

Shapes: B rows, L positions, D hidden size, H query heads, K key/value heads, E head size, F
feed-forward size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxagentrl import precision
from jaxagentrl.models import rope, sharding
from jaxagentrl.models.decoder_config import DecoderConfig

Params = dict[str, Any]

# Of a layer; its other parts finish it.
ATTENTION_PARTS = ("attention_norm", "attention", "post_attention_norm")

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F], with the kernel's gradient as xᵀ·dy.

    jax's own rule computes (dyᵀ·x)ᵀ. The same numbers, but XLA on CPU then writes a transposed copy of
    dy, element by element, in the midst of what dy is made of: a fifth of a whole update's time
    (`docs/performance_log.md`).
    """
    return precision.matmul(x, kernel)


def _product_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return precision.matmul(x, kernel), (x, kernel)


def _product_bwd(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return precision.matmul(dy, kernel.T), precision.contract(x, dy, (rows, rows))


product.defvjp(_product_fwd, _product_bwd)


@jax.custom_vjp
def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table [V, D] by tokens [...], whose gradient is summed in float32 and rounded once.

    A common token is looked up thousands of times in a batch. In bfloat16 a sum stands still at some 256 times what is
    added to it.
    """
    return jnp.take(table, tokens, axis=0, mode="clip")


def _lookup_fwd(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return lookup(table, tokens), (table, tokens)


def _lookup_bwd(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    slope = sharding.constrain(jnp.zeros(table.shape), "tensor", None)
    return slope.at[tokens].add(dy.astype(jnp.float32), mode="clip").astype(table.dtype), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def product_of_few(x: jax.Array, transposed: jax.Array) -> jax.Array:
    """x [..., D] @ transposed [F, D]ᵀ, for few rows of x, where most of the work is to read the weights.

    XLA on CPU is up to twice as fast with the weights on the left side of a product, row by row, as on its
    right (`docs/performance_log.md`). Without the barrier its simplifier would turn the sides round again.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(transposed, rows, (((1,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    def __init__(self, config: DecoderConfig, size: int):
        self.plus_one = config.norm_plus_one
        self.scale = nnx.Param(jnp.zeros((size,)) if self.plus_one else jnp.ones((size,)))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.plus_one:  # Gemma scales before it rounds to the lower precision, the others after
            return _per_channel(normed, 1 + self.scale[...].astype(jnp.float32)).astype(x.dtype)
        return _per_channel(normed.astype(x.dtype), self.scale[...])


class Projection(nnx.Module):
    """y = x @ kernel (+ bias) (+ low-rank adapter, see `lora`).

    For decode steps the kernel may be given transposed, see `decoding_layout`.
    """

    def __init__(self, size_in: int, size_out: int, bias: bool, scale: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            scale * jax.random.truncated_normal(rngs.params(), -2, 2, (size_in, size_out))
        )
        if bias:
            self.bias = nnx.Param(jnp.zeros((size_out,)))
        self.has_bias = bias
        self.is_adapted = self.is_transposed = False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_transposed:
            y = product_of_few(x, self.transposed[...].astype(x.dtype))
        else:
            y = product(x, self.kernel[...].astype(x.dtype))
        if self.is_adapted:
            low = product(x, self.lora_a[...].astype(x.dtype))
            y = y + product(low, self.lora_b[...].astype(x.dtype))
        return y + _over_rows(self.bias[...], y) if self.has_bias else y


class Attention(nnx.Module):
    """With `is_joined`, q, k and v are one projection, see `decoding_layout`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, is_joined: bool = False):
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads, scale = config.num_kv_heads * config.head_dim, config.hidden_size**-0.5

        def projection(size: int) -> Projection:
            return Projection(width, size, config.attention_bias, scale, rngs)

        self.is_joined, self.ends = is_joined, (heads, heads + kv_heads)
        if is_joined:
            self.joined = projection(heads + 2 * kv_heads)
        else:
            self.q, self.k, self.v = (projection(size) for size in (heads, kv_heads, kv_heads))
        out_scale = heads**-0.5 * (2 * config.num_layers) ** -0.5
        self.o = Projection(heads, width, False, out_scale, rngs)
        self.head_dim = config.head_dim
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)

    def qkv(self, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Rotated queries [B, L, H, E], rotated keys and values [B, L, K, E]."""
        if self.is_joined:
            parts = jnp.split(self.joined(x), self.ends, axis=-1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in parts)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, table), rope.rotate(k, table), v

    def out(self, attended: jax.Array) -> jax.Array:
        return self.o(attended.reshape(*attended.shape[:-2], -1))


class FeedForward(nnx.Module):
    """With `is_joined`, gate and up are one projection, see `decoding_layout`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, is_joined: bool = False):
        width, inner = config.hidden_size, config.intermediate_size
        self.is_joined = is_joined
        if is_joined:
            self.joined = Projection(width, 2 * inner, False, width**-0.5, rngs)
        else:
            self.gate = Projection(width, inner, False, width**-0.5, rngs)
            self.up = Projection(width, inner, False, width**-0.5, rngs)
        down_scale = inner**-0.5 * (2 * config.num_layers) ** -0.5
        self.down = Projection(inner, width, False, down_scale, rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_joined:
            gate, up = jnp.split(self.joined(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(_gated(self.activation, gate, up))


def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) · up."""
    if jax.default_backend() == "gpu":
        return _gated_on_gpu(activation, gate, up)
    return ACTIVATIONS[activation](gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_on_gpu(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The same, with both gradients in one kernel.

    XLA has a kernel for each otherwise, as what they read is read by the forward pass, too: seven arrays [B, L, F]
    are read and written in place of five, the largest part of an update after products (`docs/performance_log.md`).
    """
    return ACTIVATIONS[activation](gate) * up


def _gated_fwd(
    activation: str, gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return ACTIVATIONS[activation](gate) * up, (gate, up)


def _gated_bwd(
    activation: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up, dy = jax.lax.optimization_barrier((*saved, dy))
    return jax.vjp(lambda gate, up: ACTIVATIONS[activation](gate) * up, gate, up)[1](dy)


_gated_on_gpu.defvjp(_gated_fwd, _gated_bwd)


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, is_joined: bool = False):
        self.attention_norm = RMSNorm(config, config.hidden_size)
        self.attention = Attention(config, rngs, is_joined)
        self.mlp_norm = RMSNorm(config, config.hidden_size)
        self.mlp = FeedForward(config, rngs, is_joined)
        self.has_post_norms = config.post_norms
        if self.has_post_norms:
            self.post_attention_norm = RMSNorm(config, config.hidden_size)
            self.post_mlp_norm = RMSNorm(config, config.hidden_size)

    def add_attention(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        y = self.attention.out(attended)
        return x + (self.post_attention_norm(y) if self.has_post_norms else y)

    def add_mlp(self, x: jax.Array) -> jax.Array:
        y = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(y) if self.has_post_norms else y)


def layer_of(config: DecoderConfig, params: Params) -> Layer:
    """A layer around these parameters, adapters and transposed kernels among them; or the parts of one
    that finish it, where those before (`ATTENTION_PARTS`) are not given."""
    return _around(params, _layer_graph(config, jax.tree.structure(params)))


def norm_of(config: DecoderConfig, params: Params) -> RMSNorm:
    """A norm of hidden states around its parameters."""
    return _around(params, _norm_graph(config))


# To make modules takes longer than to trace what they compute, and every pass has the same.
@functools.cache
def _layer_graph(config: DecoderConfig, structure: jax.tree_util.PyTreeDef) -> nnx.GraphDef:
    params = structure.unflatten(structure.num_leaves * [jax.ShapeDtypeStruct((), jnp.float32)])
    layer = nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0), "joined" in params["mlp"]))
    for name in ATTENTION_PARTS:
        if name not in params and hasattr(layer, name):
            delattr(layer, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name not in ("lora_a", "lora_b", "transposed"):
            continue
        projection = layer
        for entry in path[:-1]:
            projection = getattr(projection, entry.key)
        if name == "transposed":
            projection.is_transposed = True
            del projection.kernel
        else:
            projection.is_adapted = True
        setattr(projection, name, nnx.Param(leaf))
    return nnx.graphdef(layer)


@functools.cache
def _norm_graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: RMSNorm(config, config.hidden_size)))


def _around(params: Params, graph: nnx.GraphDef) -> Any:
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))


def _per_channel(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * _over_rows(scale, x)


def _over_rows(channels: jax.Array, x: jax.Array) -> jax.Array:
    """[D] as [..., D] like x. By way of float32, in which the gradient is then summed over the rows, see `lookup`."""
    return jnp.broadcast_to(channels.astype(jnp.float32), x.shape).astype(x.dtype)
