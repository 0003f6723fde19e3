"""Ctrl-C that is heard whenever it comes.

An interrupt is an exception wherever the program is. Where nobody can catch it, in callbacks of the garbage
collector (jax has one) and in what is called as objects are given up, Python tells of exceptions and goes on:
the run would not stop.
"""

import signal
import sys
import types

_AGAIN_S = 0.01


def raise_where_heard() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, and again until it is raised where it ends something. Not where
    something has the process ignore it, as `nohup` in the background does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)
    usual = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            usual(unraisable)

    sys.unraisablehook = hook


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt
