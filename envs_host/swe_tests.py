"""Running a repository's tests: what passed, what failed and how, in the same words every time.

What is run may have been written by a model. `sandbox="bubblewrap"` shows it the file system read-only
but for its own folder, and no network; `"none"` is for machines that can be thrown away. Either way time,
memory and the size of files are limited and the environment variables are the test run's own.

Outcomes are not read from what is printed: a plugin that is there before the repository is looked in hands
them over on a descriptor of its own once pytest has ended. Code that sets out to forge them could, being in
the same process; code that exits, prints, or puts itself in pytest's place cannot.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import psutil

from envs_host import swe_scratch

SANDBOXES = ("bubblewrap", "none")

# `python -m pytest` would look for pytest in the repository first.
_PYTEST = """\
import json, os, sys
sys.path.pop(0)
import pytest

class Outcomes:
    def __init__(self):
        self.told = {}

    def note(self, report, outcome):
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr or "")
        if len(message) > 4000:  # only its first line is told, or its last
            message = message[:2000] + "\\n" + message[-2000:]
        if self.told.get(report.nodeid, [""])[0] != "failed":
            self.told[report.nodeid] = [outcome, message]

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        is_marked = getattr(getattr(item, "obj", None), "__unittest_expecting_failure__", False)
        asked = call.excinfo is not None and call.excinfo.errisinstance(pytest.xfail.Exception)
        report.as_marked = report.skipped and hasattr(report, "wasxfail") and (is_marked or not asked)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.note(report, "failed")
        elif report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            self.note(report, "passed")
        elif report.when == "call" and getattr(report, "as_marked", False):
            self.note(report, "expected")

    def pytest_collectreport(self, report):
        if report.failed:
            self.note(report, "failed")

descriptor, here, outcomes = int(sys.argv[1]), os.getcwd(), Outcomes()
sys.path[:0] = [here, os.path.join(here, "src")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
code = pytest.main(sys.argv[2:], plugins=[outcomes])
os.write(descriptor, json.dumps([int(code), outcomes.told]).encode())
sys.stdout.flush()
os._exit(0)
"""
_COMPLETE = (0, 1)  # pytest's codes: all passed, some failed
_INTERRUPTED = 2  # errors while tests were collected
# pytest shortens what it shows, addresses with it: <Thing object at 0x7f...> or <Th...x7fa18a8f46d0>.
_ADDRESS = re.compile(r"(\b0x|\.\.\.0?x?)[0-9a-f]{6,16}(?=\b|>)")
_DURATION = re.compile(r" in \d+\.\d+s(?: \(\d+:\d\d:\d\d\))?")
_MAX_FILE_BYTES = 1 << 28
_MAX_PRINTED_BYTES = 1 << 22
_MAX_TOLD_BYTES = 1 << 26  # half a million tests
_MAX_LINES, _MAX_LINE = 12, 300  # of what is printed where tests cannot be run
_HIDDEN = ("/tmp", "/var/tmp", "/run")  # where programs meet: sockets, other episodes


class SandboxError(ValueError):
    """What is needed to run tests is not there; the message says what to do."""


class TestRun(NamedTuple):
    """What came of a run.

    Attributes:
        passed: ids of the tests that passed, e.g. "tests/test_a.py::test_b".
        expected: of those that failed and are marked to (`pytest.mark.xfail`, `unittest.expectedFailure`); none
            that called `pytest.xfail`, which the code under test can do, too.
        failed: ids of those that failed, and files that could not be collected -> the first line of why, perhaps "".
        problem: why there was no complete run; "" if there was one.
        output: the end of what pytest printed, without what differs from run to run.
    """

    __test__ = False  # pytest takes the name for a test's

    passed: frozenset[str]
    expected: frozenset[str]
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
        raise ValueError(f"env.options.sandbox must be one of {', '.join(SANDBOXES)}, got {sandbox!r}.")
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
    sandbox: str,
    python: str | None = None,
    limits: Limits = Limits(),
    traceback: str = "line",
    explained: bool = True,
    hidden: Sequence[str] = (),
) -> TestRun:
    """Runs pytest in a repository.

    Args:
        folder: the repository, from which pytest is called; its modules are imported from it, or from its
            `src`, before any that are installed. It is in a folder of `swe_scratch`.
        arguments: of pytest: files, folders, ids.
        sandbox: one of `SANDBOXES`.
        python: interpreter with pytest and what the repository needs; by default this one, without the
            plugins of pytest that are installed here.
        limits: time and memory.
        traceback: pytest's `--tb`.
        explained: failures say what was compared. For that pytest rewrites every assertion there is, which is
            most of what a run of many quick tests takes.
        hidden: files and folders that bubblewrap does not show, unless the interpreter is in them.

    Raises:
        OSError: the folder is gone.
    """
    interpreter = python or sys.executable
    with swe_scratch.folder() as temporary, tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as printed:
        command = [interpreter, "-c", _PYTEST, str(told.fileno()), "-q", "-rN", f"--tb={traceback}", "--color=no"]
        command += [f"--rootdir={folder}", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
        command += [] if explained else ["--assert=plain"]
        if sandbox == "bubblewrap":
            shown = _bubblewrap(folder, temporary, _not_shown(interpreter, python is None, hidden))
            command = [*shown, "--chdir", folder, *command]
        environment = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": temporary, "TMPDIR": temporary, "LANG": "C.UTF-8",
            # Pyc files are trusted by the second: an edit may come within it.
            "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300", "CI": "",
        }  # fmt: skip
        if python is None:
            # What is installed beside us has nothing to do with the repository, and takes a second to load.
            environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        in_time = _call(command, folder, environment, limits, told, printed)
        cleaned = functools.partial(_cleaned, folders=(folder, temporary))
        output = cleaned(_end(printed, _MAX_PRINTED_BYTES).decode(errors="replace"))
        if not in_time:
            return TestRun(frozenset(), frozenset(), {}, f"The tests took longer than {limits.seconds:g} s.", output)
        try:
            code, outcomes = json.loads(_end(told, _MAX_TOLD_BYTES))
        except ValueError:
            code, outcomes = None, {}
    if code not in _COMPLETE and not (code == _INTERRUPTED and outcomes):
        lines = [line[:_MAX_LINE] for line in output.splitlines()[-_MAX_LINES:]]
        problem = "The tests could not be run: " + ("\n".join(lines) or "no output")
        return TestRun(frozenset(), frozenset(), {}, problem, output)
    passed, expected = (
        frozenset(test for test, (outcome, _) in outcomes.items() if outcome == name) for name in ("passed", "expected")
    )
    failed = {test: cleaned(message) for test, (outcome, message) in outcomes.items() if outcome == "failed"}
    return TestRun(passed, expected, {test: _first_line(message) for test, message in failed.items()}, "", output)


def _call(
    command: list[str], folder: str, environment: dict[str, str], limits: Limits, told: BinaryIO, printed: BinaryIO
) -> bool:
    """Whether a command ended in time."""
    # Units of 1,024 and of 512 bytes, as POSIX has them.
    limited = f'ulimit -c 0; ulimit -v {limits.memory_mb << 10}; ulimit -f {_MAX_FILE_BYTES >> 9}; exec "$@"'
    # In the worker's own group: what kills the worker kills the tests.
    with psutil.Popen(  # waits without looking every now and then
        ["sh", "-c", limited, "sh", *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=subprocess.STDOUT,
        pass_fds=[told.fileno()],
    ) as process:
        try:
            process.wait(timeout=limits.seconds)
            return True
        except psutil.TimeoutExpired:
            _kill(process)
            return False


def _kill(process: psutil.Process) -> None:
    """Kills a process and all that it started."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _end(file: BinaryIO, size: int) -> bytes:
    """The last bytes of what was written: there may be a lot."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
    return file.read()


def _first_line(message: str) -> str:
    """What pytest says of a failure in a line: the first; of an error while collecting, the last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    of_traceback = [line for line in lines if line.startswith("E  ")]
    return (of_traceback[-1].removeprefix("E").strip() if of_traceback else lines[0]) if lines else ""


def _cleaned(text: str, folders: Sequence[str]) -> str:
    for path in folders:
        text = text.replace(path + os.sep, "").replace(path, ".")
    return _DURATION.sub("", _ADDRESS.sub(r"\1", text))


def _not_shown(interpreter: str, is_ours: bool, hidden: Sequence[str]) -> list[str]:
    """Files and folders to hide: not those that the interpreter is in, or what it is made of."""
    needed = [os.path.abspath(interpreter), os.path.realpath(interpreter)]
    needed += [sys.prefix, sys.base_prefix] if is_ours else []
    there = [path for path in (*_HIDDEN, *hidden) if os.path.exists(path) and not os.path.islink(path)]
    return [path for path in there if not any((one + os.sep).startswith(path + os.sep) for one in needed)]


def _bubblewrap(folder: str, temporary: str, hidden: Sequence[str]) -> list[str]:
    command = ["bwrap", "--die-with-parent", "--unshare-all", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
    command += ["--dev", "/dev", "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"]
    for path in hidden:
        command += ["--tmpfs", path] if os.path.isdir(path) else ["--ro-bind", os.devnull, path]
    return [*command, "--bind", folder, folder, "--bind", temporary, temporary]


@functools.cache
def _bubblewrap_fails() -> str:
    if shutil.which("bwrap") is None:
        return "there is no program bwrap"
    with swe_scratch.folder() as folder:
        ended = subprocess.run(
            [*_bubblewrap(folder, folder, ()), "true"], stdin=subprocess.DEVNULL, capture_output=True
        )
    return ended.stderr.decode(errors="replace").strip() if ended.returncode else ""
