"""Tells when RL has come undone: success below half of what it was, and what changed with it.

What a policy collapses into differs (RAGEN's "echo trap", https://arxiv.org/abs/2504.20073, is one command over and
over; docs/study.md has a policy that learned to end no turn), and it seldom comes back. All of it is in the metrics, but
nobody looks at them while it can still be stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxagentrl import metrics

_WINDOW = 8  # iterations whose episodes are taken together

# What is compared: key, how it is called, and what it is: a share, a number, or a count of episodes.
_SIGNS = (
    ("rollout/repeat_rate", "commands given again in the same state", "share"),
    ("rollout/invalid_command_rate", "refused commands", "share"),
    ("rollout/distinct_commands", "different commands of all that were sent", "share"),
    ("rollout/stop_no_end_of_turn", "episodes cut in a turn without its end", "count"),
    ("rollout/turns_mean", "turns", "number"),
    ("policy/entropy", "entropy", "number"),
    ("optimizer/grad_norm", "gradient norm", "number"),
    ("batch/group_std_mean", "deviation within groups", "number"),
)

# How far a curriculum has come.
_STAGES = ("curriculum/level", "curriculum/commands_left")


def told(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say after the last of these lines of phase "rl": once, where success has come to be less than half of
    the best it was, by the 95 % intervals of eight iterations each; else None. Games of a curriculum's further level
    are harder, and so are earlier beginnings: only iterations of the last line's are compared."""
    lines = [line for line in lines if all(line.get(key) == lines[-1].get(key) for key in _STAGES)]
    best = _before_the_fall(lines)
    if best is None or _before_the_fall(lines[:-1]) is not None:
        return None
    now = lines[-_WINDOW:]
    changes = [
        f"{name} {_mean(best, key, kind)} → {_mean(now, key, kind)}"
        for key, name, kind in _SIGNS
        if all(any(key in line for line in window) for window in (best, now))
    ]
    return (
        f"success has fallen from {_percent(_rate(best))} (iterations {best[0]['step']} to {best[-1]['step']}) to "
        f"{_percent(_rate(now))} ({now[0]['step']} to {now[-1]['step']}): {', '.join(changes)}. A policy seldom comes "
        "back from there: look at what it does now (trajectories/, report.html). What paid for it may be a penalty "
        "(reward.*, docs/study.md), and what allowed it a high rl.optimizer.learning_rate without rl.kl."
    )


def _before_the_fall(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]] | None:
    """The best eight lines before the last eight, where these have less than half of their success."""
    if len(lines) < 2 * _WINDOW:
        return None
    starts = range(len(lines) - 2 * _WINDOW + 1)
    best = max((lines[start : start + _WINDOW] for start in starts), key=_rate)
    low, _ = metrics.wilson_interval(*_counts(best))
    _, high = metrics.wilson_interval(*_counts(lines[-_WINDOW:]))
    return best if low > 2 * high else None


def _counts(lines: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return tuple(sum(int(line[f"rollout/{key}"]) for line in lines) for key in ("successes", "episodes"))


def _rate(lines: Sequence[Mapping[str, Any]]) -> float:
    won, count = _counts(lines)
    return won / max(1, count)


def _mean(lines: Sequence[Mapping[str, Any]], key: str, kind: str) -> str:
    """Over the lines that have it; a count over the episodes."""
    values = [line[key] for line in lines if key in line]
    if kind == "count":
        return _percent(sum(values) / max(1, _counts(lines)[1]))
    return _percent(np.mean(values)) if kind == "share" else f"{np.mean(values):.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
