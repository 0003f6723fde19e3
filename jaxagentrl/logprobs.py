"""Token log-probs and entropies from hidden states, without ever holding the [B, L, V] logits."""

import jax
import jax.numpy as jnp


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    *,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of every token given those before it, and the entropy it was drawn with.

        log p(yₜ | y₍<ₜ₎) = zₜ[yₜ] − logsumexp(zₜ),   zₜ = hₜ₋₁ W / temperature

    Positions are worked off in chunks whose logits are recomputed in the backward pass, so the peak
    is [chunk_size, V] in both. The softmax is float32.

    Args:
        hidden: [B, L, D] final hidden states; entry t has seen tokens 0..t.
        unembedding: [D, V].
        tokens: [B, L] int32.
        temperature: divides the logits; that of the sampler, so that both score one distribution.
        chunk_size: positions whose logits exist at once.

    Returns:
        log-probs and entropies (nats), both [B, L] float32. Entry t describes token t; entry 0 is 0.
    """
    batch, length, width = hidden.shape
    contexts = hidden[:, :-1].reshape(-1, width)
    targets = tokens[:, 1:].reshape(-1)
    num = contexts.shape[0]

    @jax.checkpoint
    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target = chunk
        logits = jnp.matmul(x, unembedding.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = logits / temperature
        log_normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        mean_logit = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return chosen - log_normalizer, log_normalizer - mean_logit

    if num <= chunk_size:
        logprobs, entropies = score((contexts, targets))
    else:
        padding = -num % chunk_size
        contexts = jnp.pad(contexts, ((0, padding), (0, 0))).reshape(-1, chunk_size, width)
        targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk_size)
        logprobs, entropies = jax.lax.map(score, (contexts, targets))
    return tuple(
        jnp.pad(x.reshape(-1)[:num].reshape(batch, length - 1), ((0, 0), (1, 0)))
        for x in (logprobs, entropies)
    )
