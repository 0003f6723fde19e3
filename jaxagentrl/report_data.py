"""What a finished (or running) workdir says about its run, read from metrics.jsonl and config.json.

The keys looked for: `eval/*` of the held-out evaluations wherever they stand (phase "baseline" is
the untrained model, "eval" the model after imitation, "rl" during RL), `eval.t<temperature>/*`
and `eval_<x>/*` of further splits beside them, `random/*` and `walkthrough/*` of phase "baseline", `loss/action` of phase "sft",
`rollout/*` of phase "rl".
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from jaxagentrl import metrics

# Shares of the run's time: label and the key whose sum it is.
_TIMES = (
    ("preparation", "time/prepare_s"),
    ("imitation", "time/sft_s"),
    ("sampling", "time/rollout_s"),
    ("updates", "time/update_s"),
    ("evaluation", "time/evaluate_s"),
)

_OTHER_TEMPERATURE = re.compile(r"(eval\.t([\d.e-]+))/episodes")
_PASS_AT = re.compile(r"pass_at_(\d+)")
_OTHER_SPLIT = re.compile(r"(eval_(\w+))/episodes")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Success on the held-out tasks of one agent at one moment.

    Attributes:
        name: for people, "after imitation".
        stage: "untrained", "sft", "rl", or the rule's name.
        step: RL iteration, 0 before RL.
        seconds: since the run's start, preparation included.
        success: episodes won as a share, with its 95 % interval; nan when none was played.
        episodes: how many were played to an end that counts.
        values: everything measured, keys without their prefix.
    """

    name: str
    stage: str
    step: int
    seconds: float
    success: float
    low: float
    high: float
    episodes: int
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its workdir tells it.

    Attributes:
        root: the workdir.
        content: config.json as it stands: "config", "versions", "facts".
        lines: all lines of metrics.jsonl, `seconds(line)` for their time.
        agents: random and walkthrough agent, as far as they were measured.
        evaluations: of the model, in time order.
        other_temperatures: evaluations at the stages' ends at temperatures beside eval.temperature.
        other_splits: those of further held-out splits, test_<x>, by x.
    """

    root: pathlib.Path
    content: dict[str, Any]
    lines: list[metrics.Line]
    agents: dict[str, Evaluation]
    evaluations: list[Evaluation]
    other_temperatures: dict[float, list[Evaluation]]
    other_splits: dict[str, list[Evaluation]]

    def phase(self, name: str) -> list[metrics.Line]:
        return [line for line in self.lines if line["phase"] == name]

    def seconds(self, line: metrics.Line) -> float:
        """Seconds from the start of the run to this line; preparation is not in time/run_s."""
        return line["time/run_s"] + self.prepare_seconds

    @property
    def has_imitation(self) -> bool:
        return self.content.get("config", {}).get("sft", {}).get("num_steps") != 0

    @property
    def before_rl(self) -> str:
        """The stage at whose end RL begins."""
        return "sft" if self.has_imitation else "untrained"

    @property
    def stage_names(self) -> dict[str, str]:
        """What the model is called before each stage and at its end."""
        loaded = self.content.get("config", {}).get("model", {}).get("directory") is not None
        return {
            "untrained": "model as loaded" if loaded else "untrained model",
            "sft": "after imitation" if self.has_imitation else "before RL",
            "rl": "after RL",
        }

    @property
    def prepare_seconds(self) -> float:
        return sum(line.get("time/prepare_s", 0.0) for line in self.lines)

    @property
    def time_split(self) -> dict[str, float]:
        """Seconds by kind of work; "other" is what no key accounts for."""
        split = {
            label: sum(_finite(line.get(key, 0.0)) for line in self.lines)
            for label, key in _TIMES
        }
        total = self.seconds(self.lines[-1]) if self.lines else 0.0
        split["other"] = max(0.0, total - sum(split.values()))
        return split

    def last(self, stage: str) -> Evaluation | None:
        """The model's last evaluation of a stage."""
        found = [e for e in self.evaluations if e.stage == stage]
        return found[-1] if found else None

    @property
    def milestones(self) -> list[Evaluation]:
        """What a reader compares: the rules, then the model before and after each stage there was."""
        stages = ("untrained", "sft", "rl") if self.has_imitation else ("untrained", "rl")
        model = [self.last(stage) for stage in stages]
        return [*self.agents.values(), *(e for e in model if e is not None)]

    @property
    def compared(self) -> list[Evaluation]:
        """The milestones, and the last evaluation of every further split."""
        return [*self.milestones, *(evaluations[-1] for evaluations in self.other_splits.values())]


def read(root: str | os.PathLike) -> Run:
    """Reads a workdir.

    Raises:
        ValueError: it has no metrics.jsonl.
    """
    root = pathlib.Path(root)
    path = root / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{root} has no metrics.jsonl. Give the workdir of a run.")
    lines = metrics.read(path)
    config = root / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    run = Run(root, content, lines, {}, [], {}, {})
    for line in lines:
        if line["phase"] == "baseline":
            for name in ("random", "walkthrough"):
                if f"{name}/episodes" in line:
                    run.agents[name] = _evaluation(run, line, name, f"{name} agent", name)
        if "eval/episodes" in line:
            stage = {"baseline": "untrained", "rl": "rl"}.get(line["phase"], "sft")
            name = run.stage_names[stage]
            name += f" ({line['step']} iterations)" if stage == "rl" else ""
            run.evaluations.append(_evaluation(run, line, "eval", name, stage))
            for key in line:
                if found := _OTHER_TEMPERATURE.fullmatch(key):
                    prefix, temperature = found[1], float(found[2])
                    told = f"{name}, {at_temperature(temperature)}"
                    run.other_temperatures.setdefault(temperature, []).append(
                        _evaluation(run, line, prefix, told, stage)
                    )
                if found := _OTHER_SPLIT.fullmatch(key):
                    told = f"{name}, test_{found[2]}"
                    run.other_splits.setdefault(found[2], []).append(_evaluation(run, line, found[1], told, stage))
    return run


def verdict(run: Run) -> str | None:
    """One sentence on what RL added to imitation, or to what it began with; None when either was not
    measured."""
    before, after = run.last(run.before_rl), run.last("rl")
    if before is None or after is None or not (before.episodes and after.episodes):
        return None
    points = 100 * (after.success - before.success)
    apart = before.high < after.low or after.high < before.low
    intervals = "do not overlap" if apart else "overlap: this may be chance"
    word = "added" if points >= 0 else "lost"
    base = "imitation" if run.has_imitation else f"the {run.stage_names['untrained']}"
    return (
        f"RL {word} {abs(points):.1f} points of held-out success over {base} "
        f"({100 * before.success:.1f} % to {100 * after.success:.1f} %); the 95 % intervals "
        f"{intervals}."
    )


def verdict_at_other_temperatures(run: Run) -> str | None:
    """What `verdict` compares, at the other temperatures; None when there are none."""
    parts = []
    for temperature, evaluations in run.other_temperatures.items():
        last = {evaluation.stage: evaluation for evaluation in evaluations}
        before, after = last.get(run.before_rl), last.get("rl")
        if before is not None and after is not None:
            parts.append(
                f"{at_temperature(temperature)} from {percent(before)} to {percent(after)}"
            )
    return f"With other sampling: {'; '.join(parts)}." if parts else None


def verdict_on_attempts(run: Run) -> str | None:
    """How many games one attempt wins on average, and at least one of all, at every temperature; None where there was
    one attempt."""
    at_all: dict[str, dict[str, Evaluation]] = {"": {e.stage: e for e in run.evaluations}}
    for temperature, evaluations in run.other_temperatures.items():
        at_all[f" at {at_temperature(temperature)}"] = {e.stage: e for e in evaluations}
    parts = []
    for where, last in at_all.items():
        stages = [last[stage].values for stage in (run.before_rl, "rl") if stage in last]
        counts = [{int(found[1]) for key in values if (found := _PASS_AT.fullmatch(key))} for values in stages]
        common = sorted(set.intersection(*counts)) if counts else []
        for k in dict.fromkeys((*common[:1], *common[-1:])):
            shares = [_interval(*(values[f"pass_at_{k}{end}"] for end in ("", "_low", "_high"))) for values in stages]
            parts.append(f"pass@{k}{where} {'from ' if len(shares) > 1 else ''}{' to '.join(shares)}")
    return f"With several attempts at a game: {'; '.join(parts)}." if parts else None


def verdicts(run: Run) -> list[str]:
    """All sentences on what came out, as far as it was measured."""
    told = (verdict(run), verdict_at_other_temperatures(run), verdict_on_attempts(run))
    return [sentence for sentence in told if sentence]


def at_temperature(temperature: float) -> str:
    """ "greedy", "temperature 0.7" """
    return f"temperature {temperature:g}" if temperature else "greedy"


def duration(seconds: float) -> str:
    """ "41 s", "17 min", "3 h 05 min" """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(evaluation: Evaluation) -> str:
    """ "63.0 % [56.1, 69.4]" """
    if not evaluation.episodes:
        return "none played"
    return _interval(evaluation.success, evaluation.low, evaluation.high)


def _interval(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _evaluation(
    run: Run, line: metrics.Line, prefix: str, name: str, stage: str
) -> Evaluation:
    values = {
        key.removeprefix(f"{prefix}/"): _finite(value)
        for key, value in line.items() if key.startswith(f"{prefix}/")
    }
    return Evaluation(
        name=name,
        stage=stage,
        step=line["step"],
        seconds=run.seconds(line),
        success=values.get("success_rate", float("nan")),
        low=values["success_low"],
        high=values["success_high"],
        episodes=int(values["episodes"]),
        values=values,
    )


def _finite(value: float | str) -> float:
    """metrics.jsonl writes "nan" and "inf" as strings, because JSON has no such numbers."""
    return float(value)
