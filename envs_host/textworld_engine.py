"""One started TextWorld game, reduced to what an environment needs, and a memory of its answers.

TextWorld games are deterministic, so the answer to a sequence of commands is computed once per
process and remembered (`Memory`). A game is started only for a sequence not seen before; started
games are kept for the next episode of the same game (`Engines`), because starting one costs three
to four times a reset. Loading another game into a started one leaks 0.47 MB, so that is never done.
"""

import collections
import hashlib
import json
import os
from typing import NamedTuple

from envs_host import textworld_text
from envs_host.types import GameFileError

# Any fixed positive number: with the interpreter's default, random texts change from run to run.
_INTERPRETER_SEED = 1

# Where a story file keeps its compilation date and the checksum over it (Z-Machine Standard, 11.1):
# left out of the digest, so that a game has the same one on every day and machine.
_SERIAL_NUMBER = slice(0x12, 0x18)
_CHECKSUM = slice(0x1C, 0x1E)


class Moment(NamedTuple):
    """State of a game after some commands, as far as the player may know it."""

    observation: str
    room: str
    inventory: str
    score: float
    won: bool
    lost: bool
    valid_command: bool
    intermediate_reward: float
    admissible_commands: tuple[str, ...]


class Extras(NamedTuple):
    """What is wanted beside the text; each needs TextWorld's state tracking (measured: twice the
    cost of a step)."""

    intermediate_reward: bool = False
    admissible_commands: bool = False


def digest(file: str) -> str:
    """SHA-256 of a story file without its date, in hexadecimal.

    Raises:
        GameFileError: the file cannot be read.
    """
    try:
        with open(file, "rb") as story_file:
            story = bytearray(story_file.read())
    except OSError as error:
        raise GameFileError(
            f"the game file {file} cannot be read ({error.strerror}): generate the games again."
        ) from error
    for dated in (_SERIAL_NUMBER, _CHECKSUM):
        story[dated] = bytes(dated.stop - dated.start)
    return hashlib.sha256(story).hexdigest()


class Engine:
    """One started game."""

    def __init__(self, file: str, extras: Extras):
        """Starts the interpreter.

        Args:
            file: the .z8 file; its .json lies beside it.
            extras: what to track.

        Raises:
            GameFileError: the .json file is missing or damaged.
        """
        import textworld  # Takes a second to import: only where games are played.

        self._extras = extras
        infos = textworld.EnvInfos(
            feedback=True,
            inventory=True,
            admissible_commands=extras.admissible_commands,
            # TextWorld's own `intermediate_reward` fails on a game that can no longer be won
            # (it takes the length of None); it is computed below from the winning policy, which
            # is tracked if and only if the policy's commands are asked for.
            policy_commands=extras.intermediate_reward,
        )
        sidecar = os.path.splitext(file)[0] + ".json"
        if not os.path.isfile(sidecar):
            raise GameFileError(f"{sidecar} is missing beside {file}: generate the games again.")
        try:
            self._env = textworld.start(file, infos)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise GameFileError(
                f"{sidecar} is damaged ({error!r}): delete it and generate the games again."
            ) from error
        self._env.seed(_INTERPRETER_SEED)
        self._room_names: dict[str, str] = {}
        self._moves = 0
        self._moment: Moment | None = None
        self._policy: list | None = None

    def reset(self) -> Moment:
        state = self._env.reset()
        self._room_names = {
            entity.name.lower(): entity.name
            for entity in state.game.infos.values()
            if entity.type == "r" and entity.name
        }
        self._moves = state["moves"]
        self._policy = state["_winning_policy"] if self._extras.intermediate_reward else None
        room = textworld_text.room_name(state.feedback, self._room_names, "")
        text = textworld_text.clean_feedback(state.feedback, opening=True)
        return self._remember(state, room, text, valid=True, intermediate_reward=0.0)

    def step(self, command: str) -> Moment:
        """Sends a command that `textworld_text.clean_command` let through."""
        state, _, _ = self._env.step(command)
        # The parser's refusals ("That's not a verb I recognise.", "You can't see any such thing.",
        # questions back) take no turn, whereas every understood action does, even if it fails in
        # the world. The game reports its turn counter after each turn in any case, so this signal
        # costs nothing.
        valid = state["moves"] != self._moves
        self._moves = state["moves"]
        intermediate_reward = 0.0
        if self._extras.intermediate_reward:
            policy = state["_winning_policy"]
            intermediate_reward = _progress(state, self._policy, policy)
            self._policy = policy
        room = textworld_text.room_name(state.feedback, self._room_names, self._moment.room)
        text = textworld_text.clean_feedback(state.feedback, opening=False)
        return self._remember(state, room, text, valid, intermediate_reward)

    def close(self) -> None:
        self._env.close()

    def game(self):
        """The `textworld.Game` being played."""
        return self._env.state.game

    def _remember(self, state, room, text, valid, intermediate_reward) -> Moment:
        inventory = state.inventory or ""
        admissible = tuple(state.admissible_commands) if self._extras.admissible_commands else ()
        self._moment = Moment(
            observation=textworld_text.observation(room, text, inventory),
            room=room,
            inventory=inventory,
            score=float(state.score),
            won=bool(state.won),
            lost=bool(state.lost),
            valid_command=valid,
            intermediate_reward=intermediate_reward,
            admissible_commands=admissible,
        )
        return self._moment


def _progress(state, before: list | None, after: list | None) -> float:
    """+1 if the winning policy got shorter, -1 if longer; a game made unwinnable counts as -1."""
    if state.won:
        return 1.0
    if state.lost:
        return -1.0
    if before is None:
        return 0.0
    if after is None:
        return -1.0
    return float((len(before) > len(after)) - (len(before) < len(after)))


class Engines:
    """Started games, kept for the next episode of the same game; the oldest idle ones are closed."""

    def __init__(self, max_idle: int):
        self.started = 0
        self._max_idle = max_idle
        self._idle: list[tuple[tuple, Engine]] = []

    def take(self, key: tuple, file: str, extras: Extras) -> Engine:
        """Returns a started game, in whatever state: reset it first.

        Args:
            key: tells games apart by content, so that a replaced file is not mistaken for the old.
            file, extras: as for `Engine`.
        """
        for position, (idle_key, engine) in enumerate(self._idle):
            if idle_key == key:
                del self._idle[position]
                return engine
        self.started += 1
        return Engine(file, extras)

    def give_back(self, key: tuple, engine: Engine) -> None:
        self._idle.append((key, engine))
        while len(self._idle) > self._max_idle:
            self._idle.pop(0)[1].close()


class Node:
    """What is known about one sequence of commands of one game."""

    __slots__ = ("moment", "children")

    def __init__(self, moment: Moment):
        self.moment = moment
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

    def add(self, key: tuple, parent: Node | None, command: str, moment: Moment) -> Node:
        """Remembers the answer to `command` after `parent`; without parent, the game's start."""
        node = Node(moment)
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
