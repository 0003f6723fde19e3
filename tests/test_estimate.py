"""From a scored batch to credit: every name is its algorithm, with the arguments it was given.

The estimators have tests of their own; the oracles those are held to say here what `make_estimate`
must give.
"""

import numpy as np
import oracles
import pytest

from jaxagentrl import estimate, learner
from jaxagentrl.types import TrajectoryBatch

GROUPS, TURNS, LENGTH = 3, 3, 16
# Group, anchors, the (observed, acted) tokens of every turn, and their rewards. Group 1 has one outcome
# only; the last row is padding.
ROWS = (
    (0, (0, 1, 2), [(2, 2), (1, 3), (1, 2)], (0.0, 0.5, 1.0)),
    (0, (0, 2, -1), [(2, 1), (2, 2)], (0.25, 0.0)),
    (0, (0, 1, 2), [(1, 3), (1, 1), (2, 2)], (-0.5, 0.75, 0.0)),
    (2, (0, 0, 1), [(3, 2), (1, 2), (1, 1)], (1.0, 0.0, 2.0)),
    (2, (0, 1, -1), [(2, 3), (2, 2)], (0.0, -1.0)),
    (1, (0, 1, -1), [(2, 2), (1, 2)], (0.0, 1.0)),
    (1, (0, 2, -1), [(3, 1), (1, 3)], (0.0, 1.0)),
    (GROUPS, (-1, -1, -1), [], ()),
)
PLAIN = dict(
    num_groups=GROUPS,
    whiten=False,
    negative_weight=1.0,
    discount=0.9,
    gae_lambda=0.8,
    group_scale="std",
    turn_horizon="episode",
    turn_discount=0.7,
    step_weight=0.5,
    first_visit=False,
    max_turns=TURNS,
    kl_in_reward=0.0,
    skip_zero_signal=False,
)
# What each algorithm is told beside the batch, each with a value other than above.
ARGUMENTS = {
    "gae": [dict(gae_lambda=0.3)],
    "turn_gae": [dict(gae_lambda=0.3)],
    "bilevel_gae": [dict(gae_lambda=0.3), dict(discount=0.5), dict(turn_discount=0.3)],
    "group_normalized": [dict(group_scale="none")],
    "leave_one_out": [],
    "opo": [],
    "rewards_to_go_group": [dict(group_scale="none"), dict(turn_horizon="turn")],
    "gigpo": [dict(group_scale="none"), dict(turn_discount=0.4), dict(step_weight=2.0),
              dict(first_visit=True)],
    "mt_grpo": [dict(step_weight=2.0)],
    "reinforce_plus_plus": [],
    "reinforce_plus_plus_baseline": [],
}
CASES = [(name, change) for name in ARGUMENTS for change in [{}, *ARGUMENTS[name]]]
CLOSE = dict(rtol=1e-5, atol=1e-5)


def make_batch():
    """The batch, scores, reference and anchors; off the action mask every number is NaN."""
    rng = np.random.default_rng(2)
    shape = (len(ROWS), LENGTH)
    action, ends = np.zeros(shape, bool), np.zeros(shape, bool)
    turn_ids = np.full(shape, -1, np.int32)
    rewards = np.zeros(shape, np.float32)
    discounts = np.full(shape, 0.9, np.float32)
    for i, (_, _, turns, paid) in enumerate(ROWS):
        t = 0
        for turn, ((observed, acted), reward) in enumerate(zip(turns, paid, strict=True)):
            end = t + observed + acted
            turn_ids[i, t:end] = turn
            action[i, t + observed : end] = True
            ends[i, end - 1] = True
            rewards[i, end - 1] = reward
            t = end
        if i % 2:  # terminated
            discounts[i, t - 1] = 0.0

    def on_actions(x):
        return np.where(action, x, np.nan).astype(np.float32)

    batch = TrajectoryBatch(
        tokens=np.zeros(shape, np.int32),
        valid_mask=turn_ids >= 0,
        action_mask=action,
        turn_ids=turn_ids,
        turn_ends=ends,
        sampler_logprobs=on_actions(0.0),
        rewards=on_actions(rewards),
        discounts=on_actions(discounts),
        group_ids=np.array([group for group, *_ in ROWS], np.int32),
    )
    logprobs = -rng.uniform(0.1, 3, shape)
    scores = learner.Scores(
        logprobs=on_actions(logprobs),
        entropies=on_actions(0.0),
        values=on_actions(rng.normal(0, 1, shape)),
    )
    ref_logprobs = on_actions(logprobs + rng.normal(0.2, 0.5, shape))
    anchors = np.array([anchors for _, anchors, *_ in ROWS], np.int32)
    return batch, scores, ref_logprobs, anchors


BATCH, SCORES, REF, ANCHORS = make_batch()
MASK = BATCH.action_mask


def run(name, **changes):
    """Credit, which is 0 off the mask, and returns."""
    options = PLAIN | changes
    credit, returns, *_ = estimate.make_estimate(name=name, **options)(BATCH, SCORES, REF, ANCHORS)
    assert credit.shape == MASK.shape and not np.any(np.asarray(credit)[~MASK])
    return np.asarray(credit), np.asarray(returns)


def by_definition(name, rewards=BATCH.rewards, **changes):
    """[B, L] float64 credit, before whitening and the weight of what is negative."""
    options = PLAIN | changes
    values, discounts, ends = SCORES.values, BATCH.discounts, BATCH.turn_ends
    turn_ids, groups = BATCH.turn_ids, BATCH.group_ids
    if name == "gae":
        rows = zip(rewards, values, discounts, MASK)
        return np.array([oracles.gae(*row, gae_lambda=options["gae_lambda"]) for row in rows])
    if name == "turn_gae":
        rows = zip(rewards, values, discounts, MASK, ends)
        return np.array([oracles.turn_gae(*row, gae_lambda=options["gae_lambda"]) for row in rows])
    if name == "bilevel_gae":
        sizes = dict(token_discount=options["discount"], turn_discount=options["turn_discount"])
        rows = zip(rewards, values, MASK, ends)
        return np.array([oracles.bilevel_gae(*row, **sizes, gae_lambda=options["gae_lambda"]) for row in rows])
    if name == "reinforce_plus_plus":
        rows = zip(rewards, discounts, MASK)
        return oracles.whiten(np.array([oracles.rewards_to_go(*row) for row in rows]), MASK)
    if name == "rewards_to_go_group":
        return oracles.rewards_to_go_group(
            rewards,
            discounts,
            MASK,
            turn_ids,
            groups,
            num_groups=GROUPS,
            horizon=options["turn_horizon"],
            scale=options["group_scale"],
            baseline="mean" if options["group_scale"] == "std" else "leave_one_out",
        )
    if name == "gigpo":
        return oracles.gigpo(
            rewards,
            MASK,
            turn_ids,
            ANCHORS,
            groups,
            num_groups=GROUPS,
            turn_discount=options["turn_discount"],
            step_weight=options["step_weight"],
            scale=options["group_scale"],
            first_visit=options["first_visit"],
        )
    if name == "mt_grpo":  # the last turn's reward is the outcome
        outcomes, before = np.zeros(len(rewards)), np.array(rewards, np.float64)
        for row, (mask, turns) in enumerate(zip(MASK, turn_ids)):
            for token in np.flatnonzero(mask & (turns == turns[mask].max(initial=-1))):
                outcomes[row] += before[row, token]
                before[row, token] = 0.0
        return oracles.mt_grpo(
            before, outcomes, MASK, turn_ids, groups, num_groups=GROUPS, turn_weight=options["step_weight"]
        )
    totals = [sum(float(r) for r in row[mask]) for row, mask in zip(rewards, MASK)]
    if name == "leave_one_out":
        credit = oracles.leave_one_out(totals, groups, num_groups=GROUPS)
    elif name == "opo":
        credit = oracles.opo(totals, MASK.sum(axis=1), groups, num_groups=GROUPS)
    elif name == "reinforce_plus_plus_baseline":
        centered = oracles.group_normalized(totals, groups, num_groups=GROUPS, scale="none")
        return oracles.whiten(np.where(MASK, centered[:, None], 0.0), MASK)
    else:
        scale = options["group_scale"]
        credit = oracles.group_normalized(totals, groups, num_groups=GROUPS, scale=scale)
    return np.where(MASK, credit[:, None], 0.0)


def differ(a, b):
    return np.max(np.abs(a - b)) > 0.05


def test_every_name_is_tested():
    assert set(ARGUMENTS) == set(estimate.NAMES)
    plain = [by_definition(name) for name in ARGUMENTS]
    assert all(differ(a, b) for i, a in enumerate(plain) for b in plain[:i])


@pytest.mark.parametrize("name, change", CASES, ids=[f"{n} {c or ''}".strip() for n, c in CASES])
def test_each_name_is_its_algorithm_with_the_given_arguments(name, change):
    expected = by_definition(name, **change)
    assert not change or differ(expected, by_definition(name))  # else this shows nothing
    np.testing.assert_allclose(run(name, **change)[0], expected, **CLOSE)


@pytest.mark.parametrize("name", ["gae", "leave_one_out", "gigpo", "mt_grpo"])
def test_kl_is_taken_off_the_reward_of_every_action_token(name):
    """Unlikelier than under the reference is rewarded, likelier is not: r − β (log π − log π_ref)."""
    k1 = SCORES.logprobs.astype(np.float64) - REF
    expected = by_definition(name, rewards=BATCH.rewards - 0.3 * k1)
    assert differ(expected, by_definition(name, rewards=BATCH.rewards + 0.3 * k1))
    np.testing.assert_allclose(run(name, kl_in_reward=0.3)[0], expected, **CLOSE)


@pytest.mark.parametrize("whiten, skip", [(False, False), (True, False), (True, True)])
def test_whitening_comes_before_the_weight_of_what_is_negative(whiten, skip):
    """Rows without any credit count in neither mean nor variance where they are skipped."""
    plain = by_definition("leave_one_out")
    counted = MASK & np.any(plain != 0, axis=1, keepdims=True) if skip else MASK
    assert np.array_equal(np.any(counted, axis=1), [True] * 5 + [not skip] * 2 + [False])
    expected = oracles.whiten(plain, counted) if whiten else plain
    expected = np.where(expected < 0, 0.25 * expected, expected)
    credit, _ = run("leave_one_out", whiten=whiten, negative_weight=0.25, skip_zero_signal=skip)
    np.testing.assert_allclose(credit, expected, **CLOSE)
    assert np.any(credit[5:7]) == (whiten and not skip)


def test_value_targets_of_gae_are_its_advantages_before_whitening_and_the_values():
    expected = np.where(MASK, by_definition("gae") + SCORES.values, 0.0)
    credit, returns = run("gae", whiten=True, negative_weight=0.25)
    np.testing.assert_allclose(returns, expected, **CLOSE)
    assert differ(np.where(MASK, credit + SCORES.values, 0.0), expected)
