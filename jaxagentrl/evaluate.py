"""Evaluation on fixed held-out tasks, and the two agents that bound it: random and walkthrough."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from envs_host.types import EnvFailure, StepResult, StopReason, Task
from jaxagentrl import metrics
from jaxagentrl.rollout import Pool, Rollout
from jaxagentrl.trajectory import Trajectory

# A player's rule: (task, turn number, admissible commands) → command.
Policy = Callable[[Task, int, Sequence[str]], str]


def summary(prefix: str, rollout: Rollout) -> dict[str, float]:
    """Metrics of a set of episodes; failed environments are counted and in no rate.

    Keys: success rate with n and 95 % interval, mean return (score / max score), turns, tokens,
    share of refused commands (`invalid_command_rate`) and of commands that the episode had given before in the same
    state (`repeat_rate`), different commands of all episodes by all that were sent (`distinct_commands`), one count per
    stop reason, environment failures.
    """
    played = rollout.trajectories
    counts = collections.Counter(trajectory.stop_reason for trajectory in played)
    values = metrics.success_metrics(prefix, sum(t.won for t in played), len(played))
    values[f"{prefix}/env_failures"] = len(rollout.failures)
    reasons = [reason for reason in StopReason if reason is not StopReason.ENV_FAILURE]  # which is no episode's
    values |= {f"{prefix}/stop_{reason}": counts[reason] for reason in reasons}
    if played:
        num_turns = sum(trajectory.num_turns for trajectory in played)
        values |= {
            f"{prefix}/return_mean": np.mean([t.score / t.max_score for t in played]),
            f"{prefix}/turns_mean": num_turns / len(played),
            f"{prefix}/tokens_mean": np.mean([t.num_tokens for t in played]),
        }
    if sent := [turn for trajectory in played for turn in trajectory.sent_turns]:
        refused = [not turn.valid_command for turn in sent]
        values |= {
            f"{prefix}/invalid_command_rate": np.mean(refused),
            f"{prefix}/repeat_rate": sum(map(_num_repeated, played)) / len(sent),
            f"{prefix}/distinct_commands": len({turn.command for turn in sent}) / len(sent),
        }
    return {key: float(value) for key, value in values.items()}


def _num_repeated(trajectory: Trajectory) -> int:
    """Turns whose command was given before where the episode was in the same state, by what GiGPO tells states apart."""
    given = [(turn.observation if turn.anchor is None else turn.anchor, turn.command) for turn in trajectory.sent_turns]
    return len(given) - len(set(given))


def pass_at(prefix: str, won: Mapping[str, Sequence[bool]], attempts: int) -> dict[str, float]:
    """Of how many games at least one of k attempts wins: pass@k, by the unbiased estimator over all n that were made,
    1 − C(n − c, k) / C(n, k) with c of them won (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1).

    Args:
        prefix: of the metrics.
        won: of each game, attempt by attempt; where an environment failed there are fewer.
        attempts: most that a game has.

    Returns:
        `<prefix>/pass_at_<k>`, the mean over the games with k attempts or more, for k = 1, 2, 4, … and all attempts, and
        its 95 % interval, `…_low` and `…_high`: Wilson's over games, which is that of games won or lost and wide enough
        for shares in between. A k of which no game has as many is left out.
    """
    values: dict[str, float] = {}
    for k in sorted({2**power for power in range(attempts.bit_length())} | {attempts}):
        shares = [
            1 - math.comb(len(each) - sum(each), k) / math.comb(len(each), k) for each in won.values() if len(each) >= k
        ]
        if shares:
            low, high = metrics.wilson_interval(sum(shares), len(shares))
            key = f"{prefix}/pass_at_{k}"
            values |= {key: float(np.mean(shares)), f"{key}_low": low, f"{key}_high": high}
    return values


def temperature_suffix(temperature: float) -> str:
    """Of a metric's prefix, where the temperature is not the run's own: "eval" -> "eval.t0.7".

    No split's prefix can be equal to it: keys of a config have no dots.
    """
    return f".t{temperature:g}"


def breakdown(prefix: str, rollout: Rollout) -> dict[str, float]:
    """Success by split and task type, for tasks that have them (ALFWorld): rate, n and interval.

    Keys: `<prefix>/<split>/success_rate`, `<prefix>/<split>/<task type>/success_rate` and so on.
    """
    sets: dict[str, list[bool]] = {}
    for trajectory in rollout.trajectories:
        params = trajectory.task.params
        if "split" in params and "task_type" in params:
            split = f"{prefix}/{params['split']}"
            for key in (split, f"{split}/{params['task_type']}"):
                sets.setdefault(key, []).append(trajectory.won)
    values: dict[str, float] = {}
    for key in sorted(sets):
        values |= metrics.success_metrics(key, sum(sets[key]), len(sets[key]))
    return {key: float(value) for key, value in values.items()}


def play(
    tasks: Sequence[Task],
    pool: Pool,
    policy: Policy,
    *,
    max_turns: int,
    max_in_flight: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[int, int, int]:
    """Plays every task once with a rule instead of a model, so many at a time. `advance` is called with 1 for
    every episode that ended.

    Returns:
        (episodes won, episodes played to their end, environment failures).
    """
    waiting = collections.deque(range(len(tasks)))
    turns: dict[int, int] = {}
    won = failures = 0
    try:
        while waiting or turns:
            while waiting and len(turns) < max_in_flight:
                index = waiting.popleft()
                turns[index] = 0
                pool.reset(index, tasks[index])
            for index, answer in pool.poll():
                failed = isinstance(answer, EnvFailure)
                ended = isinstance(answer, StepResult) and (answer.terminated or answer.truncated)
                if failed or ended or turns[index] == max_turns:
                    failures += failed
                    won += not failed and answer.info.won
                    del turns[index]
                    pool.release(index)
                    advance(1)
                    continue
                command = policy(tasks[index], turns[index], answer.info.admissible_commands)
                turns[index] += 1
                pool.step(index, command)
    finally:
        for index in turns:
            pool.release(index)
    return won, len(tasks) - failures, failures


def random_policy(seed: int) -> Policy:
    """Uniform over the admissible commands; a task's choices do not depend on the others. Where an environment
    lists none it says nothing."""

    def policy(task: Task, turn: int, admissible: Sequence[str]) -> str:
        rng = np.random.default_rng((seed, int(task.digest[:8], 16), turn))
        return admissible[rng.integers(len(admissible))] if admissible else ""

    return policy


def walkthrough_policy(task: Task, turn: int, admissible: Sequence[str]) -> str:
    """The recorded winning commands; wins if the environment is what it was at generation."""
    del admissible
    return task.walkthrough[turn] if turn < len(task.walkthrough) else "look"
