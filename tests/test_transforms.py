"""Batch transforms: what is kept, what is counted, what shaping leaves unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxagentrl import advantages, transforms
from jaxagentrl.types import TrajectoryBatch
import oracles
from core_cases import SEEDS, batch

few = settings(max_examples=25, deadline=None)
IDS = np.array([0, 1, 0, 1, 2, 2, 3], np.int32)  # with three groups, the last row is padding


def trajectory_batch(seed, rows, **options):
    case = batch(seed, rows, 9, **options)
    names = {field.name for field in dataclasses.fields(TrajectoryBatch)}
    case["sampler_logprobs"] = case["logprobs"]
    return TrajectoryBatch(**{k: jnp.asarray(v) for k, v in case.items() if k in names})


# --- filters -----------------------------------------------------------------------------------


def test_dynamic_sampling_keeps_mixed_groups():
    # Group 0 mixed, group 1 all won, group 2 all lost; the padding row succeeds, which is nothing.
    won = np.array([1, 1, 0, 1, 0, 0, 1], bool)
    got = transforms.dynamic_sampling(won, IDS, num_groups=3)
    np.testing.assert_array_equal(got.keep, [1, 0, 1, 0, 0, 0, 0])
    assert (int(got.kept_groups), int(got.dropped_groups), bool(got.is_empty)) == (1, 2, False)


def test_an_all_dropped_batch_says_so():
    got = transforms.dynamic_sampling(np.ones(7, bool), IDS, num_groups=5)
    assert not np.any(got.keep)
    # Groups 3 and 4: one row and none; empty groups are not dropped, there was nothing to drop.
    assert (int(got.kept_groups), int(got.dropped_groups), bool(got.is_empty)) == (0, 4, True)


def test_uncertainty_filter_keeps_the_groups_that_differ_most():
    # Sample stds: .7071 (group 0), 0 (group 1), 1.4142 (group 2).
    scores = np.array([0, 1, 1, 1, 3, 1, 99], np.float32)
    keep = {
        fraction: transforms.uncertainty_filter(scores, IDS, num_groups=3, fraction=fraction)
        for fraction in (0.25, 0.34, 0.67, 1.0)
    }
    np.testing.assert_array_equal(keep[0.25].keep, [0, 0, 0, 0, 1, 1, 0])  # at least one
    np.testing.assert_array_equal(keep[0.34].keep, [0, 0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(keep[0.67].keep, [1, 0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(keep[1.0].keep, [1, 1, 1, 1, 1, 1, 0])
    assert (int(keep[0.67].kept_groups), int(keep[0.67].dropped_groups)) == (2, 1)
    without = transforms.uncertainty_filter(
        scores, IDS, num_groups=3, fraction=1.0, keep_flat=False
    )
    np.testing.assert_array_equal(without.keep, [1, 0, 1, 0, 1, 1, 0])


def test_uncertainty_filter_of_equal_scores():
    flat = np.zeros(7, np.float32)
    got = transforms.uncertainty_filter(flat, IDS, num_groups=3, fraction=0.5)
    np.testing.assert_array_equal(got.keep, [1, 0, 1, 0, 0, 0, 0])  # ties go to the lower id
    got = transforms.uncertainty_filter(flat, IDS, num_groups=3, fraction=0.5, keep_flat=False)
    assert bool(got.is_empty) and int(got.dropped_groups) == 3


def test_uncertainty_fraction_of_ten_groups_is_not_a_float_away():
    ids = np.repeat(np.arange(10, dtype=np.int32), 2)
    scores = np.arange(20, dtype=np.float32) ** 2
    for tenths in range(1, 11):
        got = transforms.uncertainty_filter(
            scores, ids, num_groups=12, fraction=tenths / 10
        )
        assert int(got.kept_groups) == tenths


@given(SEEDS, st.sampled_from([0.25, 0.5, 0.75]))
@few
def test_uncertainty_filter_matches_definition(seed, fraction):
    case = batch(seed, 12, 1, num_groups=4)
    scores = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    got = transforms.uncertainty_filter(scores, case["group_ids"], num_groups=4, fraction=fraction)
    expected = oracles.uncertainty_keep(
        scores, case["group_ids"], num_groups=4, fraction=fraction
    )
    np.testing.assert_array_equal(got.keep, expected)


def test_dropped_rows_become_padding_rows():
    whole = trajectory_batch(4, 6, group_size=2)
    keep = jnp.array([True, True, False, True, False, False])
    got = transforms.drop_rows(whole, keep, num_groups=3)
    for name in ("valid_mask", "action_mask", "turn_ends"):
        assert not jnp.any(getattr(got, name)[~keep])
        np.testing.assert_array_equal(getattr(got, name)[keep], getattr(whole, name)[keep])
    np.testing.assert_array_equal(got.turn_ids[~keep], -1)
    np.testing.assert_array_equal(got.turn_ids[keep], whole.turn_ids[keep])
    np.testing.assert_array_equal(got.rewards[~keep], 0)
    np.testing.assert_array_equal(got.rewards[keep], whole.rewards[keep])
    np.testing.assert_array_equal(got.sampler_logprobs[~keep], 0)
    np.testing.assert_array_equal(got.sampler_logprobs[keep], whole.sampler_logprobs[keep])
    np.testing.assert_array_equal(got.group_ids, [0, 0, 3, 1, 3, 3])
    np.testing.assert_array_equal(got.tokens, whole.tokens)


def test_compact_brings_kept_rows_to_the_front():
    whole = trajectory_batch(4, 6, group_size=2)
    keep = jnp.array([False, True, False, True, True, False])
    got, count = transforms.compact(whole, keep)
    assert int(count) == 3
    np.testing.assert_array_equal(got.tokens, whole.tokens[jnp.array([1, 3, 4, 0, 2, 5])])
    np.testing.assert_array_equal(got.group_ids, [0, 1, 2, 0, 1, 2])


def test_overlong_filter():
    mask = np.array([[1, 1], [1, 0], [0, 0]], bool)
    got, count = transforms.overlong_filter(mask, np.array([False, True, True]))
    np.testing.assert_array_equal(got, [[1, 1], [0, 0], [0, 0]])
    assert int(count) == 1  # the empty row lost nothing


# --- rewards -----------------------------------------------------------------------------------


def test_overlong_penalty_golden():
    lengths = np.array([0, 6, 7, 9, 10, 11, 99])
    got = transforms.overlong_penalty(lengths, max_length=10, margin=4)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.75, -1, -1, -1])
    got = transforms.overlong_penalty(lengths, max_length=10, margin=4, penalty=0.5)
    np.testing.assert_allclose(got[3:5], [-0.375, -0.5])
    with pytest.raises(ValueError, match="margin"):
        transforms.overlong_penalty(lengths, max_length=10, margin=0)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 2.0])
def test_a_fraction_is_a_share(fraction):
    with pytest.raises(ValueError, match=f"fraction: got {fraction}"):
        transforms.uncertainty_filter(np.ones(4), np.zeros(4, np.int32), num_groups=1, fraction=fraction)


MASK = np.array([[1, 1, 0, 1], [0, 1, 0, 0]], bool)
TURNS = np.array([[0, 0, 1, 1], [0, 0, -1, -1]], np.int32)
REWARDS = np.array([[0, 1, np.nan, 2], [np.inf, 3, 0, 0]], np.float32)


def test_penalties_fall_on_the_last_action_token_of_the_turn():
    flagged = np.array([[1, 0], [1, 1]], bool)  # row 1 has no turn 1: nothing to penalize
    got, count = transforms.penalize_turns(REWARDS, MASK, TURNS, flagged, penalty=0.5)
    np.testing.assert_allclose(got, [[0, 0.5, 0, 2], [0, 2.5, 0, 0]])
    assert int(count) == 2


def test_a_penalty_can_fall_on_the_first_token():
    rewards, mask = np.array([[1.0, 2.0]], np.float32), np.ones((1, 2), bool)
    flagged = np.array([[True, False]])
    got, count = transforms.penalize_turns(rewards, mask, np.array([[0, 1]]), flagged, penalty=0.5)
    np.testing.assert_allclose(got, [[0.5, 2.0]])
    assert int(count) == 1


def test_a_turn_beyond_the_flags_is_not_penalized():
    """The first token's turn is out of range, and position 0 is what nothing looks like."""
    rewards, mask = np.array([[1.0, 2.0]], np.float32), np.ones((1, 2), bool)
    flagged = np.array([[True]])
    got, count = transforms.penalize_turns(rewards, mask, np.array([[1, 0]]), flagged, penalty=0.5)
    np.testing.assert_allclose(got, [[1.0, 1.5]])
    assert int(count) == 1


def test_dense_rewards_are_divided_by_the_maximum_on_wins_and_losses():
    got, count = transforms.normalize_dense_rewards(REWARDS, np.array([4, 6], np.float32), MASK)
    np.testing.assert_allclose(got, [[0, 0.25, 0, 0.5], [0, 0.5, 0, 0]])
    assert int(count) == 0
    got, count = transforms.normalize_dense_rewards(REWARDS, np.array([0.5, 1], np.float32), MASK)
    np.testing.assert_allclose(got, [[0, 2, 0, 4], [0, 3, 0, 0]])
    assert int(count) == 0


@pytest.mark.parametrize("unknown", [0.0, -1.0, np.nan, np.inf])
def test_rows_without_a_maximum_are_counted(unknown):
    maximum = np.array([unknown, 6], np.float32)
    got, count = transforms.normalize_dense_rewards(REWARDS, maximum, MASK)
    np.testing.assert_allclose(got, [[0, 0, 0, 0], [0, 0.5, 0, 0]])
    assert int(count) == 1
    got, count = transforms.normalize_dense_rewards(REWARDS, maximum, MASK & False)
    assert int(count) == 0


def test_potential_shaping_golden():
    # Row 0: Φ = 1, 3 and 7 afterwards, γ = .5: changes .5·3 − 1 = .5 and .5·7 − 3 = .5.
    # Row 1 terminates: 0·7 − 2.
    discounts = np.array([[9, 0.5, 9, 0.5], [9, 0, 9, 9]], np.float32)
    potentials = np.array([[1, 3, np.nan], [2, np.inf, np.nan]], np.float32)
    got = transforms.potential_shaping(
        REWARDS, discounts, MASK, TURNS, potentials, np.array([7, 7], np.float32)
    )
    np.testing.assert_allclose(got, [[0, 1.5, 0, 2.5], [0, 1, 0, 0]])
    # Of a state that is none, Φ need not be known.
    again = transforms.potential_shaping(
        REWARDS, discounts, MASK, TURNS, potentials, np.array([7, np.nan], np.float32)
    )
    np.testing.assert_array_equal(again, got)


def test_rows_without_tokens_are_shaped():
    nothing, ids = np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int32)
    shaped = transforms.potential_shaping(nothing, nothing, nothing > 0, ids, nothing, np.ones(2, np.float32))
    normalized, unknown = transforms.normalize_dense_rewards(nothing, np.ones(2, np.float32), nothing > 0)
    assert shaped.shape == normalized.shape == (2, 0) and unknown == 0


@jax.jit
def returns_before_and_after(rewards, discounts, mask, turn_ids, potentials, final):
    shaped = transforms.potential_shaping(rewards, discounts, mask, turn_ids, potentials, final)
    before = advantages.rewards_to_go(rewards, discounts, mask)
    return before, advantages.rewards_to_go(shaped, discounts, mask)


@given(SEEDS)
@few
def test_potential_shaping_changes_returns_by_the_first_potential_only(seed):
    """γ = 1 and termination: Σ shaped = Σ r − Φ(s₀), and rewards-to-go shift by −Φ(sₖ)."""
    case = batch(seed, 3, 9)
    mask = case["action_mask"]
    discounts = np.ones((3, 9), np.float32)
    for i in range(3):
        if mask[i].any():
            discounts[i, np.flatnonzero(mask[i])[-1]] = 0.0
    rng = np.random.default_rng(seed)
    potentials = rng.standard_normal((3, 4)).astype(np.float32)
    final = rng.standard_normal(3).astype(np.float32)
    before, after = returns_before_and_after(
        case["rewards"], discounts, mask, case["turn_ids"], potentials, final
    )
    for i, t in zip(*np.nonzero(mask)):
        shift = potentials[i, case["turn_ids"][i, t]]
        assert after[i, t] - before[i, t] == pytest.approx(-shift, abs=1e-4)


def test_kl_in_the_reward():
    k1 = np.array([[0.1, -0.2, np.nan, 0.3], [np.inf, 1, 0, 0]], np.float32)
    got = transforms.shape_with_kl(REWARDS, k1, MASK, coefficient=0.5)
    np.testing.assert_allclose(got, [[-0.05, 1.1, 0, 1.85], [0, 2.5, 0, 0]], rtol=1e-6)
    slope = jax.grad(
        lambda x: jnp.sum(transforms.shape_with_kl(REWARDS, x, MASK, coefficient=0.5))
    )(k1)
    np.testing.assert_array_equal(slope, np.zeros_like(k1))
