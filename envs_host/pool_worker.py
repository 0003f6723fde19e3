"""What runs inside a worker process of the pool: environments, stepped in batches of requests.

The worker notes in a small shared file what it is at and since when, so that after a crash or
during a hang the pool knows the one episode to blame although answers travel in batches. Each
result is looked at and pickled while its request is still noted: one that is none of the protocol's, or
cannot be pickled, is a crash like any other exception of its environment.
"""

import mmap
import pickle
import struct
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

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
    """What came of a request: a pickled result (None for a release), and the seconds it took."""

    number: int
    pickled: bytes
    seconds: float


class Note(NamedTuple):
    """What a worker is at; times are of the system-wide monotonic clock.

    Attributes:
        number: of the request being worked on, or `Activity.IDLE`.
        since: when that request was begun.
        deadline: when its current reset or step must have ended.
        is_reset: whether that is a reset.
    """

    number: int
    since: float = 0.0
    deadline: float = 0.0
    is_reset: bool = False


class Activity:
    """The shared file that holds a `Note`."""

    _FORMAT = struct.Struct("qdd?")
    SIZE = _FORMAT.size
    IDLE = -1

    def __init__(self, fd: int):
        self._memory = mmap.mmap(fd, self.SIZE)

    def write(self, note: Note) -> None:
        self._memory[:] = self._FORMAT.pack(*note)

    def read(self) -> Note:
        while True:  # Until two readings agree: a reading may fall into a writing.
            first = self._memory[:]
            if first == self._memory[:]:
                return Note(*self._FORMAT.unpack(first))

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
            began = time.monotonic()
            pickled = pickle.dumps(self._result(request, began))
            now = time.monotonic()
            answers.append(Answer(request.number, pickled, now - began))
            if now - sent_at > _SEND_EVERY_S:
                # Sending may block while the pool's owner is busy: that is not the env's fault.
                self._activity.write(Note(Activity.IDLE))
                connection.send(answers)
                answers, sent_at = [], time.monotonic()
        self._activity.write(Note(Activity.IDLE))
        if answers:
            connection.send(answers)

    def _result(
        self, request: Request, began: float
    ) -> ResetResult | StepResult | EnvFailure | None:
        if request.task is None and request.text is None:
            self._note(request, began, is_reset=False)
            env = self._live.pop(request.episode, None)
            if env is not None:
                env.close()
                self._spare.append(env)
            return None
        result = None
        if request.task is not None:
            self._note(request, began, is_reset=True)
            env = self._spare.pop() if self._spare else self._make()
            self._live[request.episode] = env
            try:
                result = _checked(env.reset(request.task), ResetResult, env)
            except GameFileError as error:
                return EnvFailure("game file", str(error))
        env = self._live[request.episode]
        texts = request.commands if request.text is None else (*request.commands, request.text)
        for text in texts:
            self._note(request, began, is_reset=False)
            try:
                result = _checked(env.step(text), StepResult, env)
            except GameFileError as error:
                return EnvFailure("game file", str(error))
        return result

    def _note(self, request: Request, began: float, is_reset: bool) -> None:
        limit = self._reset_limit_s if is_reset else self._step_limit_s
        deadline = time.monotonic() + limit
        self._activity.write(Note(request.number, began, deadline, is_reset))


def _checked(result: Any, expected: type, env: TextEnv) -> ResetResult | StepResult:
    if not isinstance(result, expected) or not isinstance(result.observation, str):
        method = "reset" if expected is ResetResult else "step"
        raise TypeError(
            f"{type(env).__name__}.{method} must return a {expected.__name__} whose observation is a text, got "
            f"{repr(result)[:200]}"
        )
    return result
