"""What a task of a repository's is: the game file of `SweEnv`, as JSON.

Files beside the repository's own are kept whole, path to text: what is laid over it as the episode
begins, what the reference repair changes, and what is laid over it to be judged by.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from envs_host import arrival

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """A repository in a state in which some of its tests fail.

    Attributes:
        repository: folder, or git clone.
        commit: of the clone; None for the folder as it stands.
        tree: what `swe_workspace.lay_out` must return.
        changed: the files that are otherwise than in the repository; None for one that is not there.
        solution: the files of the reference repair; None for one that it deletes.
        hidden: the files that the tests are run with at the end, whatever the episode made of them.
        tests: arguments of pytest that run all tests that count.
        fail_to_pass: ids of the tests that a repair must make pass.
        pass_to_pass: ids of those that it must leave so, or failing as they are marked to.
        python: interpreter of the tests; None for that of the environment's options.
    """

    repository: str
    commit: str | None
    tree: str
    changed: dict[str, str | None]
    solution: dict[str, str | None]
    hidden: dict[str, str | None]
    tests: tuple[str, ...]
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    python: str | None


def save(problem: Problem, path: str) -> None:
    """Writes the task file, whole or not at all."""
    arrival.save_game(problem, _FORMAT, path)


def load(path: str) -> Problem:
    """Reads what `save` wrote.

    Raises:
        GameFileError: the file is missing or damaged.
    """

    def build(content: dict[str, Any]) -> Problem:
        return Problem(**content | {name: tuple(content[name]) for name in ("tests", "fail_to_pass", "pass_to_pass")})

    return arrival.load_game(path, _FORMAT, build)


def test_files(ids: Iterable[str]) -> frozenset[str]:
    """The files of tests, examples in a text among them ("guide.rst::guide.rst"); not those of code whose examples
    are tests, "code.py::code.function"."""
    parts = (test.partition("[")[0].split("::") for test in ids)
    return frozenset(part[0] for part in parts if len(part) > 1 and not (part[0].endswith(".py") and "." in part[1]))


def digest(path: str) -> str:
    """SHA-256, in hexadecimal, of what a task file says; not of where the repository lies.

    Raises:
        GameFileError: the file is missing or damaged.
    """
    content: dict[str, Any] = dataclasses.asdict(load(path))
    del content["repository"], content["python"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
