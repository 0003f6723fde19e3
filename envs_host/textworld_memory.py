"""What the environments of a process share: started games, and the answers they have given.

TextWorld games are deterministic, so the answer to a sequence of commands is computed once and
remembered, together with the interpreter's state behind it: a new command is then computed from
there, without playing the game up to it again.
"""

import collections

from envs_host.textworld_engine import Engine, Extras, Outcome


class Engines:
    """Started games. Those in use by an episode stay; of the others, the last few."""

    def __init__(self, max_idle: int):
        self.started = 0
        self._max_idle = max_idle
        self._engines: collections.OrderedDict[tuple, Engine] = collections.OrderedDict()
        self._users: collections.Counter[tuple] = collections.Counter()

    def acquire(self, key: tuple, file: str, extras: Extras) -> Engine:
        """Returns the started game; to be released by the same key.

        Args:
            key: tells games apart by content, so that a replaced file is not mistaken for the old.
            file, extras: as for `Engine`.
        """
        engine = self._engines.get(key)
        if engine is None:
            engine = self._engines[key] = Engine(file, extras)
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

    def __init__(self, outcome: Outcome):
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

    def add(self, key: tuple, parent: Node | None, command: str, outcome: Outcome) -> Node:
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
