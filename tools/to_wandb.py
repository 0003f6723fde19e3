"""A run's metrics in Weights & Biases, while it goes on or afterwards.

    pip install wandb
    python tools/to_wandb.py runs/quickstart --project text-agents             what there is
    python tools/to_wandb.py runs/quickstart --project text-agents --follow    and what comes, until Ctrl-C

A process of its own, which reads the workdir: a run neither waits for W&B nor ends with it. A workdir is one run of W&B, which
goes on where an earlier call has left it, also where the run itself was killed and goes on. Each line of metrics.jsonl is
a step; metrics are named by phase and drawn over the phase's own steps (`rl/loss/policy` over `rl/step`). The config,
package versions and hashes of games are the W&B run's config. WANDB_MODE=offline writes all of it into ./wandb, for
`wandb sync`.
"""

import argparse
import hashlib
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxagentrl import metrics, workdir


def run_id(root: pathlib.Path) -> str:
    """The W&B run of a workdir: the same whenever it is sent from this place."""
    where = str(root.resolve())
    return f"{root.resolve().name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def values(line: metrics.Line) -> dict[str, Any]:
    """A line of the metrics as W&B is given it: keys with their phase before them."""
    return {f"{line['phase']}/{key}": value for key, value in line.items() if key != "phase"}


def send(run: Any, lines: Sequence[metrics.Line], first: int) -> int:
    """Sends the lines from number `first` on; returns the number of the next."""
    for number in range(first, len(lines)):
        run.log(values(lines[number]), step=number)
    return max(first, len(lines))


def following(path: pathlib.Path, poll_s: float) -> Iterator[list[metrics.Line]]:
    """The lines that there are, again and again."""
    while True:
        yield metrics.read(path)
        time.sleep(poll_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity", help="user or team; default: yours")
    parser.add_argument("--name", help="default: the workdir's")
    parser.add_argument("--follow", action="store_true", help="go on sending what comes, until Ctrl-C")
    parser.add_argument("--poll-s", type=float, default=5.0, help="seconds between two looks at the metrics")
    args = parser.parse_args(argv)
    try:
        import wandb
    except ImportError:
        parser.error("needs W&B's package, which is none of ours: pip install wandb")
    try:
        content = workdir.content(args.workdir)
    except workdir.WorkdirError as error:
        parser.error(str(error))
    path = args.workdir / "metrics.jsonl"
    run = wandb.init(
        project=args.project,
        entity=args.entity,
        name=args.name or args.workdir.resolve().name,
        id=run_id(args.workdir),
        resume="allow",
        config=content.pop("config") | content,
    )
    for phase in ("baseline", "sft", "eval", "rl"):
        run.define_metric(f"{phase}/step", hidden=True)
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    sent = run.step  # of the next line: an earlier call may have sent those before it
    try:
        for lines in following(path, args.poll_s) if args.follow else [metrics.read(path)]:
            sent = send(run, lines, sent)
    except KeyboardInterrupt:
        pass
    finally:
        run.finish()
    print(f"{args.workdir}: {sent} lines of metrics are in W&B's run {run_id(args.workdir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
