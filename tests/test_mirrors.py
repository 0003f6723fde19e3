"""Decode steps on CPU, which read mirrors of the cache, against steps that read the cache itself."""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from test_decoder import CONFIG, tokens, variant

from jaxagentrl import compiles, sampling
from jaxagentrl.models import decoder, decoding_layout, kv_cache

SLOTS, TURN = 5, 12


def controls() -> sampling.Controls:
    return sampling.Controls(
        budgets=jnp.array([12, 3, 0, 12, 7], jnp.int32),  # one row is idle
        temperatures=jnp.array([1.0, 0.0, 1.0, 0.5, 1.0]),
        top_k=jnp.zeros(SLOTS, jnp.int32),
        top_p=jnp.ones(SLOTS),
        min_p=jnp.zeros(SLOTS),
        stop_ids=jnp.tile(jnp.arange(0, 61, 15), (SLOTS, 1)),
        streams=jnp.arange(2 * SLOTS, dtype=jnp.uint32).reshape(SLOTS, 2),
    )


def sampled(config, params, lengths, *, capacity: int, filled: int, order=None):
    """One decode call after `lengths` tokens of each slot: the cache, and what it sampled.

    `order` is the slot of each row, None all slots in order without saying so: on CPU what reads
    the cache itself.
    """
    widest = max(lengths)
    held = sampling.init(config, SLOTS, capacity, "float32", most=widest)
    ids = tokens(SLOTS, widest + 1)
    lengths = jnp.array(lengths, jnp.int32)
    extend = sampling.make_extend(config)
    nothing = jnp.zeros(SLOTS, jnp.int32)
    held, _ = extend(
        params, held, ids[:, :widest], jnp.arange(SLOTS), nothing, lengths, filled=capacity
    )
    decode = sampling.make_decode(config, max_turn_tokens=TURN)
    rows = jnp.arange(SLOTS) if order is None else jnp.array(order)
    pending, lengths, settings = jax.tree.map(
        lambda x: jnp.take(x, rows, axis=0, mode="clip"), (ids[:, -1], lengths, controls())
    )
    settings = settings._replace(budgets=jnp.where(rows < SLOTS, settings.budgets, 0))
    slots = None if order is None else rows
    given = (slots, pending, lengths, jnp.zeros(len(rows), bool), settings, jnp.int32(0))
    held, made = decode(params, held, *given, filled=filled, restricted=False)
    return held.caches, made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, lengths, capacity, filled",
    [
        # Across the blocks' edge, filled not in whole blocks.
        ("plain", (60, 63, 64, 52, 1), 150, 100),
        # The last block is longer than the cache.
        ("query and key norms", (60, 63, 64, 68, 1), 80, 80),
        ("two rotations", (130, 3, 9, 140, 120), 160, 160),
        ("soft caps", (30, 3, 9, 40, 20), 64, 64),
    ],
)
def test_mirrors_change_neither_samples_nor_the_cache(name, lengths, capacity, filled):
    config, params = variant(name)
    run = functools.partial(sampled, config, params, lengths, capacity=capacity, filled=filled)
    plain_caches, plain = run()
    order = [3, 0, 4, 1]  # without slot 2, which is idle
    caches, ours = run(order=order)
    assert int(ours.steps) == int(plain.steps) > 3
    for row, slot in enumerate(order):
        count = int(plain.counts[slot])
        assert ours.counts[row] == count
        np.testing.assert_array_equal(ours.tokens[row, :count], plain.tokens[slot, :count])
        np.testing.assert_allclose(
            ours.logprobs[row, :count], plain.logprobs[slot, :count], atol=2e-5
        )
    assert all(cache.mirrors is None for cache in caches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), caches, plain_caches)


def test_rows_that_are_padding_change_nothing():
    config, params = variant("plain")
    run = functools.partial(
        sampled, config, params, (60, 63, 64, 52, 1), capacity=150, filled=100
    )
    wanted_cache, wanted = run(order=[3, 1])
    cache, ours = run(order=[3, 1, SLOTS, SLOTS])
    for name in ("tokens", "counts", "logprobs"):
        np.testing.assert_allclose(getattr(ours, name)[:2], getattr(wanted, name), atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache, wanted_cache)


def in_a_row(blocks):
    """Keys [R, K, E, C · 64] of a mirror's blocks [R, C, K, E, 64]."""
    moved = jnp.moveaxis(blocks, 1, -2)
    return moved.reshape(*moved.shape[:-2], -1)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_steps_read_of_a_mirror_what_a_later_call_reads_of_the_cache(dtype, window):
    """Keys and values that are rounded for the cache are so at once."""
    rng, slots = np.random.default_rng(0), jnp.array([2, 0])
    before = jnp.array([330, 63])  # of a ring of 192 positions the first row's begin again

    def new(rows, width):
        return jnp.asarray(rng.standard_normal((2, rows, width, 2, 8)), jnp.float32)

    cache = kv_cache.init(1, 3, 400, 2, 8, dtype, window=window, most=66)
    assert cache.size == (400 if window is None else 192)
    for start in range(0, 330, 66):
        positions = start + jnp.tile(jnp.arange(66), (2, 1))
        positions = jnp.where(positions < before[:, None], positions, kv_cache.NOWHERE)
        cache = kv_cache.write(cache, 0, slots, positions, *new(2, 66))
    mirrored = kv_cache.mirrored(cache, slots, before, 340, jnp.float32, most=4)
    for step in range(3):
        mirrored = kv_cache.write(mirrored, 0, slots, before[:, None] + step, *new(2, 1))
    after = kv_cache.settled(mirrored, slots, before, before + 3, most=4)
    later = kv_cache.near(after, before + 3, width=1, filled=340)
    keys, values = kv_cache.read(after, 0, slots, later, jnp.float32)
    keys = keys if later.starts is None else in_a_row(keys)
    (mirror,) = mirrored.mirrors
    for row, end in enumerate(before + 3):
        first = 0 if window is None else end - window + 1
        begins = [0 if starts is None else int(starts[row]) for starts in (mirror.starts, later.starts)]
        here, there = (slice(first - begin, end - begin) for begin in begins)
        seen = (in_a_row(mirror.keys)[row, ..., here], mirror.values[row, :, here])
        kept = (keys[row, ..., there], values[row, :, there])
        for one, other in zip(seen, kept, strict=True):  # int8: a scale of rounded numbers is another by a bit
            assert one.size == 2 * 8 * (end - first)
            np.testing.assert_allclose(one, other, rtol=1e-6 if dtype == "int8" else 0, atol=0)


def test_the_example_of_a_ring_is_true():
    assert doctest.testmod(kv_cache) == (0, 2)


def test_tokens_that_a_ring_is_too_short_for_are_refused():
    cache = kv_cache.init(1, 3, 4000, 2, 8, "float32", window=100, most=64)
    assert kv_cache.near(cache, jnp.zeros(3, jnp.int32), width=64, filled=4000).size <= cache.size == 256
    with pytest.raises(ValueError, match="256 positions.*100 are not long enough for 200"):
        kv_cache.near(cache, jnp.zeros(3, jnp.int32), width=200, filled=4000)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_no_program_makes_floats_of_a_whole_cache_that_is_held_in_less(dtype):
    config, params = variant("plain")
    held = sampling.init(config, SLOTS, 150, dtype, most=16)
    rows, zeros = jnp.arange(SLOTS), jnp.zeros(SLOTS, jnp.int32)
    extend = sampling.make_extend(config).lower(
        params, held, jnp.zeros((SLOTS, 8), jnp.int32), rows, zeros, zeros, filled=100
    )
    decode = sampling.make_decode(config, max_turn_tokens=TURN).lower(
        params, held, rows, zeros, zeros, zeros > 0, controls(), jnp.int32(0), filled=100, restricted=False
    )
    fork = sampling.make_fork().lower(held, rows, rows, filled=100)
    keys, values = (",".join(map(str, x.shape)) for x in (held.caches[0].keys, held.caches[0].values))
    for lowered in (extend, decode, fork):
        text = lowered.compile().as_text()
        assert f"{ {'bfloat16': 'u16', 'int8': 's8'}[dtype] }[{keys}]" in text
        assert f"f32[{keys}]" not in text and f"f32[{values}]" not in text


def test_no_step_cuts_the_cache_or_the_weights():
    """What XLA would write a copy of in every step is cut before the loop of steps."""

    def largest_cut(slots):
        config, params = variant("plain")
        held = sampling.init(config, SLOTS, 150, "float32", most=16)
        decode = sampling.make_decode(config, max_turn_tokens=TURN)
        zeros, is_ready = jnp.zeros(SLOTS, jnp.int32), jnp.zeros(SLOTS, bool)
        traced = jax.make_jaxpr(functools.partial(decode, filled=100, restricted=False))(
            params, held, slots, zeros, zeros, is_ready, controls(), jnp.int32(0)
        )
        loop = next(eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name == "while")
        cuts = ("slice", "dynamic_slice", "gather")
        body = loop.params["body_jaxpr"].jaxpr
        return max(
            eqn.outvars[0].aval.size for eqn in equations(body) if eqn.primitive.name in cuts
        )

    cached = SLOTS * 100 * 2 * 8  # the filled keys of one layer
    assert largest_cut(jnp.arange(SLOTS)) < cached // 4 < cached <= largest_cut(None)


def equations(jaxpr):
    """All equations, of inner programs too; a loop before what is in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_programs(eqn):
            yield from equations(inner)


def inner_programs(eqn):
    def is_program(x):
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def test_an_extend_makes_keys_and_values_alone_of_all_tokens_in_its_last_layer():
    config, params = variant("plain")
    rows, width = 4, 32
    held = sampling.init(config, rows, 64, "float32", most=16)
    slots, zeros, counts = jnp.arange(rows), jnp.zeros(rows, jnp.int32), jnp.full(rows, width)

    def products(program) -> tuple[int, int]:
        """With weights, of what its results need: of all tokens, and of one a row."""
        given = (params, held, tokens(rows, width), slots, zeros, counts)
        traced = jax.make_jaxpr(functools.partial(program, filled=64))(*given).jaxpr
        needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
        return count(needed, width), count(needed, 1)

    def count(jaxpr, length: int) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                x, weights = (operand.aval for operand in eqn.invars)
                total += weights.ndim == 2 and x.shape[1] == length
            inner = sum(count(program, length) for program in inner_programs(eqn))
            total += eqn.params.get("length", 1) * inner
        return total

    hidden = functools.partial(decoder.hidden_cached, config)
    assert products(sampling.make_extend(config).__wrapped__) == (7 + 2, 5)
    assert products(lambda *given, filled: hidden(*reorder(given), filled=filled)) == (7 + 7, 0)


def test_products_of_an_extend_are_not_left_to_ynnpack():
    """Which computes those of attention on one core; but it alone has those of bfloat16 numbers."""
    option, value = next(iter(sampling._EXTEND_OPTIONS["cpu"].items()))
    if not compiles.knows(option, value):
        pytest.skip("this jaxlib has no such option.")
    config, params = variant("plain")
    rows, width = 4, 32
    held = sampling.init(config, rows, 64, "float32", most=16)
    given = (params, held, tokens(rows, width), jnp.arange(rows), *2 * [jnp.zeros(rows, jnp.int32)])

    def fused(program) -> int:
        """Products within fusions of YNNPACK."""
        text = program.lower(*given, filled=64).compile().as_text()
        bodies = dict(re.findall(r"^%?(\S+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
        theirs = re.findall(r"calls=%?(\S+?), .*__ynn_fusion", text)
        return sum(bodies[name].count(" dot(") for name in theirs)

    extend = sampling.make_extend(config)
    assert fused(extend) == 0
    assert fused(sampling.make_extend(config, "bfloat16")) > 0
    assert fused(jax.jit(extend.__wrapped__, static_argnames="filled")) > 0


def reorder(given):
    """Arguments of an extend as `hidden_cached` takes them."""
    params, held, ids, *others = given
    return params, ids, held.caches, *others


def test_weights_apart_stay_apart():
    params = decoding_layout.unstacked(decoder.init(CONFIG, jax.random.key(0)))
    assert decoding_layout.unstacked(params) is params
