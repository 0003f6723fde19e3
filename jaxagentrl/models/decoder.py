"""A Flax NNX decoder, used through pure functions on plain parameter trees.

RMSNorm before each block (Zhang & Sennrich 2019), rotary positions (`rope`), grouped-query attention
(Ainslie et al. 2023), gated feed-forward (Shazeer 2020): the modules of `layers`. Layers are one stacked
module scanned over depth, so compile time does not grow with depth.

What families of published models do differently are settings of `DecoderConfig`: biases (Qwen2),
norms of queries and keys (Qwen3), sliding windows in all or some layers (Mistral, Gemma), soft caps,
norms after each block, norms that scale by 1 + w, scaled embeddings, another rotation in the layers
with a window (Gemma 2 and 3). A setting that is off adds nothing to the compiled program. Where
layers differ, the scan takes along which kind each one is; they branch only where those with a window
read less of a cache.

One set of modules serves both passes: `hidden` attends within a batch of whole sequences (scoring,
training), `hidden_cached` appends a few tokens to rows of a KV cache (sampling).

Shapes: B rows, L positions, D hidden size, N layers, H query heads, K key/value heads, E head size,
V vocabulary, F feed-forward size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxagentrl.logprobs import cap
from jaxagentrl.models import attention, decode_kernel, kv_cache, rope, sharding
from jaxagentrl.models.decoder_config import DecoderConfig
from jaxagentrl.models.layers import (
    Layer,
    Params,
    Projection,
    RMSNorm,
    graph_of,
    merge,
    product_of_few,
)

_UNROLLED_LAYERS = 16

# Of a layer; its other parts finish it.
_ATTENTION_PARTS = ("attention_norm", "attention", "post_attention_norm")

# What the backward pass keeps of a layer; the rest is computed again (Chen et al. 2016).
REMAT = {
    "none": None,  # keeps everything
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input alone
}


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
        self.final_norm = RMSNorm(config, config.hidden_size)
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
    max_segments: int | None = None,
    ends: jax.Array | None = None,
    remat: str = "none",
    is_finished: bool = True,
) -> jax.Array:
    """Final hidden states of whole sequences, causal attention.

    Args:
        tokens: [B, L] int32. Padding on the right needs no mask: nothing before it attends to it.
        positions: [B, L] int32, default 0..L-1.
        segment_ids: [B, L] int32, attention stays within equal ids (packed rows).
        max_segments: of `Packed`; None where no kernel asks for it.
        ends: [B, L] int32, attention from token t to s needs t < ends[s] (rows of `trees`).
        remat: what the backward pass recomputes, a name of `REMAT`.
        is_finished: False stops before what is left for every position by itself, which is `finish`.

    Returns:
        [B, L, D]. Entry t predicts token t + 1.
    """
    index = jnp.arange(tokens.shape[1])
    distance = (index[:, None] - index[None, :])[None]
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :] == segment_ids[:, :, None]
    if ends is not None:  # other branches may lie between a token and its past
        mask = index[None, :, None] < ends[:, None, :]
        distance = positions[:, :, None] - positions[:, None, :]
    if positions is None:
        positions = jnp.broadcast_to(index[None], tokens.shape)
    tables = rope_tables(config, positions)
    graph, layers = _layers(config, params)
    scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    made_of = {
        "segment_ids": segment_ids,
        "max_segments": max_segments,
        "window": config.sliding_window,
    }

    def attend(x: jax.Array, inputs: tuple[Params, Any]) -> jax.Array:
        layer_params, is_local = inputs
        layer = merge(graph, layer_params)
        q, k, v = (
            sharding.constrain(y, sharding.ROWS, None, "tensor")
            for y in layer.attention.qkv(layer.attention_norm(x), _table_of(tables, is_local))
        )
        seen = _within_window(config, mask, distance, is_local)
        kernel = attention.kernel_for(
            q.dtype,
            len(index),
            config.head_dim,
            config.attention_softcap,
            one_window=is_local is None,
            is_tree=ends is not None,
        )
        return layer.add_attention(
            x, attention.attend(q, k, v, seen, **scores, kernel=kernel, **made_of)
        )

    def step(x: jax.Array, inputs: tuple[Params, Any]) -> tuple[jax.Array, None]:
        x = merge(graph, inputs[0]).add_mlp(attend(x, inputs))
        return sharding.constrain(x, sharding.ROWS), None

    def again(part: Callable) -> Callable:
        return part if REMAT[remat] is None else jax.checkpoint(part, policy=REMAT[remat])

    x = sharding.constrain(embed(config, params, tokens), sharding.ROWS)
    stack = (layers, _local_layers(config))
    if is_finished:
        x, _ = jax.lax.scan(again(step), x, stack, unroll=_unroll(config))
        return final_norm(config, params, x)
    before, last = (jax.tree.map(lambda leaf, at=at: leaf[at], stack) for at in (slice(-1), -1))
    x, _ = jax.lax.scan(again(step), x, before, unroll=_unroll(config))
    return sharding.constrain(again(attend)(x, last), sharding.ROWS)


def finishes_apart(config: DecoderConfig) -> bool:
    """Whether a caller that reads few positions should `finish` those alone.

    The last feed-forward is a good part of a model of few layers. A loop over layers would have the
    stacked weights copied without the last one's; on a mesh the weights would be gathered for every
    chunk of positions; and on a GPU, where it could save 3 % at 24 layers, it has not been measured.
    """
    is_unrolled = _unroll(config) == config.num_layers
    return is_unrolled and jax.default_backend() == "cpu" and not sharding.active()


def finish(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    """The last layer's feed-forward and the final norm: [C, D] of what `hidden(is_finished=False)`
    returns to [C, D] final hidden states. `params` are those of `finish_params`."""
    layer = nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0)))
    for name in _ATTENTION_PARTS:
        if hasattr(layer, name):
            delattr(layer, name)
    layer = merge(graph_of(layer, params["layer"]), params["layer"])
    return final_norm(config, params, layer.add_mlp(x[None])[0])


def finish_params(params: Params) -> Params:
    """The parameters that `finish` reads, of all."""
    parts = {name: part for name, part in params["layers"].items() if name not in _ATTENTION_PARTS}
    last = jax.tree.map(lambda leaf: leaf[-1], parts)
    return {"layer": last, "final_norm": params["final_norm"]}


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
    only_last: bool = False,
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
        only_last: True where the caller wants the hidden state of each row's last real token alone. The
            last layer is then a program of its own, which makes keys and values of all tokens and the rest
            of one.

    Returns:
        [R, W, D] hidden states ([R, 1, D] with `only_last`) and the cache with the new keys and values.
    """
    width = tokens.shape[1]
    offsets = jnp.arange(width)
    positions = lengths[:, None] + offsets[None]
    # Looked up: of cosines, XLA on CPU would compute each one again for every entry that it turns.
    tables = tuple(
        jnp.take(table[..., 0, :, :], positions, axis=-2, mode="clip")
        for table in rope_tables(config, np.arange(filled)[None])
    )
    parts = _cache_parts(config, cache, positions, filled)
    # A padding token writes nowhere: its position is sent out of range.
    targets = jnp.where(offsets[None] < counts[:, None], positions, cache.max_length)
    graph, layers = _layers(config, params)
    scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    local_layers = _local_layers(config)
    x = embed(config, params, tokens)
    is_fused = width == 1 and slots is None and _has_decode_kernel(config, cache, x.dtype)

    def at_last(x: jax.Array) -> jax.Array:
        """[..., R, 1, E] of [..., R, W, E]."""
        last = jnp.maximum(counts - 1, 0).reshape(*[1] * (x.ndim - 3), -1, 1, 1)
        return jnp.take_along_axis(x, last, axis=-2)

    def step(carry, index, *, only_last: bool = False):
        x, cache = carry
        if isinstance(layers, tuple):
            layer_params = layers[index]
        else:
            layer_params = jax.tree.map(lambda leaf: _at(leaf, index), layers)
        layer = merge(graph, layer_params)
        is_local = None if local_layers is None else _at(local_layers, index)
        q, k, v = layer.attention.qkv(layer.attention_norm(x), _table_of(tables, is_local))
        if is_fused:
            window = _window_of(config, is_local, filled)
            new = (q[:, 0], k[:, 0], v[:, 0])
            attended, cache = decode_kernel.attend(
                *new, cache, index, lengths, counts > 0, filled=filled, window=window, **scores
            )
            attended = attended[:, None]
        else:
            cache = kv_cache.write(cache, index, slots, targets, k, v)
            if only_last:
                x = at_last(x)
                table = _table_of(tuple(map(at_last, tables)), is_local)
                q, _, _ = layer.attention.qkv(layer.attention_norm(x), table)

            def attend(part: _CachePart) -> jax.Array:
                keys, values = kv_cache.read(
                    cache, index, slots, part.size, q.dtype, starts=part.starts
                )
                seen = at_last(part.seen) if only_last else part.seen
                return attention.attend_cached(q, keys, values, seen, **scores)

            attended = _attend_to_part(config, attend, parts, index)
        return (layer.add_mlp(layer.add_attention(x, attended)), cache), None

    carry = (x, cache)
    in_loop = 0 if isinstance(layers, tuple) else config.num_layers - only_last
    if in_loop:
        # By index: a slice of the stacked weights would be a copy of them.
        carry, _ = jax.lax.scan(step, carry, jnp.arange(in_loop))
    for index in range(in_loop, config.num_layers):
        is_last = index == config.num_layers - 1
        carry, _ = step(carry, index, only_last=only_last and is_last)
    return final_norm(config, params, carry[0]), carry[1]


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
    return unembed(params, x, softcap=config.logit_softcap)


def embed(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    # Gathered over fsdp first: a lookup in columns that are split would replicate the activations.
    table = sharding.constrain(params["embed"]["embedding"], "tensor", None)
    x = jnp.take(table, tokens, axis=0, mode="clip")
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.scale_embeddings else x


def unembedding(params: Params) -> jax.Array:
    """[D, V] matrix from hidden states to logits; the embedding's transpose when tied."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def unembed(params: Params, x: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """[..., V] float32 logits; `softcap` is `config.logit_softcap`, see `logprobs.cap`."""
    if "transposed" in params.get("lm_head", ()):  # see `decoding_layout`
        z = product_of_few(x, params["lm_head"]["transposed"])
    else:
        kernel = unembedding(params).astype(x.dtype)
        z = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    return cap(z, softcap)


def final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: RMSNorm(config, config.hidden_size))
    return merge(nnx.split(norm)[0], params["final_norm"])(x)


def rope_tables(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [B, L, E/2] float32; [2, B, L, E/2] where layers with a window have their own."""
    table = rope.tables(
        *rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling), positions
    )
    if config.local_rope_theta is None:
        return table
    local = rope.tables(*rope.frequencies(config.head_dim, config.local_rope_theta), positions)
    return tuple(jnp.stack(pair) for pair in zip(table, local, strict=True))


def _unroll(config: DecoderConfig) -> int:
    """Layers in one body of the training pass's loop: all, where they are few or devices are one GPU.

    A loop keeps what the backward pass needs in stacked arrays, which are cleared, written and read
    again: on CPU a fifth of an update of three small layers, a twentieth of one of ten larger ones,
    on an H200 a quarter of one of 24, and a third of its memory (`docs/performance.md`). The price is
    a compile time that grows with depth. Deep models on CPU and on TPU, and those on a mesh, whose
    layers would all be gathered at once, keep their one body.
    """
    backend = jax.default_backend()
    few = backend == "cpu" and config.num_layers <= _UNROLLED_LAYERS
    return config.num_layers if few or (backend == "gpu" and not sharding.active()) else 1


def _local_layers(config: DecoderConfig) -> jax.Array | None:
    """[N] bool, which layers have the window; None where all layers are alike."""
    return None if config.window_layers is None else jnp.array(config.window_layers)


def _at(stacked: jax.Array, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _table_of(
    tables: tuple[jax.Array, jax.Array], is_local: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if tables[0].ndim == 3:
        return tables
    return tuple(
        jax.lax.dynamic_index_in_dim(table, is_local.astype(jnp.int32), keepdims=False)
        for table in tables
    )


class _CachePart(NamedTuple):
    """What a layer reads of the cache."""

    size: int
    seen: jax.Array  # [R, W, size] bool
    starts: jax.Array | None  # [R] int32, each row's first position; None is 0


def _cache_parts(
    config: DecoderConfig, cache: kv_cache.KVCache, positions: jax.Array, filled: int
) -> tuple[_CachePart, _CachePart]:
    """What layers without and with the model's window read for new tokens at `positions` [R, W]."""
    window, width = config.sliding_window, positions.shape[1]

    def part(starts: jax.Array | None, size: int, window: int | None = None) -> _CachePart:
        index = jnp.arange(size)[None, None]
        index = index if starts is None else index + starts[:, None, None]
        distance = positions[:, :, None] - index
        seen = distance >= 0
        return _CachePart(size, seen if window is None else seen & (distance < window), starts)

    far = part(None, filled)
    if window is None:
        return far, far
    if cache.mirrors is None:
        first = positions[:, 0]
        return far, part(*kv_cache.near(first, width=width, window=window, filled=filled), window)
    mirror = cache.mirrors[windows(config).index(window)]
    return far, part(mirror.starts, mirror.values.shape[2], window)


def _attend_to_part(
    config: DecoderConfig,
    attend: Callable[[_CachePart], jax.Array],
    parts: tuple[_CachePart, _CachePart],
    index: jax.Array | int,
) -> jax.Array:
    """`attend` to what the layer with this index reads."""
    far, near = parts
    if config.window_layers is None:
        return attend(near)
    if isinstance(index, int):
        return attend(near if config.window_layers[index] else far)
    is_local = _at(_local_layers(config), index)
    if near.starts is None:
        return attend(far._replace(seen=jnp.where(is_local, near.seen, far.seen)))
    return jax.lax.cond(is_local, lambda: attend(near), lambda: attend(far))


def windows(config: DecoderConfig) -> tuple[int | None, ...]:
    """[N], how many tokens each layer's tokens see, themselves included; None is all."""
    has_window = config.window_layers or (True,) * config.num_layers
    return tuple(config.sliding_window if local else None for local in has_window)


def _within_window(
    config: DecoderConfig,
    mask: jax.Array | None,
    distance: jax.Array,
    is_local: jax.Array | None,
) -> jax.Array | None:
    """The mask of one layer: what is at most a window back, if the layer has a window."""
    if config.sliding_window is None:
        return mask
    near = distance < config.sliding_window
    near = near if is_local is None else near | ~is_local
    return near if mask is None else mask & near


def _window_of(
    config: DecoderConfig, is_local: jax.Array | None, filled: int
) -> jax.Array | None:
    """How many positions one layer sees, as data; None where no layer has a window."""
    if config.sliding_window is None:
        return None
    window = jnp.int32(config.sliding_window)
    return window if is_local is None else jnp.where(is_local, window, jnp.int32(filled))


def _has_decode_kernel(config: DecoderConfig, cache: kv_cache.KVCache, dtype: jnp.dtype) -> bool:
    """Whether decode steps attend by the kernel for GPUs. It knows nothing of meshes: of one that splits heads
    it takes no part, nor where rows are not `sharding.over_rows`."""
    if jax.default_backend() != "gpu" or sharding.active():
        return False
    return decode_kernel.takes(cache, config.num_heads, dtype)


def _layers(config: DecoderConfig, params: Params) -> tuple[nnx.GraphDef, Params]:
    """The modules of a layer as these parameters have them, and the layers' parameters."""
    layers = params["layers"]
    example = layers[0] if isinstance(layers, tuple) else layers
    is_joined = "joined" in example["mlp"]
    layer = nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0), is_joined))
    return graph_of(layer, example), layers
