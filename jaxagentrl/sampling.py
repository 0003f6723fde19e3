"""Compiled programs of sampling: `extend` appends tokens to cache rows, `decode` samples turns,
`fork` copies cache rows.

All work on what the device holds of a wave for a whole rollout, a KV cache foremost. Everything that varies between
calls (lengths, budgets, temperatures, keys, which rows take part) is data; the few static sizes
(rows, width, filled length) come from fixed buckets, so that nothing recompiles after warm-up.

S slots, R rows of one call, W width of an extend, T token budget of a turn, V vocabulary.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxagentrl import compiles
from jaxagentrl.models import by_device, decoder, decoding_layout, kv_cache, sharding

# Compiler options by backend. Of decode: products of a few hundred rows are faster by cuBLAS than by the
# kernels that XLA writes itself, by up to a tenth of a step; and weights that lie apart are not to be joined, which
# would copy them in every step.
_DECODE_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}
# Of extend: jaxlib 0.10's YNNPACK, to which XLA hands products, takes one core for batches of matrices of few
# rows, which are attention's. Of its fusions only those of sums are left: an extend takes up to 25 % less
# time, the more the longer the history, and with jaxlib 0.12 the same; decode steps would take more
# (`docs/performance_log.md`, "Extends on both cores"). Not so in bfloat16, whose products YNNPACK alone has.
_EXTEND_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}}

# Blocks of the vocabulary that a token is looked for in. A divisor of most published vocabularies, which are
# then not padded, and of what a mesh's tensor axis splits them into.
_MAX_BLOCKS = 128


class Held(NamedTuple):
    """What the device keeps of a wave's slots between calls."""

    caches: tuple[kv_cache.KVCache, ...]  # of `decoder.init_caches`
    hidden: jax.Array  # [S, D] float32, final hidden state of the last token that `extend` appended


_ROWS_OF_HELD = Held(caches=1, hidden=0)  # the dimension that slots are


class Controls(NamedTuple):
    """What each row's turn may be like. Data, so that no value of it compiles anything."""

    budgets: jax.Array  # [R] int32, tokens the row may sample, at most T; 0 makes the row idle
    temperatures: jax.Array  # [R] float32; 0 is greedy
    top_k: jax.Array  # [R] int32, keep the k most probable tokens; 0 keeps all
    top_p: jax.Array  # [R] float32, keep the smallest set of at least this mass; 1 keeps all
    min_p: jax.Array  # [R] float32, keep what has at least this share of the mode; 0 keeps all
    stop_ids: jax.Array  # [R, K] int32, tokens that end a turn; −1 is none
    streams: jax.Array  # [R, 2] uint32, the key of the turn


class Sampled(NamedTuple):
    """What one decode call produced, per row."""

    tokens: jax.Array  # [R, T] int32, junk beyond `counts`
    logprobs: jax.Array  # [R, T] float32, of the distribution that was sampled from
    entropies: jax.Array  # [R, T] float32, nats, of that distribution
    counts: jax.Array  # [R] int32, tokens sampled, the stop token included
    unfinished: jax.Array  # [R] bool, the call ended before the row's turn did
    steps: jax.Array  # [] int32, forward passes


def check(
    *,
    num_slots: int,
    num_waves: int,
    max_length: int,
    max_turn_tokens: int,
    filled_buckets: Sequence[int],
    width_buckets: Sequence[int],
    row_divisors: Sequence[int],
    cache_dtype: str,
    linger_share: float,
) -> None:
    """Refuses sizes that an `engine.Engine` cannot work with. Arguments as there.

    Raises:
        ValueError: with the config key (`sampling.…`), what was got and what was expected.
    """
    if min(num_slots, num_waves) < 1 or num_slots % num_waves:
        raise ValueError(
            f"sampling.num_slots ({num_slots}) must be a positive multiple of sampling.num_waves "
            f"({num_waves})."
        )
    for name, sizes in (
        ("filled_buckets", filled_buckets),
        ("width_buckets", width_buckets),
        ("row_divisors", row_divisors),
    ):
        if not sizes:
            raise ValueError(f"sampling.{name} must have at least one entry, got none.")
    if max(filled_buckets) != max_length or min(filled_buckets) < 1:
        raise ValueError(
            f"sampling.filled_buckets must be positive and end at sampling.max_length ({max_length}), got "
            f"{tuple(filled_buckets)}."
        )
    if not 0 < max_turn_tokens < max_length:
        raise ValueError(
            f"sampling.max_turn_tokens must be in 1..{max_length - 1}, below sampling.max_length, "
            f"got {max_turn_tokens}."
        )
    if min(*width_buckets, *row_divisors) < 1:
        raise ValueError(
            "sampling.width_buckets and sampling.row_divisors must be positive, got "
            f"{tuple(width_buckets)} and {tuple(row_divisors)}."
        )
    if cache_dtype not in kv_cache.DTYPES:
        raise ValueError(
            f"sampling.cache_dtype must be one of {kv_cache.DTYPES}, got {cache_dtype!r}."
        )
    if not 0 <= linger_share < 1:
        raise ValueError(f"sampling.linger_share must be in [0, 1), got {linger_share}.")


def most(width_buckets: Sequence[int], max_turn_tokens: int) -> int:
    """New tokens of a row in one call, at the most."""
    return max(*width_buckets, max_turn_tokens)


def init(
    config: decoder.DecoderConfig, num_slots: int, max_length: int, dtype: str, *, most: int
) -> Held:
    """Empty slots. `dtype` is one of `kv_cache.DTYPES`; `most` as the function of that name."""
    caches = decoder.init_caches(config, num_slots, max_length, dtype, most=most)
    return Held(caches, sharding.constrain_rows(jnp.zeros((num_slots, config.hidden_size))))


class Extend(Protocol):
    def __call__(
        self,
        params: decoder.Params,
        held: Held,
        tokens: jax.Array,
        slots: jax.Array,
        lengths: jax.Array,
        counts: jax.Array,
        *,
        filled: int,
    ) -> tuple[Held, jax.Array]: ...


def make_extend(config: decoder.DecoderConfig, cache_dtype: str = "float32") -> Extend:
    """Program that appends tokens [R, W] to the cache rows `slots` [R], and keeps the hidden states of
    the last ones, from which `decode` samples the next.

    Any cache can be given. By `cache_dtype` the program is compiled, on CPU, as one that computes in bfloat16, too, if
    that is "bfloat16"; what it computes in is the dtype of the parameters.

    Rows that are padding name a slot out of range. The argument `held` is donated. The rows' new
    lengths [R] are returned beside it: the host can wait for them after `held` was donated to the next call.

    On a mesh that splits slots and rows into shards, those of a shard are for slots of its own and number
    them from 0 (`shards`).
    """

    def append(params, held, tokens, slots, lengths, counts, *, filled):
        x, caches = decoder.hidden_cached(
            config,
            params,
            tokens,
            held.caches,
            slots,
            lengths,
            counts,
            filled=filled,
            only_last=True,
        )
        hidden = held.hidden.at[slots].set(x[:, 0].astype(jnp.float32), mode="drop")
        return Held(caches, hidden), lengths + counts

    @functools.partial(
        jax.jit,
        static_argnames="filled",
        donate_argnames="held",
        compiler_options=_known({} if cache_dtype == "bfloat16" else _EXTEND_OPTIONS),
    )
    def extend(params, held, tokens, slots, lengths, counts, *, filled):
        program = functools.partial(append, filled=filled)
        program = by_device.over_rows(program, (None, _ROWS_OF_HELD, 0, 0, 0, 0), (_ROWS_OF_HELD, 0))
        return program(params, held, tokens, slots, lengths, counts)

    return extend


def make_fork():
    """Program that copies the first `filled` positions of cache rows `sources` [R] to `targets` [R], and
    the hidden states that `extend` kept.

    A target out of range is padding. The argument `held` is donated. An array that the
    host can wait for is returned beside it. On a mesh rows are as those of `make_extend`: none is copied to another shard.
    """

    def copy(held, sources, targets, *, filled):
        caches = tuple(kv_cache.copy_rows(cache, sources, targets, filled) for cache in held.caches)
        kept = jnp.take(held.hidden, sources, axis=0, mode="clip")
        return Held(caches, held.hidden.at[targets].set(kept, mode="drop")), targets + 0

    @functools.partial(jax.jit, static_argnames="filled", donate_argnames="held")
    def fork(held, sources, targets, *, filled):
        program = functools.partial(copy, filled=filled)
        program = by_device.over_rows(program, (_ROWS_OF_HELD, 0, 0), (_ROWS_OF_HELD, 0))
        return program(held, sources, targets)

    return fork


def make_decode(config: decoder.DecoderConfig, *, max_turn_tokens: int):
    """Program that samples turns for every active row in a single compiled loop.

    Arguments of the program:
        params, held: `held` is donated.
        slots: [R] int32, the cache row of each row, out of range for one that is idle; None when R is
            all slots in order, which is what the kernel for GPUs takes and meshes shard.
        pending: [R] int32, the last token of each row, not yet in the cache. Of rows that are ready, nothing.
        lengths: [R] int32, tokens in the cache.
        is_ready: [R] bool, rows whose last token `extend` appended: their first token is sampled from the
            hidden state that it kept, without a step.
        controls: see `Controls`. Every token's key is folded from its row's stream and its
            position, so a trajectory does not depend on slot, wave or finishing order.
        until: [] int32: the call ends once at most this many rows are still in their turn. They
            are `unfinished` and go on in a later call, with the same result.
        filled: static bound on lengths + budgets.
        restricted: static; False compiles without top-k, top-p and min-p, which cost a sort of the
            vocabulary, and then requires them to be off.

    A greedy row's log-probs are those at temperature 1, after its top-k, top-p and min-p (the greedy
    choice itself has probability one). Otherwise log-probs and entropies are of the distribution sampled from:
    after temperature, top-k, top-p and min-p, renormalized.

    Returns:
        (held, Sampled). The last sampled token of a row is in no cache: it opens the next extend.
    """

    def play(
        params, held, slots, pending, lengths, is_ready, controls, until, *, filled, restricted
    ):
        caches, num_rows = held.caches, pending.shape[0]
        dtype = params["embed"]["embedding"].dtype
        begun = functools.partial(kv_cache.begun, most=max_turn_tokens)
        caches = tuple(begun(cache, slots, lengths, filled, dtype) for cache in caches)
        if caches[0].mirrors is not None:
            filled = kv_cache.in_blocks(filled)
            params = decoding_layout.for_rows(params, num_rows)
        shape = (num_rows, max_turn_tokens)
        draw = functools.partial(_draw, config, params, controls, restricted=restricted)

        def is_running(carry):
            return by_device.sum_over_rows(jnp.sum(carry[1]["active"])) > until

        def step(carry):
            caches, turns = carry
            active = turns["active"]
            x, caches = decoder.hidden_cached(
                config,
                params,
                turns["pending"][:, None],
                caches,
                slots,
                turns["lengths"],
                active.astype(jnp.int32),
                filled=filled,
            )
            moved = {"lengths": turns["lengths"] + active, "steps": turns["steps"] + 1}
            return caches, draw(turns | moved, x[:, 0], active)

        turns = {
            "pending": pending,
            "lengths": lengths,
            "counts": jnp.zeros_like(lengths),
            "active": controls.budgets > 0,
            "steps": jnp.int32(0),
            "out": (jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape)),
        }
        x = held.hidden if slots is None else jnp.take(held.hidden, slots, axis=0, mode="clip")
        x = x.astype(dtype)
        is_ready = is_ready & turns["active"]
        turns = jax.lax.cond(
            by_device.sum_over_rows(jnp.sum(is_ready)) > 0,
            lambda turns: draw(turns, x, is_ready),
            lambda turns: turns,
            turns,
        )
        caches, turns = jax.lax.while_loop(is_running, step, (caches, turns))
        settled = functools.partial(kv_cache.settled, most=max_turn_tokens)
        caches = tuple(settled(cache, slots, lengths, turns["lengths"]) for cache in caches)
        sampled = Sampled(*turns["out"], turns["counts"], turns["active"], turns["steps"])
        return held._replace(caches=caches), sampled

    @functools.partial(
        jax.jit,
        static_argnames=("filled", "restricted"),
        donate_argnames="held",
        compiler_options=_known(_DECODE_OPTIONS),
    )
    def decode(
        params, held, slots, pending, lengths, is_ready, controls, until, *, filled, restricted
    ):
        program = functools.partial(play, filled=filled, restricted=restricted)
        program = by_device.over_rows(
            program,
            (None, _ROWS_OF_HELD, 0, 0, 0, 0, 0, None),
            (_ROWS_OF_HELD, Sampled(0, 0, 0, 0, 0, steps=None)),
        )
        return program(params, held, slots, pending, lengths, is_ready, controls, until)

    return decode


def _draw(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    controls: Controls,
    turns: dict[str, Any],
    x: jax.Array,
    drawing: jax.Array,
    *,
    restricted: bool,
) -> dict[str, Any]:
    """The turns of `decode` with one token more of the rows that are `drawing` [R], whose last token has the
    final hidden state x [R, D]."""
    greedy = controls.temperatures <= 0
    scale = jnp.where(greedy, 1.0, controls.temperatures)[:, None]
    z = decoder.unembed(params, x, softcap=config.logit_softcap) / scale
    if restricted:
        z = jax.nn.log_softmax(z)
        z = restrict(z, controls.top_k, controls.top_p, controls.min_p)
    keys = jax.random.wrap_key_data(controls.streams)
    last = turns["lengths"] - 1  # its position
    token = sample(z, jax.vmap(jax.random.fold_in)(keys, last), greedy)
    out, drawn = turns["out"], (token, *describe(z, token))
    # Other rows write at index T, which is dropped.
    where = (jnp.arange(len(token)), jnp.where(drawing, turns["counts"], out[0].shape[1]))
    counts = turns["counts"] + drawing
    ended = jnp.any(token[:, None] == controls.stop_ids, axis=1) | (counts >= controls.budgets)
    return turns | {
        "pending": jnp.where(drawing, token, turns["pending"]),
        "counts": counts,
        "active": turns["active"] & ~(drawing & ended),
        "out": tuple(
            held.at[where].set(new, mode="drop") for held, new in zip(out, drawn, strict=True)
        ),
    }


def _known(options: dict[str, dict[str, str | bool]]) -> dict[str, str | bool]:
    """This backend's options, without those that this jaxlib has not heard of."""
    mine = options.get(jax.default_backend(), {})
    return {name: value for name, value in mine.items() if compiles.knows(name, value)}


def decodes_some_rows() -> bool:
    """Whether a decode call is told its rows, so that it may have fewer than there are slots.

    On CPU, where a step's time is nearly that of its rows. Not on a mesh of fake devices, which is to
    run what accelerators run.
    """
    return jax.default_backend() == "cpu" and not sharding.active()


def restrict(
    logprobs: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Log-probs [S, V] renormalized over the tokens that a row's settings keep; −inf for the rest.

    The three apply in this order: the `top_k` most probable (0: all), of those the smallest set
    with at least mass `top_p` (Holtzman et al. 2020), of those the tokens with at least `min_p`
    times the mode's probability (Nguyen et al. 2024). Tokens that tie with the last one kept stay.
    The mode always stays.
    """
    size = logprobs.shape[-1]
    ordered = -jnp.sort(-logprobs, axis=-1)
    top_k = jnp.where(top_k > 0, top_k, size)[:, None]
    kept = jnp.arange(size)[None] < top_k
    mass = jnp.where(kept, jnp.exp(ordered), 0.0)
    mass = mass / jnp.sum(mass, axis=-1, keepdims=True)
    above = jnp.cumsum(mass, axis=-1) - mass
    # `top_p` 1 means all: the cumulative sum may reach 1 in float32 before the last token.
    kept = kept & ((above < top_p[:, None]) | (top_p >= 1)[:, None])
    kept = kept & (jnp.exp(ordered - ordered[:, :1]) >= min_p[:, None])
    kept = kept.at[:, 0].set(True)
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(ordered, last, axis=-1)
    return jax.nn.log_softmax(jnp.where(logprobs >= threshold, logprobs, -jnp.inf))


def describe(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S] log-probs of `tokens` and [S] entropies in nats under logits [S, V]; −inf is impossible.

    Both sums in one reading of the logits, which on a GPU take as long to read as many layers' weights:
    H = log Σ eᶻ − Σ eᶻ z / Σ eᶻ, z measured from its maximum.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    centered = logits - highest
    masses = jnp.exp(centered)
    total = jnp.sum(masses, axis=-1)
    mean = jnp.sum(jnp.where(masses > 0, masses * centered, 0.0), axis=-1) / total
    chosen = jnp.take_along_axis(centered, tokens[:, None], axis=1)[:, 0]
    return chosen - jnp.log(total), jnp.log(total) - mean


def sample(logits: jax.Array, keys: jax.Array, greedy: jax.Array) -> jax.Array:
    """[S] int32 tokens from logits [S, V], one key per row; the most probable one of greedy rows.

    By the Gumbel-max trick (Maddison et al. 2014) twice: a block of the vocabulary by the blocks'
    masses, then a token of that block. It is the same distribution, from some 2 √V random numbers a
    row instead of V. Not by the inverse of the cumulative sum: in float32 that of a large vocabulary
    can pick tokens of probability zero.
    """
    num_blocks = min(_MAX_BLOCKS, 2 ** round(math.log2(logits.shape[-1]) / 2))
    size = -(-logits.shape[-1] // num_blocks)

    def in_blocks(x: jax.Array, nothing: float) -> jax.Array:
        missing = num_blocks * size - x.shape[-1]
        padded = jnp.pad(x, ((0, 0), (0, missing)), constant_values=nothing) if missing else x
        return padded.reshape(-1, num_blocks, size)

    masses = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # as in `describe`
    log_masses = jnp.log(jnp.sum(in_blocks(masses, 0.0), axis=-1))
    blocks = in_blocks(logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_blocks + size,)))(keys)
    noise = jnp.where(greedy[:, None], 0.0, noise)
    scores = jnp.where(greedy[:, None], jnp.max(blocks, axis=-1), log_masses)
    block = _argmax(scores + noise[:, :num_blocks])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * size + _argmax(inside + noise[:, num_blocks:])


def _argmax(x: jax.Array) -> jax.Array:
    """[S] int32, the first largest entry of each row of [S, V]."""
    if jax.default_backend() != "cpu":
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    # argmax is one entry after the other there, and so is what it is fused with, here two logarithms an
    # entry: a third of the time at V = 8192.
    is_largest = x == jnp.max(x, axis=-1, keepdims=True)
    last = x.shape[-1] - 1
    return jnp.min(jnp.where(is_largest, jnp.arange(x.shape[-1]), last), axis=-1).astype(jnp.int32)
