"""Child processes that start clean and never outlive their parent.

`multiprocessing`'s spawn imports the parent's main module again in every child, which would load
jax (seconds, and a fight over the accelerator) into each environment worker. Here a child is a
fresh interpreter that is told one function to call:

- it ignores SIGINT: Ctrl-C is the parent's to handle, which then closes its children;
- its standard input is a pipe that only the parent holds open. A thread waits for its end, so the
  child is gone even after `kill -9` of the parent, even while it hangs inside a C library;
- it is in a process group of its own, which is killed as a whole: what it has started itself (a
  compiler, a planner, a shell in a repository) goes with it, however it ended;
- its error output goes to a file, whose end the parent quotes when a child dies.
"""

import faulthandler
import importlib
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection

_STDERR_TAIL = 2000
_END_S = 0.5
_GROUP_S = 0.2  # less than _END_S, within which a parent expects the end
_STARTER = (
    "import sys; sys.path[:] = {path!r}; from envs_host import processes; processes._run({fd})"
)


class Child:
    """A Python process of its own, at work on `target(connection, *args)`.

    Attributes:
        connection: the parent's end of the pipe; at the end of the file once the child is dead.
        pid: process id.
    """

    def __init__(self, target: str, *args, pass_fds: tuple[int, ...] = ()):
        """Starts the process; returns at once.

        Args:
            target: "module:function", called in the child with its end of the pipe and `args`.
            *args: picklable.
            pass_fds: file descriptors that the child may use under the same numbers.
        """
        self.connection, theirs = multiprocessing.connection.Pipe()
        self._stderr = tempfile.TemporaryFile()
        # Sets come in the same order in every child: TextWorld's generator iterates over some.
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONFAULTHANDLER": "1"}
        path = [os.path.abspath(entry) for entry in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _STARTER.format(path=path, fd=theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
            pass_fds=[theirs.fileno(), *pass_fds],
            env=environment,
        )
        theirs.close()
        self.pid = self._process.pid
        try:
            self.connection.send((target, args))
        except (BrokenPipeError, ConnectionResetError):
            pass  # Died at birth; the caller reads the end of the file, as for any death.

    def is_alive(self) -> bool:
        if self._process.returncode is not None:
            return False
        # Asked without reaping it: its number stays its own, and `kill` can still name its group by it.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def last_words(self) -> str:
        """Says how the process ended and what it last wrote to stderr; killed if it lives on."""
        # One that has closed its connection is about to end by itself, for its own reason.
        until = time.monotonic() + _END_S
        while self.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        code = self.kill()
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace").strip()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"{how}\n{tail}" if tail else how

    def kill(self) -> int:
        """Kills the process if it is alive, and what it has started; waits for its end and returns the
        exit code."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process.stdin.close()
        self.connection.close()
        return code

    def close(self) -> None:
        """Ends the process, by force: it holds nothing worth saving."""
        self.kill()
        self._stderr.close()


def _run(fd: int) -> None:
    """The child's side: calls what the parent names, then exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    watcher = threading.Thread(target=_die_with_parent, daemon=True)
    watcher.start()
    connection = Connection(fd)
    try:
        target, args = connection.recv()
        module, _, function = target.partition(":")
        vars(importlib.import_module(module))[function](connection, *args)
    finally:
        # Of a dead parent the connection ends, too, and with it what reads from it: not before the watcher
        # has killed the group, or what it has started lives on.
        watcher.join(_GROUP_S)


def _die_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)
