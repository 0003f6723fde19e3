"""Token log-probs and entropies: values from the definition, the written-out gradient against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import logprobs

B, L, D, V = 3, 7, 5, 11


def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, L, D)), jnp.float32)
    unembedding = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((2, B, L)), jnp.float32)
    return hidden, unembedding, tokens, weights


def definition(hidden, unembedding, tokens, *, temperature, softcap):
    """All logits at once; jax differentiates it."""
    z = hidden[:, :-1] @ unembedding
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    logp = jax.nn.log_softmax(z / temperature)
    chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy))


@pytest.mark.parametrize("chunk_size", [4, 9, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_definition(chunk_size, softcap, temperature):
    hidden, unembedding, tokens, weights = inputs()
    settings = {"temperature": temperature, "softcap": softcap}

    def run(function, **options):
        def loss(hidden, unembedding):
            found = function(hidden, unembedding, tokens, **settings, **options)
            return jnp.sum(weights * jnp.stack(found)), found

        (_, found), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembedding)
        return found, slopes

    ours = run(logprobs.token_logprobs, chunk_size=chunk_size)
    theirs = run(definition)
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6, rtol=1e-5)


def test_hidden_states_in_16_bits_have_gradients_in_16_bits():
    hidden, unembedding, tokens, weights = inputs()

    def loss(hidden, unembedding):
        found = logprobs.token_logprobs(hidden, unembedding, tokens, softcap=1.5)
        assert found[0].dtype == found[1].dtype == jnp.float32
        return jnp.sum(weights * jnp.stack(found))

    exact = jax.grad(loss, (0, 1))(hidden, unembedding)
    narrow = jax.grad(loss, (0, 1))(hidden.astype(jnp.bfloat16), unembedding)
    assert [x.dtype for x in narrow] == [jnp.bfloat16, jnp.float32]
    for one, two in zip(narrow, exact, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), two, atol=0.1)


def test_a_huge_logit_leaves_everything_finite():
    hidden, unembedding, tokens, weights = inputs()

    def loss(hidden):
        return jnp.sum(weights * jnp.stack(logprobs.token_logprobs(hidden, unembedding, tokens)))

    value, slope = jax.value_and_grad(loss)(1e4 * hidden)
    assert np.isfinite(value) and np.isfinite(slope).all()
