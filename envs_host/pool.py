"""Text environments in worker processes that may crash, hang or grow without harm to the run.

Requests are queued and answers collected; a thread of the pool moves them in batches, so that
environments step while the caller computes. What a worker process can do, and what happens then:

- crash (a segfault in an interpreter written in C, an exception, an answer that cannot be
  pickled): the process is replaced. The episode that was being stepped gets its commands replayed
  in the new process and its request tried again, `max_replays` times; then it is answered with an
  `EnvFailure`. The others on that worker are replayed as well, with their next command, and notice
  nothing;
- hang past the time limit: the process is killed, then as above;
- be at a command whose episode was released: it is left alone, unless others wait for the process
  and the command has gone on for longer than replacing the process takes (its start, and what its
  other episodes took so far). Then it is replaced, its other episodes replayed;
- die between requests: replaced as well, and an error if that happens again and again;
- grow past the memory limit: the process is replaced between two batches, its episodes replayed.

Environments must be deterministic: the same commands bring back the same state.
"""

import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

from envs_host.pool_server import PoolError, Server, Worker
from envs_host.types import EnvFailure, ResetResult, StepResult, Task

__all__ = ["EnvPool", "PoolError"]

_LONGEST_WAIT_S = 0.5
_WOKEN = object()  # among the messages of the pool's thread: no answer, but `wake` was called

Result = ResetResult | StepResult | EnvFailure


class EnvPool:
    """Live episodes of text environments, one per handle. Use it as a context manager."""

    def __init__(
        self,
        env: str,
        env_kwargs: dict[str, Any],
        *,
        num_workers: int,
        step_limit_s: float,
        reset_limit_s: float,
        worker_memory_mb: float,
        max_replays: int = 1,
    ):
        """Starts the worker processes; returns at once.

        Args:
            env: environment name, see `envs_host.make`.
            env_kwargs: its options.
            num_workers: processes.
            step_limit_s: a step that takes longer is ended by killing the process.
            reset_limit_s: the same for a reset.
            worker_memory_mb: a process with more resident memory is replaced.
            max_replays: how often a request that killed its process is tried again.

        Raises:
            ValueError: a number is out of range.
        """
        for name, value in (
            ("num_workers", num_workers),
            ("step_limit_s", step_limit_s),
            ("reset_limit_s", reset_limit_s),
            ("worker_memory_mb", worker_memory_mb),
        ):
            if not value > 0:
                raise ValueError(f"pool.{name} must be more than 0, got {value}.")
        if max_replays < 0:
            raise ValueError(f"pool.max_replays must be 0 or more, got {max_replays}.")
        self._server = Server(
            lambda: Worker(env, env_kwargs, step_limit_s, reset_limit_s),
            num_workers=num_workers,
            worker_memory_mb=worker_memory_mb,
            max_replays=max_replays,
        )
        self._closed = False
        self._next_number = 0
        self._numbers: dict[Hashable, int] = {}  # Handle of a live episode -> its number.
        self._waiting: set[int] = set()  # Numbers of the episodes with an answer to come.
        self._ended: set[int] = set()
        self._thread = threading.Thread(target=self._server.run, name="env-pool", daemon=True)
        self._thread.start()

    def reset(self, handle: Hashable, task: Task) -> None:
        """Queues the start of an episode; one that is live under `handle` is released.

        Args:
            handle: any name for the episode.
            task: what to play.
        """
        self.release(handle)
        number = self._next_number
        self._next_number += 1
        self._numbers[handle] = number
        self._waiting.add(number)
        self._post("reset", number, handle, task)

    def step(self, handle: Hashable, text: str) -> None:
        """Queues a command for a live episode.

        Raises:
            ValueError: the episode is not live, has ended, or owes an answer.
        """
        number = self._numbers.get(handle)
        if number is None:
            raise ValueError(
                f"episode {handle!r} is not live (never reset, failed or released): reset it first."
            )
        if number in self._ended:
            raise ValueError(f"episode {handle!r} has ended: reset it first.")
        if number in self._waiting:
            raise ValueError(f"episode {handle!r} owes an answer: poll it before the next step.")
        self._waiting.add(number)
        self._post("step", number, text)

    def poll(
        self, limit_s: float | None = None, *, until: Callable[[], object] = lambda: False
    ) -> list[tuple[Hashable, Result]]:
        """Collects answers: waits for at least one, returns all there are.

        Args:
            limit_s: how long to wait; None waits as long as an answer is to come.
            until: there is something else to do, which ends the wait. Asked at the beginning, and again
                at every `wake`.

        Returns:
            (handle, answer) pairs; empty if the time was up, no answer is to come, or because of
            `until`. An episode answered with an `EnvFailure` is not live any more.

        Raises:
            PoolError: the worker processes cannot be started or keep dying between requests, or
                the pool is closed.
        """
        end = None if limit_s is None else time.monotonic() + limit_s
        results: list[tuple[Hashable, Result]] = []
        while self._waiting and not until():
            message = self._next_message(end, wait=not results)
            if message is None:
                break
            if message is _WOKEN:
                continue
            number, handle, result = message
            if self._numbers.get(handle) != number:
                continue  # Released meanwhile.
            self._waiting.discard(number)
            if isinstance(result, EnvFailure):
                self._forget(handle)
            elif isinstance(result, StepResult) and (result.terminated or result.truncated):
                self._ended.add(number)
            results.append((handle, result))
        return results

    def wake(self) -> None:
        """Has a `poll` of another thread ask its `until` again."""
        self._server.outbox.put(_WOKEN)

    def release(self, handle: Hashable) -> None:
        """Ends the episode of a handle, if there is one; an answer to come is dropped."""
        if handle in self._numbers:
            self._post("release", self._numbers[handle])
            self._forget(handle)

    @property
    def counters(self) -> dict[str, int]:
        """Counts since the start, by name:

        - `crashes`: worker processes that died by themselves or were killed from outside the pool;
        - `time_limits`: worker processes killed because a reset or step took too long;
        - `abandoned`: worker processes killed at a request of a released episode, because other
          episodes waited;
        - `recycles`: worker processes replaced because of their memory;
        - `replays`: episodes brought back in another process by their commands, and resets tried
          again because they killed theirs;
        - `failures`: requests answered with an `EnvFailure`, whatever the reason.
        """
        return dict(self._server.counters)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.child.pid for worker in list(self._server.workers)]

    def close(self) -> None:
        """Ends the worker processes; answers to come are lost. Calling it twice is allowed."""
        if self._closed:
            return
        self._server.post("stop")
        self._closed = True
        self._thread.join()
        self._server.close_pipe()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _post(self, method: str, *args) -> None:
        if self._closed:
            raise PoolError("the environment pool is closed.")
        self._server.post(method, *args)

    def _next_message(self, end: float | None, wait: bool):
        """Takes a message off the thread's outbox; None if there is none (in time)."""
        while True:
            patience = _LONGEST_WAIT_S if wait else 0.0
            if end is not None:
                patience = min(patience, max(0.0, end - time.monotonic()))
            alive = self._thread.is_alive()
            try:
                message = self._server.outbox.get(block=patience > 0, timeout=patience or None)
            except queue.Empty:
                if not alive:
                    raise PoolError(
                        "the environment pool is closed, or ended by an error told before."
                    ) from None
                if not wait or (end is not None and time.monotonic() >= end):
                    return None
                continue
            if isinstance(message, PoolError):
                raise message
            return message

    def _forget(self, handle: Hashable) -> None:
        number = self._numbers.pop(handle)
        self._waiting.discard(number)
        self._ended.discard(number)
