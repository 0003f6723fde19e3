"""The thread of the pool: owns the worker processes and the episodes, and moves the messages.

Nothing here is touched by the caller's thread except `Server.post`, `Server.outbox` (both made for
that) and the reading of `counters` and `workers`.
"""

import dataclasses
import os
import pickle
import queue
import tempfile
import time
import zlib
from collections.abc import Callable, Hashable
from multiprocessing.connection import wait

import psutil

from envs_host.pool_worker import READY, Activity, Answer, Note, Request
from envs_host.processes import Child
from envs_host.types import EnvFailure, Task

_START_LIMIT_S = 120.0
_MAX_FAILED_STARTS = 3
_MAX_IDLE_DEATHS = 3
_MEMORY_CHECK_S = 0.2
_LONGEST_WAIT_S = 0.5
_SHORTEST_WAIT_S = 0.01


class PoolError(RuntimeError):
    """The pool as a whole cannot work, e.g. because the environment cannot be made."""


@dataclasses.dataclass(eq=False)
class Episode:
    """What is known of a live episode; enough to bring it back after its process is gone."""

    number: int
    handle: Hashable
    task: Task
    worker: "Worker"
    commands: list[str] = dataclasses.field(default_factory=list)  # Answered ones.
    started: bool = False  # The reset was answered.
    lost: bool = False  # Its process is gone: to be replayed with the next command.
    waiting: bool = True  # An answer is owed: to the reset, or to `text`.
    text: str | None = None
    deaths: int = 0  # Of processes, at the request that is owed an answer.
    replay_s: float = 0.0  # What its reset and its commands took, so about what a replay takes.


class Worker:
    """A worker process as the pool sees it."""

    def __init__(self, env: str, env_kwargs: dict, step_limit_s: float, reset_limit_s: float):
        self.env = env
        self._note = tempfile.TemporaryFile()
        self._note.truncate(Activity.SIZE)
        self.activity = Activity(self._note.fileno())
        self.activity.write(Note(Activity.IDLE))
        self.began = time.monotonic()
        self.child = Child(
            "envs_host.pool_worker:work",
            env,
            env_kwargs,
            self._note.fileno(),
            step_limit_s,
            reset_limit_s,
            pass_fds=(self._note.fileno(),),
        )
        self.ready = False
        self.start_s = 0.0  # How long it took to be ready.
        self.failed_starts = 0  # Of processes in this place, since one of them was ready.
        # Deaths of processes in this place that no request is to blame for, since an answer came.
        self.idle_deaths = 0
        self.queue: list[Request] = []
        self.in_flight: dict[int, Request] = {}
        self.memory_checked_at = 0.0

    def memory_mb(self) -> float:
        """Resident memory."""
        try:
            return psutil.Process(self.child.pid).memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            return 0.0  # It has just died, which its connection will tell.

    def close(self) -> None:
        self.child.close()
        self.activity.close()
        self._note.close()


class Server:
    """Serves resets, steps and releases until it is closed; `run` is the body of the thread."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        *,
        num_workers: int,
        worker_memory_mb: float,
        max_replays: int,
    ):
        self._make_worker = make_worker
        self._worker_memory_mb = worker_memory_mb
        self._max_replays = max_replays
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._closing = False
        self._next_request = 0
        self._episodes: dict[int, Episode] = {}
        # Holds (episode number, handle, answer), or the PoolError that ended the thread.
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.counters = dict.fromkeys(
            ("crashes", "time_limits", "abandoned", "replays", "recycles", "failures"), 0
        )
        self.workers: list[Worker] = [make_worker() for _ in range(num_workers)]
        self._has_worked = False  # Some worker was ready, so that the environment can be made.

    def post(self, method: str, *args) -> None:
        """Has the thread call one of `reset`, `step`, `release`, `stop`."""
        self._inbox.put((method, args))
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            pass  # The pipe is full of wake-up calls already.

    def run(self) -> None:
        """Serves until `stop` is posted or nothing works any more."""
        try:
            while not self._closing:
                self._receive()
                self._check_hangs()
                self._dispatch()
        except PoolError as error:
            self.outbox.put(error)
        except OSError as error:  # no memory, or no process, for a worker in another's place
            self.outbox.put(PoolError(f"the environment pool cannot go on: {error}."))
        finally:
            for worker in self.workers:
                worker.close()

    def close_pipe(self) -> None:
        """Frees the wake-up pipe, after the thread has ended."""
        os.close(self._wake_read)
        os.close(self._wake_write)

    # What `post` may name.

    def reset(self, number: int, handle: Hashable, task: Task) -> None:
        episode = Episode(number, handle, task, self._choose_worker(task))
        self._episodes[number] = episode
        self._enqueue(episode)

    def step(self, number: int, text: str) -> None:
        episode = self._episodes.get(number)
        if episode is None:
            return  # It has just failed; the caller will learn of it.
        episode.text = text
        episode.waiting = True
        self._enqueue(episode)

    def release(self, number: int) -> None:
        episode = self._episodes.pop(number, None)
        if episode is not None:
            worker = episode.worker
            worker.queue = [request for request in worker.queue if request.episode != number]
            worker.queue.append(Request(self._number(), number))

    def stop(self) -> None:
        self._closing = True

    # Requests.

    def _number(self) -> int:
        self._next_request += 1
        return self._next_request

    def _choose_worker(self, task: Task) -> Worker:
        """Episodes of one game share a worker, whose memory of answers then serves them all,
        unless that worker has far more to do than another."""
        loads = {id(worker): 0 for worker in self.workers}
        for episode in self._episodes.values():
            loads[id(episode.worker)] += 1
        preferred = self.workers[zlib.crc32(task.digest.encode()) % len(self.workers)]
        least = min(self.workers, key=lambda worker: loads[id(worker)])
        too_many = loads[id(preferred)] > 2 * loads[id(least)] + 8
        return least if too_many else preferred

    def _enqueue(self, episode: Episode) -> None:
        """Puts the request whose answer is owed into the queue of the episode's worker."""
        number = self._number()
        if not episode.started:
            request = Request(number, episode.number, task=episode.task)
        elif episode.lost:
            episode.lost = False
            self.counters["replays"] += 1
            request = Request(
                number, episode.number, episode.task, tuple(episode.commands), episode.text
            )
        else:
            request = Request(number, episode.number, text=episode.text)
        episode.worker.queue.append(request)

    def _dispatch(self) -> None:
        """Sends each worker that has finished its batch all that is queued for it."""
        for worker in self.workers:
            if worker.queue and worker.ready and not worker.in_flight:
                batch, worker.queue = worker.queue, []
                worker.in_flight = {request.number: request for request in batch}
                try:
                    worker.child.connection.send(batch)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # It has just died, which the next reading tells.

    # Answers.

    def _receive(self) -> None:
        """Waits for something to do, takes in the caller's orders and the workers' messages."""
        workers = {worker.child.connection: worker for worker in self.workers}
        for source in wait([self._wake_read, *workers], timeout=self._patience()):
            if source == self._wake_read:
                os.read(self._wake_read, 65536)
                continue
            worker = workers[source]
            try:
                message = worker.child.connection.recv()
            except (EOFError, OSError):  # OSError: it died within a message.
                self._died(worker, "crash", worker.child.last_words())
                continue
            if message == READY:
                self._started(worker)
            else:
                self._take(worker, message)
        while not self._inbox.empty():
            method, args = self._inbox.get()
            {"reset": self.reset, "step": self.step, "release": self.release, "stop": self.stop}[
                method
            ](*args)

    def _patience(self) -> float | None:
        """How long nothing can happen that is not told by a message."""
        if all(worker.ready and not worker.in_flight for worker in self.workers):
            return None
        patience = _LONGEST_WAIT_S
        for worker in self.workers:
            note = worker.activity.read()
            if note.number != Activity.IDLE:
                patience = min(patience, note.deadline - time.monotonic())
        return max(patience, _SHORTEST_WAIT_S)

    def _started(self, worker: Worker) -> None:
        worker.ready = self._has_worked = True
        worker.start_s = time.monotonic() - worker.began
        memory = worker.memory_mb()
        if memory > self._worker_memory_mb:
            raise PoolError(
                f"pool.worker_memory_mb={self._worker_memory_mb} is less than a worker process of "
                f"{worker.env!r} takes before its first episode ({memory:.0f} MB): raise it."
            )

    def _take(self, worker: Worker, answers: list[Answer]) -> None:
        worker.idle_deaths = 0
        for answer in answers:
            request = worker.in_flight.pop(answer.number)
            episode = self._episodes.get(request.episode)
            if episode is None:
                continue  # Released meanwhile, or this is the answer to the release.
            try:
                result = pickle.loads(answer.pickled)
            except Exception as error:  # whatever an object of an environment's own raises
                result = EnvFailure("crash", f"its answer cannot be unpickled: {type(error).__name__}: {error}")
            if isinstance(result, EnvFailure):
                self._fail(episode, result)
                continue
            if episode.started:
                episode.commands.append(episode.text)
            episode.started = True
            episode.waiting = False
            episode.text = None
            episode.deaths = 0
            episode.replay_s = answer.seconds + (episode.replay_s if request.task is None else 0.0)
            self.outbox.put((episode.number, episode.handle, result))
        now = time.monotonic()
        if not worker.in_flight and now - worker.memory_checked_at > _MEMORY_CHECK_S:
            worker.memory_checked_at = now
            if worker.memory_mb() > self._worker_memory_mb:
                self.counters["recycles"] += 1
                self._replace(worker, culprit=None)

    def _fail(self, episode: Episode, failure: EnvFailure) -> None:
        self.counters["failures"] += 1
        self.outbox.put((episode.number, episode.handle, failure))
        self.release(episode.number)

    # Deaths.

    def _check_hangs(self) -> None:
        """Kills the workers that hang, or are at something that nobody waits for any more."""
        now = time.monotonic()
        for worker in list(self.workers):
            if not worker.ready and now > worker.began + _START_LIMIT_S:
                raise PoolError(
                    f"a worker process of {worker.env!r} did not start within {_START_LIMIT_S:.0f} "
                    f"s: {worker.child.last_words()}"
                )
            note = worker.activity.read()
            if note.number == Activity.IDLE:
                continue
            if now > note.deadline:
                worker.child.kill()
                reason = "reset time limit" if note.is_reset else "step time limit"
                self._died(worker, reason, "the process did not answer in time and was killed")
            elif self._is_held_up(worker, note.number, now - note.since):
                self.counters["abandoned"] += 1
                self._replace(worker, culprit=None)

    def _is_held_up(self, worker: Worker, number: int, seconds: float) -> bool:
        """Whether others should not wait any longer for a request of a released episode.

        Nothing but its death interrupts a process, and then it has to be started and its other
        episodes brought back. So others wait for as long as that would take, and no longer:
        together that is at most twice the cheaper of the two, however long the request goes on.
        """
        request = worker.in_flight.get(number)
        if request is None or request.episode in self._episodes:
            return False
        others = [episode for episode in self._episodes.values() if episode.worker is worker]
        if not any(episode.waiting for episode in others):
            return False
        return seconds > worker.start_s + sum(episode.replay_s for episode in others)

    def _died(self, worker: Worker, reason: str, message: str) -> None:
        """Replaces a dead worker; the episode to blame is tried again or given up."""
        failed_starts = 0 if worker.ready else worker.failed_starts + 1
        if failed_starts and (not self._has_worked or failed_starts >= _MAX_FAILED_STARTS):
            raise PoolError(
                f"the environment {worker.env!r} cannot be started in a worker process: {message}"
            )
        request = worker.in_flight.get(worker.activity.read().number)
        idle_deaths = worker.idle_deaths + (worker.ready and request is None)
        if idle_deaths >= _MAX_IDLE_DEATHS:
            raise PoolError(
                f"a worker process of the environment {worker.env!r} died {idle_deaths} times in a "
                "row between requests, so that no episode is to blame. Look for threads or "
                "libraries of the environment that end its process or close its files, and for a "
                f"machine short of memory. The last one: {message}"
            )
        self.counters["crashes" if reason == "crash" else "time_limits"] += 1
        culprit = self._episodes.get(request.episode) if request is not None else None
        if culprit is not None:
            culprit.deaths += 1
        fresh = self._replace(worker, culprit)
        fresh.failed_starts, fresh.idle_deaths = failed_starts, idle_deaths
        if culprit is None:
            return
        if culprit.deaths > self._max_replays:
            text = "the reset" if culprit.text is None else f"the command {culprit.text!r}"
            self._fail(
                culprit,
                EnvFailure(
                    reason,
                    f"{text} after {len(culprit.commands)} commands of task {culprit.task.name} "
                    f"killed its process {culprit.deaths} times: {message}",
                ),
            )
            return
        if not culprit.started:
            self.counters["replays"] += 1
        self._enqueue(culprit)

    def _replace(self, worker: Worker, culprit: Episode | None) -> Worker:
        """Puts a fresh process in a worker's place and queues again what it owed, except to the
        culprit, who comes last or not at all."""
        fresh = self._make_worker()
        self.workers[self.workers.index(worker)] = fresh
        worker.close()
        for episode in self._episodes.values():
            if episode.worker is worker:
                episode.worker = fresh
                episode.lost = episode.started
                if episode.waiting and episode is not culprit:
                    self._enqueue(episode)
        return fresh
