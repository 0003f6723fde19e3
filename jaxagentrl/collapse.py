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

# What is compared: key, how it is called, and whether it is a share of episodes or turns.
_SIGNS = (
    ("rollout/repeat_rate", "commands given again in the same state", True),
    ("rollout/invalid_command_rate", "refused commands", True),
    ("rollout/distinct_commands", "different commands of all that were sent", True),
    ("rollout/no_end_rate", "episodes cut in a turn without its end", True),
    ("rollout/turns_mean", "turns", False),
    ("policy/entropy", "entropy", False),
    ("optimizer/grad_norm", "gradient norm", False),
    ("batch/group_std_mean", "deviation within groups", False),
)


def told(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say after the last of these lines of phase "rl": once, where success has come to be less than half of
    the best it was, by the 95 % intervals of eight iterations each; else None."""
    best = _before_the_fall(lines)
    if best is None or _before_the_fall(lines[:-1]) is not None:
        return None
    now = lines[-_WINDOW:]
    changes = []
    for key, name, is_share in _SIGNS:
        was, is_now = (_mean(window, key) for window in (best, now))
        if was is not None and is_now is not None:
            changes.append(f"{name} {_shown(was, is_share)} → {_shown(is_now, is_share)}")
    return (
        f"success has fallen from {_shown(_rate(best), True)} (iterations {best[0]['step']} to {best[-1]['step']}) to "
        f"{_shown(_rate(now), True)} ({now[0]['step']} to {now[-1]['step']}): {', '.join(changes)}. A policy seldom comes "
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


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Over the lines that have it."""
    if key == "rollout/no_end_rate":
        _, count = _counts(lines)
        return sum(line["rollout/stop_no_end_of_turn"] for line in lines) / max(1, count)
    values = [line[key] for line in lines if key in line]
    return float(np.mean(values)) if values else None


def _shown(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f} %" if is_share else f"{value:.3g}"
