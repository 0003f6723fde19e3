"""Ctrl-C that is heard whenever it comes.

An interrupt is an exception wherever the program is. Within a callback of the garbage collector, jax has one,
Python prints exceptions and goes on: the run would not stop.
"""

import gc
import signal
import types

_AGAIN_S = 0.01


def raise_where_heard() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, outside of the garbage collector's callbacks. Not where
    something has the process ignore it, as `nohup` in the background does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        frame = frame.f_back
    raise KeyboardInterrupt
