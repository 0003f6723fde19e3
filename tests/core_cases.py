"""Ragged random batches for the tests of the functional core."""

import numpy as np
from hypothesis import strategies as st


def batch(seed, rows=3, length=9, *, num_groups=2, junk=0.0, group_size=None, max_turns=4):
    """A dict of float32/bool/int32 arrays for `rows` ragged episodes of at most `length` tokens.

    Rows may have no action token, end in the middle, be padding, terminate early or late. Off the
    action mask every float array holds `junk`, so NaN there shows whether anything is read.
    """
    rng = np.random.default_rng(seed)
    action_mask = np.zeros((rows, length), bool)
    turn_ids = np.full((rows, length), -1, np.int32)
    turn_ends = np.zeros((rows, length), bool)
    discounts = np.ones((rows, length), np.float32)
    for i in range(rows):
        t, turn = 0, 0
        stop = rng.integers(0, length + 1)
        while t < stop and turn < max_turns:
            observed = rng.integers(0, 3)
            acted = rng.integers(1, 4)
            here = slice(t, min(t + observed + acted, length))
            turn_ids[i, here] = turn
            acting = slice(min(t + observed, length), here.stop)
            action_mask[i, acting] = True
            if acting.stop > acting.start:
                turn_ends[i, acting.stop - 1] = True
            t, turn = here.stop, turn + 1
        discounts[i] = rng.choice([1.0, 0.9])
        if action_mask[i].any() and rng.random() < 0.5:
            discounts[i, np.flatnonzero(action_mask[i])[-1]] = 0.0
    valid_mask = turn_ids >= 0

    def numbers(scale=1.0):
        drawn = (scale * rng.standard_normal((rows, length))).astype(np.float32)
        return np.where(action_mask, drawn, np.float32(junk))

    rewards = numbers()
    rewards[action_mask & ~turn_ends] = 0.0
    if group_size:
        group_ids = np.arange(rows) // group_size
    else:
        group_ids = rng.integers(0, num_groups + 1, rows)  # num_groups itself marks padding rows
    logprobs = -np.abs(numbers())

    def near():
        return np.where(action_mask, np.where(action_mask, logprobs, 0) + numbers(0.3), junk)
    return {
        "tokens": rng.integers(0, 50, (rows, length)).astype(np.int32),
        "valid_mask": valid_mask,
        "action_mask": action_mask,
        "turn_ids": turn_ids,
        "turn_ends": turn_ends,
        "rewards": rewards,
        "values": numbers(),
        "discounts": np.where(action_mask, discounts, np.float32(junk)),
        "advantages": numbers(),
        "logprobs": logprobs,
        "old_logprobs": near().astype(np.float32),
        "ref_logprobs": near().astype(np.float32),
        "group_ids": group_ids.astype(np.int32),
        "scores": rng.choice([0.0, 1.0, 0.3], rows).astype(np.float32),
        "succeeded": rng.random(rows) < 0.5,
        "anchor_ids": rng.integers(-1, 3, (rows, max_turns)).astype(np.int32),
    }


SEEDS = st.integers(0, 2**32 - 1)
SHAPES = {"rows": 3, "length": 9}
