"""Repositories as a text environment: read, search, edit and test code until its tests pass.

Tasks are mistakes planted in any Python repository with tests (swe_maker.py), or instances in the form of
SWE-Gym (swe_data.py). An episode works in a copy of its own; `swe_text.HELP` has the commands. What counts
is decided once, when it is submitted: the agent's files, but for tests and their settings, are laid over
the repository anew, and the score is the share of the failing tests that pass now, or 0 if one fails that
had passed. An empty submission earns nothing, unlike a share of all tests.
"""

import hashlib
import json
import os
from typing import NamedTuple

from envs_host import swe_installed, swe_problem, swe_scratch, swe_tests, swe_text, swe_workspace
from envs_host.memory import verify
from envs_host.swe_problem import Problem
from envs_host.swe_text import Command, Refused
from envs_host.swe_workspace import PathError, Workspace, split_lines
from envs_host.types import GameFileError, Info, ResetResult, StepResult, Task


class _Verdict(NamedTuple):
    """What a submission came to: why there was no complete run, failing tests that pass, others that fail."""

    problem: str
    repaired: int
    broken: int


_MAX_JUDGED = 10_000
_FAR = 5  # A file deleted is not a thousand times as wrong as a line.
_JUDGED: dict[tuple, _Verdict] = {}  # By this process: of a group many submit the same.


class SweEnv:
    """One live episode in a repository; terminated means submitted.

    A limit on the turns is not the environment's business, so `truncated` is always False. What was not
    submitted by then has no score.
    """

    def __init__(
        self,
        *,
        intermediate_reward: bool = False,
        admissible_commands: bool = False,
        remember: bool = True,
        sandbox: str = "bubblewrap",
        python: str | None = None,
        test_limit_s: float = 60.0,
        test_memory_mb: int = 4096,
        window_lines: int = swe_text.WINDOW_LINES,
    ):
        """Makes an environment without an episode.

        Args:
            intermediate_reward: report by how many lines each edit brings the files closer to the reference
                repair (below 0: away from it), up to `_FAR` lines farther than they were at first.
            admissible_commands: report commands that can be given; edits and searches are not among
                them, as there is no end to them.
            remember: submissions of the same files for the same task are judged once in a process. The
                tests are taken to be deterministic, as all answers of an environment are.
            sandbox: where tests are run, see swe_tests.py.
            python: interpreter that runs them, for tasks that name none; by default this one.
            test_limit_s: seconds after which a run of the tests is ended, as failed by the agent. The
                pool's `step_limit_s` must be longer.
            test_memory_mb: memory of a process of the tests.
            window_lines: lines of a file that are shown at a time.

        Raises:
            ValueError: an argument is out of range.
            swe_tests.SandboxError: the sandbox does not work here.
        """
        for name, value in (
            ("test_limit_s", test_limit_s), ("test_memory_mb", test_memory_mb), ("window_lines", window_lines),
        ):  # fmt: skip
            if not value > 0:
                raise ValueError(f"env.options.{name} must be more than 0, got {value}.")
        swe_tests.check_sandbox(sandbox)
        self._intermediate = intermediate_reward
        self._admissible = admissible_commands
        self._remember = remember
        self._sandbox, self._python = sandbox, python
        self._limits = swe_tests.Limits(test_limit_s, test_memory_mb)
        self._num_shown = window_lines
        self._scratch: swe_scratch.Folder | None = None  # Holds the folders of the live episode.
        self._task: Task | None = None
        self._problem: Problem | None = None
        self._work: Workspace | None = None
        self._copies: list[str] = []  # Of the repository's code, that are installed.
        self._open: str | None = None  # The file that is shown.
        self._first = 1  # Line that is shown first.
        self._undo: list[tuple[str, str | None]] = []  # Files as they were before each edit.
        self._away = 0  # Lines in which the files differ from the reference repair, if that is asked for.
        self._farthest = 0  # What more lines count as.

    @staticmethod
    def check_here(*, sandbox: str = "bubblewrap", **others) -> None:
        """See `envs_host.check_here`."""
        swe_tests.check_sandbox(sandbox)

    def reset(self, task: Task) -> ResetResult:
        """Starts an episode of `task`.

        Raises:
            GameFileError: the task's file or its repository is missing, or not what the task was recorded
                with.
        """
        self.close()
        verify(task, swe_problem.digest)
        self._task, self._problem = task, swe_problem.load(task.file)
        self._scratch = swe_scratch.folder()
        self._work = Workspace(self._laid_out(self._scratch.name))
        # Of what the repository has now: what the agent deletes from it is to stay hidden.
        is_hidden = self._sandbox == "bubblewrap"
        self._copies = swe_installed.copies(self._work.folder, self._interpreter()) if is_hidden else []
        self._open, self._first, self._undo = None, 1, []
        self._away = self._distance()
        self._farthest = self._away + _FAR
        return ResetResult(self._ls(Command("ls", "", "")), self._info("", valid=True))

    def step(self, text: str) -> StepResult:
        """Sends one command, see `swe_text.parse`.

        Raises:
            RuntimeError: there is no live episode.
        """
        if self._work is None:
            raise RuntimeError("step was called without a live episode: call reset first.")
        try:
            command = swe_text.parse(text)
            if command.name == "submit":
                return self._submitted()
            observation = swe_text.told(_COMMANDS[command.name](self, command))
        except (Refused, PathError) as refusal:
            return StepResult(swe_text.told(str(refusal)), 0.0, False, False, self._info(text.strip(), valid=False))
        progress = self._progress() if command.name in _EDITS else 0.0
        info = self._info(text.strip(), valid=True, progress=progress)
        return StepResult(observation, 0.0, False, False, info)

    def close(self) -> None:
        """Ends the episode and removes its copy of the repository."""
        scratch, self._scratch, self._work = self._scratch, None, None
        if scratch is not None:
            scratch.cleanup()

    def _laid_out(self, scratch: str) -> str:
        """A new copy of the repository as the episode begins, in a scratch folder."""
        problem, folder = self._problem, os.path.join(scratch, "repository")
        if swe_workspace.lay_out(problem.repository, problem.commit, folder) != problem.tree:
            raise GameFileError(
                f"the repository {problem.repository} is not what task {self._task.name} was recorded with: its "
                "files have changed. Bring them back, or make the tasks again."
            )
        swe_workspace.write(folder, problem.changed)
        return folder

    def _info(self, command: str, *, valid: bool, progress: float = 0.0, score: float = 0.0, ended: bool = False) -> Info:
        return Info(
            score=score,
            max_score=self._task.max_score,
            won=ended and score == self._task.max_score,
            lost=ended and score < self._task.max_score,
            valid_command=valid,
            command=command,
            intermediate_reward=progress,
            admissible_commands=self._listed() if self._admissible and not ended else (),
            objective=self._task.objective,
        )

    def _listed(self) -> tuple[str, ...]:
        moves = ("down", "up") if self._open else ()
        opens = (f"open {path}" for path in self._work.files() if path.endswith(".py"))
        return ("ls", "test", "submit", *moves, *opens)

    def _submitted(self) -> StepResult:
        problem = self._problem
        made = {path: text for path, text in self._work.changed().items() if self._counts(path)}
        verdict = self._verdict(made)
        failing = len(problem.fail_to_pass)
        score = 0.0 if verdict.broken else self._task.max_score * verdict.repaired / failing
        observation = f"{verdict.repaired} of {failing} failing tests pass now, {verdict.broken} others fail."
        observation = f"{verdict.problem}\n{observation}" if verdict.problem else observation
        info = self._info("submit", valid=True, score=score, ended=True)
        self.close()
        return StepResult(swe_text.told(observation), score, True, False, info)

    def _verdict(self, made: dict[str, str | None]) -> _Verdict:
        """Judges what the agent has made, or remembers it."""
        content = hashlib.sha256(json.dumps(sorted(made.items())).encode()).digest()
        key = (self._task.digest, content, self._sandbox, self._interpreter(), self._limits)
        if self._remember and key in _JUDGED:
            return _JUDGED[key]
        verdict = self._judged(made)
        if not verdict.problem:  # another time there may be more time
            _JUDGED[key] = verdict
            if len(_JUDGED) > _MAX_JUDGED:
                _JUDGED.pop(next(iter(_JUDGED)))
        return verdict

    def _judged(self, made: dict[str, str | None]) -> _Verdict:
        """Judges what the agent has made, where no code of its own has been before."""
        problem = self._problem
        with swe_scratch.folder() as scratch:
            folder = self._laid_out(scratch)
            # Tests that the agent has deleted are there again, perhaps where it has put something else.
            swe_workspace.write_what_fits(folder, made)
            swe_workspace.write_over(folder, problem.hidden)
            run = self._run(problem.tests, folder, explained=False)
        repaired = sum(test in run.passed for test in problem.fail_to_pass)
        # SWE-bench lists in PASS_TO_PASS what is expected to fail, too.
        broken = sum(test not in run.passed | run.expected for test in problem.pass_to_pass)
        return _Verdict(run.problem, repaired, broken)

    def _counts(self, path: str) -> bool:
        """Whether what is made of a file is judged. What looks like a test is none where the repair is in it:
        Django's own `django/test`, say."""
        problem = self._problem
        if path in problem.hidden or path in swe_problem.test_files(problem.fail_to_pass + problem.pass_to_pass):
            return False
        return path in problem.solution or not swe_workspace.is_test(path)

    def _run(
        self, arguments: tuple[str, ...], folder: str, *, traceback: str = "line", explained: bool = True
    ) -> swe_tests.TestRun:
        return swe_tests.run(
            folder,
            arguments,
            sandbox=self._sandbox,
            python=self._interpreter(),
            limits=self._limits,
            traceback=traceback,
            explained=explained,
            # Where the reference repair is to be read.
            hidden=(
                os.path.expanduser(self._problem.repository),
                os.path.dirname(os.path.abspath(self._task.file)),
                *self._copies,
            ),
        )

    def _interpreter(self) -> str | None:
        """That of the tests; None for this one."""
        return self._problem.python or self._python

    def _progress(self) -> float:
        """By how much the files have come closer: what an episode gains on the way depends on its end alone."""
        before, self._away = self._away, min(self._distance(), self._farthest)
        return float(before - self._away)

    def _distance(self) -> int:
        """Lines in which the files differ from the reference repair."""
        if not self._intermediate:
            return 0
        solution, lines = self._problem.solution, 0
        for path in {*solution, *self._work.changed()}:
            if self._counts(path):
                aim = solution[path] if path in solution else self._work.before(path)
                lines += _difference(self._work.text(path) or "", aim or "")
        return lines

    def _ls(self, command: Command) -> str:
        return swe_text.found(self._work.entries(command.words or "."), "file", most=swe_text.MAX_LISTED)

    def _find(self, command: Command) -> str:
        hits = [path for path in self._work.files() if command.words in path]
        return swe_text.found(hits, f"file with {command.words} in its path")

    def _search(self, command: Command) -> str:
        if command.name == "search_file" and self._open is None:
            raise Refused("No file is open.")
        hits = []
        for path in self._work.files() if command.name == "search" else [self._open]:
            text = self._work.text(path)
            if text is not None and command.words in text:
                numbered = enumerate(split_lines(text), 1)
                hits += (f"{path}:{number}: {line.strip()}" for number, line in numbered if command.words in line)
        return swe_text.found(hits, f"line with {command.words} in it")

    def _opened(self, command: Command) -> str:
        path, line = swe_text.file_and_line(command.words)
        num_lines = len(split_lines(self._work.read(path)))
        if not 1 <= line <= max(1, num_lines):
            raise Refused(f"There is no line {line}: {path} has {num_lines}.")
        self._open = self._work.name(path)
        return self._around(line)

    def _scrolled(self, command: Command) -> str:
        self._read_open()
        return self._shown(self._first + (1 if command.name == "down" else -1) * self._num_shown)

    def _edited(self, command: Command) -> str:
        lines = split_lines(self._read_open())
        if command.name == "insert":
            last = swe_text.line_number(command.words, len(lines))
            first = last + 1
        else:
            first, last = swe_text.line_range(command.words, len(lines))
        end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
        if first > 1 and not lines[first - 2].endswith(("\n", "\r")):
            lines[first - 2] += end
        body = command.body.replace("\n", end)
        if last >= first and last == len(lines) and not lines[-1].endswith(("\n", "\r")):
            body = body.removesuffix(end)  # the file's last line has no end, and still has none
        self._write(self._open, "".join([*lines[: first - 1], body, *lines[last:]]))
        return self._around(first)

    def _created(self, command: Command) -> str:
        if self._work.text(command.words) is not None:
            raise Refused(f"There is a file {command.words}: open it.")
        self._write(command.words, command.body)
        self._open = self._work.name(command.words)
        return self._around(1)

    def _deleted(self, command: Command) -> str:
        path, text = self._work.name(command.words), self._work.read(command.words)
        self._work.delete(path)
        self._undo.append((path, text))
        self._open = None if self._open == path else self._open
        return f"{path} is deleted."

    def _undone(self, command: Command) -> str:
        if not self._undo:
            raise Refused("There is nothing to undo.")
        path, text = self._undo[-1]
        if text is None:
            self._work.delete(path)
        else:
            self._work.write(path, text)
        self._undo.pop()
        if text is None:
            self._open = None if self._open == path else self._open
            return f"{path} is deleted."
        self._open = path
        return self._shown(self._first)

    def _tested(self, command: Command) -> str:
        if command.words.startswith("-"):
            raise Refused("test takes a file, a folder or the id of a test, and no options.")
        if "\0" in command.words:
            raise Refused("test takes no null byte.")
        # The worker's own folder must not matter, and paths lead nowhere else.
        path = command.words.partition("::")[0]
        if path and self._work.name(path) not in (".", *self._work.files()) and not self._work.is_folder(path):
            raise Refused(f"There is no file {path}.")
        there = tuple(test for test in self._problem.tests if os.path.exists(os.path.join(self._work.folder, test)))
        try:
            arguments, traceback = ((command.words,), "short") if command.words else (there, "line")
            run = self._run(arguments, self._work.folder, traceback=traceback)
        except OSError as error:  # the tests have taken it away
            raise Refused(f"The tests could not be run ({error.strerror}).") from None
        return swe_text.tested(run, traceback=bool(command.words))

    def _read_open(self) -> str:
        if self._open is None:
            raise Refused("No file is open.")
        return self._work.read(self._open)

    def _write(self, path: str, text: str) -> None:
        """Makes an edit that can be taken back.

        Raises:
            Refused: it would leave a syntax error.
        """
        if path.endswith(".py"):
            try:
                compile(text.removeprefix("\ufeff"), path, "exec", dont_inherit=True)
            except SyntaxError as error:
                where = f"in line {error.lineno} ({error.msg})"
                raise Refused(f"The edit was not made: it would be a syntax error {where}.") from None
            except (ValueError, RecursionError, MemoryError) as error:  # null bytes; brackets without end
                raise Refused(f"The edit was not made: Python cannot read it ({error}).") from None
        before = self._work.text(path)
        self._work.write(path, text)
        self._undo.append((self._work.name(path), before))

    def _around(self, line: int) -> str:
        return self._shown(swe_text.line_above(line, self._num_shown))

    def _shown(self, first: int) -> str:
        text = self._work.read(self._open)
        self._first = swe_text.first_line(first, self._num_shown, len(split_lines(text)))
        return swe_text.window(self._open, text, self._first, self._num_shown)


_COMMANDS = {
    "ls": SweEnv._ls,
    "find": SweEnv._find,
    "search": SweEnv._search,
    "search_file": SweEnv._search,
    "open": SweEnv._opened,
    "down": SweEnv._scrolled,
    "up": SweEnv._scrolled,
    "edit": SweEnv._edited,
    "insert": SweEnv._edited,
    "create": SweEnv._created,
    "delete": SweEnv._deleted,
    "undo": SweEnv._undone,
    "test": SweEnv._tested,
}


_EDITS = ("edit", "insert", "create", "delete", "undo")


def _difference(text: str, aim: str) -> int:
    """Lines that must be changed, taken out or put in to make one text the other."""
    changed = swe_workspace.differences(split_lines(text), split_lines(aim))
    return sum(max(k - i, m - j) for i, k, j, m in changed)
