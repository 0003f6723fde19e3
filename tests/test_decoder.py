"""The decoder: shapes, masks, cache, and the scoring pass built on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import logprobs
from jaxagentrl.models import decoder, layers, lora, rope

CONFIG = decoder.DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)

# One setting, or the settings that belong together, beyond the plain decoder.
VARIANTS = {
    "plain": {},
    "biases": {"attention_bias": True, "tie_embeddings": False},
    "query and key norms": {"qk_norm": True},
    "window": {"sliding_window": 4},
    "alternating windows": {"sliding_window": 4, "window_layers": (True, False)},
    "two rotations": {
        "sliding_window": 4,
        "window_layers": (False, True),
        "local_rope_theta": 100.0,
        "rope_scaling": rope.Scaling("linear", 8.0),
    },
    "soft caps": {"attention_softcap": 0.5, "logit_softcap": 0.3},
    "gemma": {
        "norm_plus_one": True,
        "post_norms": True,
        "scale_embeddings": True,
        "activation": "gelu_tanh",
        "query_scale_dim": 16.0,
    },
}


def variant(name: str):
    """Config and parameters, the norms not at their neutral start."""
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    params = decoder.init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    return config, jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


def test_parameters_are_plain_stacked_and_deterministic(params):
    again = decoder.init(CONFIG, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert params["layers"]["attention"]["q"]["kernel"].shape == (2, 32, 32)
    assert params["layers"]["attention"]["k"]["kernel"].shape == (2, 32, 16)
    first, second = params["layers"]["mlp"]["gate"]["kernel"]
    assert not np.array_equal(first, second)  # layers do not share their draw


def test_untied_and_biased_variants_have_their_leaves():
    config = dataclasses.replace(CONFIG, tie_embeddings=False, attention_bias=True)
    params = decoder.init(config, jax.random.key(0))
    assert params["lm_head"]["kernel"].shape == (32, 61)
    assert params["layers"]["attention"]["v"]["bias"].shape == (2, 16)
    assert "bias" not in params["layers"]["attention"]["o"]
    assert decoder.logits(config, params, tokens(1, 4)).shape == (1, 4, 61)


def test_the_future_and_padding_change_nothing(params):
    ids = tokens(2, 12)
    whole = decoder.logits(CONFIG, params, ids)
    changed = ids.copy()
    changed[:, 7:] = 0
    np.testing.assert_array_equal(whole[:, :7], decoder.logits(CONFIG, params, changed)[:, :7])


@pytest.mark.parametrize(
    "name, setting",
    [
        ("window", "sliding_window"),
        ("two rotations", "local_rope_theta"),
        ("two rotations", "rope_scaling"),
        ("soft caps", "attention_softcap"),
        ("gemma", "norm_plus_one"),
        ("gemma", "scale_embeddings"),
        ("gemma", "activation"),
        ("gemma", "query_scale_dim"),
    ],
)
def test_settings_change_the_logits(name, setting):
    """Those that have no parameters of their own, which would be missed."""
    config, params = variant(name)
    without = dataclasses.replace(config, **{setting: getattr(CONFIG, setting)})
    gap = decoder.logits(config, params, tokens(2, 12)) - decoder.logits(
        without, params, tokens(2, 12)
    )
    assert np.abs(gap).max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "two rotations"])
def test_packed_segments_equal_separate_rows(name):
    config, params = variant(name)
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    packed = np.concatenate([first, second], axis=1)
    segments = np.array([[0] * 5 + [1] * 7], np.int32)
    positions = np.array([[*range(5), *range(7)]], np.int32)
    joint = decoder.logits(config, params, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(joint[:, :5], decoder.logits(config, params, first), atol=1e-5)
    np.testing.assert_allclose(joint[:, 5:], decoder.logits(config, params, second), atol=1e-5)


def test_a_window_hides_what_lies_behind_it():
    config, params = variant("window")
    ids = tokens(1, 12)
    changed = ids.copy()
    changed[:, 0] = (ids[:, 0] + 1) % CONFIG.vocab_size
    gap = np.abs(decoder.hidden(config, params, ids) - decoder.hidden(config, params, changed))
    gap = gap.max(axis=(0, 2))
    # Two layers with a window of 4 carry a token 6 places, and not farther.
    assert np.all(gap[:7] > 0) and np.all(gap[7:] == 0)


@pytest.mark.parametrize("policy", ["dots", "full"])
def test_rematerialization_changes_neither_value_nor_gradient(params, policy):
    ids = tokens(2, 9)

    def loss(params, remat):
        return jnp.sum(decoder.hidden(CONFIG, params, ids, remat=remat) ** 2)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, remat = (both(params, flag) for flag in ("none", policy))
    np.testing.assert_allclose(plain[0], remat[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain[1], remat[1])


@pytest.mark.parametrize("name", ["two rotations", "one layer", "adapters"])
def test_a_pass_finished_apart_is_the_whole_pass(name):
    remat = "full" if name == "adapters" else "none"
    config, params = variant("gemma" if name == "adapters" else name if name in VARIANTS else "plain")
    if name == "one layer":
        config = dataclasses.replace(config, num_layers=1)
        params |= {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    if name == "adapters":
        adapters = lora.init(params, jax.random.key(1), rank=2, targets=("mlp/.*", "attention/q"))
        params = lora.attach(params, jax.tree.map(lambda leaf: leaf + 0.1, adapters), 2.0)
    ids, weights = tokens(2, 9), np.random.default_rng(3).standard_normal((18, 32))

    def whole(params):
        return decoder.hidden(config, params, ids, remat=remat).reshape(18, 32)

    def apart(params):
        x = decoder.hidden(config, params, ids, remat=remat, is_finished=False)
        return decoder.finish(config, decoder.finish_params(params), x.reshape(18, 32))

    def slopes(run):
        def loss(params):
            x = run(params)
            return jnp.sum(weights * x), x

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(assert_near, slopes(apart), slopes(whole))


@pytest.mark.parametrize("name", ["plain", "two rotations"])
def test_appending_in_any_pieces_equals_one_pass(name):
    config, params = variant(name)
    ids = tokens(3, 20)
    whole = decoder.hidden(config, params, ids)
    caches = decoder.init_caches(config, 5, 24, "float32", most=12)
    slots = jnp.array([4, 0, 2])
    start = 0
    for width in (7, 1, 12):
        part, caches = decoder.hidden_cached(
            config,
            params,
            ids[:, start : start + width],
            caches,
            slots,
            jnp.full(3, start),
            jnp.full(3, width),
            filled=24 if start else 8,
        )
        np.testing.assert_allclose(part, whole[:, start : start + width], atol=1e-5)
        start += width
    for cache in caches:
        np.testing.assert_array_equal(np.asarray(cache.keys)[:, [1, 3]], 0.0)


def test_padding_of_an_append_writes_nowhere(params):
    caches = decoder.init_caches(CONFIG, 2, 16, "float32", most=6)
    counts, slots = jnp.array([2, 3]), jnp.array([0, 2])  # slot 2 does not exist: a padding row
    _, (cache,) = decoder.hidden_cached(
        CONFIG, params, tokens(2, 6), caches, slots, jnp.zeros(2, jnp.int32), counts, filled=16
    )
    keys = np.asarray(cache.keys)
    assert np.all(np.any(keys[:, 0, :2] != 0, axis=(-2, -1)))
    np.testing.assert_array_equal(keys[:, 0, 2:], 0.0)
    np.testing.assert_array_equal(keys[:, 1], 0.0)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_holds_something(params, chunk_size):
    ids = tokens(3, 11)
    with pytest.raises(ValueError, match=f"chunk_size: got {chunk_size}, expected at least 1"):
        logprobs.token_logprobs(
            decoder.hidden(CONFIG, params, ids), decoder.unembedding(params), ids, chunk_size=chunk_size
        )


@pytest.mark.parametrize("chunk_size", [4096, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_against_float64_softmax(params, chunk_size, temperature):
    ids = tokens(3, 11)
    x = decoder.hidden(CONFIG, params, ids)
    scores, entropies = logprobs.token_logprobs(
        x, decoder.unembedding(params), ids, temperature=temperature, chunk_size=chunk_size
    )
    logits = np.asarray(decoder.logits(CONFIG, params, ids), np.float64) / temperature
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for row in range(3):
        assert scores[row, 0] == 0.0
        for t in range(1, 11):
            distribution = expected[row, t - 1]
            np.testing.assert_allclose(scores[row, t], distribution[ids[row, t]], atol=1e-5)
            entropy = -np.sum(np.exp(distribution) * distribution)
            np.testing.assert_allclose(entropies[row, t], entropy, atol=1e-5)


def test_layers_in_a_loop_and_unrolled_are_the_same(params, monkeypatch):
    ids = tokens(2, 9)

    def gradient():
        def loss(params):
            return jnp.sum(jnp.sin(decoder.logits(CONFIG, params, ids)))

        return jax.jit(jax.grad(loss))(params)

    unrolled = gradient()
    monkeypatch.setattr(decoder, "_UNROLLED_LAYERS", 0)
    looped = gradient()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), unrolled, looped
    )


def test_a_products_gradient_is_that_of_jax():
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 3), (3, 4), (2, 5, 4))
    )

    def slopes(multiply):
        return jax.grad(lambda x, k: jnp.sum(weights * multiply(x, k)), (0, 1))(x, kernel)

    for one, two in zip(slopes(layers.product), slopes(jnp.matmul), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_chunked_logprobs_have_the_same_gradient(params):
    ids = tokens(2, 9)

    def loss(params, chunk_size):
        x = decoder.hidden(CONFIG, params, ids)
        scores, entropies = logprobs.token_logprobs(
            x, decoder.unembedding(params), ids, chunk_size=chunk_size
        )
        return jnp.sum(scores) + 0.3 * jnp.sum(entropies)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, chunked = (gradient(params, size) for size in (4096, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, chunked)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 2.0}, "model.num_layers must be a whole number, got 2.0"),
        ({"num_heads": True}, "model.num_heads must be a whole number, got True"),
        ({"vocab_size": None}, "model.vocab_size must be a whole number, got None"),
        ({"sliding_window": 4.5}, "model.sliding_window must be a whole number, got 4.5"),
        ({"norm_eps": "1e-6"}, "model.norm_eps must be a number, got '1e-6'"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 4, "window_layers": (True,)}, "window_layers.*each of the 2 layers"),
        ({"sliding_window": 4, "window_layers": (True, True)}, "some True and some False"),
        ({"window_layers": (True, False)}, "sliding_window"),
        ({"sliding_window": 4, "local_rope_theta": 1e4}, "local_rope_theta"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
