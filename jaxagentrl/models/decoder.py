"""A Flax NNX decoder, used through pure functions on plain parameter trees.

RMSNorm before each block (Zhang & Sennrich 2019), rotary positions (`rope`), grouped-query attention
(Ainslie et al. 2023), gated feed-forward (Shazeer 2020): the modules of `layers`. Layers are one stacked
module scanned over depth, so compile time does not grow with depth.

What families of published models do differently are settings of `DecoderConfig`: biases (Qwen2),
norms of queries and keys (Qwen3), sliding windows in all or some layers (Mistral, Gemma), soft caps,
norms after each block, norms that scale by 1 + w, scaled embeddings, another rotation in the layers
with a window (Gemma 2 and 3). A setting that is off adds nothing to the compiled program. Where
layers differ, the scan of whole sequences takes along which kind each one is; that on a cache, of which
each kind has its own, takes a period of the pattern at once.

One set of modules serves both passes: `hidden` attends within a batch of whole sequences (scoring,
training), `hidden_cached` appends a few tokens to rows of a KV cache (sampling).

Shapes: B rows, L positions, D hidden size, N layers, H query heads, K key/value heads, E head size,
V vocabulary, F feed-forward size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxagentrl import precision
from jaxagentrl.logprobs import cap
from jaxagentrl.models import attention, by_device, decode_kernel, extend_kernel, kv_cache, kv_tail, rope, sharding
from jaxagentrl.models.decoder_config import DecoderConfig
from jaxagentrl.models.layers import (
    ATTENTION_PARTS,
    Layer,
    Params,
    Projection,
    RMSNorm,
    layer_of,
    lookup,
    norm_of,
    product_of_few,
)

_UNROLLED_LAYERS = 16

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
    scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    made_of = {
        "segment_ids": segment_ids,
        "max_segments": max_segments,
        "window": config.sliding_window,
    }

    def attend(x: jax.Array, inputs: tuple[Params, Any]) -> jax.Array:
        layer_params, is_local = inputs
        layer = layer_of(config, layer_params)
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
        x = layer_of(config, inputs[0]).add_mlp(attend(x, inputs))
        return sharding.constrain(x, sharding.ROWS), None

    def again(part: Callable) -> Callable:
        return part if REMAT[remat] is None else jax.checkpoint(part, policy=REMAT[remat])

    x = sharding.constrain(embed(config, params, tokens), sharding.ROWS)
    stack = (params["layers"], _local_layers(config))
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
    return final_norm(config, params, layer_of(config, params["layer"]).add_mlp(x[None])[0])


def finish_params(params: Params) -> Params:
    """The parameters that `finish` reads, of all."""
    parts = {name: part for name, part in params["layers"].items() if name not in ATTENTION_PARTS}
    last = jax.tree.map(lambda leaf: leaf[-1], parts)
    return {"layer": last, "final_norm": params["final_norm"]}


def init_caches(
    config: DecoderConfig, num_slots: int, max_length: int, dtype: str, *, most: int
) -> tuple[kv_cache.KVCache, ...]:
    """Empty KV caches, one for each kind of layers.

    Args:
        max_length: positions of a slot.
        dtype: one of `kv_cache.DTYPES`.
        most: new tokens of one call, and of a decode loop.
    """
    layers = windows(config)
    return tuple(
        kv_cache.init(
            layers.count(window),
            num_slots,
            max_length,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            window=window,
            most=most,
        )
        for window in _kinds(config)
    )


def hidden_cached(
    config: DecoderConfig,
    params: Params,
    tokens: jax.Array,
    caches: tuple[kv_cache.KVCache, ...],
    slots: jax.Array | None,
    lengths: jax.Array,
    counts: jax.Array,
    *,
    filled: int,
    only_last: bool = False,
) -> tuple[jax.Array, tuple[kv_cache.KVCache, ...]]:
    """Appends tokens to cache rows and returns their hidden states.

    Args:
        tokens: [R, W] int32, the new tokens of each row, right-padded.
        caches: keys and values of all slots, of `init_caches`.
        slots: [R] int32, the cache row of each row of tokens; None when R is all slots in order.
            A row that is itself padding names a slot out of range: its writes are dropped.
        lengths: [R] int32, tokens already in the cache.
        counts: [R] int32, how many of the W tokens are real.
        filled: static bound on lengths + counts; attention reads this much of the cache and no more.
        only_last: True where the caller wants the hidden state of each row's last real token alone. The
            last layer is then a program of its own, which makes keys and values of all tokens and the rest
            of one.

    Returns:
        [R, W, D] hidden states ([R, 1, D] with `only_last`) and the caches with the new keys and values.
    """
    width = tokens.shape[1]
    offsets = jnp.arange(width)
    positions = lengths[:, None] + offsets[None]
    # Looked up: of cosines, XLA on CPU would compute each one again for every entry that it turns.
    tables = tuple(
        jnp.take(table[..., 0, :, :], positions, axis=-2, mode="clip")
        for table in rope_tables(config, np.arange(filled)[None])
    )
    parts = [_cache_part(cache, positions, filled) for cache in caches]
    targets = jnp.where(offsets[None] < counts[:, None], positions, kv_cache.NOWHERE)
    layers = params["layers"]
    scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    x = embed(config, params, tokens)
    is_fused = width == 1 and slots is None and all(
        decode_kernel.takes(cache, config.num_heads, x.dtype) for cache in caches
    )
    rows = jnp.arange(len(tokens)) if slots is None else slots
    shape = {"num_rows": len(tokens), "width": width, "filled": filled}

    def at_last(x: jax.Array) -> jax.Array:
        """[..., R, 1, E] of [..., R, W, E]."""
        last = jnp.maximum(counts - 1, 0).reshape(*[1] * (x.ndim - 3), -1, 1, 1)
        return jnp.take_along_axis(x, last, axis=-2)

    def step(carry, index, place: tuple[int, Any], *, only_last: bool = False):
        """A layer; its place says which of the caches is its kind's, and which layer of that it is."""
        (x, caches), (kind, at) = carry, place
        if isinstance(layers, tuple):
            layer_params = layers[index]
        else:
            layer_params = jax.tree.map(lambda leaf: _at(leaf, index), layers)
        layer, cache = layer_of(config, layer_params), caches[kind]
        table = _table_of(tables, jnp.bool_(cache.window is not None))
        # Else heads that the mesh does not divide are split inside, and with them the cache, for each write anew.
        q, k, v = (
            sharding.constrain(y, sharding.ROWS, None, "tensor")
            for y in layer.attention.qkv(layer.attention_norm(x), table)
        )
        if is_fused:
            fused = functools.partial(decode_kernel.attend, filled=filled, **scores)
            fused = by_device.over_heads(fused, config.num_kv_heads, (1, 1, 1, 2, None, None, None), (1, 2))
            new = (q[:, 0], k[:, 0], v[:, 0])
            attended, cache = fused(*new, cache, at, lengths, counts > 0)
            attended = attended[:, None]
        else:
            cache = kv_cache.write(cache, at, slots, targets, k, v)
            if not only_last and extend_kernel.takes(cache, config.num_heads, x.dtype, **shape):
                fused = functools.partial(extend_kernel.attend, filled=filled, **scores)
                fused = by_device.over_heads(fused, config.num_kv_heads, (2, 2, None, None, None), 2)
                attended = fused(q, cache, at, rows, lengths)
            else:
                seen = parts[kind].seen
                if only_last:
                    x, seen = at_last(x), at_last(seen)
                    q, _, _ = layer.attention.qkv(layer.attention_norm(x), tuple(map(at_last, table)))
                read = [(*kv_cache.read(cache, at, slots, parts[kind].stretch, q.dtype), seen)]
                if cache.tail is not None:
                    read.append((cache.tail.keys[at], cache.tail.values[at], parts[kind].seen_of_tail))
                attended = attention.attend_cached(q, read, **scores)
        caches = (*caches[:kind], cache, *caches[kind + 1 :])
        return layer.add_mlp(layer.add_attention(x, attended)), caches

    carry, places = (x, caches), _places(config)
    period = _period(config)
    rounds = 0 if isinstance(layers, tuple) else (config.num_layers - only_last) // period
    each = [sum(kind == other for other, _ in places[:period]) for kind in range(len(caches))]

    def steps(carry, turn):
        for offset, (kind, at) in enumerate(places[:period]):
            carry = step(carry, turn * period + offset, (kind, turn * each[kind] + at))
        return carry, None

    if rounds:
        # By index: a slice of the stacked weights would be a copy of them.
        carry, _ = jax.lax.scan(steps, carry, jnp.arange(rounds))
    for index in range(rounds * period, config.num_layers):
        is_last = index == config.num_layers - 1
        carry = step(carry, index, places[index], only_last=only_last and is_last)
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
    x = lookup(params["embed"]["embedding"], tokens)
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.scale_embeddings else x


def with_whole_tables(params: Params) -> Params:
    """The parameters with the tables `sharding.gathered`, once for a pass: a lookup in columns that are split would
    replicate the activations, and every chunk of logits would gather the unembedding."""
    whole = {"embed": {"embedding": sharding.gathered(params["embed"]["embedding"], "tensor", "fsdp")}}
    if "lm_head" in params:
        whole["lm_head"] = {"kernel": sharding.gathered(params["lm_head"]["kernel"], "fsdp", "tensor")}
    return params | whole


def unembedding(params: Params) -> jax.Array:
    """[D, V] matrix from hidden states to logits; the embedding's transpose when tied."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def unembed(params: Params, x: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """[..., V] float32 logits; `softcap` is `config.logit_softcap`, see `logprobs.cap`."""
    if "transposed" in params.get("lm_head", ()):  # see `decoding_layout`
        z = product_of_few(x, params["lm_head"]["transposed"])
    else:
        kernel = unembedding(params).astype(x.dtype)
        z = precision.matmul(x, kernel, jnp.float32)
    return cap(z, softcap)


def final_norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
    return norm_of(config, params["final_norm"])(x)


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
    """Layers in one body of the training pass's loop: all, where they are few or devices are GPUs with all heads.

    A loop keeps what the backward pass needs in stacked arrays, which are cleared, written and read again: on CPU a
    fifth of an update of three small layers, a twentieth of one of ten larger ones, on an H200 a quarter of one of 24,
    and a third of its memory (`docs/performance_log.md`). On several GPUs what one layer needs is gathered while the
    layer before computes, if both are in one body. The price is a compile time that grows with depth. Deep models on
    CPU and on TPU keep their one body, and those whose heads are split: the compiler took three times the memory.
    """
    backend = jax.default_backend()
    few = backend == "cpu" and config.num_layers <= _UNROLLED_LAYERS
    has_all_heads = sharding.head_shards_in_use() == 1
    return config.num_layers if few or (backend == "gpu" and has_all_heads) else 1


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
    """What layers of a kind read of their cache."""

    stretch: kv_cache.Stretch
    seen: jax.Array  # [R, W, size] bool
    seen_of_tail: jax.Array | None = None  # [R, 1, T] bool


def _cache_part(cache: kv_cache.KVCache, positions: jax.Array, filled: int) -> _CachePart:
    """What is read for new tokens at `positions` [R, W]."""
    tail = cache.tail
    if cache.mirrors is not None:
        stretch = kv_cache.Stretch(cache.mirrors[0].starts, cache.mirrors[0].values.shape[2])
    elif tail is not None and tail.before is not None:
        stretch = kv_cache.Stretch(tail.before.starts, tail.before.values.shape[3])
    else:
        stretch = kv_cache.near(cache, positions[:, 0], width=positions.shape[1], filled=filled)
    index = jnp.arange(stretch.size)[None, None]
    index = index if stretch.starts is None else index + stretch.starts[:, None, None]
    distance = positions[:, :, None] - index
    seen = (distance >= 0) if tail is None else index < tail.begins[:, None, None]
    seen = seen if cache.window is None else seen & (distance < cache.window)
    return _CachePart(stretch, seen, None if tail is None else kv_tail.seen(tail, positions[:, 0], cache.window))


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


def _kinds(config: DecoderConfig) -> tuple[int | None, ...]:
    """The windows that there are, each once."""
    return tuple(dict.fromkeys(windows(config)))


def _places(config: DecoderConfig) -> list[tuple[int, int]]:
    """[N], of each layer its kind and how many of its kind are before it."""
    layers, kinds = windows(config), _kinds(config)
    return [(kinds.index(window), layers[:i].count(window)) for i, window in enumerate(layers)]


def _period(config: DecoderConfig) -> int:
    """After how many layers their kinds repeat."""
    layers = windows(config)
    return next(n for n in range(1, len(layers) + 1) if layers[n:] == layers[:-n])
