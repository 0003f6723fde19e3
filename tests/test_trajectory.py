"""The record keeps everything exactly and derives its masks from the turns."""

import json

import numpy as np
import pytest

from envs_host.types import StopReason
from jaxagentrl.trajectory import Trajectory
from records import make_trajectory, make_turn


def test_tokens_and_masks_of_a_hand_made_episode():
    # prompt 5 6 7, action 8 2; glue and observation 9, action 4.
    made = make_trajectory(
        [make_turn([5, 6, 7], [8, 2], logprobs=[-0.5, -0.25]), make_turn([9], [4], logprobs=[-1])]
    )
    assert made.tokens.tolist() == [5, 6, 7, 8, 2, 9, 4]
    assert made.num_tokens == 7 and made.num_action_tokens == 3 and made.num_turns == 2
    fields = made.token_fields()
    assert fields["tokens"].tolist() == made.tokens.tolist()
    assert fields["action_mask"].tolist() == [False] * 3 + [True, True, False, True]
    assert fields["turn_ends"].tolist() == [False] * 4 + [True, False, True]
    assert fields["turn_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert fields["sampler_logprobs"].tolist() == [0, 0, 0, -0.5, -0.25, 0, -1]
    assert fields["tokens"].dtype == np.int32 and fields["sampler_logprobs"].dtype == np.float32


def test_tail_tokens_belong_to_the_last_turn_and_are_no_action():
    made = make_trajectory([make_turn([5], [8]), make_turn([6], [9])], tail_ids=[2, 3])
    assert made.tokens.tolist() == [5, 8, 6, 9, 2, 3] and made.num_tokens == 6
    fields = made.token_fields()
    assert fields["action_mask"].tolist() == [False, True, False, True, False, False]
    assert fields["turn_ends"].tolist() == [False, True, False, True, False, False]
    assert fields["turn_ids"].tolist() == [0, 0, 1, 1, 1, 1]


def test_an_episode_without_turns_is_empty():
    made = make_trajectory([], stop_reason=StopReason.TOKEN_LIMIT, won=False)
    assert made.tokens.tolist() == [] and made.tokens.dtype == np.int32
    assert all(len(values) == 0 for values in made.token_fields().values())


@pytest.mark.parametrize("reason", list(StopReason))
def test_terminated_truncated_and_broken_are_three_things(reason):
    made = make_trajectory([make_turn([5], [8])], stop_reason=reason)
    assert made.terminated == (reason is StopReason.DONE)
    assert made.truncated == (reason not in (StopReason.DONE, StopReason.ENV_FAILURE))


def test_json_round_trip_is_exact():
    rng = np.random.default_rng(0)
    logprobs = np.concatenate([-rng.exponential(size=50), [-1e-30, -3.4e38, -0.1]])
    turns = [
        make_turn(
            [5, 6],
            list(range(53)),
            logprobs=logprobs,
            entropies=rng.random(53),
            reward=np.float32(0.1),
            score=1 / 3,
            valid_command=np.bool_(False),
            anchor="room",
            observation='quote " and \n and ☃',
        ),
        make_turn([9], [4]),
    ]
    made = make_trajectory(turns, tail_ids=[1], stop_reason=StopReason.TURN_LIMIT, won=False, head_start=2)
    text = json.dumps(made.to_json(), allow_nan=False)
    again = Trajectory.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.task == made.task and again.stop_reason is StopReason.TURN_LIMIT
    assert again.head_start == 2
    assert again.won is False and again.turns[0].valid_command is False
    np.testing.assert_array_equal(again.tokens, made.tokens)
    for one, two in zip(made.turns, again.turns, strict=True):
        for name in ("prompt_ids", "action_ids", "logprobs", "entropies"):
            before, after = getattr(one, name), getattr(two, name)
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        assert (one.reward, one.score, one.anchor) == (two.reward, two.score, two.anchor)


def test_records_of_another_version_are_refused():
    record = make_trajectory([make_turn([5], [8])]).to_json()
    record["turns"][0]["surprise"] = 1
    with pytest.raises(ValueError, match=r"a Turn record .*unknown \['surprise'\]"):
        Trajectory.from_json(record)
    record = make_trajectory([]).to_json()
    del record["won"]
    with pytest.raises(ValueError, match=r"a Trajectory record .*missing \['won'\]"):
        Trajectory.from_json(record)


def test_records_of_before_there_were_head_starts_are_read():
    record = make_trajectory([make_turn([5], [8])]).to_json()
    del record["head_start"]
    assert Trajectory.from_json(record).head_start == 0


def test_turns_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="sizes"):
        make_turn([5], [8, 2], logprobs=[-0.1])
    with pytest.raises(ValueError, match="at least one action token"):
        make_turn([5], [], logprobs=[], entropies=[])
    with pytest.raises(ValueError, match="must be a vector"):
        make_turn([[5]], [8])
