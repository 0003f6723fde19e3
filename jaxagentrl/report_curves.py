"""curves.png: held-out success over the time of the run, the imitation loss, the RL rollouts."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxagentrl import metrics
from jaxagentrl.report_data import Evaluation, Run

# Okabe and Ito's palette: told apart by people who see colors differently, and in print.
_BLUE, _ORANGE, _GREEN, _GRAY, _RED = "#0072B2", "#E69F00", "#009E73", "#666666", "#D55E00"
_SMOOTHING = 0.1   # weight of the newest value in the running mean of rollout curves


def draw(run: Run) -> bytes:
    """The figure as PNG. Parts without numbers say so, so a run can be drawn at any time."""
    figure = Figure(figsize=(11, 7.4), dpi=130, layout="constrained")
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
    axes.set_title(f"Held-out tasks won{_counts(points)}", loc="left")
    _percent_axis(axes)
    if not points:
        _say_empty(axes, "no evaluation yet")
        return
    minutes = np.array([e.seconds for e in points]) / 60
    rate = np.array([e.success for e in points])
    bounds = np.array([[e.success - e.low for e in points], [e.high - e.success for e in points]])
    axes.plot(minutes, rate, color=_GRAY, linewidth=1, zorder=1)
    for stage, color, label in (
        ("untrained", _GRAY, run.stage_names["untrained"]),
        ("sft", _ORANGE, run.stage_names["sft"]),
        ("rl", _BLUE, "during RL"),
    ):
        mine = np.array([e.stage == stage for e in points])
        if mine.any():
            axes.errorbar(
                minutes[mine], rate[mine], yerr=np.maximum(bounds[:, mine], 0.0), fmt="o",
                color=color, capsize=3, label=label)
    for name, color, style in (("walkthrough", _GREEN, "--"), ("random", _RED, ":")):
        if name in run.agents and run.agents[name].episodes:
            agent = run.agents[name]
            axes.axhline(agent.success, color=color, linestyle=style,
                         label=f"{agent.name} ({100 * agent.success:.1f} %)")
            axes.axhspan(agent.low, agent.high, color=color, alpha=0.08, linewidth=0)
    _mark_stages(axes, run)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes since the start")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, fontsize=9,
                frameon=False)


def _mark_stages(axes: Axes, run: Run) -> None:
    """Names and shades the stages, so that the two kinds of training are told apart at a glance."""
    ends = [
        # A stage ends with the evaluation that follows it.
        (name, color, max((run.seconds(line) for phase in phases for line in run.phase(phase)),
                          default=0.0))
        for name, color, phases in (
            ("preparation", _GRAY, ("baseline",)),
            ("imitation", _ORANGE, ("sft", "eval")),
            ("RL", _BLUE, ("rl",)),
        )
    ]
    start, total = 0.0, run.seconds(run.lines[-1])
    for name, color, end in ends:
        if end <= start:
            continue
        axes.axvspan(start / 60, end / 60, color=color, alpha=0.06, linewidth=0)
        if end - start > 0.08 * total:   # a name would not fit in less
            axes.text((start + end) / 120, 0.93, name, color=color, ha="center", va="top")
        start = end


def _draw_imitation(axes: Axes, run: Run) -> None:
    axes.set_title("Imitation: loss on expert actions", loc="left")
    lines = [line for line in run.phase("sft") if "loss/action" in line]
    if not lines:
        _say_empty(axes, "no imitation in this run")
        return
    steps = [line["step"] for line in lines]
    # One or two points make no visible line.
    marker = "." if len(steps) < 3 else ""
    axes.plot(steps, _column(lines, "loss/action"), marker=marker, color=_ORANGE, label="actions")
    if "loss/observation" in lines[0]:
        axes.plot(steps, _column(lines, "loss/observation"), marker=marker, color=_GRAY,
                  linewidth=1, label="observations (auxiliary)")
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
        axes.plot(steps, values, marker="." if len(steps) < 3 else "", color=color, linewidth=0.8,
                  alpha=0.35)
        axes.plot(steps, _running_mean(values), color=color, linewidth=1.8, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), max(1.0, high))
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="best")


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


def _counts(points: list[Evaluation]) -> str:
    """ " (n = 200, bars: 95 % interval)" """
    counts = sorted({e.episodes for e in points})
    if not counts:
        return ""
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f" (n = {n}, bars: 95 % interval)"


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.2)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_GRAY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
