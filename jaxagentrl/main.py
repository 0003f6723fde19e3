"""`python -m jaxagentrl.main --config=configs/<x>.py --workdir=<folder>`: flags, and nothing else."""

import atexit
import difflib
import gc
import os
import pathlib
import re
import signal
import sys
import traceback

if __name__ == "__main__":
    from jaxagentrl import pages

    pages.use_huge_ones()  # before jax is imported: it starts this process again
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun: Ctrl-C needs no traceback
    gc.disable()  # a fifth of the time of the imports, which leave nothing to collect

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from envs_host.games import GenerationError
from envs_host.pool import PoolError
from jaxagentrl import demos, hosts, interrupts, metrics, settings, train, workdir


# What ends a run with a sentence.
_TOLD = (ValueError, OSError, metrics.NonFiniteError, demos.DemonstrationError, GenerationError, PoolError)


class _OrNone(flags.ArgumentParser):
    """Another parser's values, and None: `--config.sft.target_loss=None`, of numbers in any spelling of it."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument):
        # "none" is a value of some keys that are texts.
        is_number = isinstance(self._parser, flags.IntegerParser | flags.FloatParser)
        said = argument.capitalize() if is_number and isinstance(argument, str) else argument
        return None if said in (None, "None") else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


for _type, _parser in (
    (int, flags.IntegerParser()), (float, flags.FloatParser()), (str, flags.ArgumentParser())
):
    config_flags.register_flag_parser_for_type(_type, _OrNone(_parser))

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors that have a message.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as the TPU pod, Slurm or MPI says."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where nothing says.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator, from 0.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run writes into and resumes from.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _WORKDIR.value is None:
        sys.exit("error: --workdir must be given: a folder that the run writes into and resumes from.")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every save at INFO
    config = _CONFIG.value.to_dict()
    interrupts.raise_where_heard()
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        if _DISTRIBUTED.value or any(value is not None for value in given):
            hosts.start(*given)
        train.run(config, _WORKDIR.value)
    except (jax.errors.JaxRuntimeError, *_TOLD) as error:
        if hosts.may_be_of_another(error):
            traceback.print_exc()
            sys.exit(
                "error: of a device, or because another process has ended: its output says why. The same commands, of "
                "all processes, continue from the last checkpoint"
            )
        if _DEBUG.value or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        sys.exit(f"error: {error}\n({_keep_traceback(error)} shows where)")
    except KeyboardInterrupt:
        said = "stopped; the same command continues from the last checkpoint"
        if jax.distributed.is_initialized():
            sys.exit(said)
        # All that an exit does but taking the interpreter down, in which jax crashes after an interrupted compilation.
        print(said, file=sys.stderr)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def _keep_traceback(error: Exception) -> str:
    """Writes it beside the run, if that has begun: what ended after hours is not soon seen again. Returns what shows
    where the error came from."""
    folder = pathlib.Path(_WORKDIR.value).expanduser()
    # A folder that is refused may be another run's.
    if isinstance(error, workdir.WorkdirError) or not (folder / "config.json").is_file():
        return "--debug"
    number = f"_{jax.process_index()}" if jax.distributed.is_initialized() else ""
    kept = folder / f"error{number}.txt"
    try:
        kept.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:  # it may be the reason, as of a full disk
        return "--debug"
    return str(kept)


def parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            sys.exit("error: --config must be given: --config=configs/<x>.py --workdir=<folder>")
        _CONFIG.value.to_dict()  # a file that could not be read says so when it is asked
        return rest
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # What absl raises of a flag, and config_flags of a file that is not there, a key that no config has, a value
        # of another type. What a config file raised itself is the end of a traceback in absl's text.
        if "--debug" in argv:
            raise
        if isinstance(error, AttributeError | KeyError) and (path := _unknown(argv, str(error))):
            sys.exit(f"error: {_without(path)} (docs/config.md has all keys; --debug shows where)")
        lines = str(error.args[0]).strip().splitlines()
        is_traceback = isinstance(error, OSError | flags.Error)
        said = lines[-1].strip() if is_traceback else " ".join(lines)
        if "get_config() takes 0 positional arguments" in said:
            said += ": that config takes no method; give it a parameter `method` and return methods.apply(config, method)"
        where = "" if isinstance(error, flags.Error) else f"{type(error).__name__} in the flags: "
        end = "" if said.endswith((".", "?")) else "."
        sys.exit(f"error: {where}{said}{end} docs/config.md has all keys (--debug shows where)")


def _unknown(argv: list[str], said: str) -> str | None:
    """Of the keys in the flags the one that an error of ml_collections means, which tells its last name in quotes."""
    paths = [flag.lstrip("-").partition("=")[0].removeprefix("config.") for flag in argv if "config." in flag]
    name = re.search(r"'(\w+)\\?'", said)
    return next((path for path in paths if name and name[1] in path.split(".")), None)


def _without(path: str) -> str:
    """What to say of a key that the config does not have."""
    section, _, name = path.rpartition(".")
    if settings.can_be_added(path):
        return (
            f"--config.{path} cannot be set, as {section} of this config has no {name} and the command line changes "
            "only what is there: add it in a config file."
        )
    similar = difflib.get_close_matches(path, settings.KEYS, n=1)
    hint = f": did you mean --config.{similar[0]}?" if similar else "."
    return f"--config.{path} names no key of the config{hint}"


def run() -> None:
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: no collection goes through it again
    gc.enable()
    run()
