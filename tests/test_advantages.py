"""Advantage estimators: goldens by hand, float64 oracles, limits, leaks and gradients."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxagentrl import advantages, turn_credit
import oracles
from core_cases import SEEDS, batch

# The shared fixture: three turns of 2, 2 and 1 tokens, junk value 9 on observations.
MASK = np.array([1, 1, 0, 0, 1, 1, 0, 1], bool)
REWARDS = np.array([0, 0.2, 0, 0, 0, 0.3, 0, 1], np.float32)
VALUES = np.array([0.1, 0.2, 9, 9, 0.3, 0.4, 9, 0.5], np.float32)
ENDS = np.array([0, 1, 0, 0, 0, 1, 0, 1], bool)
ONES = np.ones(8, np.float32)
GROUP = np.zeros(4, np.int32)
WIN = np.array([1, 0, 0, 0], np.float32)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

few = settings(max_examples=25, deadline=None)
junk = st.sampled_from([0.0, np.nan, np.inf, -np.inf])
shapes = st.sampled_from([(3, 9), (2, 1)])


STATIC = (
    "num_groups num_anchors num_turns num_trajectories num_steps scale horizon baseline "
    "episode_mean_over first_visit ddof shift_mean"
).split()


def compiled(name):
    """The estimator under jit, with numbers traced, so that random cases do not recompile."""
    function = getattr(advantages, name)
    known = inspect.signature(function).parameters
    return jax.jit(function, static_argnames=[option for option in STATIC if option in known])


# The same names as in `advantages`.
fast = types.SimpleNamespace(**{name: compiled(name) for name in advantages.__all__})


def check(got, expected, mask=None):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, **CLOSE)
    if mask is not None:
        assert np.all(np.asarray(got)[~np.asarray(mask)] == 0.0)


# --- goldens -----------------------------------------------------------------------------------


def test_gae_golden():
    # λ = γ = 1: return to go − value: 1.5 − .1, 1.5 − .2, 1.3 − .3, 1.3 − .4, 1 − .5.
    got = fast.gae(REWARDS, VALUES, ONES, MASK, gae_lambda=1.0)
    np.testing.assert_allclose(got, [1.4, 1.3, 0, 0, 1.0, 0.9, 0, 0.5], atol=1e-6)


def test_gae_is_zero_off_the_mask_whatever_the_bootstrap():
    # Row 1 is padding: nothing of it counts, nor the value that somebody gave for its end.
    mask = np.array([[True, False], [False, False]])
    zeros, ones = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    end = np.array([2.0, np.nan], np.float32)
    got = fast.gae(ones, zeros, ones, mask, gae_lambda=1.0, bootstrap_values=end)
    np.testing.assert_array_equal(got, [[3, 0], [0, 0]])


def test_gae_golden_discounted():
    # From the right: .5; .3 + .9·.5 − .4 + .855·.5 = .7775; .9·.4 − .3 + .855·.7775 = .7248; …
    got = fast.gae(REWARDS, VALUES, 0.9 * ONES, MASK, gae_lambda=0.95)
    np.testing.assert_allclose(got, [0.8407, 0.8897, 0, 0, 0.7248, 0.7775, 0, 0.5], atol=5e-5)


def test_bilevel_gae_golden():
    # Ends: .5; .3 + .95·.5 − .4 + .95·.5 = .85; .2 + .95·.4 − .2 + .95·.85 = 1.1875.
    # Inside: .4 − .3 + .85 = .95; .2 − .1 + 1.1875 = 1.2875.
    got = fast.bilevel_gae(
        REWARDS, VALUES, MASK, ENDS, token_discount=1.0, turn_discount=0.95, gae_lambda=1.0
    )
    np.testing.assert_allclose(got, [1.2875, 1.1875, 0, 0, 0.95, 0.85, 0, 0.5], atol=1e-6)


def test_turn_gae_golden():
    # Turn values .1, .3, .5 (first tokens), rewards .2, .3, 1, γ = .9, λ = .5. From the right:
    # 1 − .5 = .5; .3 + .45 − .3 + .45·.5 = .675; .2 + .27 − .1 + .45·.675 = .67375.
    got = fast.turn_gae(REWARDS, VALUES, 0.9 * ONES, MASK, ENDS, gae_lambda=0.5)
    np.testing.assert_allclose(got, [0.67375, 0.67375, 0, 0, 0.675, 0.675, 0, 0.5], atol=1e-6)


def test_turn_gae_bootstrap_and_termination():
    # The last discount decides whether the 10 believed to follow is worth anything.
    truncated = fast.turn_gae(
        REWARDS, VALUES, ONES, MASK, ENDS, gae_lambda=0.0, bootstrap_values=10.0
    )
    assert truncated[7] == pytest.approx(1 + 10 - 0.5)
    discounts = ONES.copy()
    discounts[7] = 0.0
    terminated = fast.turn_gae(
        REWARDS, VALUES, discounts, MASK, ENDS, gae_lambda=0.0, bootstrap_values=10.0
    )
    assert terminated[7] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"scale": "std"}, [1.5, -0.5, -0.5, -0.5]),  # mean 1/4, sample std 1/2
        ({"scale": "std", "ddof": 0}, [1.73205, -0.57735, -0.57735, -0.57735]),  # std √3/4
        ({"scale": "none"}, [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_group_normalized_golden(options, expected):
    got = fast.group_normalized(WIN, GROUP, num_groups=1, **options)
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_group_epsilon_is_added_to_the_std():
    # std of [1, 0] is 1/√2; .5 / (.707107 + .1) = .619497.
    got = fast.group_normalized(
        np.array([1, 0], np.float32), np.zeros(2, np.int32), num_groups=1, epsilon=0.1
    )
    np.testing.assert_allclose(got, [0.619497, -0.619497], atol=1e-6)


def test_leave_one_out_golden():
    got = fast.leave_one_out(WIN, GROUP, num_groups=1)
    np.testing.assert_allclose(got, [1, -1 / 3, -1 / 3, -1 / 3], atol=1e-6)


def test_reinforce_plus_plus_credits_every_turn_of_a_win():
    # A won and a lost game of three one-token turns: the flaw of resetting the return on
    # observations credits only the last turn of the win and punishes its first two.
    mask = np.array([[1, 0, 1, 0, 1]] * 2, bool)
    rewards = np.array([[0, 0, 0, 0, 1], [0] * 5], np.float32)
    got = fast.reinforce_plus_plus(rewards, np.ones((2, 5), np.float32), mask)
    # Six returns 1,1,1,0,0,0: mean 1/2, sample variance 6·(1/4)/5 = .3.
    np.testing.assert_allclose(got[0], np.array([1, 0, 1, 0, 1]) * 0.5 / np.sqrt(0.3), rtol=1e-5)
    np.testing.assert_allclose(got[1], -got[0])


def test_whiten_golden():
    # Mean 2, sample variance ((−1)² + 1²)/1 = 2, and with ε = 2 the root is 2.
    x = np.array([1, 3, np.nan], np.float32)
    mask = np.array([1, 1, 0], bool)
    got = fast.whiten(x, mask, epsilon=2.0)
    np.testing.assert_allclose(got, [-0.5, 0.5, 0], atol=1e-6)
    kept = fast.whiten(x, mask, shift_mean=False, epsilon=2.0)
    np.testing.assert_allclose(kept, [0.5, 1.5, 0], atol=1e-6)


@pytest.mark.parametrize("offset, size", [(1e2, 1e-2), (1e4, 1), (1e6, 1), (-1e6, 1)])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_does_not_lose_digits_to_a_common_offset(offset, size, shift_mean):
    x = (offset + size * np.random.default_rng(0).standard_normal((4, 50))).astype(np.float32)
    mask = np.random.default_rng(1).random((4, 50)) < 0.7
    expected = oracles.whiten(x, mask, shift_mean=shift_mean)
    check(fast.whiten(np.where(mask, x, np.nan), mask, shift_mean=shift_mean), expected, mask)
    if shift_mean:
        over_devices = jax.vmap(
            functools.partial(advantages.whiten, axis_name="devices"), axis_name="devices"
        )
        check(over_devices(x, mask), expected, mask)


def test_bilevel_gae_skips_what_lies_inside_a_turn():
    """Tool output in the middle of a turn is no token of it."""
    options = {"token_discount": 0.9, "turn_discount": 0.8, "gae_lambda": 0.7}
    plain = fast.bilevel_gae(
        np.array([0.5, 1.0, 2.0], np.float32),
        np.array([1.0, 2.0, 3.0], np.float32),
        np.array([True, True, True]),
        np.array([False, True, True]),
        **options,
    )
    parted = fast.bilevel_gae(
        np.array([0.5, 9.0, 1.0, 2.0], np.float32),
        np.array([1.0, 9.0, 2.0, 3.0], np.float32),
        np.array([True, False, True, True]),
        np.array([False, False, True, True]),
        **options,
    )
    np.testing.assert_allclose(np.asarray(parted)[[0, 2, 3]], plain, atol=1e-6)


GIGPO_REWARDS = np.array([[0, 0, 10], [0, 0, 0]], np.float32)
GIGPO_MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
GIGPO_TURNS = np.array([[0, 1, 2], [0, 1, -1]], np.int32)


@pytest.mark.parametrize(
    "over, episode", [("trajectories", [5, -5]), ("steps", [4, -6])], ids=["paper", "verl-agent"]
)
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
def test_gigpo_golden(over, episode, weight):
    # Step returns 9.025, 9.5, 10 and 0, 0; anchors s0 and s1 met by both, s2 by one.
    got = fast.gigpo(
        GIGPO_REWARDS,
        GIGPO_MASK,
        GIGPO_TURNS,
        GIGPO_TURNS,
        np.zeros(2, np.int32),
        num_groups=1,
        num_anchors=3,
        scale="none",
        step_weight=weight,
        episode_mean_over=over,
    )
    step = np.array([[4.5125, 4.75, 0], [-4.5125, -4.75, 0]])
    expected = (np.array(episode)[:, None] + weight * step) * GIGPO_MASK
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gigpo_loops_dominate_unless_first_visits_only():
    # Row 0 passes its anchor three times (returns 1, 1, 1 with γ = 1), row 1 once (return 0).
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    turns = np.array([[0, 1, 2], [0, -1, -1]], np.int32)
    rewards = np.array([[0, 0, 1], [0, 0, 0]], np.float32)
    anchors = np.zeros((2, 3), np.int32)

    def step_credit(first_visit):
        return fast.gigpo(
            rewards,
            mask,
            turns,
            anchors,
            np.zeros(2, np.int32),
            num_groups=1,
            num_anchors=1,
            turn_discount=1.0,
            scale="none",
            first_visit=first_visit,
        ) - np.array([[0.5], [-0.5]]) * mask

    # All visits: mean 3/4. First visits: mean 1/2, against which later visits are measured too.
    np.testing.assert_allclose(step_credit(False), [[0.25] * 3, [-0.75, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(step_credit(True), [[0.5] * 3, [-0.5, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("scale, later", [("none", -0.5), ("std", -(3**0.5))])
def test_gigpo_measures_later_visits_where_the_first_ones_tie(scale, later):
    # Both reach the anchor with a return of 1, and row 0 comes back to it with 0.5. The std is that of
    # all three visits: √((1/36 + 1/36 + 4/36) / 2) = 1/√12.
    rewards = np.array([[0.5, 0, 0.5], [0, 0, 1]], np.float32)
    anchors = np.array([[0, 1, 0], [0, 2, 3]], np.int32)

    def step_credit(rewards):
        credit = functools.partial(
            fast.gigpo,
            rewards,
            np.ones((2, 3), bool),
            np.array([[0, 1, 2]] * 2, np.int32),
            anchors,
            np.zeros(2, np.int32),
            num_groups=1,
            num_anchors=4,
            turn_discount=1.0,
            scale=scale,
            first_visit=True,
        )
        return np.asarray(credit(step_weight=1.0) - credit(step_weight=0.0))

    expected = np.array([[0, 0, later], [0, 0, 0]])
    np.testing.assert_allclose(step_credit(rewards), expected, atol=1e-5)
    # First visits that almost tie are no divisor. Their mean is half a part in ten thousand higher.
    almost = step_credit(rewards + np.array([[0, 0, 0], [0, 0, 1e-4]], np.float32))
    np.testing.assert_allclose(almost, expected, atol=1e-3)


def test_gigpo_compares_no_trajectory_with_itself():
    # Alone at its anchor, three times: with first visits only there is one row to compare with.
    got = fast.gigpo(
        np.array([[1, 2, 4]], np.float32),
        np.ones((1, 3), bool),
        np.arange(3, dtype=np.int32)[None],
        np.zeros((1, 3), np.int32),
        np.zeros(1, np.int32),
        num_groups=1,
        num_anchors=1,
        scale="none",
        first_visit=True,
    )
    np.testing.assert_array_equal(got, np.zeros((1, 3)))


def test_mt_grpo_golden():
    # Two turns each. Intermediate [1, 0] → ±.7071; outcome [0, 1] → ∓.7071.
    mask = np.ones((2, 3), bool)
    turns = np.array([[0, 0, 1]] * 2, np.int32)
    rewards = np.array([[0, 1, 0], [0, 0, 0]], np.float32)
    got = fast.mt_grpo(
        rewards,
        np.array([0, 1], np.float32),
        mask,
        turns,
        np.zeros(2, np.int32),
        num_groups=1,
        turn_weight=2.0,
    )
    # First turn of row 0: 2·.7071 − .7071; last turn: the outcome alone.
    np.testing.assert_allclose(
        got, np.array([[1, 1, -1], [-1, -1, 1]]) * np.sqrt(0.5), atol=5e-6
    )


def test_opo_golden():
    # Baseline (3·1 + 1·0)/4 = 3/4.
    got = fast.opo(
        np.array([1, 0], np.float32),
        np.array([3, 1], np.float32),
        np.zeros(2, np.int32),
        num_groups=1,
    )
    np.testing.assert_allclose(got, [0.25, -0.75], atol=1e-6)


def test_opo_does_not_read_the_lengths_of_padding_rows():
    rows = jnp.array([3.0, 1.0, np.nan]), np.array([0, 0, 1], np.int32)
    got, slope = jax.value_and_grad(
        lambda scores: advantages.opo(scores, *rows, num_groups=1)[0]
    )(np.array([1, 0, np.nan], np.float32))
    assert float(got) == 0.25
    np.testing.assert_allclose(slope, [0.25, -0.25, 0], atol=1e-6)


def test_remax_golden():
    got = fast.remax(np.array([1, 0.5], np.float32), np.array([0.25, 1], np.float32))
    np.testing.assert_allclose(got, [0.75, -0.5])


def test_rewards_to_go_group_golden():
    # Turn rewards (1, 2) and (0, 1); γ = 1. Returns (3, 2) and (1, 1); means 2 and 1.5.
    mask = np.ones((2, 3), bool)
    turns = np.array([[0, 0, 1]] * 2, np.int32)
    rewards = np.array([[0, 1, 2], [0, 0, 1]], np.float32)
    args = (rewards, np.ones((2, 3), np.float32), mask, turns, np.zeros(2, np.int32))
    got = fast.rewards_to_go_group(*args, num_groups=1)
    np.testing.assert_allclose(got, [[1, 1, 0.5], [-1, -1, -0.5]], atol=1e-6)
    got = fast.rewards_to_go_group(*args, num_groups=1, horizon="turn")
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5]], atol=1e-6)
    got = fast.rewards_to_go_group(*args, num_groups=1, baseline="leave_one_out")
    np.testing.assert_allclose(got, [[2, 2, 1], [-2, -2, -1]], atol=1e-6)


# --- against the oracles -----------------------------------------------------------------------


@given(SEEDS, junk, shapes, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 2.0]))
@few
def test_gae_matches_definition(seed, junk, shape, lam, bootstrap):
    case = batch(seed, *shape, junk=junk)
    rows = [case[k] for k in ("rewards", "values", "discounts", "action_mask")]
    got = fast.gae(*rows, gae_lambda=lam, bootstrap_values=bootstrap)
    expected = [oracles.gae(*r, gae_lambda=lam, bootstrap=bootstrap) for r in zip(*rows)]
    check(got, expected, case["action_mask"])


@given(SEEDS, junk, shapes, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 2.0]))
@few
def test_turn_gae_matches_definition(seed, junk, shape, lam, bootstrap):
    case = batch(seed, *shape, junk=junk)
    rows = [case[k] for k in ("rewards", "values", "discounts", "action_mask", "turn_ends")]
    got = fast.turn_gae(*rows, gae_lambda=lam, bootstrap_values=bootstrap)
    expected = [oracles.turn_gae(*r, gae_lambda=lam, bootstrap=bootstrap) for r in zip(*rows)]
    check(got, expected, case["action_mask"])


@given(SEEDS, junk, shapes, st.sampled_from([(1.0, 0.95, 1.0), (0.9, 0.8, 0.5)]))
@few
def test_bilevel_gae_matches_definition(seed, junk, shape, numbers):
    case = batch(seed, *shape, junk=junk)
    token, turn, lam = numbers
    rows = [case[k] for k in ("rewards", "values", "action_mask", "turn_ends")]
    options = {"token_discount": token, "turn_discount": turn, "gae_lambda": lam}
    got = fast.bilevel_gae(*rows, bootstrap_values=0.7, **options)
    expected = [oracles.bilevel_gae(*r, bootstrap=0.7, **options) for r in zip(*rows)]
    check(got, expected, case["action_mask"])


@given(SEEDS, junk, shapes)
@few
def test_rewards_to_go_matches_definition(seed, junk, shape):
    case = batch(seed, *shape, junk=junk)
    rows = [case[k] for k in ("rewards", "discounts", "action_mask")]
    got = fast.rewards_to_go(*rows)
    check(got, [oracles.rewards_to_go(*r) for r in zip(*rows)], case["action_mask"])
    whitened = fast.reinforce_plus_plus(*rows)
    expected = oracles.whiten(np.asarray(got, np.float64), case["action_mask"])
    np.testing.assert_allclose(whitened, expected, rtol=1e-3, atol=1e-3)


def test_bootstrap_values_per_row():
    case = batch(3, 4, 9)
    rows = [case[k] for k in ("rewards", "values", "discounts", "action_mask")]
    boots = np.array([0.0, 1.0, -2.0, 3.0], np.float32)
    got = fast.gae(*rows, gae_lambda=0.9, bootstrap_values=boots)
    expected = [
        oracles.gae(*r, gae_lambda=0.9, bootstrap=b) for *r, b in zip(*rows, boots.tolist())
    ]
    check(got, expected, case["action_mask"])


@given(SEEDS, st.sampled_from(["std", "none"]), st.sampled_from([0, 1]))
@few
def test_group_normalized_matches_definition(seed, scale, ddof):
    case = batch(seed, 8, 2, num_groups=3)
    got = fast.group_normalized(
        case["scores"], case["group_ids"], num_groups=3, scale=scale, ddof=ddof)
    expected = oracles.group_normalized(
        case["scores"], case["group_ids"], num_groups=3, scale=scale, ddof=ddof
    )
    check(got, expected, case["group_ids"] < 3)


@given(SEEDS)
@few
def test_leave_one_out_and_opo_match_definition(seed):
    case = batch(seed, 8, 9, num_groups=3)
    ids, scores = case["group_ids"], case["scores"]
    got = fast.leave_one_out(scores, ids, num_groups=3)
    check(got, oracles.leave_one_out(scores, ids, num_groups=3), ids < 3)
    lengths = case["action_mask"].sum(1).astype(np.float32)
    got = fast.opo(scores, lengths, ids, num_groups=3)
    check(got, oracles.opo(scores, lengths, ids, num_groups=3), ids < 3)


@given(
    SEEDS,
    junk,
    st.sampled_from(
        [
            ("episode", "mean", "none"),
            ("episode", "mean", "std"),
            ("episode", "leave_one_out", "none"),
            ("turn", "leave_one_out", "std"),
        ]
    ),
)
@few
def test_rewards_to_go_group_matches_definition(seed, junk, choices):
    horizon, baseline, scale = choices
    case = batch(seed, 6, 9, junk=junk)
    options = {"horizon": horizon, "baseline": baseline, "scale": scale, "epsilon": 0.1}
    rows = [case[k] for k in ("rewards", "discounts", "action_mask", "turn_ids", "group_ids")]
    got = fast.rewards_to_go_group(*rows, num_groups=2, **options)
    expected = oracles.rewards_to_go_group(*rows, num_groups=2, **options)
    check(got, expected, case["action_mask"])


GIGPO_CHOICES = st.sampled_from(
    [
        ("std", "trajectories", False),
        ("std", "trajectories", True),
        ("none", "steps", False),
        ("none", "trajectories", True),
    ]
)


@given(SEEDS, junk, GIGPO_CHOICES)
@few
def test_gigpo_matches_definition(seed, junk, choices):
    scale, over, first_visit = choices
    case = batch(seed, 6, 9, junk=junk)
    options = {
        "scale": scale,
        "episode_mean_over": over,
        "first_visit": first_visit,
        "step_weight": 0.7,
        "epsilon": 0.1,
    }
    rows = [case[k] for k in ("rewards", "action_mask", "turn_ids", "anchor_ids", "group_ids")]
    expected = oracles.gigpo(*rows, num_groups=2, **options)
    if not first_visit:
        del options["first_visit"]  # the default
    got = fast.gigpo(*rows, num_groups=2, num_anchors=3, **options)
    check(got, expected, case["action_mask"])


@given(SEEDS, GIGPO_CHOICES)
@few
def test_gigpo_steps_is_gigpo_on_rows_of_turns(seed, choices):
    scale, over, first_visit = choices
    case = batch(seed, 6, 9)
    options = {"num_groups": 2, "num_anchors": 3, "epsilon": 0.1, "scale": scale}
    options |= {"first_visit": first_visit, "episode_mean_over": over, "step_weight": 0.7}
    rows = [case[k] for k in ("rewards", "action_mask", "turn_ids", "anchor_ids", "group_ids")]
    whole = np.asarray(fast.gigpo(*rows, **options))
    # One row per possible (trajectory, turn) in a shuffled order; absent ones are padding rows.
    order = np.random.default_rng(seed).permutation(6 * 4)
    trajectory, turn = order // 4, order % 4
    tokens = [
        case["action_mask"][i] & (case["turn_ids"][i] == k) for i, k in zip(trajectory, turn)
    ]
    here = np.array([t.any() for t in tokens])
    if not first_visit:
        del options["first_visit"]  # the default
    # One id out of range makes a row padding, whatever it is paid and whatever the others say.
    why = np.where(here, -1, np.arange(len(here)) % 3)
    paid = [case["rewards"][i][t].sum() if t.any() else 7.0 for i, t in zip(trajectory, tokens)]
    got = fast.gigpo_steps(
        np.array(paid, np.float32),
        np.where(why == 0, 6, trajectory).astype(np.int32),
        np.where(why == 1, 4, turn).astype(np.int32),
        case["anchor_ids"][trajectory, turn],
        np.where(why == 2, -1, case["group_ids"][trajectory]).astype(np.int32),
        num_trajectories=6,
        num_steps=4,
        **options,
    )
    expected = [whole[i][t][0] if t.any() else 0.0 for i, t in zip(trajectory, tokens)]
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_gigpo_steps_passes_over_a_missing_step():
    """A row that was dropped discounts nothing."""
    rewards = np.array([0, 1, 0, 0.5], np.float32)
    trajectory, anchor = np.array([0, 0, 1, 1], np.int32), np.array([0, 1, 0, 1], np.int32)

    def credit(steps):
        return fast.gigpo_steps(
            rewards, trajectory, np.array(steps, np.int32), anchor, np.zeros(4, np.int32),
            num_groups=1, num_anchors=2, num_trajectories=2, num_steps=3, turn_discount=0.5,
            scale="none",
        )

    # Episodes 1 and 0.5: ±0.25. First turns 0.5 and 0.25: ±0.125. Last turns 1 and 0.5: ±0.25.
    np.testing.assert_allclose(credit([0, 2, 0, 1]), [0.375, 0.5, -0.375, -0.5], atol=1e-6)


@pytest.mark.parametrize("score", [0.1, 0.7, -1e4 / 3, 3e6])
def test_equal_scores_are_exactly_zero_whatever_the_size(score):
    sizes = (2, 3, 5, 6, 7, 11)
    ids = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    scores = np.full(len(ids), score, np.float32)
    for scale in ("std", "none"):
        got = fast.group_normalized(scores, ids, num_groups=len(sizes), scale=scale)
        np.testing.assert_array_equal(got, np.zeros(len(ids)))


@given(SEEDS, junk)
@few
def test_mt_grpo_matches_definition(seed, junk):
    case = batch(seed, 6, 9, junk=junk)
    options = {"turn_weight": 0.5, "outcome_weight": 2.0, "epsilon": 0.1}
    rows = [case[k] for k in ("rewards", "scores", "action_mask", "turn_ids", "group_ids")]
    got = fast.mt_grpo(*rows, num_groups=2, **options)
    check(got, oracles.mt_grpo(*rows, num_groups=2, **options), case["action_mask"])


@given(SEEDS, junk, st.sampled_from(["mean", "leave_one_out"]))
@few
def test_istar_matches_definition(seed, junk, baseline):
    case = batch(seed, 6, 9, junk=junk)
    options = {"step_weight": 0.5, "baseline": baseline, "epsilon": 0.1}
    rows = [case[k] for k in ("scores", "rewards", "action_mask", "turn_ids", "group_ids")]
    got = fast.istar(*rows, num_groups=2, **options)
    check(got, oracles.istar(*rows, num_groups=2, **options), case["action_mask"])


@given(SEEDS, junk)
@few
def test_reinforce_plus_plus_baseline_matches_definition(seed, junk):
    case = batch(seed, 6, 9, junk=junk)
    got = fast.reinforce_plus_plus_baseline(
        case["scores"], case["group_ids"], case["action_mask"], num_groups=2)
    centered = oracles.group_normalized(
        case["scores"], case["group_ids"], num_groups=2, scale="none"
    )
    mask = case["action_mask"] & (case["group_ids"] < 2)[:, None]
    rows = np.where(mask, centered[:, None], 0.0)
    expected = oracles.whiten(np.where(np.abs(rows) < 1e-12, 0.0, rows), mask)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


# --- limits and identities ---------------------------------------------------------------------


def case_rows(seed=11, rows=6, length=17):
    case = batch(seed, rows, length)
    return case, [case[k] for k in ("rewards", "values", "discounts", "action_mask")]


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error():
    case, rows = case_rows()
    mask = case["action_mask"]
    returns = fast.rewards_to_go(case["rewards"], case["discounts"], mask)
    full = fast.gae(*rows, gae_lambda=1.0)
    np.testing.assert_allclose(full, np.where(mask, returns - case["values"], 0), **CLOSE)
    td = fast.gae(*rows, gae_lambda=0.0)
    for i in range(len(mask)):
        places = np.flatnonzero(mask[i])
        for here, after in zip(places, [*places[1:], None]):
            following = 0.0 if after is None else case["values"][i, after]
            expected = case["rewards"][i, here] + case["discounts"][i, here] * following
            assert td[i, here] == pytest.approx(expected - case["values"][i, here], abs=1e-5)


def test_gae_reads_nothing_between_the_turns():
    """Cutting the observations out of the row changes nothing."""
    case, rows = case_rows()
    whole = fast.gae(*rows, gae_lambda=0.9)
    for i in range(6):
        kept = case["action_mask"][i]
        if kept.any():
            alone = fast.gae(*(r[i][kept] for r in rows), gae_lambda=0.9)
            np.testing.assert_allclose(whole[i][kept], alone, atol=1e-6)


def test_a_terminal_in_the_middle_separates_episodes():
    case, rows = case_rows(rows=1)
    rewards, values, discounts, mask = (np.concatenate([r, r], axis=1) for r in rows)
    last = np.flatnonzero(rows[3][0])[-1]
    discounts[0, last] = 0.0
    both = fast.gae(rewards, values, discounts, mask, gae_lambda=0.9)
    rows[2][0, last] = 0.0
    np.testing.assert_allclose(both[:, :17], fast.gae(*rows, gae_lambda=0.9), atol=1e-6)


def test_bilevel_with_equal_discounts_is_gae():
    """For turns of one token at any discount; for turns of any length at γ = λ = 1."""
    case, (rewards, values, _, mask) = case_rows()
    discounts = np.full(mask.shape, 0.9, np.float32)
    equal = {"token_discount": 0.9, "turn_discount": 0.9, "gae_lambda": 0.8}
    got = fast.bilevel_gae(rewards, values, mask, mask, **equal)
    expected = fast.gae(rewards, values, discounts, mask, gae_lambda=0.8)
    np.testing.assert_allclose(got, expected, **CLOSE)
    ones = {"token_discount": 1.0, "turn_discount": 1.0, "gae_lambda": 1.0}
    got = fast.bilevel_gae(rewards, values, mask, case["turn_ends"], **ones)
    expected = fast.gae(rewards, values, np.ones_like(values), mask, gae_lambda=1.0)
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_turn_gae_with_turns_of_one_token_is_gae():
    case, rows = case_rows()
    got = fast.turn_gae(*rows, case["action_mask"], gae_lambda=0.8)
    np.testing.assert_allclose(got, fast.gae(*rows, gae_lambda=0.8), **CLOSE)


def test_turns_without_reward_are_turns():
    """Turn ends are given: zeroing a reward moves A by its own discounted effect, no more."""
    options = {"token_discount": 1.0, "turn_discount": 0.5, "gae_lambda": 1.0}
    without = REWARDS.copy()
    without[5] = 0.0
    before = fast.bilevel_gae(REWARDS, VALUES, MASK, ENDS, **options)
    after = fast.bilevel_gae(without, VALUES, MASK, ENDS, **options)
    np.testing.assert_allclose(
        before - after, [0.15, 0.15, 0, 0, 0.3, 0.3, 0, 0], atol=1e-6
    )


def test_an_unmarked_last_turn_end_changes_nothing():
    ends = ENDS.copy()
    ends[7] = False
    for name, args, options in [
        ("turn_gae", (REWARDS, VALUES, 0.9 * ONES, MASK), {"gae_lambda": 0.5}),
        (
            "bilevel_gae",
            (REWARDS, VALUES, MASK),
            {"token_discount": 1.0, "turn_discount": 0.5, "gae_lambda": 0.5},
        ),
    ]:
        run = functools.partial(getattr(fast, name), bootstrap_values=2.0, **options)
        np.testing.assert_array_equal(run(*args, ends), run(*args, ENDS))


def test_leave_one_out_is_scaled_centering():
    scores = np.array([3.0, -1.0, 0.5, 0.25, 9.0], np.float32)
    ids = np.array([1, 1, 1, 1, 0], np.int32)
    centered = fast.group_normalized(scores, ids, num_groups=2, scale="none")
    got = fast.leave_one_out(scores, ids, num_groups=2)
    np.testing.assert_allclose(got[:4], 4 / 3 * centered[:4], rtol=1e-6)
    assert got[4] == 0.0


def test_opo_with_equal_lengths_is_dr_grpo():
    scores = np.array([3.0, -1.0, 0.5], np.float32)
    ids = np.zeros(3, np.int32)
    got = fast.opo(scores, np.full(3, 7.0, np.float32), ids, num_groups=1)
    expected = fast.group_normalized(scores, ids, num_groups=1, scale="none")
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rewards_to_go_group_with_one_turn_is_the_scalar_estimator():
    rewards = np.array([[0, 1.0], [0, 0.25], [0, -3.0]], np.float32)
    ones, mask = np.ones((3, 2), np.float32), np.ones((3, 2), bool)
    turns, ids = np.zeros((3, 2), np.int32), np.zeros(3, np.int32)
    got = fast.rewards_to_go_group(
        rewards, ones, mask, turns, ids, num_groups=1, baseline="leave_one_out"
    )
    expected = fast.leave_one_out(rewards.sum(1), ids, num_groups=1)
    np.testing.assert_allclose(got, fast.spread(expected, mask), atol=1e-6)


@jax.jit
def all_group_estimators(scores, ids, rewards, mask, turns, lengths):
    """Everything that compares within groups or batches, as arrays of [B] or [B, L]."""
    anchors = jnp.zeros((len(scores), 1), jnp.int32)
    ones = jnp.ones_like(rewards)
    return [
        advantages.group_normalized(scores, ids, num_groups=2),
        advantages.group_normalized(scores, ids, num_groups=2, scale="none"),
        advantages.leave_one_out(scores, ids, num_groups=2),
        advantages.opo(scores, lengths, ids, num_groups=2),
        advantages.whiten(rewards[:, 2:], mask[:, 2:]),
        advantages.reinforce_plus_plus(rewards, ones, mask),
        advantages.reinforce_plus_plus_baseline(scores, ids, mask, num_groups=2),
        advantages.rewards_to_go_group(rewards, ones, mask, turns, ids, num_groups=2, scale="std"),
        advantages.gigpo(rewards, mask, turns, anchors, ids, num_groups=2, num_anchors=1),
        advantages.mt_grpo(rewards, scores, mask, turns, ids, num_groups=2),
        advantages.istar(scores, rewards, mask, turns, ids, num_groups=2),
    ]


@pytest.mark.parametrize("value", [0.1, 1.0, -3.3, 1e4])
def test_equal_scores_give_exactly_zero(value):
    rewards = np.tile(np.array([0, 0, value], np.float32), (7, 1))
    for got in all_group_estimators(
        np.full(7, value, np.float32),
        np.array([0, 1, 0, 1, 0, 1, 1], np.int32),
        rewards,
        np.ones((7, 3), bool),
        np.zeros((7, 3), np.int32),
        np.arange(1, 8).astype(np.float32),
    ):
        np.testing.assert_array_equal(got, np.zeros_like(got))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_differ_by_the_rounding_of_their_sums_are_equal(sign):
    """All of a group lost, with the same penalties on different turns: that is no signal."""
    rewards = sign * np.random.default_rng(9).uniform(0.01, 1, 20).astype(np.float32)
    orders = [rewards[np.random.default_rng(row).permutation(20)] for row in range(8)]
    sums = jnp.array([functools.reduce(np.add, order) for order in orders])
    assert len(set(np.asarray(sums).tolist())) > 1
    ids = jnp.zeros(8, jnp.int32)
    for scale in ("std", "none"):
        made = advantages.group_normalized(sums, ids, num_groups=1, scale=scale)
        np.testing.assert_array_equal(made, 0.0)
    np.testing.assert_array_equal(advantages.leave_one_out(sums, ids, num_groups=1), 0.0)
    # A reward of a hundred-thousandth of the score is one.
    made = advantages.leave_one_out(sums.at[0].multiply(1.00001), ids, num_groups=1)
    assert abs(float(made[0])) > 0.9e-5 * abs(float(sums[0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("members", [1, 2, 4])
def test_scores_that_are_no_numbers_are_no_missing_signal(bad, members):
    """They must stop the run, not pass for a group that has nothing to learn from."""
    ids = np.array([0] * members + [1, 1, 9], np.int32)
    scores = np.array([bad] + [1.0] * (members - 1) + [3.0, 4.0, bad], np.float32)
    mask, turns = np.ones((len(ids), 1), bool), np.zeros((len(ids), 1), np.int32)
    rows, ones = scores[:, None], np.ones((len(ids), 1), np.float32)
    firsts = {"turn_discount": 1.0, "first_visit": True, "scale": "none"}
    found = [
        *(fast.group_normalized(scores, ids, num_groups=2, scale=s) for s in ("std", "none")),
        fast.leave_one_out(scores, ids, num_groups=2),
        fast.opo(scores, ones[:, 0], ids, num_groups=2),
        fast.rewards_to_go_group(rows, ones, mask, turns, ids, num_groups=2)[:, 0],
        fast.mt_grpo(rows, 0 * ones[:, 0], mask, turns, ids, num_groups=2)[:, 0],
        fast.istar(0 * ones[:, 0], rows, mask, turns, ids, num_groups=2)[:, 0],
        fast.gigpo(rows, mask, turns, turns, ids, num_groups=2, num_anchors=1)[:, 0],
        fast.gigpo(rows, mask, turns, turns, ids, num_groups=2, num_anchors=1, **firsts)[:, 0],
    ]
    for got in found:
        assert not np.isfinite(got[0])
        assert np.all(np.isfinite(got[members:])) and got[-1] == 0.0
    whole = fast.reinforce_plus_plus_baseline(scores, ids, mask, num_groups=2)
    assert not np.any(np.isfinite(whole[:-1])) and whole[-1, 0] == 0.0


def test_a_later_visit_that_is_no_number_is_seen():
    # Alone at its anchor, and a later visit there: nothing to compare it with.
    got = fast.gigpo(
        np.array([[1, np.inf]], np.float32),
        np.ones((1, 2), bool),
        np.arange(2, dtype=np.int32)[None],
        np.zeros((1, 2), np.int32),
        np.zeros(1, np.int32),
        num_groups=1,
        num_anchors=1,
        first_visit=True,
    )
    assert not np.any(np.isfinite(got))


def test_scores_that_are_no_numbers_leave_other_groups_gradients_alone():
    scores, ids = np.array([np.nan, 1, 3, 4, 4, 4], np.float32), np.array([0, 0, 1, 1, 2, 2])

    def loss(x):
        credit = advantages.group_normalized(x, ids, num_groups=3, scale="none")
        return jnp.sum(credit[2:] * jnp.arange(4.0))

    gradient = jax.grad(loss)(scores)
    assert np.all(np.isfinite(gradient[2:])) and np.any(gradient[2:4] != 0)


def test_a_group_of_one_and_padding_rows_get_zero():
    scores = np.array([5.0, np.nan, np.inf, 3.0], np.float32)
    ids = np.array([0, 2, -1, 1], np.int32)  # 2 and −1 are out of range
    mask = np.ones((4, 2), bool)
    for got in [
        fast.group_normalized(scores, ids, num_groups=2),
        fast.leave_one_out(scores, ids, num_groups=2),
        fast.opo(scores, np.ones(4, np.float32), ids, num_groups=2),
        fast.reinforce_plus_plus_baseline(scores, ids, mask, num_groups=2),
    ]:
        np.testing.assert_array_equal(got, np.zeros_like(got))


def test_groups_need_not_be_contiguous():
    scores = np.array([1, 10, 0, 20, 0, 30], np.float32)
    ids = np.array([0, 1, 0, 1, 0, 1], np.int32)
    order = np.argsort(ids, kind="stable")
    got = fast.group_normalized(scores, ids, num_groups=2)
    together = fast.group_normalized(scores[order], ids[order], num_groups=2)
    np.testing.assert_allclose(np.asarray(got)[order], together, rtol=1e-6)


def test_group_statistics_do_not_lose_digits_to_a_common_offset():
    scores = np.array([1e4, 1e4 + 1, 1e4 + 2], np.float32)
    got = fast.group_normalized(scores, np.zeros(3, np.int32), num_groups=1)
    np.testing.assert_allclose(got, [-1, 0, 1], atol=1e-5)


# --- gradients ---------------------------------------------------------------------------------


@jax.jit
def gradients(rewards, values, discounts, mask, ends):
    def total(rewards, values):
        options = {"token_discount": 0.9, "turn_discount": 0.8, "gae_lambda": 0.7}
        weights = jnp.cos(jnp.arange(9.0))[None, :]
        return sum(
            jnp.sum(weights * x)
            for x in [
                advantages.gae(rewards, values, discounts, mask, gae_lambda=0.7),
                advantages.turn_gae(rewards, values, discounts, mask, ends, gae_lambda=0.7),
                advantages.bilevel_gae(rewards, values, mask, ends, **options),
                advantages.whiten(values, mask, epsilon=0.1),
                advantages.reinforce_plus_plus(rewards, discounts, mask),
            ]
        )

    return jax.grad(total, (0, 1))(rewards, values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_junk_off_the_mask_reaches_no_gradient(bad):
    names = ("rewards", "values", "discounts", "action_mask", "turn_ends")
    clean, dirty = (batch(5, 4, 9, junk=junk) for junk in (0.0, bad))
    for a, b in zip(gradients(*(clean[k] for k in names)), gradients(*(dirty[k] for k in names))):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.all(np.asarray(b)[~clean["action_mask"]] == 0.0)


def test_gradients_against_finite_differences():
    case, (rewards, values, discounts, mask) = case_rows(seed=2, rows=2, length=9)
    ends, ids = case["turn_ends"], np.zeros(4, np.int32)
    scores = np.array([0.3, -1.0, 2.0, 0.1], np.float32)

    @jax.jit
    def everything(r, v, s):
        return (
            advantages.gae(r, v, discounts, mask, gae_lambda=0.7),
            advantages.turn_gae(r, v, discounts, mask, ends, gae_lambda=0.7),
            advantages.group_normalized(s, ids, num_groups=1),
            advantages.group_normalized(s, ids, num_groups=1, scale="none"),
            advantages.leave_one_out(s, ids, num_groups=1),
            advantages.whiten(s, np.ones(4, bool)),
        )

    check_grads(everything, (rewards, values, scores), order=1, rtol=2e-2, atol=2e-2)


def test_equal_scores_have_finite_gradients():
    grad = jax.grad(
        lambda s: advantages.group_normalized(s, np.zeros(3, np.int32), num_groups=1)[0]
    )(jnp.ones(3))
    assert np.all(np.isfinite(grad))


# --- errors ------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match='scale.*"std"'):
        advantages.group_normalized(WIN, GROUP, num_groups=1, scale="var")
    args = (np.ones((4, 2), np.float32),) * 2
    masks = (np.ones((4, 2), bool), np.zeros((4, 2), np.int32), GROUP)
    for name in ("horizon", "baseline", "scale"):
        with pytest.raises(ValueError, match=name):
            advantages.rewards_to_go_group(*args, *masks, num_groups=1, **{name: "no"})
    with pytest.raises(ValueError, match="horizon"):
        turn_credit.turn_returns(*args, *masks[:2], num_turns=1, horizon="no")
    with pytest.raises(ValueError, match="baseline"):
        advantages.istar(WIN, args[0], *masks, num_groups=1, baseline="no")
    anchors = np.zeros((4, 1), np.int32)
    gigpo = functools.partial(advantages.gigpo, args[0], *masks[:2], anchors, GROUP)
    for name in ("scale", "episode_mean_over"):
        with pytest.raises(ValueError, match=name):
            gigpo(num_groups=1, num_anchors=1, **{name: "no"})


def test_rows_without_tokens_have_advantages_without_tokens():
    numbers, mask = np.zeros((2, 0), np.float32), np.zeros((2, 0), bool)
    discounts = dict(token_discount=1.0, turn_discount=0.9)
    for got in (
        advantages.gae(*[numbers] * 3, mask, gae_lambda=0.9),
        advantages.turn_gae(*[numbers] * 3, mask, mask, gae_lambda=0.9),
        advantages.bilevel_gae(*[numbers] * 2, mask, mask, gae_lambda=0.9, **discounts),
    ):
        assert jax.tree.map(np.shape, got) in ((2, 0), ((2, 0), (2, 0)))
    ids = np.zeros(2, np.int32)
    assert advantages.spread(numbers.sum(1), mask).shape == (2, 0)
    assert advantages.reinforce_plus_plus_baseline(WIN[:2], ids, mask, num_groups=1).shape == (2, 0)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: advantages.gae(REWARDS, VALUES[:3], ONES, MASK, gae_lambda=1.0),
         r"values is float32 \[3\], expected float \[..., L\] with ... = \[\] as of rewards, L = 8 as of rewards"),
        (lambda: advantages.gae(REWARDS, VALUES, ONES, MASK.astype(np.float32), gae_lambda=1.0),
         r"action_mask is float32 \[8\], expected bool \[..., L\]"),
        (lambda: advantages.gae(REWARDS, VALUES, ONES, MASK, gae_lambda=1.0, bootstrap_values=np.ones(3)),
         r"bootstrap_values is float32 \[3\], expected float \[\]"),
        (lambda: advantages.group_normalized(WIN, GROUP.astype(np.float32), num_groups=1),
         r"group_ids is float32 \[4\], expected int \[B\] with B = 4 as of scores"),
        (lambda: advantages.leave_one_out(WIN[:3], GROUP, num_groups=1),
         r"group_ids is int32 \[4\], expected int \[B\] with B = 3 as of scores"),
        (lambda: advantages.whiten(REWARDS, MASK[:3]), r"mask is bool \[3\], expected bool \[...\] with ... = \[8\] as of x"),
        (lambda: advantages.spread(WIN, np.ones((3, 2), bool)),
         r"scores is float32 \[4\], expected float \[...\] with ... = \[3\] as of action_mask"),
    ],
)
def test_shapes_and_types_are_checked(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64])
def test_narrow_ids_do_not_wrap_around(dtype):
    """Numbers of groups, turns and anchors, and products of ids, may be beyond what holds the ids."""
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=(6, 3)).astype(np.float32), np.ones((6, 3), bool)
    turns, groups = np.tile(np.arange(3), (6, 1)), np.array([0, 0, 60, 60, 120, 120])

    def credit(kind):
        ids = {"turn_ids": turns.astype(kind), "group_ids": groups.astype(kind)}
        scores = advantages.group_normalized(rewards[:, 0], ids["group_ids"], num_groups=40_000)
        credit = advantages.rewards_to_go_group(
            rewards, np.ones((6, 3), np.float32), mask, *ids.values(), num_groups=2000, num_turns=200
        )
        return scores, credit

    for wanted, got in zip(credit(np.int32), credit(dtype), strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_array_equal(got, wanted)


def test_an_empty_batch_has_no_credit():
    nothing = np.zeros((0, 4), np.float32)
    found = advantages.turn_gae(nothing, nothing, nothing, nothing > 0, nothing > 0, gae_lambda=1.0)
    assert found.shape == (0, 4)


def test_turns_that_are_missing_join_no_group_of_unsigned_ids():
    """−1, which is no group, is 255 in eight bits."""
    rewards = np.array([[1.0, 4.0], [2.0, 0.0], [5.0, 6.0], [8.0, 0.0]], np.float32)
    mask, turns = rewards > 0, np.tile(np.arange(2), (4, 1))

    def credit(groups):
        return advantages.istar(rewards[:, 0], rewards, mask, turns, groups, num_groups=256)

    wanted = credit(np.array([0, 0, 255, 255]))
    assert np.abs(wanted).max() > 0
    np.testing.assert_array_equal(credit(np.array([0, 0, 255, 255], np.uint8)), wanted)


def test_wide_discounts_are_taken():
    """Under `jax_enable_x64`, where they would stay float64 beside rewards in float32."""
    rewards, mask, turns = np.diag([1.0, 0, 0, 0])[:2], np.ones((2, 4), bool), np.tile([0, 0, 1, 1], (2, 1))
    with jax.enable_x64(True):
        found = advantages.rewards_to_go_group(rewards, np.ones((2, 4)), mask, turns, np.zeros(2, int), num_groups=1)
    assert found.dtype == np.float32 and np.abs(found).max() > 0
