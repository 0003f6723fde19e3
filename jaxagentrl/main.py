"""`python -m jaxagentrl.main --config=configs/<x>.py --workdir=<folder>`: flags, and nothing else."""

import sys

from absl import app, flags
from ml_collections import config_flags

from jaxagentrl import train

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run writes into and resumes from.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        train.run(_CONFIG.value.to_dict(), _WORKDIR.value)
    except ValueError as error:
        sys.exit(f"error: {error}")


def run() -> None:
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    run()
