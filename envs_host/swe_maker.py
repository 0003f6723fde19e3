"""The making of a task from a repository: plant a mistake that its tests notice. See maker.py.

All mistakes that can be planted in the files are shuffled once, and seeds are numbers among them, modulo how
many there are: as many seeds in a row give as many different tasks. The tests are run twice as the repository
stands, and those that pass both times count. A mistake counts if some of them fail with it, in ten times the
time that they take without it, and the reference repair, played as an agent would, makes all pass again.
"""

import fnmatch
import functools
import json
import os
import random
import time
from typing import Any

from envs_host import swe, swe_bugs, swe_installed, swe_problem, swe_scratch, swe_tests, swe_text, swe_workspace
from envs_host.specs import SetAside, Spec
from envs_host.swe_problem import Problem
from envs_host.swe_tests import Limits, TestRun
from envs_host.types import Task

_MAX_NAMED = 3
_STANDING_S = 600.0  # What the tests may take as the repository stands.
# With a mistake many never end, and are waited for.
_SLOWER = 10.0
_LEAST_S = 10.0
_ORDER_SEED = 0


def prepare() -> None:
    """Looks where tests can be run."""
    swe_tests.safest_sandbox()


def build(spec: Spec, problem_path: str, description_path: str) -> Task:
    """Plants one mistake.

    Raises:
        SetAside: no test notices the seed's mistake.
        ValueError: there is nothing to plant a mistake in, or no test that passes.
    """
    params = dict(spec.params)
    repository, python = params["repository"], params["python"]
    tests = tuple((params["tests"] or "").split())
    passing, limits = _standing(repository, tests, python)
    bugs = _bugs(repository, params["files"], swe_problem.test_files(passing))
    path, bug = bugs[spec.seed % len(bugs)]
    source = _read(os.path.join(repository, path))
    if not swe_bugs.is_program(source, bug):
        raise SetAside("the change makes no other program")
    broken = swe_bugs.plant(source, bug)
    with swe_scratch.folder() as scratch:
        folder = os.path.join(scratch, "repository")
        tree = swe_workspace.lay_out(repository, None, folder)
        swe_workspace.write(folder, {path: broken})
        run = _run(folder, tests, python, limits)
    if run.problem:
        raise SetAside(f"the tests cannot be told apart with it: {run.problem}")
    if not (noticed := sorted(set(run.failed) & passing)):
        raise SetAside("no test notices the mistake")
    problem = Problem(
        repository=repository,
        commit=None,
        tree=tree,
        changed={path: broken},
        solution={path: source},
        hidden={},
        tests=tests,
        fail_to_pass=tuple(noticed),
        pass_to_pass=tuple(sorted(passing & run.passed)),
        python=python,
    )
    swe_problem.save(problem, problem_path)
    with open(description_path, "w") as file:
        json.dump({"path": path, **bug._asdict()}, file)
    task = Task(
        env="swe",
        name=spec.name,
        # What the mistake is, for evaluation by type.
        params={"family": spec.family, **params, "split": os.path.basename(repository), "task_type": bug.kind},
        seed=spec.seed,
        file=problem_path,
        digest=swe_problem.digest(problem_path),
        objective=_objective(os.path.basename(repository), noticed, run),
        max_score=1.0,
        walkthrough=_walkthrough(path, bug, noticed[0], params, len(swe_workspace.split_lines(source))),
    )
    _play_through(task, limits)
    return task


@functools.cache
def _bugs(repository: str, form: str, tests: frozenset[str]) -> list[tuple[str, swe_bugs.Bug]]:
    """The mistakes that can be planted, shuffled, with the paths of the files; found once per process."""
    found = []
    for path in swe_workspace.paths(repository):
        if not path.endswith(".py") or not fnmatch.fnmatch(path, form):
            continue
        if path not in tests and not swe_workspace.is_test(path):
            try:
                found += ((path, bug) for bug in swe_bugs.find(_read(os.path.join(repository, path))))
            except (SyntaxError, ValueError, RecursionError):
                continue  # for another Python, an exhibit of a test, a number or a term without end
    if not found:
        raise ValueError(f"in {repository} there is no function to plant a mistake in, in files {form!r}")
    return random.Random(_ORDER_SEED).sample(found, len(found))


def _read(path: str) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


@functools.cache
def _standing(repository: str, tests: tuple[str, ...], python: str | None) -> tuple[frozenset[str], Limits]:
    """The tests that pass as the repository stands, and what they may take with a mistake; found once per process."""
    with swe_scratch.folder() as scratch:
        folder = os.path.join(scratch, "repository")
        swe_workspace.lay_out(repository, None, folder)
        began = time.monotonic()
        runs = [_run(folder, tests, python, Limits(_STANDING_S)) for _ in range(2)]
        seconds = (time.monotonic() - began) / 2
    if problem := runs[0].problem or runs[1].problem:
        raise ValueError(f"the tests of {repository} do not run as it stands. {problem}")
    if not (passing := runs[0].passed & runs[1].passed):
        raise ValueError(f"of the tests of {repository} none passes as it stands")
    return passing, Limits(min(_STANDING_S, max(_LEAST_S, _SLOWER * seconds)))


def _run(folder: str, tests: tuple[str, ...], python: str | None, limits: Limits) -> TestRun:
    sandbox = swe_tests.safest_sandbox()
    # Hidden here as in episodes: a test that needs an installed copy is none that passes.
    hidden = swe_installed.copies(folder, python) if sandbox == "bubblewrap" else ()
    return swe_tests.run(folder, tests, sandbox=sandbox, python=python, limits=limits, hidden=hidden)


def _objective(name: str, noticed: list[str], run: TestRun) -> str:
    said = {test: swe_text.clipped(run.failed[test]) for test in noticed[:_MAX_NAMED]}
    lines = [f"{test}: {message}" if message else test for test, message in said.items()]
    if len(noticed) > _MAX_NAMED:
        lines.append(f"and {len(noticed) - _MAX_NAMED} more")
    told = "\n".join(lines)
    return f"The last change to {name} was a mistake: {len(noticed)} of its tests fail.\n{told}\nRepair the code."


def _walkthrough(
    path: str, bug: swe_bugs.Bug, test: str, params: dict[str, Any], num_lines: int
) -> tuple[str, ...]:
    """What a repair can look like. The "looker" opens the file where the code of the function begins, and goes
    down until it sees the mistake. The others know the line; the "reader" looks at the failing test first."""
    edit = (f"edit {bug.line}:{bug.line}\n{bug.before}", "submit")
    if params["expert"] == "looker":
        return (*_looking(path, bug, params["window_lines"] or swe_text.WINDOW_LINES, num_lines), *edit)
    name = test.partition("[")[0].rpartition("::")[2]
    reading = (f"open {test.partition('::')[0]}", f"search_file def {name}", f"test {test}")
    repair = (f"open {path} {bug.line}", *edit)
    return repair if params["expert"] == "direct" else (*reading, *repair)


def _looking(path: str, bug: swe_bugs.Bug, num_shown: int, num_lines: int) -> tuple[str, ...]:
    """How a mistake comes into sight from where the code of its function begins."""
    first, moves = swe_text.line_above(bug.body_line, num_shown), 0
    while (first := swe_text.first_line(first, num_shown, num_lines)) + num_shown <= bug.line:
        first, moves = first + num_shown, moves + 1
    return (f"open {path} {bug.body_line}", *["down"] * moves)


def _play_through(task: Task, limits: Limits) -> None:
    """Plays the walkthrough; it must win.

    Raises:
        SetAside: it does not.
    """
    env = swe.SweEnv(sandbox=swe_tests.safest_sandbox(), test_limit_s=limits.seconds)
    try:
        env.reset(task)
        for command in task.walkthrough:
            answer = env.step(command)
            if not answer.info.valid_command:
                raise SetAside(f"the walkthrough command {command!r} is refused: {answer.observation}")
    finally:
        env.close()
    if not answer.info.won:
        raise SetAside(f"the walkthrough does not win: {answer.observation}")
