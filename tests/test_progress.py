"""Bars and notices where nobody watches: few lines in a pipe, something to see elsewhere."""

import io
import subprocess
import sys
import threading

import pytest
import rich.console

from jaxagentrl import progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe(clock):
    """A line display whose lines come with the second they appeared at."""
    file = io.StringIO()
    return progress.LineDisplay(file, clock), file


def test_short_bar_leaves_no_line(pipe, clock):
    display, file = pipe
    with display.bar("loading", 3) as advance:
        for _ in range(3):
            clock.now += 0.5
            advance()
    assert file.getvalue() == ""


def test_long_bar_leaves_a_line_every_few_seconds(pipe, clock):
    display, file = pipe
    with display.bar("generating games", 600) as advance:
        for index in range(600):
            clock.now += 0.1
            advance(1, note=f"game {index}")
    lines = file.getvalue().splitlines()
    assert 8 <= len(lines) <= 14   # a minute
    assert lines[0].startswith("generating games: 20/600 (3 %), 2 s, about 58 s left, game 19")
    assert lines[-1] == "generating games: 600/600 (100 %), 60 s, game 599, ended"


def test_bar_of_unknown_length(pipe, clock):
    display, file = pipe
    with display.bar("reading", None) as advance:
        clock.now += 3
        advance(5)
    assert file.getvalue().splitlines()[0] == "reading: 5, 3 s"


def test_bar_that_ends_by_an_error_says_how_far_it_came(pipe, clock):
    display, file = pipe
    with pytest.raises(KeyError), display.bar("reading", 10) as advance:
        clock.now += 3
        advance(5)
        raise KeyError
    assert file.getvalue().splitlines()[-1].startswith("reading: 5/10 (50 %), 3 s")


def test_many_notices_at_once_share_lines_and_none_is_lost(pipe, clock):
    display, file = pipe
    for number in range(40):
        clock.now += 0.01
        display.notice(f"compiling program {number}.")
    assert len(file.getvalue().splitlines()) == 4
    clock.now += 6
    display.notice("done")
    display.flush()
    lines = file.getvalue().splitlines()
    assert len(lines) == 5 and lines[-1].endswith("; done")
    assert all(f"program {number}." in file.getvalue() for number in range(40))


def test_single_notice_comes_at_once(pipe, clock):
    display, file = pipe
    with display.bar("working", 100) as advance:
        for _ in range(30):
            clock.now += 1
            advance()
        display.notice("compiling decode")
        assert file.getvalue().splitlines()[-1] == "compiling decode"


def test_lines_from_threads_are_whole(pipe, clock):
    display, file = pipe

    def work(name):
        for _ in range(50):
            display.notice(name * 20)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    display.flush()
    pieces = [piece for line in file.getvalue().splitlines() for piece in line.split("; ")]
    assert sorted(pieces) == ["a" * 20] * 50 + ["b" * 20] * 50


def test_terminal_shows_nested_bars_and_notices():
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=True, width=120)
    display = progress.TerminalDisplay(console)
    with display.bar("outer [x]", 2) as advance_outer:
        with display.bar("inner", None) as advance_inner:
            advance_inner(3, note="note [y]")
            display.notice("compiling [z]")
        advance_outer(2)
    display.notice("after")
    text = output.getvalue()
    for part in ("outer [x]", "inner", "note [y]", "compiling [z]", "after"):
        assert part in text   # square brackets are text, not markup


def test_module_functions_use_the_chosen_display(pipe, clock):
    display, file = pipe
    progress.use(display)
    try:
        with progress.bar("busy", 1) as advance:
            clock.now += 3
            advance(note="x")
        progress.notice("hello")
    finally:
        progress.use(None)
    assert "busy: 1/1" in file.getvalue() and "hello" in file.getvalue()


def test_a_pipe_is_recognized_and_held_back_lines_come_at_the_end():
    program = (
        "from jaxagentrl import progress\n"
        "for i in range(9): progress.notice(f'notice {i}')\n"
        "with progress.bar('quick', 3) as advance: advance(3)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and lines[-1] == "; ".join(f"notice {i}" for i in range(4, 9))


def test_notebook_redraws_in_place(monkeypatch, clock):
    display_module = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, content):
            shown.append(("update", content.data))

    def display(content, display_id=False):
        shown.append(("display", content.data))
        return Handle()

    monkeypatch.setattr(display_module, "display", display)
    notebook = progress.NotebookDisplay(clock)
    with notebook.bar("games <1>", 10) as advance:
        for index in range(10):
            clock.now += 0.2
            advance(note=f"n{index}")
    notebook.notice("a < b")
    kinds = [kind for kind, _ in shown]
    assert kinds == ["display", "update", "update", "update", "update", "display"]
    assert 'value="10"' in shown[-2][1] and "games &lt;1&gt;: 10/10" in shown[-2][1]
    assert "a &lt; b" in shown[-1][1]
