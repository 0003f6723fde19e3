"""Which tasks are played: splits that never overlap, and samplers whose state is saved.

A sampler's draws depend on its seed and its counters only, so that a run which was stopped and
restored draws what it would have drawn.
"""

import collections
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs_host.types import Task


class SplitError(ValueError):
    """Two splits share seeds or games."""


class StateError(ValueError):
    """A saved sampler state belongs to another sampler."""


def seed_ranges(ranges: Mapping[str, tuple[int, int]]) -> dict[str, range]:
    """Turns {split: (first seed, number of seeds)} into ranges and checks that they are disjoint.

    Splits are kept apart by seed alone, whatever the games' parameters, so that a held-out set is
    held out from every training set. Call it before any game is generated.

    Raises:
        SplitError: two ranges overlap, or a count is below 1.
    """
    for name, (first, count) in ranges.items():
        if count < 1 or first < 0:
            raise SplitError(
                f"split {name!r} has first seed {first} and {count} seeds; it needs a first seed "
                "of 0 or more and at least one"
            )
    made = {name: range(first, first + count) for name, (first, count) in ranges.items()}
    for (name, seeds), (other, others) in itertools.combinations(made.items(), 2):
        low, high = max(seeds.start, others.start), min(seeds.stop, others.stop) - 1
        if low <= high:
            raise SplitError(
                f"splits {name!r} (seeds {seeds.start} to {seeds.stop - 1}) and {other!r} (seeds "
                f"{others.start} to {others.stop - 1}) share the seeds {low} to {high}; move one "
                "of them"
            )
    return made


def check_splits(splits: Mapping[str, Sequence[Task]]) -> None:
    """Checks that no two splits share a seed or a game, and that no split holds a task twice.

    The same game can come out of two seeds; its digest tells.

    Raises:
        SplitError: with the names of the splits, and the seeds or tasks that they share.
    """
    for name, tasks in splits.items():
        counts = collections.Counter(task.name for task in tasks)
        repeated = sorted(task for task, count in counts.items() if count > 1)
        if repeated:
            raise SplitError(f"split {name!r} holds tasks twice: {_some(repeated)}")
    for (name, tasks), (other, others) in itertools.combinations(splits.items(), 2):
        seeds = {task.seed for task in tasks} & {task.seed for task in others}
        if seeds:
            raise SplitError(
                f"splits {name!r} and {other!r} share the seeds {_some(sorted(seeds))}; move one "
                "of them"
            )
        by_digest = {task.digest: task for task in tasks}
        same = [(by_digest[t.digest].name, t.name) for t in others if t.digest in by_digest]
        if same:
            pairs = [f"{one} and {two}" for one, two in same]
            raise SplitError(
                f"splits {name!r} and {other!r} hold the same game under different seeds: "
                f"{_some(pairs)}; leave these out of one of them (tasks.without)"
            )


def without(tasks: Sequence[Task], held_out: Sequence[Task]) -> list[Task]:
    """The tasks whose game is in no held-out task, by digest; and each game only once."""
    seen = {task.digest for task in held_out}
    kept = []
    for task in tasks:
        if task.digest not in seen:
            seen.add(task.digest)
            kept.append(task)
    return kept


class Sampler:
    """Draws tasks epoch by epoch, each epoch in a new order; every task once per epoch."""

    def __init__(self, tasks: Sequence[Task], *, seed: int):
        """Args: tasks, at least one; seed, which together with the epoch gives the order."""
        if not tasks:
            raise ValueError("tasks.Sampler: there are no tasks to draw from")
        self._tasks = list(tasks)
        self._seed = seed
        self._digest = _digest([task.name for task in tasks])
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    def take(self, count: int) -> list[Task]:
        """The next tasks; goes on into the next epoch where this one ends."""
        drawn = []
        for _ in range(count):
            drawn.append(self._tasks[self._order[self._position]])
            self._position += 1
            if self._position == len(self._tasks):
                self._epoch += 1
                self._position = 0
                self._order = self._epoch_order()
        return drawn

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        return {
            "seed": self._seed,
            "num_tasks": len(self._tasks),
            "digest": self._digest,
            "epoch": self._epoch,
            "position": self._position,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            StateError: the state is of other tasks, another order of them or another seed.
        """
        check_state("tasks.Sampler", self.state(), state, ("seed", "num_tasks", "digest"))
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < len(self._tasks):
            raise StateError(f"tasks.Sampler: no epoch {epoch} with a position {position}")
        self._epoch, self._position = epoch, position
        self._order = self._epoch_order()

    def _epoch_order(self) -> np.ndarray:
        return np.random.default_rng((self._seed, self._epoch)).permutation(len(self._tasks))


def check_state(
    what: str, own: Mapping[str, Any], given: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Refuses the saved state of another sampler than `what`, whose own is given; they agree in `keys`.

    Raises:
        StateError: with what differs.
    """
    if set(given) != set(own):
        raise StateError(
            f"{what}: a state needs {sorted(own)}, got {sorted(given)}; it was written by another "
            "version"
        )
    differing = [
        f"{key} {given[key]!r} (here {own[key]!r})" for key in keys if given[key] != own[key]
    ]
    if differing:
        raise StateError(
            f"{what}: the saved state is of another task set or seed: {', '.join(differing)}. "
            "Restore it with the tasks and the seed it was saved with."
        )


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _some(items: Sequence[Any]) -> str:
    """The first few of a list, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
