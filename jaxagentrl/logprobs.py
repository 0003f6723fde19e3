"""Token log-probs and entropies from hidden states: of the tokens that are needed and no others, and
without ever holding the [B, L, V] logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxagentrl import precision

# Logits that exist at once: 256 MiB of float32, 1 GiB on accelerators, where every chunk reads and writes
# the unembedding's gradient once more.
_CHUNK_LOGITS = {"cpu": 1 << 26, "gpu": 1 << 28, "tpu": 1 << 28}
# Positions: products of more rows are no faster, and a chunk is computed whole, however few it holds.
_MAX_CHUNK = {"cpu": 256, "gpu": 4096, "tpu": 4096}

# (parameters, [C, D]) → [C, D].
Finish = Callable[[Any, jax.Array], jax.Array]


def _as_it_is(_: Any, x: jax.Array) -> jax.Array:
    return x


def largest_chunk(vocab_size: int) -> int:
    """Positions of a device whose logits may exist at once; fewer where the vocabulary is large."""
    backend = jax.default_backend()
    return max(min(_MAX_CHUNK[backend], _CHUNK_LOGITS[backend] // vocab_size), 1)


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    needed: jax.Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    row_shards: int = 1,
    finish: Finish = _as_it_is,
    finish_params: Any = (),
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of every needed token given those before it, and the entropy it was drawn with.

        log p(yₜ | y₍<ₜ₎) = zₜ[yₜ] − logsumexp(zₜ),   zₜ = cap(hₜ₋₁ W) / temperature

    Most tokens of an agent's episode are the environment's, and no loss asks for their log-probs. So
    the needed ones are brought together and worked off in chunks, as many as there are, forward and
    backward: cost is by needed tokens, their number is data and compiles nothing. A chunk's logits are
    computed again in the backward pass, so the peak is [chunk_size, V] in both; where all of the batch fit
    in the memory of a chunk, they are kept instead. The softmax is float32.

    Args:
        hidden: [B, L, D] final hidden states; entry t has seen tokens 0..t.
        unembedding: [D, V].
        tokens: [B, L] int32.
        needed: [B, L] bool, tokens whose log-probs are read; None is all of them. The first of a row
            never is: nothing predicts it.
        temperature: divides the logits; that of the sampler, so that both score one distribution.
        softcap: `cap` on the logits (Gemma 2), cap(x) = softcap · tanh(x / softcap); None is no cap.
        chunk_size: positions of a device whose logits exist at once; None is `largest_chunk`.
        row_shards: parts that the rows are shared out into over devices. Every part works off its own
            tokens, and they sum the gradients of weights once. A number that does not divide B is 1.
        finish: what is left of the model for every position by itself, if `hidden` are not final yet: then
            that is done for needed positions only, too. It is computed again in the backward pass, and
            for zeros, which fill the last chunk, its derivative must be finite.
        finish_params: its parameters, a tree, in the dtype of `hidden`.

    Returns:
        log-probs and entropies (nats), both [B, L] float32. Entry t describes token t; what is not
        needed is 0, without gradient.

    Raises:
        ValueError: a chunk of no positions.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1, or None")
    batch, length, width = hidden.shape
    if not batch * length:
        return jnp.zeros((batch, length)), jnp.zeros((batch, length))
    shards = 1 if batch % row_shards else row_shards
    held = batch // shards * length  # positions of a device
    size = min(chunk_size or largest_chunk(unembedding.shape[1]), held)
    needed = jnp.ones(tokens.shape, bool) if needed is None else needed

    def shard(contexts: jax.Array, targets: jax.Array, asked: jax.Array) -> jax.Array:
        places = jnp.nonzero(asked, size=-(-held // size) * size, fill_value=held)[0]
        return _score(reading, contexts, weights, targets, places.reshape(-1, size), chunks)

    # Entry t of these is about the token after it, which the hidden state there predicts.
    asked = jnp.roll(needed, -1, axis=1).at[:, -1].set(False).reshape(shards, held)
    targets = jnp.roll(tokens, -1, axis=1).reshape(shards, held)
    contexts = hidden.reshape(shards, held, width)
    reading = _Reading(finish, temperature, softcap)
    weights = _Weights(finish_params, unembedding.astype(hidden.dtype))
    chunks = -(-jnp.max(jnp.sum(asked, axis=1)) // size)
    if shards == 1:
        found = shard(contexts[0], targets[0], asked[0])
    else:
        found = jax.vmap(shard)(contexts, targets, asked)
    return tuple(jnp.roll(x.reshape(batch, length), 1, axis=1) for x in found)


class _Reading(NamedTuple):
    """How hidden states are read."""

    finish: Finish
    temperature: float
    softcap: float | None


class _Weights(NamedTuple):
    finish: Any  # the parameters of `_Reading.finish`
    unembedding: jax.Array  # [D, V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    reading: _Reading,
    contexts: jax.Array,
    weights: _Weights,
    targets: jax.Array,
    places: jax.Array,
    chunks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log p[y] and the entropy H where they are asked for, zeros elsewhere, both [N] float32.

    contexts [N, D], targets [N]; places [chunks at most, chunk] are indices into them, N on padding,
    of which the first `chunks` rows are worked off.

    The gradient is written out, in one pass over the logits and without the scatter that the
    derivative of an indexed log-prob would be:

        ∂ log p[y] / ∂zⱼ = 1[j = y] − pⱼ,   ∂H / ∂zⱼ = −pⱼ (log pⱼ + H)
    """
    return _score_chunks(reading, contexts, weights, targets, places, chunks, kept=None)[0][:2]


def _score_fwd(reading, contexts, weights, targets, places, chunks):
    kept, vocab_size = None, weights.unembedding.shape[1]
    if places.size * vocab_size <= _CHUNK_LOGITS[jax.default_backend()]:
        kept = jnp.zeros((*places.shape, vocab_size))
    inputs = (contexts, weights, targets, places, chunks)
    found, kept = _score_chunks(reading, *inputs, kept=kept)
    return found[:2], (inputs, found, kept)


def _score_chunks(reading, contexts, weights, targets, places, chunks, *, kept):
    """Log-probs, entropies and normalizers, [N] each; and the logits, if there is an array to keep
    them in, [chunks at most, chunk, V]."""

    def body(index, carry):
        found, kept = carry
        at = places[index]
        x = reading.finish(weights.finish, _take(contexts, at))
        logits = _logits(reading, x, weights.unembedding)
        # Both sums in one reading of the logits: H = log Σ eᶻ − Σ eᶻ z / Σ eᶻ, z measured from its
        # maximum.
        highest = jnp.max(logits, axis=-1, keepdims=True)
        centered = logits - highest
        masses = jnp.exp(centered)
        total = jnp.sum(masses, axis=-1)
        chosen = jnp.take_along_axis(logits, _take(targets, at)[:, None], axis=-1)[:, 0]
        log_normalizer = jnp.log(total) + highest[:, 0]
        entropy = jnp.log(total) - jnp.sum(masses * centered, axis=-1) / total
        found = _put(found, at, (chosen - log_normalizer, entropy, log_normalizer))
        return found, None if kept is None else kept.at[index].set(logits)

    zeros = jnp.zeros(targets.shape)
    return jax.lax.fori_loop(0, chunks, body, ((zeros,) * 3, kept))


def _score_bwd(reading, saved, cotangents):
    (contexts, weights, targets, places, chunks), (_, entropies, log_normalizers), kept = saved
    unembedding = weights.unembedding

    def body(index, slopes):
        d_contexts, d_weights = slopes
        at = places[index]
        x, slope_of = jax.vjp(reading.finish, weights.finish, _take(contexts, at))
        per_position = (*cotangents, log_normalizers, entropies)
        d_chosen, d_entropy, log_normalizer, entropy = (_take(y, at)[:, None] for y in per_position)
        logits = _logits(reading, x, unembedding) if kept is None else kept[index]
        log_probs = logits - log_normalizer
        column = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
        is_target = (column == _take(targets, at)[:, None]).astype(logits.dtype)
        probs = jnp.exp(log_probs)
        d_logits = d_chosen * (is_target - probs) - d_entropy * probs * (log_probs + entropy)
        d_scores = (d_logits * _slope(reading, logits)).astype(x.dtype)
        d_unembedding = precision.contract(x, d_scores, ((0,), (0,)), jnp.float32)
        d_finish, d_taken = slope_of(precision.matmul(d_scores, unembedding.T))
        # Summed over chunks in float32, whatever the products are in.
        d_weights = jax.tree.map(jnp.add, d_weights, _Weights(d_finish, d_unembedding))
        return _put(d_contexts, at, d_taken), d_weights

    zeros = (jnp.zeros_like(contexts), jax.tree.map(lambda x: jnp.zeros(x.shape), weights))
    d_contexts, d_weights = jax.lax.fori_loop(0, chunks, body, zeros)
    d_weights = jax.tree.map(lambda slope, x: slope.astype(x.dtype), d_weights, weights)
    return d_contexts, d_weights, None, None, None


_score.defvjp(_score_fwd, _score_bwd)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """Entries of a chunk; zeros on padding."""
    return x.at[at].get(mode="fill", fill_value=0, indices_are_sorted=True)


def _put(tree, at: jax.Array, parts):
    """Arrays with a chunk's entries in them; padding goes nowhere."""

    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        return x.at[at].set(part, mode="drop", indices_are_sorted=True)

    return jax.tree.map(put, tree, parts)


def cap(x: jax.Array, softcap: float | None) -> jax.Array:
    """Squeezes into (−softcap, softcap), near the identity around 0; None leaves x as it is."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _logits(reading: _Reading, x: jax.Array, unembedding: jax.Array) -> jax.Array:
    """[C, V] float32."""
    scores = precision.matmul(x, unembedding, jnp.float32)
    return cap(scores, reading.softcap) / reading.temperature


def _slope(reading: _Reading, logits: jax.Array) -> jax.Array | float:
    """Derivative of the logits by the product x·W."""
    if reading.softcap is None:
        return 1 / reading.temperature
    squeezed = logits * (reading.temperature / reading.softcap)
    return (1 - squeezed * squeezed) / reading.temperature
