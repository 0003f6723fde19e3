"""Trajectories to `TrajectoryBatch`: group ids, length buckets, padding. Numpy.

Compiled programs want few shapes and no padding. `length_groups` sorts the rows of a batch into
micro-batches of the same token budget (long and few rows, or short and many), `to_batch` builds one.
The weights of tokens in a loss are computed before, over the whole batch (`losses.aggregation_weights`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from envs_host.types import StopReason
from jaxagentrl.packing import rows_per_part
from jaxagentrl.trajectory import Trajectory
from jaxagentrl.types import TrajectoryBatch


@dataclasses.dataclass(frozen=True)
class LengthGroup:
    """Which trajectories share one batch, and its shape."""

    indices: tuple[int, ...]  # into the sequence given, longest first
    length: int  # L
    num_rows: int  # B, padding rows included


def to_batch(
    trajectories: Sequence[Trajectory],
    turn_rewards: Sequence[np.ndarray] | None,
    *,
    discount: float,
    length_buckets: Sequence[int],
    row_multiple: int,
    group_ids: Sequence[int] | np.ndarray | None = None,
    num_groups: int | None = None,
    num_rows: int | None = None,
) -> TrajectoryBatch:
    """Pads trajectories into one batch of numpy arrays.

    Args:
        trajectories: B' ≥ 1 of them.
        turn_rewards: one vector [T] for each, paid on the turns' last action tokens; None for
            imitation, where rewards are 0.
        discount: γ of every action token, but 0 on the last one of an episode that terminated. A
            truncated episode keeps γ: its bootstrap value is the estimator's business.
        length_buckets: allowed L; the smallest that holds the longest trajectory is taken.
        row_multiple: B is rounded up to a multiple of this (the number of devices, say).
        group_ids: [B'], from `group_ids` over the whole set if this batch is a part of it. None
            numbers the groups of these trajectories from 0 in order of appearance.
        num_groups: number of groups in the whole set, the id of padding rows; None takes the
            largest id plus 1.
        num_rows: exact B, for batches that must share a shape; None rounds B' up.

    Returns:
        The batch, B ≥ B' rows; row i is trajectory i.

    Raises:
        ValueError: no trajectories, one that is longer than every bucket, has no turns or was
            broken by its environment, rewards that do not fit their turns or are not finite, group
            ids out of range, or too few rows.
    """
    if not trajectories:
        raise ValueError("to_batch: no trajectories; an empty batch must be skipped by the caller")
    _check_trajectories(trajectories, turn_rewards)
    length = bucket(max(t.num_tokens for t in trajectories), length_buckets, trajectories)
    rows = _num_rows(len(trajectories), row_multiple, num_rows)
    ids, padding_id = _group_column(trajectories, group_ids, num_groups)

    batch = TrajectoryBatch(
        tokens=np.zeros((rows, length), np.int32),
        valid_mask=np.zeros((rows, length), bool),
        action_mask=np.zeros((rows, length), bool),
        turn_ids=np.full((rows, length), -1, np.int32),
        turn_ends=np.zeros((rows, length), bool),
        sampler_logprobs=np.zeros((rows, length), np.float32),
        rewards=np.zeros((rows, length), np.float32),
        discounts=np.zeros((rows, length), np.float32),
        group_ids=np.full(rows, padding_id, np.int32),
    )
    batch.group_ids[: len(ids)] = ids
    for row, trajectory in enumerate(trajectories):
        end = trajectory.num_tokens
        fields = trajectory.token_fields()
        for name, values in fields.items():
            vars(batch)[name][row, :end] = values
        batch.valid_mask[row, :end] = True
        ends = np.flatnonzero(fields["turn_ends"])
        if turn_rewards is not None:
            batch.rewards[row, ends] = turn_rewards[row]
        batch.discounts[row, :end] = np.where(fields["action_mask"], discount, 0.0)
        if trajectory.terminated:
            batch.discounts[row, ends[-1]] = 0.0
    return batch


def length_groups(
    lengths: Sequence[int],
    *,
    length_buckets: Sequence[int],
    tokens_per_batch: int,
    row_multiple: int,
) -> list[LengthGroup]:
    """Sorts trajectories into batches of nearly equal lengths and a fixed set of shapes.

    Each bucket L has one number of rows, about tokens_per_batch / L, so that there are at most as
    many shapes as buckets and each costs about the same. Trajectories are taken longest first; a
    batch takes the bucket of its longest, and shorter ones fill the rows it has left.

    Args:
        lengths: `num_tokens` of each trajectory.
        length_buckets: allowed L.
        tokens_per_batch: upper bound of B × L, as long as `row_multiple` rows fit.
        row_multiple: B is a multiple of this.

    Returns:
        Groups in order of falling length; every index is in exactly one. Deterministic.
    """
    if row_multiple < 1 or tokens_per_batch < 1:
        raise ValueError(
            f"length_groups: row_multiple {row_multiple} and tokens_per_batch {tokens_per_batch} "
            "must be 1 or more"
        )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups = []
    start = 0
    while start < len(order):
        length = bucket(lengths[order[start]], length_buckets)
        rows = rows_per_part(
            length, tokens_per_part=tokens_per_batch, row_multiple=row_multiple
        )
        groups.append(LengthGroup(tuple(order[start : start + rows]), length, rows))
        start += rows
    return groups


def group_ids(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Numbers the groups from 0 in order of appearance: int32 [B'].

    Raises:
        ValueError: one group number stands for two tasks.
    """
    numbers: dict[int, int] = {}
    tasks: dict[int, str] = {}
    for trajectory in trajectories:
        numbers.setdefault(trajectory.group, len(numbers))
        name = tasks.setdefault(trajectory.group, trajectory.task.name)
        if name != trajectory.task.name:
            raise ValueError(
                f"group {trajectory.group} holds the tasks {name} and {trajectory.task.name}; the "
                "members of a group play the same task"
            )
    return np.asarray([numbers[t.group] for t in trajectories], np.int32)


def anchor_ids(
    trajectories: Sequence[Trajectory], *, num_rows: int, max_turns: int
) -> np.ndarray:
    """Numbers the states that turns were taken in: int32 [num_rows, max_turns].

    Two turns of one group have the same id if and only if their anchors are equal; a turn without an
    anchor, and every place that holds no turn, has −1. Each group counts from 0: its ids are below the number
    of its members × max_turns.
    """
    ids = np.full((num_rows, max_turns), -1, np.int32)
    seen: dict[int, dict[str, int]] = {}
    for row, trajectory in enumerate(trajectories):
        mine = seen.setdefault(trajectory.group, {})
        for index, turn in enumerate(trajectory.turns):
            if turn.anchor is not None:
                ids[row, index] = mine.setdefault(turn.anchor, len(mine))
    return ids


def bucket(
    length: int, length_buckets: Sequence[int], trajectories: Sequence[Trajectory] = ()
) -> int:
    """The smallest bucket that holds `length` tokens.

    Raises:
        ValueError: there is none; names the longest of `trajectories` if given.
    """
    if not length_buckets:
        raise ValueError("length_buckets is empty; give at least one length")
    fitting = [size for size in length_buckets if size >= length]
    if fitting:
        return min(fitting)
    longest = max(trajectories, key=lambda t: t.num_tokens, default=None)
    whose = "" if longest is None else f" of task {longest.task.name}"
    raise ValueError(
        f"a trajectory{whose} has {length} tokens, more than the largest length bucket "
        f"{max(length_buckets)}: raise length_buckets (of a run: learner.length_buckets, and sampling.max_length with "
        "them), or take tasks whose texts are shorter"
    )


def _num_rows(count: int, row_multiple: int, num_rows: int | None) -> int:
    if row_multiple < 1:
        raise ValueError(f"to_batch: row_multiple must be 1 or more, got {row_multiple}")
    if num_rows is None:
        return -(-count // row_multiple) * row_multiple
    if num_rows < count or num_rows % row_multiple:
        raise ValueError(
            f"to_batch: num_rows {num_rows} must hold {count} trajectories and be a multiple of "
            f"row_multiple {row_multiple}"
        )
    return num_rows


def _group_column(
    trajectories: Sequence[Trajectory],
    given: Sequence[int] | np.ndarray | None,
    num_groups: int | None,
) -> tuple[np.ndarray, int]:
    ids = group_ids(trajectories) if given is None else np.asarray(given, np.int32)
    if ids.shape != (len(trajectories),):
        raise ValueError(
            f"to_batch: group_ids has shape {ids.shape}, expected ({len(trajectories)},)"
        )
    padding_id = int(ids.max()) + 1 if num_groups is None else num_groups
    if ids.min() < 0 or ids.max() >= padding_id:
        raise ValueError(
            f"to_batch: group ids run from {ids.min()} to {ids.max()}, expected 0 to "
            f"{padding_id - 1} for {padding_id} groups"
        )
    return ids, padding_id


def _check_trajectories(
    trajectories: Sequence[Trajectory], turn_rewards: Sequence[np.ndarray] | None
) -> None:
    if turn_rewards is not None and len(turn_rewards) != len(trajectories):
        raise ValueError(
            f"to_batch: {len(turn_rewards)} reward vectors for {len(trajectories)} trajectories"
        )
    problems = []
    for index, trajectory in enumerate(trajectories):
        name = f"trajectory {index} (task {trajectory.task.name})"
        if trajectory.stop_reason is StopReason.ENV_FAILURE:
            problems.append(f"{name} was broken by its environment; drop and count it")
        if not trajectory.turns:
            problems.append(f"{name} has no turns")
        if turn_rewards is None:
            continue
        rewards = np.asarray(turn_rewards[index])
        if rewards.shape != (trajectory.num_turns,):
            problems.append(
                f"{name} has {trajectory.num_turns} turns but rewards of shape {rewards.shape}"
            )
        elif not np.all(np.isfinite(rewards)):
            problems.append(f"{name} has rewards that are not finite: {rewards}")
    if problems:
        raise ValueError("to_batch: " + "; ".join(problems))
