"""What an agent says to work in a repository, and how files and tests are told to it.

The commands are those that SWE-agent's interface has proven (arXiv 2405.15793): a window on a file,
edits by line numbers that are refused where they leave a syntax error behind, searches that end early.
One command a turn, nothing that needs a shell.
"""

import re
from typing import NamedTuple

from envs_host.swe_tests import TestRun
from envs_host.swe_workspace import split_lines

HELP = """\
You repair a code repository. Every message of yours is one command:
ls [FOLDER]: what is in a folder
find NAME: the files whose path has NAME in it
search TEXT: the lines that have TEXT in them; search_file TEXT: only those of the open file
open FILE [LINE]: shows a part of a file, around LINE
down, up: the part after, the part before
edit FIRST:LAST: puts the lines that follow in your message in the place of lines FIRST to LAST of the open file
insert LINE: puts the lines that follow in your message after that line (0: before the first)
create FILE: makes a file of the lines that follow in your message; delete FILE
undo: takes back the last edit
test [FILE or ID]: runs the tests
submit: ends the work; the tests decide"""

WINDOW_LINES = 40  # by default
MAX_LINE = 200
MAX_FOUND = 20
MAX_LISTED = 100
MAX_TOLD = 20_000
MAX_FAILURES = 5
MAX_TRACEBACK = 40

# Command -> whether it has words on its line, and lines below: "no", "may", "must".
_FORMS = {
    "ls": ("may", "no"), "find": ("must", "no"), "search": ("must", "no"), "search_file": ("must", "no"),
    "open": ("must", "no"), "down": ("no", "no"), "up": ("no", "no"), "edit": ("must", "may"),
    "insert": ("must", "must"), "create": ("must", "may"), "delete": ("must", "no"), "undo": ("no", "no"), "test": ("may", "no"),
    "submit": ("no", "no"),
}  # fmt: skip
_FENCED = re.compile(r"```[\w-]*\n(.*?)\n?```", re.DOTALL)
_FENCE = re.compile(r" {0,3}```([\w-]*)\s*")
_NUMBER = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{1,9})\s*:\s*([0-9]{1,9})")


class Refused(ValueError):
    """A command that cannot be carried out; the message is the answer to give."""


class Command(NamedTuple):
    """What an agent asks for.

    Attributes:
        name: one of the commands.
        words: what follows it on its line.
        body: the lines below, with their ends.
    """

    name: str
    words: str
    body: str


def parse(text: str) -> Command:
    """Reads a command out of anything a model can write: what it begins with, else the first fenced block that begins with one.

    Raises:
        Refused: it is none.
    """
    text = text.encode(errors="replace").decode()  # half of a surrogate pair can be neither written nor told
    text = text.replace("\r\n", "\n").lstrip()
    if _first_word(text) not in _FORMS and (blocks := [block.lstrip() for block in _FENCED.findall(text)]):
        text = next((block for block in blocks if _first_word(block) in _FORMS), blocks[0])
    head, _, body = text.partition("\n")
    name, _, words = head.strip().partition(" ")
    words = words.strip()
    if (whole := _FENCED.fullmatch(body.strip())) and _is_one_block(whole[1]):  # as models like to write code
        body = whole[1]
    if name not in _FORMS:
        known = f"There is no command {clipped(name)!r}. Commands: {', '.join(_FORMS)}."
        raise Refused(known if name else "No command was given.")
    for what, form, given in zip(("words behind it", "lines below it"), _FORMS[name], (words, body)):
        if form == "no" and given.strip():
            raise Refused(f"{name} takes no {what}.")
        if form == "must" and not given:
            raise Refused(f"{name} needs {what}.")
    return Command(name, words, body + "\n" * bool(body and not body.endswith("\n")))


def _first_word(text: str) -> str:
    return text.partition("\n")[0].partition(" ")[0]


def _is_one_block(inside: str) -> bool:
    """Whether what is between two fences is in one block, and not in the first and the last of several."""
    depth = 0
    for line in inside.split("\n"):
        if fence := _FENCE.fullmatch(line):
            depth += 1 if fence[1] else -1  # one with a language opens, one without closes
            if depth < 0:
                return False
    return depth == 0


def line_number(words: str, num_lines: int) -> int:
    """The line of `insert`.

    Raises:
        Refused: there is no such line.
    """
    if _NUMBER.fullmatch(words) is None or int(words) > num_lines:
        raise Refused(f"insert needs the number of a line, 0 to {num_lines}.")
    return int(words)


def line_range(words: str, num_lines: int) -> tuple[int, int]:
    """The lines of `edit`.

    Raises:
        Refused: there are no such lines.
    """
    match = _RANGE.fullmatch(words)
    if match is None:
        raise Refused("edit needs a range of lines, such as edit 12:14.")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last <= num_lines:
        raise Refused(f"There are no lines {first} to {last}: the file has {num_lines}.")
    return first, last


def file_and_line(words: str) -> tuple[str, int]:
    """The file of `open`, and the line, 1 if there is none."""
    path, _, line = words.rpartition(" ")
    return (path.rstrip(), int(line)) if path and _NUMBER.fullmatch(line) else (words, 1)


def line_above(line: int, num_shown: int) -> int:
    """Line that a window around `line` begins with, if the file is long enough."""
    return line - num_shown // 3


def first_line(first: int, num_shown: int, num_lines: int) -> int:
    """Line that a window from `first` on begins with: at the end of a file it is as long as elsewhere."""
    return max(1, min(first, num_lines - num_shown + 1))


def window(path: str, text: str, first: int, num_lines: int) -> str:
    """A part of a file, with line numbers."""
    lines = split_lines(text)
    last = min(len(lines), first + num_lines - 1)
    if not lines:
        return f"[{path}, empty]"
    shown = (f"{number}:{clipped(lines[number - 1].rstrip())}" for number in range(first, last + 1))
    return "\n".join([f"[{path}, lines {first} to {last} of {len(lines)}]", *shown])


def found(hits: list[str], what: str, *, most: int = MAX_FOUND) -> str:
    """The first of what a search found."""
    if not hits:
        return f"There is no {what}."
    more = [f"and {len(hits) - most} more"] if len(hits) > most else []
    return "\n".join([*map(clipped, hits[:most]), *more])


def tested(run: TestRun, *, traceback: bool) -> str:
    """What a run of tests found."""
    if run.problem:
        return run.problem
    counts = [f"{len(run.failed)} failed"] * bool(run.failed) + [f"{len(run.passed)} passed"]
    lines = [", ".join(counts) + "."]
    lines += (f"{test}: {message}" if message else test for test, message in list(run.failed.items())[:MAX_FAILURES])
    if len(run.failed) > MAX_FAILURES:
        lines.append(f"and {len(run.failed) - MAX_FAILURES} more")
    if traceback and run.failed:
        # Below the line of dots, above the count.
        told = re.split(r"^=+ (?:FAILURES|ERRORS) =+$", run.output, flags=re.MULTILINE)[-1]
        lines += [line.rstrip() for line in told.strip().splitlines()[-MAX_TRACEBACK - 1 : -1]]
    return "\n".join(map(clipped, lines))


def told(answer: str) -> str:
    """An answer as it can be told: of a length that fits, in characters that can be written."""
    shown = answer if len(answer) <= MAX_TOLD else answer[: MAX_TOLD - 1] + "…"
    return shown.encode(errors="replace").decode()


def clipped(line: str) -> str:
    """A line as it can be shown."""
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…"
