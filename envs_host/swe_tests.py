"""Running a repository's tests: what passed, what failed and how, in the same words every time.

What is run may have been written by a model. `sandbox="bubblewrap"` shows it the file system read-only
but for its own folder, and no network; `"none"` is for machines that can be thrown away. Either way time,
memory and the size of files are limited and the environment variables are the test run's own.

Outcomes are read from pytest's summary, which is the last thing a run prints. Code that sets out to forge
that summary could; code that merely exits, or prints, cannot.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import psutil

SANDBOXES = ("bubblewrap", "none")

# What `python -m pytest` does, but that pytest is found before the repository is looked in: a file pytest.py, or
# src/sitecustomize.py, is not in its place.
_PYTEST = """\
import os, sys
sys.path.pop(0)
import pytest
here = os.getcwd()
sys.path[:0] = [here, os.path.join(here, "src")]
os.environ["PYTHONPATH"] = sys.path[1]
sys.exit(pytest.main())
"""
_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_OUTCOME = re.compile(r"^(PASSED|XFAIL|FAILED|ERROR) (.+)$", re.MULTILINE)
_PASSES = ("PASSED", "XFAIL")
# pytest shortens what it shows, addresses with it: <Thing object at 0x7f...> or <Th...x7fa18a8f46d0>.
_ADDRESS = re.compile(r"(\b0x|\.\.\.0?x?)[0-9a-f]{6,16}(?=\b|>)")
_DURATION = re.compile(r" in \d+\.\d+s(?: \(\d+:\d\d:\d\d\))?")
_MAX_FILE_BYTES = 1 << 28


class SandboxError(RuntimeError):
    """What is needed to run tests is not there; the message says what to do."""


class TestRun(NamedTuple):
    """What came of a run.

    Attributes:
        passed: ids of the tests that passed (or failed as expected), e.g. "tests/test_a.py::test_b".
        failed: ids of the others that ran -> what pytest says of them in a line, perhaps "".
        problem: why there was no complete run: out of time, or no summary; "" if there was one.
        output: what pytest printed, without what differs from run to run.
    """

    __test__ = False  # pytest takes the name for a test's

    passed: frozenset[str]
    failed: dict[str, str]
    problem: str
    output: str


class Limits(NamedTuple):
    """What a run may take."""

    seconds: float = 60.0
    memory_mb: int = 4096


def check_sandbox(sandbox: str) -> None:
    """Looks whether tests can be run in it.

    Raises:
        ValueError: there is no such sandbox.
        SandboxError: it does not work here.
    """
    if sandbox not in SANDBOXES:
        raise ValueError(f"sandbox must be one of {', '.join(SANDBOXES)}, got {sandbox!r}.")
    if sandbox == "bubblewrap" and (complaint := _bubblewrap_fails()):
        raise SandboxError(
            f"tests are to be run in bubblewrap, which does not work here ({complaint}). Install it (apt install "
            "bubblewrap), or set env.options.sandbox='none' where what a model writes can do no harm: it is then "
            "run with your rights."
        )


def safest_sandbox() -> str:
    """"bubblewrap" where it works, else "none"."""
    return "none" if _bubblewrap_fails() else "bubblewrap"


def run(
    folder: str,
    arguments: Sequence[str],
    *,
    scratch: str,
    sandbox: str,
    python: str | None = None,
    limits: Limits = Limits(),
    traceback: str = "line",
) -> TestRun:
    """Runs pytest in a repository.

    Args:
        folder: the repository, from which pytest is called; its modules are imported from it, or from its
            `src`, before any that are installed.
        arguments: of pytest: files, folders, ids.
        scratch: a folder that the tests may write to; it holds `folder`.
        sandbox: one of `SANDBOXES`.
        python: interpreter with pytest and what the repository needs; by default this one, without the
            plugins of pytest that are installed here.
        limits: time and memory.
        traceback: pytest's `--tb`.
    """
    temporary = os.path.join(scratch, "tmp")
    os.makedirs(temporary, exist_ok=True)
    command = [python or sys.executable, "-c", _PYTEST, "-q", "-rfEpx", f"--tb={traceback}", "--color=no"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
    if sandbox == "bubblewrap":
        command = [*_bubblewrap(scratch), "--chdir", folder, *command]
    # Pyc files are trusted by the second: an edit may come within it.
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "HOME": temporary, "TMPDIR": temporary, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "300", "CI": "",
    }
    if python is None:
        # What is installed beside us has nothing to do with the repository, and takes a second to load.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    printed, in_time = _call(command, folder, environment, limits)
    printed = _cleaned(printed, folder, scratch)
    if not in_time:
        return TestRun(frozenset(), {}, f"The tests took longer than {limits.seconds:g} s.", printed)
    *_, summary = _SUMMARY.split(printed)
    if summary == printed:
        problem = "The tests could not be run: " + ("\n".join(printed.splitlines()[-12:]) or "no output")
        return TestRun(frozenset(), {}, problem, printed)
    passed, failed = set(), {}
    for outcome, told in _OUTCOME.findall(summary):
        if outcome in _PASSES:
            passed.add(told.partition(" - ")[0] if outcome == "XFAIL" else told)
        else:
            test, _, message = told.partition(" - ")
            failed[test] = message
    # A test whose teardown fails is listed twice.
    return TestRun(frozenset(passed - set(failed)), failed, "", printed)


def _call(command: list[str], folder: str, environment: dict[str, str], limits: Limits) -> tuple[str, bool]:
    """What a command printed, and whether it ended in time."""
    # Units of 1,024 and of 512 bytes, as POSIX has them.
    limited = f'ulimit -c 0; ulimit -v {limits.memory_mb << 10}; ulimit -f {_MAX_FILE_BYTES >> 9}; exec "$@"'
    # In the worker's own group: what kills the worker kills the tests.
    with subprocess.Popen(
        ["sh", "-c", limited, "sh", *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limits.seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            printed, in_time = b"", False
    return printed.decode(errors="replace"), in_time


def _kill(pid: int) -> None:
    """Kills a process and all that it started."""
    try:
        family = [psutil.Process(pid)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _cleaned(printed: str, folder: str, scratch: str) -> str:
    for path in (folder, scratch):
        printed = printed.replace(path + os.sep, "").replace(path, ".")
    return _DURATION.sub("", _ADDRESS.sub(r"\1", printed))


def _bubblewrap(scratch: str) -> list[str]:
    return [
        "bwrap", "--die-with-parent", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
        "--bind", scratch, scratch,
    ]  # fmt: skip


@functools.cache
def _bubblewrap_fails() -> str:
    if shutil.which("bwrap") is None:
        return "there is no program bwrap"
    ended = subprocess.run(
        [*_bubblewrap("/tmp")[:-3], "true"], stdin=subprocess.DEVNULL, capture_output=True
    )
    return ended.stderr.decode(errors="replace").strip() if ended.returncode else ""
