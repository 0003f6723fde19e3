"""curves.png: held-out success over the time of the run, the imitation loss, the RL rollouts."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxagentrl import metrics
from jaxagentrl.report_data import Evaluation, Run

# Okabe and Ito's palette: told apart by people who see colors differently, and in print.
_BLUE, _ORANGE, _GREEN, _GRAY, _RED = "#0072B2", "#E69F00", "#009E73", "#666666", "#D55E00"
_SMOOTHING = 0.1   # weight of the newest value in the running mean of rollout curves


def draw(run: Run) -> bytes:
    """The figure as PNG. Parts without numbers say so, so a run can be drawn at any time."""
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.35, 1))
    _draw_success(figure.add_subplot(grid[0, :]), run)
    _draw_imitation(figure.add_subplot(grid[1, 0]), run)
    _draw_rollouts(figure.add_subplot(grid[1, 1]), run)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_success(axes: Axes, run: Run) -> None:
    """Success on held-out tasks against minutes; intervals as bars; the rules as lines."""
    points = [e for e in run.evaluations if e.episodes]
    axes.set_title("Held-out tasks won (bars: 95 % interval)", loc="left")
    _percent_axis(axes)
    if not points:
        _say_empty(axes, "no evaluation yet")
        return
    minutes = np.array([e.seconds for e in points]) / 60
    rate = np.array([e.success for e in points])
    bounds = np.array([[e.success - e.low for e in points], [e.high - e.success for e in points]])
    axes.plot(minutes, rate, color=_GRAY, linewidth=1, zorder=1)
    for stage, color, label in (
        ("untrained", _GRAY, "untrained model"),
        ("sft", _ORANGE, "after imitation"),
        ("rl", _BLUE, "during RL"),
    ):
        mine = np.array([e.stage == stage for e in points])
        if mine.any():
            axes.errorbar(
                minutes[mine], rate[mine], yerr=np.maximum(bounds[:, mine], 0.0), fmt="o",
                color=color, capsize=3, label=f"{label} (n = {_counts(points, mine)})")
    for name, color, style in (("walkthrough", _GREEN, "--"), ("random", _RED, ":")):
        if name in run.agents and run.agents[name].episodes:
            agent = run.agents[name]
            axes.axhline(agent.success, color=color, linestyle=style,
                         label=f"{agent.name} ({100 * agent.success:.0f} %)")
            axes.axhspan(agent.low, agent.high, color=color, alpha=0.08, linewidth=0)
    _mark_stages(axes, run)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes since the start")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _mark_stages(axes: Axes, run: Run) -> None:
    """Shades the time of RL, so that the two kinds of training are told apart at a glance."""
    rl, sft = run.phase("rl"), run.last("sft")
    if rl and sft is not None:
        axes.axvspan(sft.seconds / 60, run.seconds(rl[-1]) / 60, color=_BLUE, alpha=0.05,
                     linewidth=0)
        axes.annotate("RL", ((sft.seconds + run.seconds(rl[-1])) / 120, 0.97),
                      xycoords=("data", "axes fraction"), ha="center", va="top", color=_BLUE)
    if sft is not None and run.phase("sft"):
        axes.annotate("imitation", (sft.seconds / 120, 0.97), xycoords=("data", "axes fraction"),
                      ha="center", va="top", color=_ORANGE)


def _draw_imitation(axes: Axes, run: Run) -> None:
    axes.set_title("Imitation: loss on expert actions", loc="left")
    lines = [line for line in run.phase("sft") if "loss/action" in line]
    if not lines:
        _say_empty(axes, "no imitation in this run")
        return
    steps = [line["step"] for line in lines]
    axes.plot(steps, _column(lines, "loss/action"), color=_ORANGE, label="actions")
    if "loss/observation" in lines[0]:
        axes.plot(steps, _column(lines, "loss/observation"), color=_GRAY, linewidth=1,
                  label="observations (auxiliary)")
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.2)


def _draw_rollouts(axes: Axes, run: Run) -> None:
    axes.set_title("RL: training episodes (thick: running mean)", loc="left")
    lines = [line for line in run.phase("rl") if "rollout/return_mean" in line]
    if not lines:
        _say_empty(axes, "no RL in this run")
        return
    steps = [line["step"] for line in lines]
    for key, color, label in (
        ("rollout/return_mean", _BLUE, "mean return (share of the best score)"),
        ("rollout/success_rate", _GREEN, "won"),
    ):
        values = _column(lines, key)
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(steps, _running_mean(values), color=color, linewidth=1.8, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), max(1.0, high))
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower right")


def _column(lines: list[metrics.Line], key: str) -> np.ndarray:
    return np.array([float(line.get(key, "nan")) for line in lines])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Exponential running mean without the bias of its start; missing values are passed over."""
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            total = (1 - _SMOOTHING) * total + _SMOOTHING * value
            weight = (1 - _SMOOTHING) * weight + _SMOOTHING
        result[index] = total / weight if weight else np.nan
    return result


def _counts(points: list[Evaluation], mine: np.ndarray) -> str:
    counts = sorted({e.episodes for e, chosen in zip(points, mine, strict=True) if chosen})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.2)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_GRAY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
