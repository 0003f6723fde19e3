"""Calls of compiled programs from a thread of their own, so that the host goes on meanwhile.

A call of a program with a loop is not asynchronous on GPUs: XLA reads the loop's condition on the host, so
that the call returns when the loop is over. Decoding is such a loop. Called by the thread that plays the
episodes it would keep it from the other waves' environments.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax

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
