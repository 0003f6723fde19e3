"""What runs inside a worker process of the pool: environments, stepped in batches of requests.

The worker notes in a small shared file what it is at and since when, so that after a crash or
during a hang the pool knows the one episode to blame although answers travel in batches. Each
result is pickled while its request is still noted: one that cannot be pickled is a crash like any
other exception of its environment.
"""

import mmap
import pickle
import struct
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import envs_host
from envs_host.types import EnvFailure, GameFileError, ResetResult, StepResult, Task, TextEnv

READY = "ready"
_SEND_EVERY_S = 0.005


class Request(NamedTuple):
    """One thing to do for one episode.

    `task` alone resets. `text` alone steps. Both bring a lost episode back by replaying `commands`
    and then step. None of them releases the episode.
    """

    number: int
    episode: int
    task: Task | None = None
    commands: tuple[str, ...] = ()
    text: str | None = None


class Answer(NamedTuple):
    """What came of a request: a pickled result, None for a release."""

    number: int
    pickled: bytes


class Activity:
    """The shared note: number of the request being worked on, since when, and until when at most.

    Times are of the system-wide monotonic clock.
    """

    _FORMAT = struct.Struct("qd?")
    SIZE = _FORMAT.size
    IDLE = -1

    def __init__(self, fd: int):
        self._memory = mmap.mmap(fd, self.SIZE)

    def write(self, number: int, deadline: float = 0.0, is_reset: bool = False) -> None:
        self._memory[:] = self._FORMAT.pack(number, deadline, is_reset)

    def read(self) -> tuple[int, float, bool]:
        """Returns (request number or IDLE, deadline, whether it is a reset)."""
        while True:  # Until two readings agree: a reading may fall into a writing.
            first = self._memory[:]
            if first == self._memory[:]:
                return self._FORMAT.unpack(first)

    def close(self) -> None:
        self._memory.close()


def work(
    connection: Connection,
    env: str,
    env_kwargs: dict,
    activity_fd: int,
    step_limit_s: float,
    reset_limit_s: float,
) -> None:
    """Serves requests until the pool goes away."""
    worker = _Worker(env, env_kwargs, Activity(activity_fd), step_limit_s, reset_limit_s)
    connection.send(READY)
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        worker.serve(batch, connection)


class _Worker:
    def __init__(self, env, env_kwargs, activity, step_limit_s, reset_limit_s):
        self._make = lambda: envs_host.make(env, **env_kwargs)
        self._activity = activity
        self._step_limit_s = step_limit_s
        self._reset_limit_s = reset_limit_s
        self._live: dict[int, TextEnv] = {}
        # One is made ahead: its imports are part of the start, not of somebody's reset.
        self._spare: list[TextEnv] = [self._make()]

    def serve(self, batch: list[Request], connection: Connection) -> None:
        """Works through a batch; sends answers now and then and at the end."""
        answers: list[Answer] = []
        sent_at = time.monotonic()
        for request in batch:
            answers.append(Answer(request.number, pickle.dumps(self._result(request))))
            if time.monotonic() - sent_at > _SEND_EVERY_S:
                # Sending may block while the pool's owner is busy: that is not the env's fault.
                self._activity.write(Activity.IDLE)
                connection.send(answers)
                answers, sent_at = [], time.monotonic()
        self._activity.write(Activity.IDLE)
        if answers:
            connection.send(answers)

    def _result(self, request: Request) -> ResetResult | StepResult | EnvFailure | None:
        if request.task is None and request.text is None:
            self._note(request, is_reset=False)
            env = self._live.pop(request.episode, None)
            if env is not None:
                env.close()
                self._spare.append(env)
            return None
        result = None
        if request.task is not None:
            self._note(request, is_reset=True)
            env = self._spare.pop() if self._spare else self._make()
            self._live[request.episode] = env
            try:
                result = env.reset(request.task)
            except GameFileError as error:
                return EnvFailure("game file", str(error))
        env = self._live[request.episode]
        texts = request.commands if request.text is None else (*request.commands, request.text)
        for text in texts:
            self._note(request, is_reset=False)
            try:
                result = env.step(text)
            except GameFileError as error:
                return EnvFailure("game file", str(error))
        return result

    def _note(self, request: Request, is_reset: bool) -> None:
        limit = self._reset_limit_s if is_reset else self._step_limit_s
        self._activity.write(request.number, time.monotonic() + limit, is_reset)
