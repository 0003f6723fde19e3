"""Compiling: several programs at a time, and how many jax has compiled in this process, or found in
its cache, by its own account."""

import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_lock = threading.Lock()
_count = 0
_of_thread = threading.local()


def count() -> int:
    return _count


def count_here() -> int:
    """Of the thread that asks, beside which others may compile."""
    return getattr(_of_thread, "count", 0)


class Account:
    """Counts what jax compiled during the wrapped calls, expected or not (parameters of another dtype than
    those of the warm-up, say), and the seconds of calls that compiled; those of several threads at the same
    time count once.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._until, self._lock = 0.0, threading.Lock()

    @contextlib.contextmanager
    def of(self, counted: Callable[[], int]) -> Iterator[None]:
        """Takes in what happens within, by `count` or `count_here`."""
        before, since = counted(), time.monotonic()
        yield
        if (compiled := counted() - before) == 0:
            return
        with self._lock:
            now = time.monotonic()
            self.count += compiled
            self.seconds += now - max(since, self._until)
            self._until = now


def cores() -> int:
    """Those that this process may run on: a batch system gives fewer than the host has."""
    return len(os.sched_getaffinity(0))


def ahead(compilations: Iterable[Callable[[], object]]) -> None:
    """Compiles programs that are about to be called, as many at a time as there are cores.

    One program keeps few cores of the compiler busy. What comes first is compiled while the next is still
    traced, in the caller's thread and so in its mesh. A later call of the jitted function, with arguments
    like those it was lowered with, finds it compiled.

    Args:
        compilations: `jitted.lower(...).compile` of each, or what calls it.
    """
    pool = concurrent.futures.ThreadPoolExecutor(cores(), thread_name_prefix="compile")
    try:
        for done in [pool.submit(compilation) for compilation in compilations]:
            done.result()
    finally:  # at an error or an interrupt the rest is not compiled
        pool.shutdown(cancel_futures=True)


@functools.cache
def knows(option: str, value: str | bool) -> bool:
    """Whether this jaxlib takes a compiler option. Those that XLA calls experimental come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True


def _hear(event: str, duration: float, **_) -> None:
    global _count
    del duration
    if event == _EVENT:
        with _lock:
            _count += 1
        _of_thread.count = count_here() + 1


jax.monitoring.register_event_duration_secs_listener(_hear)
