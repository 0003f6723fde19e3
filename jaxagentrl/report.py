"""What a run leaves for people: the table in the terminal, curves.png, report.html, and the model's card."""

import os
import pathlib
import sys

import rich.box
import rich.console
import rich.table

from jaxagentrl import report_card, report_curves, report_data, report_page, workdir

_PIPE_WIDTH = 100   # columns when the output is no terminal; rich's own 80 would wrap the table


def write(root: str | os.PathLike, *, console: rich.console.Console | None = None) -> None:
    """Writes curves.png and report.html of a workdir, README.md beside its weights, and prints its table.

    Works at any time during a run; parts that do not exist yet are left out.

    Args:
        root: the workdir.
        console: where the table goes; standard output by default.

    Raises:
        ValueError: the folder has no metrics.jsonl.
    """
    root = pathlib.Path(root)
    run = report_data.read(root)
    png = report_curves.draw(run)
    workdir.write_atomic(root / "curves.png", png)
    # An environment may have said what cannot be written, halves of surrogate pairs.
    workdir.write_atomic(root / "report.html", report_page.page(run, png).encode(errors="replace"))
    report_card.write(run)
    print_table(run, console=console)


def print_table(run: report_data.Run, *, console: rich.console.Console | None = None) -> None:
    """The result on one screen: who won how often, what RL added, where the time went."""
    if console is None:
        console = rich.console.Console(
            width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    table = rich.table.Table(
        title="Held-out tasks", box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("agent")
    for head in ("won", "success [95 % interval]", "return", "turns", "refused"):
        table.add_column(head, justify="right", no_wrap=True)
    for evaluation in run.compared:
        values = evaluation.values
        table.add_row(
            evaluation.name,
            f"{values['successes']:.0f}/{evaluation.episodes}",
            report_data.percent(evaluation).replace("[", r"\["),   # rich reads [..] as markup
            f"{values['return_mean']:.2f}" if "return_mean" in values else "",
            f"{values['turns_mean']:.1f}" if "turns_mean" in values else "",
            f"{100 * values['invalid_command_rate']:.0f} %"
            if "invalid_command_rate" in values else "",
            style="bold" if evaluation.stage == "rl" else "",
        )
    console.print(table)
    for told in report_data.verdicts(run):
        console.print(told, markup=False)
    split = {label: seconds for label, seconds in run.time_split.items() if seconds >= 0.5}
    if split:
        parts = ", ".join(
            f"{label} {report_data.duration(seconds)}" for label, seconds in split.items())
        total = report_data.duration(sum(run.time_split.values()))
        console.print(f"Time: {total} ({parts}).", markup=False)
    names = ("report.html", "curves.png", "model", "adapters")
    left = [name for name in names if (run.root / name).exists()]
    if left:
        console.print(f"In {run.root}: {', '.join(left)}.", markup=False, soft_wrap=True)
