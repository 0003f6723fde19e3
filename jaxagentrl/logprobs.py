"""Token log-probs and entropies from hidden states, without ever holding the [B, L, V] logits."""

import functools

import jax
import jax.numpy as jnp

# Logits that exist at once: 256 MiB of float32, 1 GiB on accelerators, where every chunk reads and writes
# the unembedding's gradient once more.
_CHUNK_LOGITS = {"cpu": 1 << 26, "gpu": 1 << 28, "tpu": 1 << 28}
_MAX_CHUNK = 4096  # positions; products of this many rows are as fast as longer ones


def chunk_size(vocab_size: int) -> int:
    """Positions whose logits may exist at once: 4096, and fewer where the vocabulary is large."""
    return max(min(_MAX_CHUNK, _CHUNK_LOGITS[jax.default_backend()] // vocab_size), 1)


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = _MAX_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of every token given those before it, and the entropy it was drawn with.

        log p(yₜ | y₍<ₜ₎) = zₜ[yₜ] − logsumexp(zₜ),   zₜ = cap(hₜ₋₁ W) / temperature

    Positions are worked off in chunks whose logits are computed again in the backward pass, so the
    peak is [chunk_size, V] in both. A chunk is the same few positions of every row, so that rows may be
    shared out over devices. The softmax is float32.

    Args:
        hidden: [B, L, D] final hidden states; entry t has seen tokens 0..t.
        unembedding: [D, V].
        tokens: [B, L] int32.
        temperature: divides the logits; that of the sampler, so that both score one distribution.
        softcap: cap(x) = softcap · tanh(x / softcap) on the logits (Gemma 2); None is no cap.
        chunk_size: positions whose logits exist at once.

    Returns:
        log-probs and entropies (nats), both [B, L] float32. Entry t describes token t; entry 0 is 0.
    """
    batch, length, _ = hidden.shape
    contexts, targets = hidden[:, :-1], tokens[:, 1:]

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _score(temperature, softcap, chunk[0], unembedding.astype(hidden.dtype), chunk[1])

    def merged(x: jax.Array) -> jax.Array:
        """Chunks [K, B, C] side by side: [B, L], entry 0 zero."""
        x = jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, : length - 1]
        return jnp.pad(x, ((0, 0), (1, 0)))

    if batch * (length - 1) <= chunk_size:
        results = score((contexts.reshape(-1, hidden.shape[-1]), targets.reshape(-1)))
        return tuple(merged(x.reshape(1, batch, length - 1)) for x in results)
    size = max(chunk_size // batch, 1)
    padding = -(length - 1) % size

    def chunked(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return tuple(merged(x) for x in jax.lax.map(score, (chunked(contexts), chunked(targets))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _score(
    temperature: float,
    softcap: float | None,
    x: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log p[y] and the entropy H of each position of a chunk: x [..., D], targets [...].

    The gradient is written out, in one pass over the logits and without the scatter that the
    derivative of an indexed log-prob would be:

        ∂ log p[y] / ∂zⱼ = 1[j = y] − pⱼ,   ∂H / ∂zⱼ = −pⱼ (log pⱼ + H)
    """
    return _score_fwd(temperature, softcap, x, unembedding, targets)[0]


def _score_fwd(temperature, softcap, x, unembedding, targets):
    logits, _ = _logits(temperature, softcap, x, unembedding)
    # Both sums in one reading of the logits: H = log Σ eᶻ − Σ eᶻ z / Σ eᶻ, z measured from its maximum.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    centered = logits - highest
    masses = jnp.exp(centered)
    total = jnp.sum(masses, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_normalizer = jnp.log(total) + highest[..., 0]
    entropy = jnp.log(total) - jnp.sum(masses * centered, axis=-1) / total
    saved = (x, unembedding, targets, log_normalizer, entropy)
    return (chosen - log_normalizer, entropy), saved


def _score_bwd(temperature, softcap, saved, cotangents):
    x, unembedding, targets, log_normalizer, entropy = saved
    d_chosen, d_entropy = (cotangent[..., None] for cotangent in cotangents)
    logits, slope = _logits(temperature, softcap, x, unembedding)
    log_probs = logits - log_normalizer[..., None]
    index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    is_target = (index == targets[..., None]).astype(logits.dtype)
    probs = jnp.exp(log_probs)
    d_logits = d_chosen * (is_target - probs)
    d_logits -= d_entropy * probs * (log_probs + entropy[..., None])
    d_scores = (d_logits * slope).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    # The barrier keeps XLA from making (xᵀ·d)ᵀ, where the unembedding is an embedding's transpose, into
    # dᵀ·x: on CPU that product takes up to 1.8 times as long (`docs/performance.md`).
    d_unembedding = jax.lax.optimization_barrier(
        jax.lax.dot_general(x, d_scores, ((rows, rows), ((), ())))
    )
    return d_scores @ unembedding.T, d_unembedding, None


_score.defvjp(_score_fwd, _score_bwd)


def _logits(
    temperature: float, softcap: float | None, x: jax.Array, unembedding: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Logits [..., V] in float32, and their slope with respect to the product x·W."""
    scores = jnp.matmul(x, unembedding, preferred_element_type=jnp.float32)
    if softcap is None:
        return scores / temperature, 1 / temperature
    squeezed = jnp.tanh(scores / softcap)
    return softcap * squeezed / temperature, (1 - squeezed * squeezed) / temperature
