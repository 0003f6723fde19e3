"""Weights laid out for decode steps of few rows on CPU, against those that training has."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoder import CONFIG, variant
from test_mirrors import SLOTS, TURN, controls, sampled

from jaxagentrl import plan_sampling, sampling
from jaxagentrl.models import decoder, decoding_layout, lora


@pytest.fixture
def transposed(monkeypatch):
    """The layout for models whose weights no cache holds, for the tiny ones of these tests."""
    monkeypatch.setattr(decoding_layout, "_UNCACHED", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "biases", "query and key norms", "gemma", "adapters"])
def test_transposed_weights_change_neither_samples_nor_the_cache(name, transposed):
    config, params = variant("plain" if name == "adapters" else name)
    if name == "adapters":
        adapters = lora.init(params, jax.random.key(2), rank=2, targets=("attention/q", "mlp/down"))
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        params = lora.attach(params, adapters, 0.5)
    laid_out = decoding_layout.for_decoding(params, "float32")
    plain_cache, plain = sampled(
        config, params, (60, 63, 64, 52, 1), capacity=150, filled=100, order=[3, 0, 4, 1]
    )
    cache, ours = sampled(
        config, laid_out, (60, 63, 64, 52, 1), capacity=150, filled=100, order=[3, 0, 4, 1]
    )
    assert int(ours.steps) > 3
    np.testing.assert_array_equal(ours.counts, plain.counts)
    for row, count in enumerate(plain.counts):
        np.testing.assert_array_equal(ours.tokens[row, :count], plain.tokens[row, :count])
        np.testing.assert_allclose(
            ours.logprobs[row, :count], plain.logprobs[row, :count], atol=2e-5
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache, plain_cache)


@pytest.mark.parametrize("name", ["plain", "biases"])  # tied, and with an unembedding of its own
def test_few_rows_are_the_right_side_of_every_product_with_weights(name, transposed, monkeypatch):
    """In the compiled program: XLA's simplifier likes to turn the sides round."""
    monkeypatch.setattr(decoding_layout, "_FEW_ROWS", 3)
    config, params = variant(name)
    laid_out = decoding_layout.for_decoding(params, "float32")

    def left_sides(rows: int) -> list[list[int]]:
        held = sampling.init(config, SLOTS, 150, "float32", most=16)
        settings = jax.tree.map(lambda x: x[:rows], controls())
        slots, zeros = jnp.arange(rows), jnp.zeros(rows, jnp.int32)
        decode = sampling.make_decode(config, max_turn_tokens=TURN)
        given = (laid_out, held, slots, zeros, zeros, zeros > 0, settings, jnp.int32(0))
        text = decode.lower(*given, filled=100, restricted=False).compile().as_text()
        shapes = dict(re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text))
        lefts = re.findall(r" dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.-]+)", text)
        sides = [[int(size) for size in shapes[left].split(",")] for left in lefts]
        return [side for side in sides if len(side) == 2]

    products = 7 * config.num_layers + 2  # the logits of first tokens, and of others
    few, many = left_sides(3), left_sides(4)
    assert len(few) == len(many) == products
    assert all(3 not in side for side in few)
    assert all(4 in side for side in many)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_of_a_frozen_base_in_sixteen_bits_only_what_changes_is_copied(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config, params = variant("biases")  # with an unembedding of its own
    base = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    adapters = lora.init(base, jax.random.key(2), rank=2, targets=("attention/q", "mlp/down"))
    given = lora.attach(base, adapters, 0.5)
    laid_out = decoding_layout.for_decoding(given, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(laid_out)} == {jnp.dtype("bfloat16")}
    for name in ("embed", "lm_head", "final_norm"):
        assert jax.tree.leaves(laid_out[name])[0] is jax.tree.leaves(base[name])[0]
    copied = sum(x.nbytes for x in jax.tree.leaves(laid_out["layers"]))
    if backend == "cpu":
        kernel = base["layers"]["mlp"]["down"]["kernel"]
        assert laid_out["layers"]["mlp"]["down"]["kernel"] is kernel
        copied = sum(x.nbytes for x in jax.tree.leaves(adapters)) // 2
    shapes = (jax.eval_shape(lambda x=x: x) for x in (given, laid_out))
    assert plan_sampling._copy_bytes(*shapes, None) == copied


def test_only_weights_that_no_cache_holds_are_kept_transposed(monkeypatch):
    params = decoder.init(CONFIG, jax.random.key(0))
    assert decoding_layout.for_decoding(params, "float32") is params
    size = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    monkeypatch.setattr(decoding_layout, "_UNCACHED", size)
    laid_out = decoding_layout.for_decoding(params, "float32")
    assert laid_out["layers"] is params["layers"]  # nothing else is copied
    assert "few_rows" not in decoding_layout.for_decoding(params, "bfloat16")
    few, many = (decoding_layout.for_rows(laid_out, rows) for rows in (64, 65))
    gate = params["layers"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(few["layers"][1]["mlp"]["gate"]["transposed"], gate[1].T)
    np.testing.assert_array_equal(many["layers"][1]["mlp"]["gate"]["kernel"], gate[1])
    assert few["lm_head"]["transposed"] is params["embed"]["embedding"]
    # The plan counts what is there twice and nothing else.
    given, taken = (jax.eval_shape(lambda x=x: x) for x in (params, laid_out))
    assert plan_sampling._copy_bytes(given, taken, None) == size
