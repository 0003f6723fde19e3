"""Calls of compiled programs from a thread of their own, so that the host goes on meanwhile.

A call of a program with a loop is not asynchronous on GPUs: XLA reads the loop's condition on the host, so
that the call returns when the loop is over. Decoding is such a loop. Called by the thread that plays the
episodes it would keep it from the other waves' environments. On CPU every wave has such a thread of its
own: programs that are called from different threads run side by side.
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

import jax

from jaxagentrl.models import sharding

T = TypeVar("T")


class Queue:
    """Runs calls one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="dispatch")

    def put(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Returns at once; the future has the call's result, or its error. The mesh in use here is in
        use there: jax keeps it by thread."""
        mesh = jax.sharding.get_mesh()

        def run() -> T:
            with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
                return call()

        return self._thread.submit(run)


def for_waves(count: int) -> list[Queue]:
    """A queue for each of `count` waves: of its own on CPU, up to one per core, else one for all.

    Much of a decode step keeps one core busy, attention over the cache above all; another wave's program
    has the others meanwhile (`docs/performance.md`). Not on a mesh of CPU devices, where the collectives
    of two programs would wait for each other, nor on accelerators, which are busy with one program.
    """
    is_shared = jax.default_backend() != "cpu" or sharding.active()
    queues = [Queue() for _ in range(1 if is_shared else min(count, os.cpu_count() or 1))]
    return [queues[wave % len(queues)] for wave in range(count)]
