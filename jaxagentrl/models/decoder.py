"""A Flax NNX decoder of the Qwen2/Llama kind, used through pure functions on plain parameter trees.

RMSNorm before each block (Zhang & Sennrich 2019), rotary positions in the half-split convention of
`transformers` (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020).
Layers are one stacked module scanned over depth, so compile time does not grow with depth.

One set of modules serves both passes: `hidden` attends within a batch of whole sequences (scoring,
training), `hidden_cached` appends a few tokens to rows of a KV cache (sampling).

Shapes: B rows, L positions, D hidden size, N layers, H query heads, K key/value heads, E head size,
V vocabulary, F feed-forward size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxagentrl.models import kv_cache

Params = dict[str, Any]

# Large and negative instead of -inf: a row that attends to nothing (padding) stays finite.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Names follow the `config.json` of Qwen2 and Llama checkpoints."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"model.{field.name} must be positive, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads}): every key/value head serves the same number of queries."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary positions, got {self.head_dim}.")


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return _per_channel(normed.astype(x.dtype), self.scale[...])


class Projection(nnx.Module):
    """y = x @ kernel (+ bias)."""

    def __init__(self, size_in: int, size_out: int, bias: bool, scale: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            scale * jax.random.truncated_normal(rngs.params(), -2, 2, (size_in, size_out))
        )
        if bias:
            self.bias = nnx.Param(jnp.zeros((size_out,)))
        self.has_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(x.dtype)[None, None] if self.has_bias else y


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads, scale = config.num_kv_heads * config.head_dim, config.hidden_size**-0.5
        self.q = Projection(width, heads, config.attention_bias, scale, rngs)
        self.k = Projection(width, kv_heads, config.attention_bias, scale, rngs)
        self.v = Projection(width, kv_heads, config.attention_bias, scale, rngs)
        out_scale = heads**-0.5 * (2 * config.num_layers) ** -0.5
        self.o = Projection(heads, width, False, out_scale, rngs)
        self.head_dim = config.head_dim

    def qkv(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Rotated queries [B, L, H, E], rotated keys and values [B, L, K, E]."""
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        return rotate(heads(self.q(x)), rope), rotate(heads(self.k(x)), rope), heads(self.v(x))

    def out(self, attended: jax.Array) -> jax.Array:
        return self.o(attended.reshape(*attended.shape[:-2], -1))


class FeedForward(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = Projection(width, inner, False, width**-0.5, rngs)
        self.up = Projection(width, inner, False, width**-0.5, rngs)
        down_scale = inner**-0.5 * (2 * config.num_layers) ** -0.5
        self.down = Projection(inner, width, False, down_scale, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config, rngs)


class Embedding(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class Decoder(nnx.Module):
    """Parameters only; the passes below thread activations through its parts."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.embed = Embedding(config, rngs)
        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Projection(
                config.hidden_size, config.vocab_size, False, config.hidden_size**-0.5, rngs
            )


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters as a plain nested dict of float32 arrays; every layer leaf leads with [N]."""
    _, state = nnx.split(Decoder(config, nnx.Rngs(params=key)))
    return nnx.to_pure_dict(state)


def num_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def hidden(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    remat: bool = False,
) -> jax.Array:
    """Final hidden states of whole sequences, causal attention.

    Args:
        tokens: [B, L] int32. Padding on the right needs no mask: nothing before it attends to it.
        positions: [B, L] int32, default 0..L-1.
        segment_ids: [B, L] int32, attention stays within equal ids (packed rows).
        remat: recompute layer activations in the backward pass (Chen et al. 2016).

    Returns:
        [B, L, D]. Entry t predicts token t + 1.
    """
    length = tokens.shape[1]
    index = jnp.arange(length)
    mask = (index[None, :] <= index[:, None])[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :] == segment_ids[:, :, None])
    if positions is None:
        positions = jnp.broadcast_to(index[None], tokens.shape)
    rope = rope_tables(config, positions)

    def block(x: jax.Array, layer: Layer) -> jax.Array:
        q, k, v = layer.attention.qkv(layer.attention_norm(x), rope)
        x = x + layer.attention.out(attend(q, k, v, mask))
        return x + layer.mlp(layer.mlp_norm(x))

    graph, layers = _layers(config, params)

    def step(x: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
        return block(x, _merge(graph, layer_params)), None

    x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, embed(params, tokens), layers)
    return final_norm(config, params, x)


def hidden_cached(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    cache: kv_cache.KVCache,
    slots: jax.Array | None,
    lengths: jax.Array,
    counts: jax.Array,
    *,
    filled: int,
) -> tuple[jax.Array, kv_cache.KVCache]:
    """Appends tokens to cache rows and returns their hidden states.

    Args:
        tokens: [R, W] int32, the new tokens of each row, right-padded.
        cache: keys and values of all slots.
        slots: [R] int32, the cache row of each row of tokens; None when R is all slots in order.
            A row that is itself padding names a slot out of range: its writes are dropped.
        lengths: [R] int32, tokens already in the cache.
        counts: [R] int32, how many of the W tokens are real.
        filled: static bound on lengths + counts; attention reads this much of the cache and no more.

    Returns:
        [R, W, D] hidden states and the cache with the new keys and values.
    """
    width = tokens.shape[1]
    offsets = jnp.arange(width)
    positions = lengths[:, None] + offsets[None]
    rope = rope_tables(config, positions)
    mask = jnp.arange(filled)[None, None, :] <= positions[:, :, None]
    # A padding token writes nowhere: its position is sent out of range.
    targets = jnp.where(offsets[None] < counts[:, None], positions, cache.max_length)
    graph, layers = _layers(config, params)

    def step(carry, layer_params):
        x, cache, index = carry
        layer = _merge(graph, layer_params)
        q, k, v = layer.attention.qkv(layer.attention_norm(x), rope)
        cache = kv_cache.write(cache, index, slots, targets, k, v)
        keys, values = kv_cache.read(cache, index, slots, filled, q.dtype)
        x = x + layer.attention.out(attend_cached(q, keys, values, mask))
        x = x + layer.mlp(layer.mlp_norm(x))
        return (x, cache, index + 1), None

    carry = (embed(params, tokens), cache, jnp.int32(0))
    (x, cache, _), _ = jax.lax.scan(step, carry, layers)
    return final_norm(config, params, x), cache


def logits(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """[B, L, V] float32 logits; entry t scores token t + 1. For tests and tools; training uses
    `jaxagentrl.logprobs`, which never holds the whole array."""
    x = hidden(config, params, tokens, positions=positions, segment_ids=segment_ids)
    return unembed(params, x)


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    return jnp.take(params["embed"]["embedding"], tokens, axis=0, mode="clip")


def unembedding(params: Params) -> jax.Array:
    """[D, V] matrix from hidden states to logits; the embedding's transpose when tied."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def unembed(params: Params, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, unembedding(params).astype(x.dtype), preferred_element_type=jnp.float32)


def final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: RMSNorm(config.hidden_size, config.norm_eps))
    return _merge(nnx.split(norm)[0], params["final_norm"])(x)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of [B, L, E/2] float32: position · θ^(−2i/E)."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions.astype(jnp.float32)[..., None] * (config.rope_theta**-exponents)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, L, heads, E]; the pairs are (i, i + E/2), as in `transformers`' rotate_half."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
        q: [B, L, H, E]. k, v: [B, S, K, E] with K dividing H. mask: [B or 1, L, S] bool.

    Returns:
        [B, L, H, E].
    """
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("blkge,bske->bkgls", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * size**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgls,bske->blkge", weights, v).reshape(batch, length, heads, size)


def attend_cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` on keys and values as `kv_cache` lays them out.

    Args:
        q: [R, W, H, E]. k: [R, K, E, S]. v: [R, K, S, E]. mask: [R, W, S] bool.

    Returns:
        [R, W, H, E].
    """
    rows, width, heads, size = q.shape
    num_kv_heads = k.shape[1]
    # Queries of one key/value head side by side: one matrix product per row and head.
    q = q.reshape(rows, width, num_kv_heads, heads // num_kv_heads, size)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, -1, size)
    scores = jnp.einsum("rkqe,rkes->rkqs", q, k, preferred_element_type=jnp.float32)
    mask = jnp.tile(mask, (1, heads // num_kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores * size**-0.5, MASKED), axis=-1)
    out = jnp.einsum("rkqs,rkse->rkqe", weights.astype(v.dtype), v)
    out = out.reshape(rows, num_kv_heads, heads // num_kv_heads, width, size)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, width, heads, size)


def _layers(config: DecoderConfig, params: Params) -> tuple[nnx.GraphDef, Params]:
    graph, _ = nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))
    return graph, params["layers"]


def _merge(graph: nnx.GraphDef, params: Params) -> Any:
    """An NNX module of this graph around these arrays."""
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))


def _per_channel(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
