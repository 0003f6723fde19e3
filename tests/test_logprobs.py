"""Token log-probs and entropies: values from the definition, the written-out gradient against jax's own,
and nothing computed that is not needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import logprobs
from jaxagentrl.models import sharding

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


def asked(share: str) -> np.ndarray:
    """[B, L] bool; in the first column, which nothing predicts, too."""
    rng = np.random.default_rng(3)
    masks = {"some": rng.random((B, L)) < 0.4, "one row": np.arange(B)[:, None] == [1] * L}
    masks |= {"none": np.zeros((B, L), bool), "all": np.ones((B, L), bool)}
    return masks[share]


def loss_of(function, weights, **options):
    """(function's values, the slopes of their weighted sum) from hidden states and unembedding."""

    def loss(hidden, unembedding, tokens):
        found = function(hidden, unembedding, tokens, **options)
        return jnp.sum(weights * jnp.stack(found)), found

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("share", ["none", "some", "one row", "all"])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_what_is_not_needed_is_zero_and_has_no_gradient(
    share, chunk_size, keeps_logits, monkeypatch
):
    if not keeps_logits:
        monkeypatch.setitem(logprobs._CHUNK_LOGITS, "cpu", 0)
    hidden, unembedding, tokens, weights = inputs()
    needed = asked(share)
    options = {"temperature": 0.7, "softcap": 1.5}
    ours = loss_of(logprobs.token_logprobs, weights, needed=needed, chunk_size=chunk_size, **options)
    (_, found), slopes = ours(hidden, unembedding, tokens)
    theirs = loss_of(definition, jnp.where(needed, weights, 0.0), **options)
    (_, expected), expected_slopes = theirs(hidden, unembedding, tokens)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, np.where(needed, two, 0.0), atol=2e-6, rtol=1e-5)
    for one, two in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6, rtol=1e-5)


def squash(params, x):
    """What a model may do last to every position by itself."""
    return x + jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]


def squash_params():
    rng = np.random.default_rng(5)
    shapes = {"in": (D, 4), "bias": (4,), "out": (4, D)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("share", ["none", "some", "all"])
@pytest.mark.parametrize("chunk_size, row_shards", [(1, 1), (4, 3), (1000, 1)])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_needed_positions_are_finished_alone(
    share, chunk_size, row_shards, keeps_logits, monkeypatch
):
    if not keeps_logits:
        monkeypatch.setitem(logprobs._CHUNK_LOGITS, "cpu", 0)
    hidden, unembedding, tokens, weights = inputs()
    needed = asked(share)

    def ours(hidden, unembedding, params):
        options = dict(needed=needed, chunk_size=chunk_size, row_shards=row_shards)
        options |= dict(finish=squash, finish_params=params, temperature=0.7, softcap=1.5)
        return logprobs.token_logprobs(hidden, unembedding, tokens, **options)

    def theirs(hidden, unembedding, params):
        x = squash(params, hidden.reshape(-1, D)).reshape(hidden.shape)
        found = definition(x, unembedding, tokens, temperature=0.7, softcap=1.5)
        return tuple(jnp.where(needed, x, 0.0) for x in found)

    def run(function):
        def loss(*args):
            found = function(*args)
            return jnp.sum(weights * jnp.stack(found)), found

        slopes = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        return slopes(hidden, unembedding, squash_params())

    for one, two in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(one, two, atol=3e-6, rtol=1e-5)


def test_cost_goes_by_the_needed_tokens(monkeypatch):
    """As many chunks of logits as they fill, forward and backward, and one program for any number."""
    made, finished = [], []
    logits = logprobs._logits

    def counted(*args):
        jax.debug.callback(lambda: made.append(1))
        return logits(*args)

    def finish(params, x):
        jax.debug.callback(lambda: finished.append(len(x)))
        return squash(params, x)

    monkeypatch.setattr(logprobs, "_logits", counted)
    monkeypatch.setitem(logprobs._CHUNK_LOGITS, "cpu", 0)  # logits are made again for the gradient
    hidden, unembedding, tokens, weights = inputs()

    @jax.jit
    def both(needed):
        options = dict(chunk_size=2, finish=finish, finish_params=squash_params())
        run = loss_of(logprobs.token_logprobs, weights, needed=needed, **options)
        return run(hidden, unembedding, tokens)

    for count in (0, 1, 2, 5, B * (L - 1)):
        places = np.flatnonzero(np.arange(B * L) % L)[:count]
        needed = np.zeros(B * L, bool)
        needed[places] = True
        made.clear()
        finished.clear()
        jax.block_until_ready(both(needed.reshape(B, L)))
        jax.effects_barrier()
        assert len(made) == 2 * -(-count // 2)
        assert finished == [2] * len(made)
    assert both._cache_size() == 1


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (3, 1, 1)])
def test_devices_work_off_their_own_rows(shape):
    """Needed tokens are spread unevenly, and 12 rows are shared out; over 8 devices they stay whole."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((12, L, 8)).astype(np.float32)
    unembedding = rng.standard_normal((8, 16)).astype(np.float32)
    tokens = rng.integers(0, 16, (12, L)).astype(np.int32)
    weights = rng.standard_normal((2, 12, L)).astype(np.float32)
    needed = rng.random((12, L)) < np.linspace(0, 0.9, 12)[:, None]

    def run():
        options = dict(needed=needed, chunk_size=3, row_shards=sharding.row_shards_in_use())
        rows = sharding.constrain(hidden, sharding.ROWS)
        columns = sharding.constrain(unembedding, None, "tensor")
        program = jax.jit(loss_of(logprobs.token_logprobs, weights, **options))
        return program(rows, columns, tokens)

    alone = run()
    axes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    with sharding.use(sharding.make_mesh(**axes)):
        assert sharding.row_shards_in_use() == shape[0] * shape[1]
        spread = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), alone, spread)


def test_devices_wait_for_each_other_once():
    """What they exchange lies outside the loops over chunks: one sum of the unembedding's gradient."""
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.ROWS))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))

    def loss(hidden, embedding, tokens, needed):
        weights = sharding.constrain(embedding.T, None, "tensor")
        options = dict(needed=needed, chunk_size=4, row_shards=8)
        return jnp.sum(jnp.stack(logprobs.token_logprobs(hidden, weights, tokens, **options)))

    shapes = (
        jax.ShapeDtypeStruct((16, L, 8), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=columns),
        jax.ShapeDtypeStruct((16, L), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((16, L), bool, sharding=rows),
    )
    with sharding.use(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    pattern = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
    loops, whole = text[: text.index("\nENTRY")], text[text.index("\nENTRY") :]
    assert not re.findall(pattern, loops)
    summed = [line for line in whole.splitlines() if re.search(pattern, line) and "reduce_sum" in line]
    assert len(summed) == 1 and whole.count(" while(") == 2


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_a_batch_without_tokens_has_none(shape):
    hidden, unembedding = jnp.zeros((*shape, 4)), jnp.zeros((4, 8))
    for found in logprobs.token_logprobs(hidden, unembedding, jnp.zeros(shape, jnp.int32)):
        assert found.shape == shape and found.dtype == jnp.float32


def test_sums_over_chunks_are_float32():
    """A thousand chunks of one token, computed in bfloat16: their sum is as exact as one chunk's."""
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.standard_normal((1, 1025, 4)), jnp.bfloat16)
    unembedding = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 8, (1, 1025)), jnp.int32)

    def slope(chunk_size):
        def loss(unembedding):
            found = logprobs.token_logprobs(hidden, unembedding, tokens, chunk_size=chunk_size)
            return jnp.sum(found[0])

        return np.asarray(jax.grad(loss)(unembedding))

    whole, parts = slope(2000), slope(1)
    assert np.abs(parts - whole).max() < 2**-7 * np.abs(whole).max()
