"""`python -m jaxagentrl.main --config=configs/<x>.py --workdir=<folder>`: flags, and nothing else."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxagentrl import demos, metrics, train

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors that have a message.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run writes into and resumes from.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every save at INFO
    try:
        train.run(_CONFIG.value.to_dict(), _WORKDIR.value)
    except (ValueError, metrics.NonFiniteError, demos.DemonstrationError) as error:
        if _DEBUG.value:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from the last checkpoint")


def run() -> None:
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    run()
