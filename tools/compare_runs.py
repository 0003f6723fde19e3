"""Compares runs by the held-out tasks that they played: who wins how often, by how much, and what was set otherwise.

    python tools/compare_runs.py runs/quickstart runs/grpo runs/rloo --image comparison.png

Every run plays the same held-out tasks, so runs are compared task by task with the first that is named: how many tasks
only the one won and how many only the other, the difference of their success with its 95 % interval, and the probability
of a split as uneven as this one if both were as good (McNemar's test, exact). What counts is the end of the last stage:
after RL, else after imitation, else the model as it began. Runs whose configs differ in the seed alone are one row, and
are compared with runs of the same seeds. `--split fresh` compares by `splits.test_fresh`. Intervals treat every pair of
episodes as drawn by itself: they say what other games would change, and not what other seeds would.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys

import numpy as np
import rich.box
import rich.console
import rich.table
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxagentrl import metrics, report_data, workdir

_COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")  # Okabe and Ito's, and a gray


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs of one config under one or more seeds.

    Attributes:
        name: for people, the folder of the first run.
        config: as the first run kept it.
        runs: by seed.
        won: whether a task was won under a seed: {(seed, name, digest): bool}.
        stages: at whose ends, in the order of `runs`.
    """

    name: str
    config: dict
    runs: dict[int, report_data.Run]
    won: dict[tuple[int, str, str], bool]
    stages: list[str]

    @property
    def success(self) -> float:
        return float(np.mean(list(self.won.values())))

    def by_seed(self) -> list[float]:
        """Success under each seed."""
        return [float(np.mean([won for key, won in self.won.items() if key[0] == seed])) for seed in self.runs]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two settings made of the tasks, and seeds, that both played.

    Attributes:
        pairs: how many.
        gained, lost: won by the second alone, and by the first alone.
        difference, low, high: of success, second less first, with its 95 % interval after Agresti and Min (2005): half
            a pair more in each of the four cells.
        p: of McNemar's test, exact and two-sided.
    """

    pairs: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def compare(first: Setting, second: Setting) -> Comparison | None:
    """None where they share no task under a seed of both."""
    shared = first.won.keys() & second.won.keys()
    if not shared:
        return None
    pairs = len(shared)
    gained = sum(second.won[key] and not first.won[key] for key in shared)
    lost = sum(first.won[key] and not second.won[key] for key in shared)
    apart, n = gained + lost + 1.0, pairs + 2.0
    middle = (gained - lost) / n
    half = scipy.stats.norm.ppf(0.975) * np.sqrt(apart - (gained - lost) ** 2 / n) / n
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Comparison(pairs, gained, lost, (gained - lost) / pairs, middle - half, middle + half, float(p))


def read(roots: list[str], split: str | None = None) -> list[Setting]:
    """The settings of these workdirs, in the order of their first runs.

    Args:
        roots: workdirs.
        split: x of `splits.test_<x>`; None is `splits.test`.

    Raises:
        ValueError: a folder is no workdir, has no config, has not played the split to a stage's end, or no episode of
            it, or is the same run as another.
    """
    found: dict[str, Setting] = {}
    for root in map(pathlib.Path, roots):
        run = report_data.read(root)
        if "config" not in run.content:
            raise ValueError(f"{root} has no config.json of a run, which says what the run is.")
        config = dict(run.content["config"])
        seed = config.pop("seed")
        stage, won = _last_stage(root, "eval" if split is None else f"eval_{split}")
        key = json.dumps(config, sort_keys=True)
        setting = found.setdefault(key, Setting(root.absolute().name, config, {}, {}, []))
        if seed in setting.runs:
            raise ValueError(f"{root} and {setting.runs[seed].root} have the same config and the same seed ({seed}). Name one of them.")
        setting.runs[seed] = run
        setting.stages.append(stage)
        setting.won.update({(seed, *task): value for task, value in won.items()})
    return list(found.values())


def _last_stage(root: pathlib.Path, prefix: str) -> tuple[str, dict[tuple[str, str], bool]]:
    """The last stage that has ended, and whether the tasks, by name and digest, were won at its end."""
    for stage in ("rl", "sft", "untrained"):
        path = root / "trajectories" / f"{prefix}_{stage}.jsonl"
        if path.exists():
            with open(path, encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            if not records:
                raise ValueError(f"{path} has no episode: the environments of that evaluation all failed.")
            return stage, {(of["task"]["name"], of["task"]["digest"]): of["won"] for of in records}
    raise ValueError(
        f"{root} has no {prefix}_<stage>.jsonl in trajectories/: no stage of it has ended yet, "
        "or its config has no such split."
    )


def print_table(settings: list[Setting], console: rich.console.Console) -> None:
    first, *others = settings
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="Held-out tasks", title_justify="left", title_style="bold")
    for head in ("run", "at the end of", "success [95 % interval]"):
        table.add_column(head, no_wrap=True)
    for head in (f"less {first.name} [95 %]", "won alone", f"by {first.name} alone", "p"):
        table.add_column(head, justify="right")
    for setting in settings:
        wins = sum(setting.won.values())
        low, high = metrics.wilson_interval(wins, len(setting.won))
        name, success = setting.name, f"{100 * setting.success:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        if len(setting.runs) > 1:
            name += f" ({len(setting.runs)} seeds)"
            success += ": " + ", ".join(f"{100 * share:.1f}" for share in setting.by_seed())
        row = [name, ", ".join(dict.fromkeys(setting.stages)), success]
        if setting is not first:
            found = compare(first, setting)
            row += ["nothing played by both", "", "", ""] if found is None else [
                f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
                str(found.gained), str(found.lost), f"{found.p:.2g}",
            ]  # fmt: skip
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
    for setting in others:
        console.print(f"{setting.name}, set otherwise than {first.name}:", markup=False)
        for line in workdir.differences(first.config, setting.config, ""):
            console.print(f"  {line}", markup=False, soft_wrap=True)


def draw(settings: list[Setting], path: str, split: str | None = None) -> None:
    """Success by RL iteration, of several seeds their mean, with each seed as a thin line. Splits beside `splits.test` are
    played at the ends of stages only."""
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, setting in enumerate(settings):
        color, style = _COLORS[index % len(_COLORS)], ("-", "--", ":")[index // len(_COLORS) % 3]
        of_step = collections.defaultdict(list)
        for run in setting.runs.values():
            played = run.evaluations if split is None else run.other_splits.get(split, [])
            points = [e for e in played if e.stage in (run.before_rl, "rl") and e.episodes]
            if len(setting.runs) > 1:
                axes.plot([e.step for e in points], [e.success for e in points], color=color, linewidth=0.6, alpha=0.5)
            for evaluation in points:
                of_step[evaluation.step].append(evaluation.success)
        steps = sorted(step for step, values in of_step.items() if len(values) == len(setting.runs))
        line = dict(color=color, linestyle=style, marker=".", label=setting.name)
        axes.plot(steps, [np.mean(of_step[step]) for step in steps], **line)
    axes.set_title("Held-out tasks won" + (f", test_{split}" if split else ""), loc="left")
    axes.set_xlabel("RL iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="workdirs; the others are compared with the first")
    parser.add_argument("--split", help="x of splits.test_<x>; without it splits.test")
    parser.add_argument("--image", help="a PNG with success by RL iteration")
    args = parser.parse_args()
    try:
        settings = read(args.runs, args.split)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    width = None if sys.stdout.isatty() else 140  # a pipe has none, and rich's own would wrap the table
    print_table(settings, rich.console.Console(highlight=False, width=width))
    if args.image:
        draw(settings, args.image, args.split)


if __name__ == "__main__":
    main()
