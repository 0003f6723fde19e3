"""What the environments of a process share: started games, and the answers they have given.

Games are deterministic, so the answer to a sequence of commands is computed once and remembered,
together with the engine's state behind it: a new command is then computed from there, without
playing the game up to it again.
"""

import collections
import os
from collections.abc import Callable
from typing import Any

from envs_host.types import GameFileError, Task

_VERIFIED: set[tuple] = set()  # Files whose digest was checked, with their size and time.


class Engines:
    """Started games (with a `close`). Those in use by an episode stay; of the others, the last few."""

    def __init__(self, max_idle: int):
        self.started = 0
        self._max_idle = max_idle
        self._engines: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        self._users: collections.Counter[tuple] = collections.Counter()

    def acquire(self, key: tuple, start: Callable[[], Any]) -> Any:
        """Returns the started game; to be released by the same key.

        Args:
            key: tells games apart by content, so that a replaced file is not mistaken for the old.
            start: starts it, if it is not started.
        """
        engine = self._engines.get(key)
        if engine is None:
            engine = self._engines[key] = start()
            self.started += 1
        self._engines.move_to_end(key)
        self._users[key] += 1
        return engine

    def release(self, key: tuple) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
        idle = [key for key in self._engines if key not in self._users]
        for key in idle[: max(0, len(idle) - self._max_idle)]:
            self._engines.pop(key).close()


class Node:
    """What is known about one sequence of commands of one game."""

    __slots__ = ("outcome", "children")

    def __init__(self, outcome: Any):
        self.outcome = outcome
        self.children: dict[str, Node] = {}


class Memory:
    """Answers of games to sequences of commands: a tree per game, bounded in total size.

    The least recently started games are forgotten first. An episode that is live on a forgotten
    game keeps its part of the tree, which simply is not found by later episodes.
    """

    def __init__(self, max_entries: int):
        self.hits = 0
        self.misses = 0
        self.entries = 0
        self._max_entries = max_entries
        self._roots: collections.OrderedDict[tuple, Node] = collections.OrderedDict()
        self._sizes: dict[tuple, int] = {}

    def root(self, key: tuple) -> Node | None:
        """The state before any command, if this game was started before."""
        node = self._roots.get(key)
        if node is not None:
            self._roots.move_to_end(key)
        return node

    def add(self, key: tuple, parent: Node | None, command: str, outcome: Any) -> Node:
        """Remembers the outcome of `command` after `parent`; without parent, the game's opening."""
        node = Node(outcome)
        if parent is None:
            self._roots[key] = node
            self._sizes[key] = 0
        else:
            parent.children[command] = node
        if key in self._sizes:
            self._sizes[key] += 1
            self.entries += 1
        while self.entries > self._max_entries and self._roots:
            oldest, _ = self._roots.popitem(last=False)
            self.entries -= self._sizes.pop(oldest)
        return node


def verify(task: Task, digest: Callable[[str], str]) -> None:
    """Checks the game file against the task's digest, once per file and process.

    Raises:
        GameFileError: it is missing or differs.
    """
    try:
        status = os.stat(task.file)
    except OSError as error:
        raise GameFileError(
            f"the game file {task.file} of task {task.name} cannot be read ({error.strerror}): "
            "generate the games again."
        ) from error
    key = (task.file, task.digest, status.st_size, status.st_mtime_ns)
    if key in _VERIFIED:
        return
    found = digest(task.file)
    if found != task.digest:
        raise GameFileError(
            f"the game file {task.file} is not the one of task {task.name}: its digest is "
            f"{found[:12]}..., the task was recorded with {task.digest[:12]}.... It is damaged or "
            "was replaced: delete it and generate the games again."
        )
    _VERIFIED.add(key)
