"""Goes on from where a run stands, in another workdir and with some settings otherwise; the run stays as it is.

    python tools/fork_run.py --from=runs/quickstart --config=configs/textworld_quickstart.py --workdir=runs/longer \\
        --config.rl.num_iterations=240 --config.rl.optimizer.learning_rate=1e-4

The flags are those of the new run, and the same command by `python -m jaxagentrl.main`, without `--from`, runs it: from the
newest checkpoint, with the optimizer's state, the draws of games and the metrics until there. What may be others are `rl`
but for the critic, the order of games, KL's placement and the moments' dtype, `reward`, `rollout`, `eval`, `learner`,
`sampling` and what any run may be continued with (docs/config.md). The new run's config.json and model card say what was
changed, and when.
"""

import pathlib
import shlex
import sys

from absl import app, flags, logging

from jaxagentrl import checkpoints, main, settings, train, workdir

_FROM = flags.DEFINE_string("from", None, "Workdir of the run to go on from.")

_SECTIONS = ("rl", "reward", "rollout", "eval", "learner", "sampling")
# The state in a checkpoint has a critic's parameters or not, moments of a dtype, and that of one sampler of games; the
# policy that KL refers to was kept as RL began, or was not.
_FIXED = ("rl.critic", "rl.curriculum.order", "rl.kl.placement", "rl.optimizer.moment_dtype")


def stands(root: str) -> str:
    """How far a run has come that has a checkpoint: "RL iteration 80"."""
    folder = pathlib.Path(root).expanduser() / "checkpoints"
    for stage, name in (("rl", "RL iteration"), ("sft", "imitation step")):
        if (step := checkpoints.latest_step(folder / stage)) is not None:
            return f"{name} {step}"
    return "the start"


def may_differ(config: settings.Config) -> list[str]:
    """The keys by which a fork may be another run."""
    keys = [key for key, _ in settings.flat(config) if key.startswith(tuple(f"{name}." for name in _SECTIONS))]
    return [*train.FREE_KEYS, *(key for key in keys if key not in _FIXED)]


def run(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    source, target, config = _FROM.value, flags.FLAGS.workdir, flags.FLAGS.config.to_dict()
    if source is None or target is None:
        sys.exit("error: --from must be given, the workdir of a run, and --workdir, where the new one goes on.")
    try:
        settings.check(config)
        after = stands(source)
        changed = workdir.fork(
            source, target, config, may_differ=may_differ(config), later_keys=train.LATER_KEYS, after=after
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    given = sys.argv[1:]
    place = next(place for place, argument in enumerate(given) if argument.lstrip("-").partition("=")[0] == "from")
    del given[place : place + (1 if "=" in given[place] else 2)]
    print(
        f"{target}: {source} after {after}, " + ("; ".join(changed) or "with all settings as they were"),
        f"python -m jaxagentrl.main {shlex.join(given)}",
        sep="\n",
    )


if __name__ == "__main__":
    app.run(run, flags_parser=main.parse)
