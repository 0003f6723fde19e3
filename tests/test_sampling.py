"""What is kept by top-k, top-p and min-p, against transformers and by hand; what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from jaxagentrl import engine, sampling, turns
from jaxagentrl.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=16,
)


def restrict(logits, *, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    return np.asarray(
        sampling.restrict(
            jax.nn.log_softmax(np.asarray(logits, np.float32)),
            np.full(rows, top_k, np.int32),
            np.full(rows, top_p, np.float32),
            np.full(rows, min_p, np.float32),
        )
    )


def test_by_hand():
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    off = -np.inf
    for settings, kept in (
        (dict(), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_p=0.5), [1, 0, 0, 0]),
        (dict(top_p=0.51), [0.625, 0.375, 0, 0]),
        (dict(top_p=1e-6), [1, 0, 0, 0]),
        (dict(min_p=0.29), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(min_p=0.999), [1, 0, 0, 0]),
        # Of the two most probable (0.625, 0.375), the first alone has mass 0.6.
        (dict(top_k=2, top_p=0.6), [1, 0, 0, 0]),
    ):
        expected = np.array([np.log(p) if p else off for p in kept])
        np.testing.assert_allclose(restrict(logits, **settings)[0], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings", [dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=20, top_p=0.9, min_p=0.02)]
)
def test_transformers_keeps_the_same(settings, seed):
    logits = np.random.default_rng(seed).normal(0, 2, (16, 200)).astype(np.float32)
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = torch.tensor(logits)
    for name, value in settings.items():
        scores = warpers[name](value)(None, scores)
    expected = torch.log_softmax(scores, -1).numpy()
    np.testing.assert_allclose(restrict(logits, **settings), expected, atol=1e-5)


def test_the_mode_always_stays_and_ties_stay_together():
    np.testing.assert_allclose(
        np.exp(restrict([[1.0, 1.0, 1.0, -50.0]], top_k=1)), [[1 / 3, 1 / 3, 1 / 3, 0]], atol=1e-6
    )
    one_token = restrict([[100.0, 0.0, 0.0]], top_p=0.5, min_p=0.5)
    np.testing.assert_array_equal(np.exp(one_token), [[1, 0, 0]])
    logprobs, entropies = sampling.describe(one_token, np.array([0]))
    assert float(logprobs[0]) == float(entropies[0]) == 0.0


def test_the_engine_reports_the_distribution_it_samples_from():
    params = decoder.init(CONFIG, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 8
    rows = 64
    eng = engine.Engine(
        CONFIG,
        num_slots=rows,
        num_waves=1,
        max_length=16,
        max_turn_tokens=1,
        stop_ids=[5],
        filled_buckets=(16,),
        width_buckets=(8,),
    )
    prompt = np.arange(1, 6, dtype=np.int32)
    logits = np.asarray(decoder.logits(CONFIG, params, prompt[None]))[0, -1]
    for settings in (dict(top_k=3), dict(top_p=0.5, temperature=0.7), dict(min_p=0.2)):
        for slot in range(rows):
            eng.release(0, slot)
            eng.submit(0, engine.TurnRequest(slot, prompt, 1, (slot,), **settings))
        eng.launch(params, 0)
        samples = eng.receive(0)
        options = dict(settings)
        scaled = logits / options.pop("temperature", 1.0)
        expected = restrict(scaled[None], **options)[0]
        for sample in samples.values():
            assert expected[sample.ids[0]] > -np.inf  # nothing outside the set is ever sampled
            np.testing.assert_allclose(sample.logprobs[0], expected[sample.ids[0]], atol=1e-5)
        entropy = -np.sum(np.exp(expected) * np.where(expected > -np.inf, expected, 0))
        np.testing.assert_allclose(samples[0].entropies[0], entropy, atol=1e-5)
        assert len({int(sample.ids[0]) for sample in samples.values()}) > 1


def draw(logits, n: int, *, is_greedy: bool = False) -> np.ndarray:
    """[n] tokens from logits [V], each by a stream of its own."""
    streams = np.stack([turns.stream_words((7, index)) for index in range(n)])
    assert len({tuple(words) for words in streams.tolist()}) == n
    keys, rows = jax.random.wrap_key_data(streams), np.tile(np.float32(logits), (n, 1))
    return np.asarray(jax.jit(sampling.sample)(rows, keys, np.full(n, is_greedy)))


@pytest.mark.parametrize("size, n", [(2, 20_000), (3, 20_000), (97, 20_000), (627, 20_000), (8192, 3_000)])
def test_samples_follow_the_distribution(size, n):
    """Of vocabularies that are and are not a multiple of their blocks; with tokens that are impossible."""
    random = np.random.default_rng(size)
    p = random.permutation(1 / np.arange(1, size + 1)) * (random.random(size) > 0.2)
    p[size // 2] = 0.5 * p.sum() + 1.0
    p /= p.sum()
    with np.errstate(divide="ignore"):
        tokens = draw(np.log(p), n)
    counts = np.bincount(tokens, minlength=size)
    assert len(counts) == size and np.all(counts[p == 0] == 0)
    # By themselves the probable ones; the others together, in two ways.
    for groups in (np.arange(size) % 16, np.arange(size) * 16 // size):
        kinds = np.where(n * p > 20, np.arange(size), size + groups)
        kept = np.unique(kinds[p > 0])
        got, expected = (np.array([x[kinds == kind].sum() for kind in kept]) for x in (counts, n * p))
        assert scipy.stats.chisquare(got, expected).pvalue > 1e-3


def test_a_greedy_row_takes_the_first_of_the_most_probable():
    """However much more probable others are together, wherever the vocabulary is cut into blocks."""
    logits = np.zeros(8192)
    logits[:1000] = 0.9
    logits[[5000, 5001, 7000]] = 1.0
    assert set(draw(logits, 50, is_greedy=True)) == {5000}


def test_the_largest_entry_is_the_first_of_equals():
    x = np.random.default_rng(0).integers(0, 9, (40, 61)).astype(np.float32)
    x[0], x[1, 1:], x[2, :-1] = -np.inf, -np.inf, -np.inf
    largest = jax.jit(sampling._argmax)(x)
    assert largest.dtype == jnp.int32
    np.testing.assert_array_equal(largest, np.argmax(x, axis=1))


def test_every_stop_id_ends_a_turn():
    params = decoder.init(CONFIG, jax.random.key(0))
    eng = engine.Engine(
        CONFIG,
        num_slots=32,
        num_waves=1,
        max_length=32,
        max_turn_tokens=20,
        stop_ids=[5, 6, 7],
        filled_buckets=(32,),
        width_buckets=(8,),
    )
    for slot in range(32):
        eng.submit(0, engine.TurnRequest(slot, np.array([1, 2]), 20, (slot,)))
    eng.launch(params, 0)
    lasts = set()
    for sample in eng.receive(0).values():
        assert not set(sample.ids[:-1].tolist()) & {5, 6, 7}
        if len(sample.ids) < 20:
            lasts.add(int(sample.ids[-1]))
    assert lasts == {5, 6, 7}
