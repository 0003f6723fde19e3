"""Instances in the form of SWE-Gym and SWE-bench, from a file of JSON lines and clones of their repositories.

    instances.jsonl     a line each: instance_id, repo, base_commit, problem_statement, patch, test_patch,
                        FAIL_TO_PASS, PASS_TO_PASS; what else there is is not read
    <repositories>/<owner>__<name>        a git clone, or a bare one

No image of a container is needed, and none is used: what a repository takes to run its tests is installed
by you, into an interpreter that `python` names, with `{repo}` (as <owner>__<name>), `{instance_id}` and
`{version}` in it where these differ. Each reference repair is played once, and what came of it is kept in the
cache: an instance that it does not repair here can neither be demonstrated nor trusted to be solvable.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from envs_host import arrival, swe, swe_problem, swe_tests, swe_workspace
from envs_host.games import Progress
from envs_host.swe_problem import Problem
from envs_host.swe_workspace import split_lines
from envs_host.types import GameFileError, Task

FAMILY = "swe-data"
_FIELDS = (
    "instance_id", "repo", "base_commit", "problem_statement", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS",
)  # fmt: skip
_OLD_NAME = re.compile(r"^(?:rename|copy) from (.+)$", re.MULTILINE)


class Unusable(Exception):
    """An instance that cannot be played here; the message says why."""


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What `read` found.

    Attributes:
        tasks: the playable instances, in the order of the file.
        left_out: instance id -> why it cannot be played.
    """

    tasks: list[Task]
    left_out: dict[str, str]


def read(
    *,
    instances: str,
    repositories: str,
    cache_dir: str,
    python: str | None = None,
    repos: Sequence[str] = (),
    test_limit_s: float = 600.0,
    num_workers: int | None = None,
    progress: bool = True,
) -> DataReport:
    """Reads instances, writes their task files into the cache, and plays the reference repairs that were not
    played before.

    Args:
        instances: the file; may start with "~", as all paths here.
        repositories: the folder of the clones.
        cache_dir: made if need be.
        python: interpreter of the tests, see the top of this file; None for that of the environment.
        repos: which to return, e.g. ("getmoto/moto",); by default all.
        test_limit_s: seconds that the tests may take with the reference repair.
        num_workers: how many are played at a time; by default as many as this process may use cores.
        progress: show a progress bar if some must be played.

    Raises:
        ValueError: the file is missing or not in this form.
    """
    folder = os.path.abspath(os.path.expanduser(cache_dir))
    os.makedirs(folder, exist_ok=True)
    tasks, left_out = [], {}
    for instance in _instances(os.path.expanduser(instances)):
        if repos and instance["repo"] not in repos:
            continue
        try:
            tasks.append(_task(instance, os.path.expanduser(repositories), python, folder))
        except Unusable as reason:
            left_out[instance["instance_id"]] = str(reason)
    failing = _checked(tasks, test_limit_s, num_workers, progress)
    return DataReport([task for task in tasks if task.name not in failing], left_out | failing)


def _checked(tasks: list[Task], test_limit_s: float, num_workers: int | None, progress: bool) -> dict[str, str]:
    """Of the tasks whose reference repair does not win: name -> why."""
    told = {task.name: _told(task) for task in tasks}
    new = [task for task in tasks if told[task.name] is None]
    if new:
        # Threads wait for processes here: tests run in their own.
        with (
            Progress("Playing reference repairs", len(new), progress) as advance,
            futures.ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool,
        ):
            for task, complaint in zip(new, pool.map(lambda task: _played(task, test_limit_s), new)):
                told[task.name] = complaint
                advance()
    return {
        task.name: f"its reference repair does not win here: {told[task.name]} (to have it played again, delete "
        f"{_record(task)})"
        for task in tasks
        if told[task.name]
    }


def _record(task: Task) -> str:
    return task.file.removesuffix(".swe.json") + ".checked.json"


def _told(task: Task) -> str | None:
    """What came of the reference repair: "" for a win; None if it was not played yet."""
    try:
        with open(_record(task), encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _played(task: Task, test_limit_s: float) -> str:
    """Plays the reference repair; returns what is wrong with it, and keeps that."""
    env = swe.SweEnv(sandbox=swe_tests.safest_sandbox(), test_limit_s=test_limit_s)
    try:
        env.reset(task)
        answers = [env.step(command) for command in task.walkthrough]
    except GameFileError as error:  # a clone without all of its objects, say
        return str(error)
    finally:
        env.close()
    refused = [answer.observation for answer in answers if not answer.info.valid_command]
    complaint = refused[0] if refused else "" if answers[-1].info.won else answers[-1].observation
    arrival.write_json(complaint, _record(task))
    return complaint


def _instances(path: str) -> list[dict[str, Any]]:
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_instance(line, f"{path}, line {number}"))
    except OSError as error:
        raise ValueError(f"the instances {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the instances {path} must be UTF-8, and are not ({error}): convert the file.") from error
    twice = [name for name, count in collections.Counter(one["instance_id"] for one in found).items() if count > 1]
    if twice:
        raise ValueError(f"{path} holds instances twice: {', '.join(twice[:5])}.")
    return found


def _instance(line: str, where: str) -> dict[str, Any]:
    try:
        instance = json.loads(line)
        missing = [name for name in _FIELDS if name not in instance]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected a JSON object ({error}).") from error
    if missing:
        raise ValueError(f"{where}: an instance needs {', '.join(missing)}.")
    for name in _FIELDS:
        is_list = name in ("FAIL_TO_PASS", "PASS_TO_PASS")
        if is_list and isinstance(instance[name], str):  # SWE-bench has them as a text of JSON
            try:
                instance[name] = json.loads(instance[name])
            except ValueError as error:
                raise ValueError(f"{where}: {name} is not a list in JSON ({error}).") from error
        of_texts = is_list and isinstance(instance[name], list) and all(isinstance(one, str) for one in instance[name])
        if not of_texts and (is_list or not isinstance(instance[name], str)):
            expected = "a list of texts" if is_list else "a text"
            raise ValueError(f"{where}: {name} must be {expected}, got {instance[name]!r}.")
    return instance


def _task(instance: dict[str, Any], repositories: str, python: str | None, cache_dir: str) -> Task:
    """The task of an instance, whose file is written.

    Raises:
        Unusable: it cannot be played here.
    """
    repo, commit = instance["repo"].replace("/", "__"), instance["base_commit"]
    clone = os.path.abspath(os.path.join(repositories, repo))
    if not os.path.isdir(clone):
        raise Unusable(f"there is no clone at {clone}")
    if not instance["FAIL_TO_PASS"]:
        raise Unusable("no test fails before the repair")
    files = _before(instance, clone)
    solution = _patched(files, instance["patch"], "patch")
    hidden = _patched(files | solution, instance["test_patch"], "test_patch")
    problem = Problem(
        repository=clone,
        commit=commit,
        tree=commit,
        changed={},
        solution=solution,
        hidden=hidden,
        tests=tuple(sorted(swe_problem.test_files(instance["FAIL_TO_PASS"] + instance["PASS_TO_PASS"]))),
        fail_to_pass=tuple(instance["FAIL_TO_PASS"]),
        pass_to_pass=tuple(instance["PASS_TO_PASS"]),
        python=None if python is None else _interpreter(python, instance, repo),
    )
    if not problem.tests:
        raise Unusable("its tests are not pytest's: their ids have no files")
    content = json.dumps([dataclasses.asdict(problem), instance["problem_statement"]], sort_keys=True)
    path = os.path.join(cache_dir, hashlib.sha256(content.encode()).hexdigest()[:24] + ".swe.json")
    if not os.path.exists(path):
        swe_problem.save(problem, path)
    digest = swe_problem.digest(path)
    return Task(
        env="swe",
        name=instance["instance_id"],
        params={"family": FAMILY, "split": instance["repo"], "task_type": _size(solution, files)},
        # Instances have no seed; this tells them apart as a seed would.
        seed=int(digest[:12], 16),
        file=path,
        digest=digest,
        # Halves of surrogate pairs, which JSON may hold, can be neither written nor told.
        objective=instance["problem_statement"].strip().encode(errors="replace").decode(),
        max_score=1.0,
        walkthrough=_walkthrough(solution, files),
    )


def _interpreter(python: str, instance: dict[str, Any], repo: str) -> str:
    """Raises Unusable if it is not there."""
    names = {"repo": repo, "instance_id": instance["instance_id"], "version": instance.get("version", "")}
    try:
        path = os.path.abspath(os.path.expanduser(python.format(**names)))
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"swe-data: python may have {sorted(names)} in braces, got {python!r} ({error!r}).") from error
    if not os.access(path, os.X_OK):
        raise Unusable(f"there is no interpreter at {path}")
    return path


def _before(instance: dict[str, Any], clone: str) -> dict[str, str | None]:
    """The files that the patches name, as they are before: path -> text, None if there is none."""
    named = sorted({path for key in ("patch", "test_patch") for path in _named(instance[key], key)})
    try:
        there = swe_workspace.names(clone, instance["base_commit"])
        return {path: swe_workspace.show(clone, instance["base_commit"], path) if path in there else None for path in named}
    except GameFileError as error:
        raise Unusable(str(error)) from error
    except UnicodeDecodeError as error:
        raise Unusable(f"a patch changes a file that is not text ({error})") from error


def _patched(files: dict[str, str | None], patch: str, what: str) -> dict[str, str | None]:
    """What the files of a patch are after it: path -> text, None for those that it deletes.

    Raises:
        Unusable: it does not apply.
    """
    if not patch.strip():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        swe_workspace.write(folder, files)
        _apply(patch, what, folder)
        made = swe_workspace.Workspace(folder)
        after = {path: made.text(path) for path in _named(patch, what)}
    return dict(sorted(after.items()))


def _named(patch: str, what: str) -> set[str]:
    """The files that a patch reads or writes."""
    if not patch.strip():
        return set()
    with tempfile.TemporaryDirectory() as folder:
        listed = _apply(patch, what, folder, "--numstat", "-z").decode(errors="surrogateescape").split("\0")
    return {line.split("\t", 2)[2] for line in listed if line} | set(_OLD_NAME.findall(patch))


def _apply(patch: str, what: str, folder: str, *options: str) -> bytes:
    """Has git apply a patch in a folder, or tell of it.

    Raises:
        Unusable: it does not apply.
    """
    ended = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", *options, "-"],
        cwd=folder,
        # A folder of temporary files may be in somebody's repository.
        env=swe_workspace.git_environment() | {"GIT_CEILING_DIRECTORIES": os.path.dirname(os.path.realpath(folder))},
        input=(patch if patch.endswith("\n") else patch + "\n").encode(),
        capture_output=True,
    )
    if ended.returncode != 0:
        raise Unusable(f"its {what} does not apply: {ended.stderr.decode(errors='replace').strip()}")
    return ended.stdout


def _size(solution: dict[str, str | None], files: dict[str, str | None]) -> str:
    """How large a repair is, in the bins of arXiv 2510.01132, table 2."""
    lines = sum(
        max(last - first, len(new)) for path, text in solution.items() for first, last, new in _hunks(files[path], text)
    )
    return "patch_1_8" if lines <= 8 else "patch_9_31" if lines <= 31 else "patch_32"


def _walkthrough(solution: dict[str, str | None], files: dict[str, str | None]) -> tuple[str, ...]:
    """The reference repair in an agent's commands."""
    # Deleted first: in the place of a folder there may be a file then.
    commands = [f"delete {path}" for path, text in solution.items() if text is None]
    for path, text in solution.items():
        if text is None:
            continue
        if files[path] is None:
            commands.append(f"create {path}\n{text}")
            continue
        commands += [f"open {path}"] if files[path] != text else []
        # From the last to the first: line numbers before an edit stay what they were.
        for first, last, new in reversed(_hunks(files[path], text)):
            edit = f"insert {first}" if first == last else f"edit {first + 1}:{last}"
            commands.append(f"{edit}\n{''.join(new)}")
    return (*commands, "submit")


def _hunks(before: str | None, after: str | None) -> list[tuple[int, int, list[str]]]:
    """What changes between two texts: lines (first, last] of the one, and the lines in their place."""
    old, new = split_lines(before or ""), split_lines(after or "")
    return [(i, k, new[j:m]) for i, k, j, m in swe_workspace.differences(old, new)]
