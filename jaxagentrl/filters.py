"""Which groups of an iteration are learned from: all, those that tell something, or those that tell most.

Groups that all won, or all lost, have no gradient in group estimators. DAPO's dynamic sampling plays further games
until an iteration has as many groups that are mixed as it has games; StarPO-S plays as many as ever and learns from
those whose members differ most. What is kept is decided by the functions of `transforms`, on the host's episodes.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from envs_host.types import StopReason
from jaxagentrl import batching, rewards, transforms
from jaxagentrl.models import sharding
from jaxagentrl.trajectory import Trajectory

NAMES = ("none", "dynamic_sampling", "uncertainty")
# Why an episode may have ended that is learned from or not.
STOP_REASONS = tuple(str(reason) for reason in StopReason if reason is not StopReason.ENV_FAILURE)


def check(options: Mapping[str, Any], *, group_size: int) -> None:
    """Refuses settings of `rl.filter` that cannot work, beside what `reinforce.check` looks at key by key.

    Raises:
        ValueError: with the key, what was got and what was expected.
    """
    name, fraction = options["name"], options["fraction"]
    if not 0 < fraction <= 1:
        raise ValueError(f"rl.filter.fraction is a share of the groups, above 0 and at most 1, got {fraction}.")
    if unknown := [reason for reason in options["leave_out"] if reason not in STOP_REASONS]:
        raise ValueError(
            f"rl.filter.leave_out names why episodes ended: {', '.join(STOP_REASONS)}; got {', '.join(unknown)}."
        )
    if set(options["leave_out"]) == set(STOP_REASONS):
        raise ValueError("rl.filter.leave_out names all that an episode may end by: nothing would be learned from.")
    if name != "none" and group_size < 2:
        raise ValueError(
            f"rl.filter.name {name!r} looks at how the members of a group differ, but rl.group_size is {group_size}: "
            "set it to 2 or more, or the filter to 'none'."
        )


def kept(
    trajectories: Sequence[Trajectory],
    *,
    name: str,
    fraction: float,
    num_groups: int,
    group_size: int,
    reward: Mapping[str, Any],
) -> list[Trajectory]:
    """The trajectories of the groups that a filter keeps, in their order.

    Args:
        trajectories: of at most `num_groups` groups of at most `group_size`.
        name: "none": all. "dynamic_sampling": groups with some, but not only, episodes that are won.
            "uncertainty": the `fraction` of the groups, at least one, whose returns differ most.
        num_groups, group_size: the same in every call, for programs of one shape.
        reward: options of `rewards.turn_rewards`, of which returns are the sums.
    """
    if name == "none" or not trajectories:
        return list(trajectories)
    ids = np.full(num_groups * group_size, num_groups, np.int32)
    ids[: len(trajectories)] = batching.group_ids(trajectories)
    with sharding.unused():  # every process has all episodes, and decides for itself
        if name == "dynamic_sampling":
            won = _padded([t.won for t in trajectories], ids.shape, bool)
            keep = _mixed(won, ids, num_groups=num_groups)
        else:
            returns = [np.sum(rewards.turn_rewards(t, **reward), dtype=np.float64) for t in trajectories]
            scores = _padded(returns, ids.shape, np.float32)
            keep = _uncertain(scores, ids, num_groups=num_groups, fraction=fraction)
    return [t for t, is_kept in zip(trajectories, np.asarray(keep)) if is_kept]


def games_to_play(missing: int, *, kept: int, played: int, most: int, multiple: int) -> int:
    """Of a further round: as many as have `missing` groups among them if the next are as the `played` were, of which
    `kept` were; a multiple of `multiple`, and at most `most`, which is one."""
    wanted = math.ceil(missing * played / kept) if kept else most
    return min(most, -(-wanted // multiple) * multiple)


def of_groups(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Those of the first `count` groups, in order of appearance."""
    first = list(dict.fromkeys(t.group for t in trajectories))[:count]
    return [t for t in trajectories if t.group in first]


def num_groups(trajectories: Sequence[Trajectory]) -> int:
    return len({t.group for t in trajectories})


def learned_from(trajectories: Sequence[Trajectory], leave_out: Sequence[str]) -> np.ndarray:
    """[B'] bool, False where an episode ended by what `leave_out` names: DAPO's overlong filtering, for any reason."""
    return np.array([str(t.stop_reason) not in leave_out for t in trajectories], bool)


def _padded(values: Sequence[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    padded = np.zeros(shape, dtype)
    padded[: len(values)] = values
    return padded


@functools.partial(jax.jit, static_argnames="num_groups")
def _mixed(won: np.ndarray, ids: np.ndarray, *, num_groups: int) -> jax.Array:
    return transforms.dynamic_sampling(won, ids, num_groups=num_groups).keep


@functools.partial(jax.jit, static_argnames=("num_groups", "fraction"))
def _uncertain(scores: np.ndarray, ids: np.ndarray, *, num_groups: int, fraction: float) -> jax.Array:
    return transforms.uncertainty_filter(scores, ids, num_groups=num_groups, fraction=fraction).keep
