"""Compiling: several programs at a time, and how many jax has compiled in this process, or found in
its cache, by its own account."""

import concurrent.futures
import os
from collections.abc import Iterable

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def count() -> int:
    return _count


def ahead(programs: Iterable[jax.stages.Lowered]) -> None:
    """Compiles programs that are about to be called, as many at a time as there are cores.

    A later call of the jitted function that a program was lowered from, with arguments like those,
    finds it compiled. One program keeps few cores of the compiler busy; what comes first is compiled
    while the next is still traced, in the caller's thread (and so in its mesh).
    """
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
    try:
        for done in [pool.submit(program.compile) for program in programs]:
            done.result()
    finally:  # at an error or an interrupt the rest is not compiled
        pool.shutdown(cancel_futures=True)


def _hear(event: str, duration: float, **_) -> None:
    global _count
    del duration
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_hear)
