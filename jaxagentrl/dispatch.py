"""Calls of compiled programs from a thread of their own, so that the host goes on meanwhile.

A call of a program with a loop is not asynchronous on GPUs: XLA reads the loop's condition on the host, so
that the call returns when the loop is over. Decoding is such a loop: called from the main
thread, it would keep that from stepping the environments of other waves. On CPU every wave has such a thread of its
own: programs that are called from different threads run side by side.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax

from jaxagentrl import compiles
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


def side_by_side(num_waves: int) -> int:
    """How many of so many waves run programs at a time: on CPU up to one per core, else one.

    Much of a decode step keeps one core busy, attention over the cache above all; another wave's program
    has the others meanwhile (`docs/performance_log.md`). Not on a mesh of CPU devices, where the collectives
    of two programs would wait for each other, nor on accelerators, which one program fills.
    """
    if jax.default_backend() != "cpu" or sharding.active():
        return 1
    return min(num_waves, compiles.cores())


def for_waves(num_waves: int) -> list[Queue]:
    """A queue for each wave, as many different ones as run side by side."""
    queues = [Queue() for _ in range(side_by_side(num_waves))]
    return [queues[wave % len(queues)] for wave in range(num_waves)]
