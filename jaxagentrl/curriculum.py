"""Which games an iteration of RL plays, where they begin, and how many turns they may take: all alike, from simple to
complex worlds, most of those that are won about as often as lost, or from the end of walkthroughs back to their start.

What is drawn depends on the seed and on what was played before, which the state of a sampler holds: a run that goes on
from a checkpoint draws what it would have drawn, and all processes, which know all episodes, draw alike.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs_host.types import Task
from jaxagentrl import tasks
from jaxagentrl.trajectory import Trajectory

ORDERS = ("uniform", "levels", "learnability", "reverse")

# Of what was seen of a game, what still counts when it is played again: the policy was another one then.
_MEMORY = 0.5


def check(options: Mapping[str, Any], *, max_turns: int, num_levels: int) -> None:
    """Refuses settings of `rl.curriculum` that cannot work, beside what `reinforce.check` looks at key by key.

    Args:
        options: `rl.curriculum`.
        max_turns: `rollout.max_turns`.
        num_levels: splits of games to train on.

    Raises:
        ValueError: with the key, what was got and what was expected.
    """
    if options["order"] == "levels" and num_levels < 2:
        raise ValueError(
            "rl.curriculum.order 'levels' goes from split to split, but splits has no train_<name> beside train: add "
            "one, such as train_rooms=(60001, 500, dict(world_size=4)), or set the order to 'uniform'."
        )
    for key in ("share", "threshold"):
        if not 0 < options[key] <= 1:
            raise ValueError(f"rl.curriculum.{key} is a share, above 0 and at most 1, got {options[key]}.")
    limits = (*options["horizons"], max_turns)
    if limits[0] < 1 or any(first >= second for first, second in zip(limits, limits[1:])):
        raise ValueError(
            "rl.curriculum.horizons must be numbers of turns, from 1 and each below the next, the last below "
            f"rollout.max_turns = {max_turns}, got {tuple(options['horizons'])}."
        )


def check_games(games: Sequence[Task], order: str) -> None:
    """Refuses games that `rl.curriculum.order` cannot begin where it is to.

    Raises:
        ValueError: with the first of them.
    """
    without = [task.name for task in games if not task.walkthrough] if order == "reverse" else []
    if without:
        raise ValueError(
            f"rl.curriculum.order 'reverse' begins near the end of walkthroughs, which {len(without)} of the {len(games)} "
            f"games to train on have not, such as {without[0]}: take games that have one, or set another order."
        )


def max_turns(iteration: int, *, horizons: Sequence[int], horizon_iterations: int, longest: int) -> int:
    """ScalingInter-RL's horizon (arXiv 2509.08755): the n-th phase of an equal number of iterations has
    the n-th horizon, what follows the `longest`.

    Args:
        iteration: from 0.
        horizons: turns of an episode, phase by phase.
        horizon_iterations: of each phase.
        longest: `rollout.max_turns`.
    """
    phase = iteration // horizon_iterations
    return horizons[phase] if phase < len(horizons) else longest


class _FromTheStart:
    def head_starts(self, drawn: Sequence[Task]) -> list[int]:
        """Commands of each game's walkthrough that are given before its episodes begin: none."""
        return [0] * len(drawn)


class Uniform(_FromTheStart, tasks.Sampler):
    """Every game once per epoch, whatever came of it."""

    def tell(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes note of what was played of the last draw; returns metrics, of which this one has none."""
        return {}


class Levels(_FromTheStart):
    """From simple to complex worlds: the games of the first level, and those of each further level once enough of
    the one before is won. What was learned first goes on being played, lest it be forgotten."""

    def __init__(
        self, levels: Mapping[str, Sequence[Task]], *, share: float, threshold: float, window: int, seed: int
    ):
        """Args:
        levels: games of each, by name, the simplest first.
        share: of an iteration's games, those of the latest level; the levels before it have equal parts of the others.
        threshold: share of the latest level's episodes that are won at which the next begins,
        window: counted over as many iterations.
        seed: of the orders of games.
        """
        self._samplers = [tasks.Sampler(games, seed=seed) for games in levels.values()]
        self._level_of = {_key(task): index for index, games in enumerate(levels.values()) for task in games}
        self._share, self._threshold, self._window = share, threshold, window
        self._latest = 0
        self._recent: list[tuple[int, int]] = []  # of the latest level: won and played, iteration by iteration

    def take(self, count: int) -> list[Task]:
        """The next games."""
        counts = [0] * self._latest + [count]
        if self._latest:
            counts[-1] = _part(self._share, count)
            rest = count - counts[-1]
            for index in range(self._latest):  # what is left over goes to the later ones
                counts[index] = rest // (self._latest - index)
                rest -= counts[index]
        return [task for sampler, number in zip(self._samplers, counts) for task in sampler.take(number)]

    def tell(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes note of what was played; begins the next level where that is due.

        Returns:
            `curriculum/level`, from 1, that was the latest; `curriculum/success` of its episodes, if there were any.
        """
        values = {"curriculum/level": float(self._latest + 1)}
        outcomes = [t.won for t in trajectories if self._level_of[_key(t.task)] == self._latest]
        if outcomes:
            values["curriculum/success"] = sum(outcomes) / len(outcomes)
            self._recent = [*self._recent, (sum(outcomes), len(outcomes))][-self._window :]
        if _is_due(self._recent, self._threshold, self._window) and self._latest + 1 < len(self._samplers):
            self._latest, self._recent = self._latest + 1, []
        return values

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        samplers = [sampler.state() for sampler in self._samplers]
        return {"latest": self._latest, "recent": [list(pair) for pair in self._recent], "samplers": samplers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            tasks.StateError: the state is another sampler's.
        """
        tasks.check_state("curriculum.Levels", self.state(), state, ())
        if len(state["samplers"]) != len(self._samplers) or not 0 <= state["latest"] < len(self._samplers):
            raise tasks.StateError(
                f"curriculum.Levels: the saved state has {len(state['samplers'])} levels, {len(self._samplers)} are here."
            )
        for sampler, saved in zip(self._samplers, state["samplers"]):
            sampler.restore(saved)
        self._latest, self._recent = state["latest"], [(won, played) for won, played in state["recent"]]


class Learnability(_FromTheStart):
    """Most of those games that are won about as often as lost, since what is always won, or always lost, teaches a
    group nothing: p (1 − p), the variance of success (arXiv 2408.15099 and 2502.12272).

    Those play games for the sole purpose of estimating it. Here the training's own episodes tell: wins and losses of
    a game, of earlier visits half as much each time, with the prior Beta(1/2, 1/2), of which
    E[p (1 − p)] = a b / ((a + b) (a + b + 1)). A game that was not played yet has 1/8; eight episodes, all lost, leave
    0.047 and four won of eight 0.225. A part of the games is drawn from all alike, so that those are met again of which
    the policy has become, or ceased to be, capable. Games under several names count as one.
    """

    def __init__(self, games: Sequence[Task], *, share: float, seed: int):
        """Args: games to draw from; share, of an iteration's games, those that are drawn by learnability; seed."""
        self._games, self._share, self._seed = list(games), share, seed
        self._uniform = tasks.Sampler(games, seed=seed)
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(task.digest for task in games))}
        self._numbers = numbers
        self._of_task = np.array([numbers[task.digest] for task in games])
        self._draws = 0
        self._won, self._lost = np.zeros(len(numbers)), np.zeros(len(numbers))

    def take(self, count: int) -> list[Task]:
        """The next games: first those of the epoch, then others by learnability, as far as there are others."""
        drawn = self._uniform.take(count - min(len(self._games), math.floor(round(self._share * count, 9))))
        taken = {_key(task) for task in drawn}
        left = [index for index, task in enumerate(self._games) if _key(task) not in taken]
        # Successive draws without replacement, each by weight: the largest of log weight + Gumbel noise.
        noise = np.random.default_rng((self._seed, 1, self._draws)).gumbel(size=len(left))
        order = np.argsort(-(np.log(self.learnability()[self._of_task[left]]) + noise), kind="stable")
        drawn += [self._games[left[index]] for index in order[: count - len(drawn)]]
        self._draws += 1
        return drawn + self._uniform.take(count - len(drawn))

    def learnability(self) -> np.ndarray:
        """[number of games] float64: what is expected of p (1 − p), in the order in which games appear first."""
        a, b = self._won + 0.5, self._lost + 0.5
        return a * b / ((a + b) * (a + b + 1))

    def tell(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes note of what was played.

        Returns:
            `curriculum/visited`, the share of games that were played so far, and `curriculum/learnability`, the mean of
            what is expected of p (1 − p) over all games.
        """
        outcomes = collections.defaultdict(list)
        for trajectory in trajectories:
            outcomes[self._numbers[trajectory.task.digest]].append(trajectory.won)
        for number, won in outcomes.items():
            self._won[number] = _MEMORY * self._won[number] + sum(won)
            self._lost[number] = _MEMORY * self._lost[number] + len(won) - sum(won)
        visited = float(np.mean(self._won + self._lost > 0))
        return {"curriculum/visited": visited, "curriculum/learnability": float(np.mean(self.learnability()))}

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        counts = {"won": self._won.tolist(), "lost": self._lost.tolist()}
        return {"uniform": self._uniform.state(), "draws": self._draws, **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            tasks.StateError: the state is another sampler's.
        """
        tasks.check_state("curriculum.Learnability", self.state(), state, ())
        self._uniform.restore(state["uniform"])
        self._draws = state["draws"]
        self._won, self._lost = np.array(state["won"]), np.array(state["lost"])


class Reverse:
    """From the end of walkthroughs back to their start (Florensa et al. 2017, arXiv 1707.05300; of demonstrations
    Salimans and Chen 2018, arXiv 1812.03381; with language models arXiv 2402.05808): episodes begin behind all but the
    last command of the game's walkthrough and, whenever enough of these are won, also one command earlier. What leads
    to a first win by chance is short then, whatever the game's length. A game's commands left are drawn from all that
    were reached (as in the last of these papers): where all begin at the newest, of which nothing may be won at first, a
    policy that knows how games end has nothing to hold it (docs/study.md). Every game once per epoch."""

    def __init__(self, games: Sequence[Task], *, share: float, threshold: float, window: int, seed: int):
        """Args:
        games: each with its walkthrough.
        share: of an iteration's games, those that begin late; the others are played from the start.
        threshold: share that is won of those that begin earliest at which others begin one command earlier still,
        window: counted over as many iterations.
        seed: of the orders of games.
        """
        self._sampler, self._seed = tasks.Sampler(games, seed=seed), seed
        self._share, self._threshold, self._window = share, threshold, window
        self._left = 1
        self._recent: list[tuple[int, int]] = []  # of episodes that begin earliest: won and played, by iteration

    def take(self, count: int) -> list[Task]:
        """The next games."""
        return self._sampler.take(count)

    def head_starts(self, drawn: Sequence[Task]) -> list[int]:
        """Commands of each game's walkthrough that are given before its episodes begin."""
        state, num_late = self._sampler.state(), _part(self._share, len(drawn))
        rng = np.random.default_rng((self._seed, 1, state["epoch"], state["position"]))
        left = rng.integers(1, self._left, size=num_late, endpoint=True)
        late = [max(0, len(task.walkthrough) - int(count)) for task, count in zip(drawn, left)]
        return late + [0] * (len(drawn) - num_late)

    def tell(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Takes note of what was played; begins earlier where that is due.

        Returns:
            `curriculum/commands_left`, the most that walkthroughs of late episodes had left; the success of those with
            as many, `curriculum/success`, and of what was played from the start, `curriculum/success_from_start`,
            where there were any; `curriculum/late_share`, what part of the episodes was begun late, which is less than
            was drawn where a head start left no room for a turn.
        """
        values = {"curriculum/commands_left": float(self._left)}
        if trajectories:
            values["curriculum/late_share"] = sum(t.head_start > 0 for t in trajectories) / len(trajectories)
        earliest = [t.won for t in trajectories if 0 < t.head_start == len(t.task.walkthrough) - self._left]
        from_start = [t.won for t in trajectories if not t.head_start]
        if from_start:
            values["curriculum/success_from_start"] = sum(from_start) / len(from_start)
        if earliest:
            values["curriculum/success"] = sum(earliest) / len(earliest)
            self._recent = [*self._recent, (sum(earliest), len(earliest))][-self._window :]
        if _is_due(self._recent, self._threshold, self._window):  # never, once no walkthrough is longer
            self._left, self._recent = self._left + 1, []
        return values

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        return {"left": self._left, "recent": [list(pair) for pair in self._recent], "sampler": self._sampler.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            tasks.StateError: the state is another sampler's.
        """
        tasks.check_state("curriculum.Reverse", self.state(), state, ())
        self._sampler.restore(state["sampler"])
        self._left, self._recent = state["left"], [(won, played) for won, played in state["recent"]]


Sampler = Uniform | Levels | Learnability | Reverse


def make(levels: Mapping[str, Sequence[Task]], options: Mapping[str, Any], *, seed: int) -> Sampler:
    """The sampler that `rl.curriculum` asks for.

    Args:
        levels: games of each split that is trained on, by name, the simplest first.
        options: `rl.curriculum`.
        seed: the run's.
    """
    games = [task for split in levels.values() for task in split]
    if options["order"] == "uniform":
        return Uniform(games, seed=seed)
    if options["order"] == "learnability":
        return Learnability(games, share=options["share"], seed=seed)
    progress = {key: options[key] for key in ("share", "threshold", "window")}
    if options["order"] == "reverse":
        return Reverse(games, **progress, seed=seed)
    return Levels(levels, **progress, seed=seed)


def told(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """What to say after the last of these lines of phase "rl", where it was the first of a level, or of a horizon.

    Args:
        lines: of the metrics.
        names: of the levels' splits.
    """
    parts = []
    for key, said in (
        ("curriculum/level", lambda value: f"games of splits.{names[int(value) - 1]} are played"),
        ("curriculum/commands_left", lambda value: f"late episodes begin {value:.0f} commands before the end"),
        ("curriculum/max_turns", lambda value: f"episodes may have {value:.0f} turns"),
    ):
        before, now = (line.get(key) for line in (lines[-2:] if len(lines) > 1 else [{}, *lines]))
        if now != before and before is not None:
            parts.append(said(now))
    return f"curriculum: from iteration {lines[-1]['step']} on {' and '.join(parts)}" if parts else None


def _part(share: float, count: int) -> int:
    return math.ceil(round(share * count, 9))  # 0.1 * 30 is a little above 3


def _is_due(recent: Sequence[tuple[int, int]], threshold: float, window: int) -> bool:
    """Whether enough was won of what was (won, played) in as many iterations."""
    won, played = map(sum, zip(*recent)) if recent else (0, 0)
    return len(recent) == window and won >= threshold * played


def _key(task: Task) -> tuple[str, str]:
    return task.name, task.digest
