"""Turn rewards by hand: normalized on wins and losses alike, penalties where they belong."""

import numpy as np
import pytest

from envs_host.types import StopReason
from jaxagentrl import rewards, transforms
from records import make_trajectory, make_turn


def episode(increases, *, max_score=2.0, won=True, reason=StopReason.DONE, valid=None, steps=None):
    """An episode whose turn t raised the score by increases[t]."""
    valid = [True] * len(increases) if valid is None else valid
    steps = [0.0] * len(increases) if steps is None else steps
    turns = [
        make_turn([5], [8], reward=gain, valid_command=ok, intermediate_reward=step)
        for gain, ok, step in zip(increases, valid, steps, strict=True)
    ]
    return make_trajectory(
        turns, score=sum(increases), max_score=max_score, won=won, stop_reason=reason
    )


def test_single_pays_the_whole_score_at_the_end():
    # 2 of 2 points: 1 on the last turn.
    got = rewards.turn_rewards(episode([1, 0, 1]), kind="single")
    assert got.tolist() == [0, 0, 1] and got.dtype == np.float32
    # 1 of 2 points and lost: a half.
    lost = episode([1, 0, 0], won=False, reason=StopReason.TURN_LIMIT)
    assert rewards.turn_rewards(lost, kind="single").tolist() == [0, 0, 0.5]


def test_dense_pays_each_increase():
    got = rewards.turn_rewards(episode([1, 0, 1]), kind="dense")
    assert got.tolist() == [0.5, 0, 0.5]


def test_a_lost_game_never_earns_more_than_a_won_one():
    # The flaw of the public code: six sub-goals of ten, lost, earned 6; won earned 1.
    lost = episode([1.0] * 6, max_score=10.0, won=False, reason=StopReason.TURN_LIMIT)
    won = episode([1.0] * 10, max_score=10.0)
    for kind in ("single", "dense"):
        assert rewards.turn_rewards(lost, kind=kind).sum() == pytest.approx(0.6)
        assert rewards.turn_rewards(won, kind=kind).sum() == pytest.approx(1.0)


def test_dense_may_lose_points():
    got = rewards.turn_rewards(episode([1, -1, 2]), kind="dense")
    assert got.tolist() == [0.5, -0.5, 1.0]


def test_intermediate_adds_progress_to_the_outcome():
    # Steps +1 −1 +1 of 0.1 each, and 2 of 2 points at the end.
    made = episode([0, 0, 2], steps=[1, -1, 1])
    got = rewards.turn_rewards(made, kind="intermediate", intermediate_scale=0.1)
    np.testing.assert_allclose(got, [0.1, -0.1, 1.1], rtol=1e-6)


def test_invalid_commands_cost_on_their_own_turn():
    made = episode([0, 0, 2], valid=[True, False, False])
    got = rewards.turn_rewards(made, kind="single", invalid_penalty=0.1)
    np.testing.assert_allclose(got, [0, -0.1, 0.9], rtol=1e-6)


@pytest.mark.parametrize("tokens, paid", [(6, 0.0), (8, -0.125), (9, -0.1875), (10, -0.25), (13, -0.25)])
def test_long_episodes_pay_by_what_they_sampled_in_all(tokens, paid):
    """By hand: free up to 10 - 4 = 6 tokens, all of the 0.25 from 10 on; on the last turn, whatever came before."""
    turns = [make_turn([1] * 50, [2] * size) for size in (tokens - 5, 5)]
    made = make_trajectory(turns, won=False, score=0.0)
    options = dict(overlong_penalty=0.25, overlong_length=10, overlong_margin=4)
    assert rewards.turn_rewards(made, kind="single", **options).tolist() == [0.0, paid]
    assert float(transforms.overlong_penalty(tokens, max_length=10, margin=4, penalty=0.25)) == paid


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(overlong_penalty=0.5), "reward.overlong_length is None and reward.overlong_penalty 0.5"),
        (dict(overlong_length=9), "reward.overlong_length is 9 and reward.overlong_penalty 0.0"),
        (dict(overlong_penalty=-0.1), "reward.overlong_penalty is subtracted and must be 0 or more, got -0.1"),
        (dict(overlong_penalty=0.5, overlong_length=9, overlong_margin=10), r"overlong_margin is 10, expected 1 to .* \(9\)"),
        (dict(overlong_penalty=0.5, overlong_length=9, overlong_margin=0), "overlong_margin is 0, expected 1"),
    ],
)
def test_lengths_that_cannot_work_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        rewards.turn_rewards(episode([1]), kind="single", **options)


def test_a_missing_end_of_turn_costs_on_the_last_turn_only():
    made = episode([0, 1, 0], won=False, reason=StopReason.NO_END_OF_TURN)
    got = rewards.turn_rewards(made, kind="dense", no_end_of_turn_penalty=0.25)
    np.testing.assert_allclose(got, [0, 0.5, -0.25])
    # The command that was never sent does not count as a refused one as well.
    made = episode([0, 0], won=False, reason=StopReason.NO_END_OF_TURN, valid=[False, False])
    got = rewards.turn_rewards(
        made, kind="single", invalid_penalty=0.5, no_end_of_turn_penalty=0.25
    )
    assert got.tolist() == [-0.5, -0.25]
    for reason in (StopReason.DONE, StopReason.TURN_LIMIT, StopReason.TOKEN_LIMIT):
        made = episode([0, 1, 0], won=False, reason=reason)
        got = rewards.turn_rewards(made, kind="dense", no_end_of_turn_penalty=0.25)
        np.testing.assert_allclose(got, [0, 0.5, 0])


def test_a_way_out_of_a_penalty_is_told():
    """An episode that breaks off in a turn is refused nothing."""
    told = rewards.way_out(invalid_penalty=0.01, no_end_of_turn_penalty=0.0, cut_turns="end")
    assert "costs 0.0 (reward.no_end_of_turn_penalty)" in told and "rollout.cut_turns 'send'" in told
    assert rewards.way_out(invalid_penalty=0.01, no_end_of_turn_penalty=0.01, cut_turns="end") is None
    assert rewards.way_out(invalid_penalty=0.01, no_end_of_turn_penalty=0.0, cut_turns="send") is None
    assert rewards.way_out(invalid_penalty=0.0, no_end_of_turn_penalty=0.0, cut_turns="end") is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "sparse"}, "kind must be one of"),
        ({"kind": "single", "invalid_penalty": -0.1}, "invalid_penalty .* got -0.1"),
        ({"kind": "single", "no_end_of_turn_penalty": float("nan")}, "no_end_of_turn_penalty"),
        ({"kind": "intermediate"}, "needs reward.intermediate_scale"),
        ({"kind": "dense", "intermediate_scale": 0.1}, "has no effect on reward.kind 'dense'"),
        ({"kind": "intermediate", "intermediate_scale": -1.0}, "is -1.0, expected more than 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        rewards.turn_rewards(episode([2]), **options)


def test_trajectories_without_an_outcome_are_refused():
    with pytest.raises(ValueError, match="environment failed in trajectory of task game-s1"):
        rewards.turn_rewards(episode([0], reason=StopReason.ENV_FAILURE), kind="single")
    with pytest.raises(ValueError, match="no turns"):
        rewards.turn_rewards(episode([]), kind="single")
    with pytest.raises(ValueError, match="max_score 0.0"):
        rewards.turn_rewards(episode([0], max_score=0.0), kind="single")
