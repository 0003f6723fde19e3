"""Progress bars and notices in a terminal, a notebook or a pipe.

    with progress.bar("generating games", 620) as advance:
        for game in games:
            advance(1, note=game.name)
    progress.notice("compiling decode: 96 rows x 128 tokens")

In a terminal rich draws live bars. In a notebook one output cell per bar is redrawn. In a pipe (a
log file, CI) a bar is a plain line every few seconds, and nothing at all when it ends within two
seconds. Everything goes to standard error, so that standard output stays clean for results.
"""

import atexit
import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

import rich.console
import rich.progress

Advance = Callable[..., None]

_LINE_SECONDS = 5.0       # between two lines of the same pipe, bursts apart
_BURST_LINES = 4          # lines that may come at once before the limit applies
_QUIET_SECONDS = 2.0      # a bar that ends sooner leaves no line in a pipe
_REDRAW_SECONDS = 0.5     # between two redraws in a notebook


class Display(Protocol):
    """Where bars and notices go. One per process; `use` replaces it (tests, other front ends)."""

    def bar(self, title: str, total: int | None) -> contextlib.AbstractContextManager[Advance]: ...

    def notice(self, text: str) -> None: ...


def bar(title: str, total: int | None) -> contextlib.AbstractContextManager[Advance]:
    """A progress bar for the length of a `with` block. Bars may nest.

    Args:
        title: what is being done, "generating games".
        total: how many units make it complete; None when unknown.

    Returns:
        A context manager giving `advance(count=1, *, note=None)`: adds units, and shows a short
        text beside the bar (None keeps the last one).
    """
    return _current().bar(title, total)


def notice(text: str) -> None:
    """One line about something that is about to take time or has happened."""
    _current().notice(text)


def use(display: Display | None) -> None:
    """Sends bars and notices to another display; None chooses by the kind of output again."""
    global _display
    _display = display


class TerminalDisplay:
    """Live bars by rich; all bars that are open at a time share one live region."""

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._lock = threading.Lock()
        self._live: rich.progress.Progress | None = None
        self._open_bars = 0

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Advance]:
        live = self._acquire()
        task = live.add_task(title, total=total, note="")

        def advance(count: int = 1, *, note: str | None = None) -> None:
            live.update(task, advance=count, **({} if note is None else {"note": note}))

        try:
            yield advance
        finally:
            live.stop_task(task)
            self._release()

    def notice(self, text: str) -> None:
        with self._lock:
            console = self._live.console if self._live else self._console
        console.print(f"· {text}", style="dim", markup=False, highlight=False)

    def _acquire(self) -> rich.progress.Progress:
        with self._lock:
            if self._live is None:
                self._live = rich.progress.Progress(
                    rich.progress.TextColumn("{task.description}", markup=False),
                    rich.progress.BarColumn(bar_width=30),
                    rich.progress.MofNCompleteColumn(),
                    rich.progress.TimeElapsedColumn(),
                    rich.progress.TimeRemainingColumn(compact=True),
                    rich.progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
                    console=self._console,
                    refresh_per_second=4,
                )
                self._live.start()
            self._open_bars += 1
            return self._live

    def _release(self) -> None:
        with self._lock:
            self._open_bars -= 1
            if self._open_bars == 0 and self._live is not None:
                self._live.stop()
                self._live = None


class LineDisplay:
    """Sparse plain lines for a pipe.

    Args:
        file: where the lines go.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic):
        self._file = file
        self._clock = clock
        self._lock = threading.RLock()
        self._credit = float(_BURST_LINES)
        self._credit_time = clock()
        self._pending: list[str] = []

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Advance]:
        start = self._clock()
        state = {"done": 0, "note": "", "last": start, "shown": False}

        def advance(count: int = 1, *, note: str | None = None) -> None:
            with self._lock:
                state["done"] += count
                state["note"] = state["note"] if note is None else note
                now = self._clock()
                wait = _LINE_SECONDS if state["shown"] else _QUIET_SECONDS
                is_last = total is not None and state["done"] >= total  # its line follows, with the end
                if now - state["last"] >= wait and not is_last and self._may_print(now):
                    self._print(_bar_line(title, total, state, now - start))
                    state.update(last=now, shown=True)

        try:
            yield advance
        finally:
            with self._lock:
                elapsed = self._clock() - start
                if state["shown"] or elapsed >= _QUIET_SECONDS:
                    self._say(_bar_line(title, total, state, elapsed) + ", ended")

    def notice(self, text: str) -> None:
        with self._lock:
            self._say(text)

    def flush(self) -> None:
        """Prints what was held back, if there is still somewhere to print it."""
        with self._lock:
            if self._pending and not self._file.closed:
                self._print()

    def _say(self, text: str) -> None:
        """Prints now when the rate allows, else holds the text back for the next line."""
        if self._may_print(self._clock()):
            self._print(text)
        else:
            self._pending.append(text)

    def _may_print(self, now: float) -> bool:
        earned = (now - self._credit_time) / _LINE_SECONDS
        self._credit = min(float(_BURST_LINES), self._credit + earned)
        self._credit_time = now
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

    def _print(self, *texts: str) -> None:
        print("; ".join([*self._pending, *texts]), file=self._file, flush=True)
        self._pending.clear()


class NotebookDisplay:
    """One output area per bar, redrawn in place; needs IPython only, no widgets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        import IPython.display   # only there inside a notebook

        self._ipython = IPython.display
        self._clock = clock

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Advance]:
        start = self._clock()
        state = {"done": 0, "note": "", "last": start}
        handle = self._ipython.display(
            self._ipython.HTML(_bar_html(title, total, state, 0.0)), display_id=True)

        def redraw() -> None:
            state["last"] = self._clock()
            handle.update(self._ipython.HTML(
                _bar_html(title, total, state, state["last"] - start)))

        def advance(count: int = 1, *, note: str | None = None) -> None:
            state["done"] += count
            state["note"] = state["note"] if note is None else note
            if self._clock() - state["last"] >= _REDRAW_SECONDS:
                redraw()

        try:
            yield advance
        finally:
            redraw()

    def notice(self, text: str) -> None:
        self._ipython.display(self._ipython.HTML(
            f'<span style="color:gray">· {html.escape(text)}</span>'))


_display: Display | None = None


def _current() -> Display:
    global _display
    if _display is None:
        console = rich.console.Console(stderr=True)
        if console.is_jupyter:
            _display = NotebookDisplay()
        elif console.is_terminal:
            _display = TerminalDisplay(console)
        else:
            _display = LineDisplay(sys.stderr)
            atexit.register(_display.flush)
    return _display


def _bar_line(title: str, total: int | None, state: dict[str, Any], elapsed: float) -> str:
    """ "generating games: 120/620 (19 %), 41 s, 170 s left, w2-o3-q4" """
    done = state["done"]
    line = f"{title}: {done}" if total is None else f"{title}: {done}/{total}"
    if total:
        line += f" ({100 * done / total:.0f} %)"
    line += f", {_duration(elapsed)}"
    if total and 0 < done < total:
        line += f", about {_duration(elapsed * (total - done) / done)} left"
    return line + (f", {state['note']}" if state["note"] else "")


def _bar_html(title: str, total: int | None, state: dict[str, Any], elapsed: float) -> str:
    maximum = "" if total is None else f' max="{max(total, 1)}" value="{state["done"]}"'
    return (
        f'<progress{maximum} style="width:12em;vertical-align:middle"></progress> '
        f"{html.escape(_bar_line(title, total, state, elapsed))}"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
