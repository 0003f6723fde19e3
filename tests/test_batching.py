"""Batches hold every token of every trajectory once, in few shapes, with no silent change."""

import dataclasses
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from envs_host.types import StopReason
from jaxagentrl import batching
from records import make_task, make_trajectory, make_turn

OPTIONS = {"discount": 0.9, "length_buckets": (8, 16), "row_multiple": 1}


def two_turns(**changes):
    return make_trajectory(
        [make_turn([5, 6, 7], [8, 2], logprobs=[-0.5, -0.25]), make_turn([9], [4], logprobs=[-1])],
        **changes,
    )


def one_turn(length, **changes):
    return make_trajectory([make_turn([5] * (length - 1), [8])], **changes)


def test_a_row_by_hand():
    batch = batching.to_batch([two_turns()], [[0.5, 1.0]], **OPTIONS)
    no, yes = False, True
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 2, 9, 4, 0]]
    assert batch.valid_mask.tolist() == [[yes] * 7 + [no]]
    assert batch.action_mask.tolist() == [[no, no, no, yes, yes, no, yes, no]]
    assert batch.turn_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1]]
    assert batch.turn_ends.tolist() == [[no, no, no, no, yes, no, yes, no]]
    assert batch.sampler_logprobs.tolist() == [[0, 0, 0, -0.5, -0.25, 0, -1, 0]]
    assert batch.rewards.tolist() == [[0, 0, 0, 0, 0.5, 0, 1, 0]]
    # γ on action tokens, 0 on the last one because the episode terminated.
    np.testing.assert_allclose(batch.discounts, [[0, 0, 0, 0.9, 0.9, 0, 0, 0]])
    assert batch.group_ids.tolist() == [0]


def test_dtypes_are_those_of_the_device():
    batch = batching.to_batch([two_turns()], None, **OPTIONS)
    kinds = {
        "tokens": np.int32, "turn_ids": np.int32, "group_ids": np.int32, "valid_mask": bool,
        "action_mask": bool, "turn_ends": bool, "sampler_logprobs": np.float32,
        "rewards": np.float32, "discounts": np.float32,
    }  # fmt: skip
    for name, dtype in kinds.items():
        assert vars(batch)[name].dtype == dtype, name
    on_device = jax.device_put(batch)
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(vars(on_device)[field.name], vars(batch)[field.name])


@pytest.mark.parametrize("reason", [r for r in StopReason if r is not StopReason.ENV_FAILURE])
def test_only_termination_ends_the_discount(reason):
    batch = batching.to_batch([two_turns(stop_reason=reason)], None, **OPTIONS)
    last = 0.0 if reason is StopReason.DONE else 0.9
    np.testing.assert_allclose(batch.discounts[0, [3, 4, 6]], [0.9, 0.9, last])


def test_tail_tokens_are_valid_and_untrained():
    batch = batching.to_batch([two_turns(tail_ids=[3])], None, **OPTIONS)
    assert batch.valid_mask.all()
    assert batch.tokens[0, 7] == 3 and not batch.action_mask[0, 7]
    assert batch.discounts[0].tolist()[6:] == [0.0, 0.0]


def test_padding_rows_are_out_of_every_group():
    made = [one_turn(3, group=7), one_turn(2, group=7), one_turn(4, group=5)]
    batch = batching.to_batch(made, None, **OPTIONS | {"row_multiple": 4})
    assert batch.tokens.shape == (4, 8)
    # Numbered in order of appearance; the padding row has the number of groups.
    assert batch.group_ids.tolist() == [0, 0, 1, 2]
    assert not batch.valid_mask[3].any() and (batch.turn_ids[3] == -1).all()
    for name in ("tokens", "action_mask", "turn_ends", "rewards", "discounts"):
        assert not vars(batch)[name][3].any()
    scores = jax.ops.segment_sum(np.ones(4), batch.group_ids, num_segments=2)
    assert scores.tolist() == [2, 1]


def test_the_smallest_bucket_that_fits_is_taken():
    for length, expected in ((1, 8), (8, 8), (9, 16), (16, 16)):
        assert batching.to_batch([one_turn(length)], None, **OPTIONS).tokens.shape[1] == expected
    with pytest.raises(ValueError, match="of task game-s1 has 17 tokens, more than .* 16"):
        batching.to_batch([one_turn(3), one_turn(17)], None, **OPTIONS)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no trajectories"):
        batching.to_batch([], None, **OPTIONS)
    with pytest.raises(ValueError, match="1 reward vectors for 2"):
        batching.to_batch([two_turns(), two_turns()], [[0, 0]], **OPTIONS)
    broken = two_turns(stop_reason=StopReason.ENV_FAILURE)
    empty = make_trajectory([])
    with pytest.raises(ValueError, match="trajectory 0 .*broken by its environment.*1 .*no turns"):
        batching.to_batch([broken, empty], None, **OPTIONS)
    with pytest.raises(ValueError, match=r"2 turns but rewards of shape \(1,\)"):
        batching.to_batch([two_turns()], [[0.0]], **OPTIONS)
    with pytest.raises(ValueError, match="not finite"):
        batching.to_batch([two_turns()], [[0.0, float("nan")]], **OPTIONS)
    with pytest.raises(ValueError, match="group ids run from 0 to 3"):
        batching.to_batch([two_turns()] * 2, None, **OPTIONS, group_ids=[0, 3], num_groups=3)
    with pytest.raises(ValueError, match="num_rows 1 must hold 2"):
        batching.to_batch([two_turns()] * 2, None, **OPTIONS, num_rows=1)
    with pytest.raises(ValueError, match="row_multiple must be 1 or more"):
        batching.to_batch([two_turns()], None, **OPTIONS | {"row_multiple": 0})
    other = two_turns(task=make_task("game-s2", 2))
    with pytest.raises(ValueError, match="group 3 holds the tasks game-s1 and game-s2"):
        batching.to_batch([two_turns(), other], None, **OPTIONS)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    tokens_per_batch=st.integers(1, 512),
    row_multiple=st.integers(1, 4),
)
def test_length_groups_hold_everything_once_in_few_shapes(lengths, tokens_per_batch, row_multiple):
    buckets = (8, 24, 64)
    groups = batching.length_groups(
        lengths,
        length_buckets=buckets,
        tokens_per_batch=tokens_per_batch,
        row_multiple=row_multiple,
    )
    assert sorted(i for group in groups for i in group.indices) == list(range(len(lengths)))
    shapes = {(group.num_rows, group.length) for group in groups}
    assert len(shapes) <= len(buckets)
    for group in groups:
        assert group.indices and len(group.indices) <= group.num_rows
        assert group.num_rows % row_multiple == 0
        assert max(lengths[i] for i in group.indices) <= group.length
        smallest = group.length * row_multiple
        assert group.num_rows * group.length <= max(tokens_per_batch, smallest)
    assert [g.length for g in groups] == sorted((g.length for g in groups), reverse=True)


def test_batches_of_a_set_agree_with_one_large_batch():
    made = [
        one_turn(length, group=group, task=make_task(f"game-s{group}", group))
        for length, group in ((3, 1), (16, 2), (5, 1), (8, 4), (2, 2), (12, 4), (7, 9))
    ]
    scores = [np.asarray([float(i)], np.float32) for i in range(len(made))]
    whole = batching.to_batch(made, scores, **OPTIONS)
    groups = batching.length_groups(
        [trajectory.num_tokens for trajectory in made], length_buckets=OPTIONS["length_buckets"],
        tokens_per_batch=32, row_multiple=1,
    )
    assert [(group.length, group.num_rows) for group in groups] == [(16, 2), (8, 4), (8, 4)]
    seen = []
    for group in groups:
        batch = batching.to_batch(
            [made[index] for index in group.indices],
            [scores[index] for index in group.indices],
            **OPTIONS | {"length_buckets": [group.length]},
            group_ids=batching.group_ids(made)[list(group.indices)],
            num_groups=4,
            num_rows=group.num_rows,
        )
        assert batch.tokens.shape == (group.num_rows, group.length)
        for row, index in enumerate(group.indices):
            seen.append(index)
            for field in dataclasses.fields(batch):
                expected = np.atleast_1d(vars(whole)[field.name][index])[: group.length]
                got = np.atleast_1d(vars(batch)[field.name][row])
                np.testing.assert_array_equal(got, expected, strict=True)
        assert (batch.group_ids[len(group.indices) :] == 4).all()
    assert sorted(seen) == list(range(len(made)))


def test_anchors_are_numbered_within_their_group():
    def trajectory(group, *anchors):
        return types.SimpleNamespace(
            group=group, turns=[types.SimpleNamespace(anchor=anchor) for anchor in anchors])

    played = [trajectory(0, "a", "b", "a"), trajectory(1, "b", None), trajectory(0, "c", "b"), trajectory(1, "b", "a")]
    ids = batching.anchor_ids(played, num_rows=5, max_turns=3)
    np.testing.assert_array_equal(ids, [[0, 1, 0], [0, -1, -1], [2, 1, -1], [0, 1, -1], [-1, -1, -1]])
