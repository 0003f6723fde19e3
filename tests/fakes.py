"""Environments that misbehave on command, for the tests of the worker pool.

Worker processes import this file: nothing of jax in here.
"""

import ctypes
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from envs_host.types import GameFileError, Info, ResetResult, StepResult, Task


def task(name="t", **params) -> Task:
    """A task of `ScriptedEnv`; `params["reset"]` is a command that the reset carries out."""
    return Task("fakes:ScriptedEnv", name, params, 0, "", name, "", 1.0, ())


class Unreadable:
    """Can be pickled, and not be read again."""

    def __reduce__(self):
        return (int, ("no number",))


# What no pool can hand on.
_OBJECTIVES = {"unpicklable": {"look": 1}.keys(), "unreadable": Unreadable()}


class ScriptedEnv:
    """Carries out each word of a command; the observation is the history of commands."""

    def __init__(self, *, make: str = ""):
        self._history = []
        self._hoard = []
        self._task = None
        self._do(make)

    def reset(self, task: Task) -> ResetResult:
        self._task = task
        self._history = [task.name]
        self._do(task.params.get("reset", ""))
        return ResetResult(self._observation(), self._info(""))

    def step(self, text: str) -> StepResult:
        self._history.append(text)
        answer = self._do(text)
        done = text == "win"
        return StepResult(answer or self._observation(), 1.0, done, False, self._info(text))

    def close(self) -> None:
        pass

    def _observation(self) -> str:
        return " | ".join(self._history)

    def _info(self, command: str) -> Info:
        return Info(0.0, 1.0, command == "win", False, True, command, 0.0, (), _OBJECTIVES.get(command, ""))

    def _do(self, text: str) -> str | None:
        verb, _, rest = text.partition(" ")
        if verb == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif verb == "crash_once":
            marker = pathlib.Path(rest)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        elif verb == "hang":
            time.sleep(1000)
        elif verb == "hang_in_c":
            ctypes.CDLL(None).pause()
        elif verb == "sleep":
            time.sleep(float(rest))
        elif verb == "raise":
            raise ZeroDivisionError("made to fail")
        elif verb == "need" and not pathlib.Path(rest).exists():
            raise FileNotFoundError(rest)
        elif verb == "grow":
            self._hoard.append(b"x" * (int(rest) * 2**20))
        elif verb == "no_game_file":
            raise GameFileError("the file is gone")
        elif verb == "print":
            print("this must not appear on the terminal")
        elif verb == "pid":
            return str(os.getpid())
        elif verb == "start":
            return str(subprocess.Popen(["sleep", "1000"]).pid)
        elif verb == "no_text":
            return ("a box", 1.0)
        elif verb == "close_files":
            os.closerange(3, 1000)  # As a library does that turns its process into a daemon.
        elif verb == "modules":
            return " ".join(sorted(sys.modules))
        return None


def _random(task: Task, *parts: str) -> random.Random:
    text = "|".join((str(task.seed), *parts))
    return random.Random(hashlib.sha256(text.encode()).digest())


class RaggedEnv:
    """Answers with words that depend on all that was said, after as many turns as the seed says.

    Episodes take 1 to 20 turns, answers 1 to 30 words, and a random time of up to `latency_s`.
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        stuck_seed: int = -1,
        forgets: bool = False,
        forgets_after: int = 1000,
    ):
        self._latency_s, self._stuck_seed = latency_s, stuck_seed
        self._forgets, self._forgets_after = forgets, forgets_after
        self._clock = random.Random(os.getpid())

    def reset(self, task: Task) -> ResetResult:
        self._task, self._said = task, []
        return ResetResult(self._answer(), self._info("", False))

    def step(self, text: str) -> StepResult:
        self._said.append(text)
        if self._task.seed == self._stuck_seed and len(self._said) == 2:
            time.sleep(1000)
        time.sleep(self._clock.random() * self._latency_s)
        done = len(self._said) >= self.num_turns(self._task)
        return StepResult(self._answer(), float(done), done, False, self._info(text, done))

    def close(self) -> None:
        pass

    def _answer(self) -> str:
        words = self._random(*self._said)
        said = [words.choice(("box", "key", "door", "room")) for _ in range(words.randint(1, 30))]
        forgotten = self._forgets or len(self._said) > self._forgets_after
        return " ".join(said + [str(time.time_ns())] * forgotten)

    @classmethod
    def num_turns(cls, task: Task) -> int:
        """After how many the task ends."""
        return 1 + _random(task, "turns").randrange(20)

    def _random(self, *parts: str) -> random.Random:
        return _random(self._task, *parts)

    def _info(self, command: str, done: bool) -> Info:
        return Info(float(done), 1.0, done, False, True, command, 0.0, (), "Say words.")


def start_and_read(connection):
    """Starts a process, tells its number, and goes as soon as nobody is there any more."""
    started = subprocess.Popen(["sleep", "1000"])
    sys.setswitchinterval(10.0)  # no other thread comes in between, unless it is waited for
    connection.send(started.pid)
    try:
        connection.recv()
    except EOFError:
        pass
