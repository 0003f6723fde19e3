"""Diagnostics: hand-made numbers and plain numpy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from jaxagentrl import diagnostics
from core_cases import SEEDS, batch

few = settings(max_examples=25, deadline=None)
ALL = np.ones((1, 4), bool)


def test_explained_variance():
    returns = np.array([[1, 2, 3, np.nan]], np.float32)
    mask = np.array([[1, 1, 1, 0]], bool)
    perfect = diagnostics.explained_variance(returns, returns, mask)
    constant = diagnostics.explained_variance(np.full((1, 4), 7, np.float32), returns, mask)
    assert (float(perfect), float(constant)) == (1.0, pytest.approx(0.0, abs=1e-6))
    # Errors 0, 0, 1: variance 2/9 of 6/9.
    off = np.array([[1, 2, 2, np.inf]], np.float32)
    assert diagnostics.explained_variance(off, returns, mask) == pytest.approx(1 - 1 / 3)
    assert diagnostics.explained_variance(returns, np.ones((1, 4), np.float32), mask) == 0.0


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_returns_that_vary_by_rounding_do_not_vary(outcome):
    """Episodes that end alike: the returns are advantages and values, added up again."""
    values = np.random.default_rng(0).uniform(-2, 2, (4, 9)).astype(np.float32)
    noise = np.random.default_rng(1).uniform(-1e-7, 1e-7, (4, 9))
    returns = (outcome + noise).astype(np.float32)
    assert np.ptp(returns) > 0
    mask = np.ones((4, 9), bool)
    assert diagnostics.explained_variance(values, returns, mask) == 0
    ids = np.zeros((4, 9), np.int32)
    per_turn = diagnostics.explained_variance_per_turn(values, returns, mask, ids, num_turns=1)
    assert per_turn[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("of_returns", [False, True])
def test_a_critic_that_gives_no_numbers_explains_nothing(bad, of_returns):
    good, broken = np.array([[1, 2, 3, bad]], np.float32), np.array([[bad, 1, 2, 3]], np.float32)
    values, returns = (good, broken) if of_returns else (broken, good)
    mask, ids = np.array([[True, True, True, False]]), np.zeros((1, 4), np.int32)
    assert not np.isfinite(diagnostics.explained_variance(values, returns, mask))
    per_turn = diagnostics.explained_variance_per_turn(values, returns, mask, ids, num_turns=2)
    assert not np.isfinite(per_turn[0]) and per_turn[1] == 0


def test_explained_variance_per_turn():
    turns = np.array([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]], np.int32)
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    returns = np.array([[1, 2, 5, 6, np.nan], [3, 7, 8, 9, 9]], np.float32)
    values = np.array([[1, 2, 1, 1, np.nan], [2, 1, 1, 4, 5]], np.float32)
    got = diagnostics.explained_variance_per_turn(values, returns, mask, turns, num_turns=4)
    # Turn 0: errors 0, 0, 1 as above; turn 1: a constant; turn 2: nothing varies; turn 3: absent.
    np.testing.assert_allclose(got, [2 / 3, 0, 0, 0], atol=1e-6)
    # A turn's observation has its id, too, and no part in its variance.
    turns[0, 4] = 0
    again = diagnostics.explained_variance_per_turn(values, returns, mask, turns, num_turns=4)
    np.testing.assert_allclose(again, got, atol=1e-6)


def test_clip_fractions():
    # Of ten tokens one each is clipped low, clipped high, and cut by the dual clip; 1.2 and .9 are
    # within the clips, an advantage of 0 or of the other sign clips nothing, the last is off the mask.
    ratio = np.array([[0.5, 0.5, 1.5, 1.5, 5.0, 5.0, 1.2, 0.9, 0.5, 0.5, 9.0]], np.float32)
    adv = np.array([[1, -1, 1, -1, -1, 0, 1, -1, 0, 0.5, 1]], np.float32)
    mask = np.ones((1, 11), bool)
    mask[0, 10] = False
    rows = (np.log(ratio), np.zeros((1, 11), np.float32), adv, mask)
    got = diagnostics.clip_fractions(*rows, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert {k: float(v) for k, v in got.items()} == pytest.approx(
        {"low": 0.1, "high": 0.1, "dual": 0.1}
    )
    got = diagnostics.clip_fractions(*rows, clip_low=0.2, clip_high=0.28)
    assert float(got["dual"]) == 0.0
    # A ratio on the edge of its clip keeps its gradient: on-policy nothing is clipped, even at 0.
    still = (rows[1], rows[1], adv, mask)
    got = diagnostics.clip_fractions(*still, clip_low=0.0, clip_high=0.0, dual_clip=1.0)
    assert {k: float(v) for k, v in got.items()} == {"low": 0.0, "high": 0.0, "dual": 0.0}
    with pytest.raises(ValueError, match="surrogate: got 'ppo'"):
        diagnostics.is_clipped("ppo", *rows[:3:2], mask, clip_low=0.2, clip_high=0.28)


@given(SEEDS)
@few
def test_approximate_kl(seed):
    case = batch(seed, 3, 9, junk=np.nan)
    old, new, mask = (case[k] for k in ("old_logprobs", "logprobs", "action_mask"))
    got = diagnostics.approximate_kl(old, new, mask)
    u = (old.astype(np.float64) - new)[mask]
    expected = {"k1": u, "k2": u**2 / 2, "k3": np.exp(-u) - 1 + u}
    for name, x in expected.items():
        assert float(got[name]) == pytest.approx(x.mean() if x.size else 0.0, abs=1e-5)


def test_effective_sample_size():
    same = np.full((1, 4), 3.0, np.float32)
    assert diagnostics.effective_sample_size(same, ALL) == pytest.approx(1.0)
    one = np.array([[8, 0, 0, 0]], np.float32)
    assert diagnostics.effective_sample_size(one, ALL) == pytest.approx(0.25)
    # (1 + 3)² / (2 · 10).
    two = np.array([[1, 3, np.nan, np.inf]], np.float32)
    half = np.array([[1, 1, 0, 0]], bool)
    assert diagnostics.effective_sample_size(two, half) == pytest.approx(0.8)
    huge = np.array([[1e30, 1e30, 1e30, 1e30]], np.float32)
    assert diagnostics.effective_sample_size(huge, ALL) == pytest.approx(1.0)
    assert diagnostics.effective_sample_size(two, half & False) == 0.0


def test_sampler_mismatch():
    old = np.array([[-1.0, -2.0, np.nan, -1.0]], np.float32)
    sampler = np.array([[-1.5, -1.0, np.inf, -1.0]], np.float32)
    mask = np.array([[1, 1, 0, 1]], bool)
    got = {k: float(v) for k, v in diagnostics.sampler_mismatch(old, sampler, mask).items()}
    w = np.exp([0.5, -1.0, 0.0])
    assert got == pytest.approx(
        {
            "max_abs": 1.0,
            "k1": (-0.5 + 1.0) / 3,
            "k3": (w - 1 - np.log(w)).mean(),
            "max_ratio": np.exp(0.5),
            "ess": w.sum() ** 2 / (3 * (w**2).sum()),
        },
        abs=1e-5,
    )


def test_group_signal():
    scores = np.array([1, 0, 1, 1, 5, 3, np.nan], np.float32)
    ids = np.array([0, 0, 1, 1, 2, 4, -1], np.int32)  # group 3 is empty, group 4 out of range
    got = {k: float(v) for k, v in diagnostics.group_signal(scores, ids, num_groups=4).items()}
    # Stds √.5, 0 and 0 (a group of one) over three groups.
    assert got == pytest.approx(
        {"std_mean": np.sqrt(0.5) / 3, "zero_signal": 2 / 3, "num_groups": 3}
    )


def test_mean_entropy():
    entropies = np.array([[1, 3, np.nan]], np.float32)
    assert diagnostics.mean_entropy(entropies, np.array([[1, 1, 0]], bool)) == 2.0


def test_credit_by_turn():
    adv = np.array([[1, -3, np.nan, 2], [2, 0, 0, np.inf]], np.float32)
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0]], bool)
    turns = np.array([[0, 0, 0, 1], [0, 1, 1, 1]], np.int32)
    got = diagnostics.credit_by_turn(adv, mask, turns, num_turns=3)
    np.testing.assert_allclose(got["mean"], [0, 2 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(got["share"], [0.75, 0.25, 0])
    np.testing.assert_array_equal(got["tokens"], [3, 3, 0])
    nothing = diagnostics.credit_by_turn(np.zeros((2, 4), np.float32), mask, turns, num_turns=3)
    np.testing.assert_array_equal(nothing["share"], [0, 0, 0])


def test_the_largest_ratio_is_one_of_the_action_tokens():
    """Off the mask the ratio is 0, not 1: where all are below 1, so is the largest."""
    old, sampler = np.array([[-2.0, -3.0, -1.0]]), np.array([[-1.0, -1.0, -1.0]])
    got = diagnostics.sampler_mismatch(
        old.astype(np.float32), sampler.astype(np.float32), np.array([[True, True, False]])
    )
    assert float(got["max_ratio"]) == pytest.approx(np.exp(-1.0))


def test_ratios_beyond_float32_stay_finite():
    """The log ratio is cut at 20 in either direction, as in the losses."""
    for gap, expected in ((300.0, np.exp(20.0)), (-300.0, np.exp(-20.0))):
        old, sampler = np.full((1, 3), gap - 1.0), np.full((1, 3), -1.0)
        got = diagnostics.sampler_mismatch(
            old.astype(np.float32), sampler.astype(np.float32), np.ones((1, 3), bool)
        )
        assert float(got["max_ratio"]) == pytest.approx(expected, rel=1e-5)
        assert float(got["max_abs"]) == 300.0


def test_diagnostics_pass_no_gradient():
    """They may be computed inside a loss without changing what is learned."""
    old = np.array([[-1.0, -1.2, -0.7, -0.4]], np.float32)
    new = np.array([[-1.5, -1.1, -0.9, -0.3]], np.float32)
    signs = np.array([[1, -1, 1, -1]], np.float32)
    turns = np.array([[0, 0, 1, 1]], np.int32)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    for measure in [
        lambda x, y: diagnostics.sampler_mismatch(x, y, ALL),
        lambda x, y: diagnostics.approximate_kl(x, y, ALL),
        lambda x, y: diagnostics.clip_fractions(x, y, signs, ALL, **clips),
        lambda x, y: diagnostics.explained_variance(x, y, ALL),
        lambda x, y: diagnostics.explained_variance_per_turn(x, y, ALL, turns, num_turns=2),
    ]:
        def total(x, y):
            return sum(jax.numpy.sum(value) for value in jax.tree.leaves(measure(x, y)))

        for gradient in jax.grad(total, (0, 1))(new, old):
            np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_shares_are_of_all_credit_also_of_turns_that_are_not_counted():
    adv, turns = np.array([[1.0, 1.0, 2.0, 4.0]]), np.array([[0, 0, 1, 2]])
    got = diagnostics.credit_by_turn(adv, np.ones((1, 4), bool), turns, num_turns=2)
    np.testing.assert_allclose(got["share"], [0.25, 0.25])


def test_nothing_mismatches_in_an_empty_batch():
    nothing = np.zeros((0, 4), np.float32)
    got = diagnostics.sampler_mismatch(nothing, nothing, nothing > 0)
    assert {key: float(value) for key, value in got.items()} == dict.fromkeys(got, 0.0)
