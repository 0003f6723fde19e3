"""One started TextWorld game: the Z-machine interpreter, its states, and TextWorld's tracking.

This talks to the interpreter (Jericho's Frotz) itself instead of through `textworld.start`, whose
text, score and tracked infos it reproduces exactly (a test plays both side by side). Three reasons:

- a state of the interpreter can be saved and restored in 0.03 ms, against 1 to 2 ms for a step and
  15 ms for the start of a game, so any number of episodes share one started game;
- TextWorld takes a second to import; without tracking it is not needed at all;
- TextWorld's own intermediate reward raises when a game becomes unwinnable.

Loading another game into a started interpreter leaks 0.47 MB, so that is never done.
"""

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from envs_host import textworld_text
from envs_host.types import GameFileError

# Any fixed positive number: with the interpreter's default, random texts change from run to run.
_INTERPRETER_SEED = 1

# Where a story file keeps its compilation date and the checksum over it (Z-Machine Standard, 11.1):
# left out of the digest, so that a game has the same one on every day and machine.
_SERIAL_NUMBER = slice(0x12, 0x18)
_CHECKSUM = slice(0x1C, 0x1E)

# TextWorld games report these between tags after each turn, once asked to.
_REPORTS = ("inventory", "moves", "score")
_REPORT = re.compile(r"<(inventory|moves|score)>\n(.*?)</\1>", re.DOTALL)
# With tracing on they also tell the actions: "[taking the coin]", "[taking the coin - succeeded]".
_TRACE = re.compile(r"\[([^]]+)\]\n?")
_SUCCEEDED = " - succeeded"
_WON = "*** The End ***"
_LOST = "*** You lost! ***"


class Extras(NamedTuple):
    """What is wanted beside the text; each needs TextWorld's state tracking."""

    intermediate_reward: bool = False
    admissible_commands: bool = False


class State(NamedTuple):
    """A state of the interpreter, as its difference from the opening (1 to 2 kB).

    `registers` are program counter, stack pointer, frame pointer, frame count, opcode and random
    number generator, in the order of Jericho's `set_state`.
    """

    positions: Any  # uint16 or uint32 [n], where memory and stack differ from the opening
    values: Any  # uint8 [n]
    registers: tuple


class Moment(NamedTuple):
    """What is known of a game after some commands."""

    observation: str
    room: str
    inventory: str
    score: float
    moves: int
    won: bool
    lost: bool
    valid_command: bool
    intermediate_reward: float = 0.0
    admissible_commands: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """Answer of the engine to a command."""

    moment: Moment
    state: State
    events: tuple[str, ...]  # Actions that succeeded; () without tracking.


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
    """One started game, which can be put into any state it has been in.

    Attributes:
        opening: the outcome of starting the game.
    """

    def __init__(self, file: str, extras: Extras):
        """Starts the interpreter.

        Args:
            file: the .z8 file; its .json lies beside it.
            extras: what will be tracked.

        Raises:
            GameFileError: the .json file is missing or damaged.
        """
        import jericho  # With numpy: only where games are played.

        self._file = file
        self._tracing = any(extras)
        self._extras = extras
        self._opening_track: Track | None = None
        self._room_names = _room_names(_sidecar(file))
        with warnings.catch_warnings():
            # "Not fully supported": Jericho knows hints for some famous games only.
            warnings.simplefilter("ignore")
            self._frotz = jericho.FrotzEnv(file, _INTERPRETER_SEED)
        # A .z8 story keeps its dynamic memory below 64 kB, and the stack adds 2.
        self._base = None
        self._at: State | None = None
        self.opening = self._open()

    def _open(self) -> Outcome:
        text, _ = self._frotz.reset()
        reported = ""
        for report in _REPORTS:
            reported += self._frotz.step(f"tw-extra-infos {report}")[0]
        if self._tracing:
            self._frotz.step("tw-trace-actions")
        room = textworld_text.room_name(text, self._room_names, "")
        told = textworld_text.clean_feedback(text, opening=True)
        reports, _ = _split(reported)
        inventory = reports["inventory"]
        moment = Moment(
            observation=textworld_text.observation(room, told, inventory),
            room=room,
            inventory=inventory,
            score=float(_number(reports["score"])),
            moves=_number(reports["moves"]),
            won=False,
            lost=False,
            valid_command=True,
        )
        return Outcome(moment, self._save(), ())

    def step(self, state: State, before: Moment, command: str) -> Outcome:
        """Sends a command that `textworld_text.clean_command` let through.

        Args:
            state: where the game is; any state this game was in, under this or an earlier engine.
            before: what was known there.
            command: the command.
        """
        self._restore(state)
        printed, _, _, _ = self._frotz.step(command)
        reports, text = _split(printed)
        events: tuple[str, ...] = ()
        if self._tracing:
            events, text = _split_trace(text)
        room = textworld_text.room_name(printed, self._room_names, before.room)
        told = textworld_text.clean_feedback(text, opening=False)
        inventory = reports.get("inventory", before.inventory)
        moves = _number(reports["moves"]) if "moves" in reports else before.moves
        moment = Moment(
            observation=textworld_text.observation(room, told, inventory),
            room=room,
            inventory=inventory,
            score=float(_number(reports["score"])) if "score" in reports else before.score,
            moves=moves,
            won=_WON in text,
            lost=_LOST in text,
            # The parser's refusals ("That's not a verb I recognise.", "You can't see any such
            # thing.", questions back) take no turn, whereas every action it understands does, even
            # one that fails in the world. The turn counter is reported anyway: this costs nothing.
            valid_command=moves != before.moves,
        )
        return Outcome(moment, self._save(), events)

    def track(self, path: Iterable[tuple[str, ...]]) -> "Track":
        """What is true in the game after the events of several commands.

        Raises:
            GameFileError: the .json file is damaged.
        """
        if self._opening_track is None:
            self._opening_track = Track.opening(_load_game(_sidecar(self._file)), self._extras)
        track = self._opening_track
        for events in path:
            track = track.after(events)
        return track

    def close(self) -> None:
        """Frees the interpreter."""
        self._frotz = None

    def _save(self) -> State:
        import numpy as np

        memory, stack, *registers, _ = self._frotz.get_state()
        contents = np.concatenate([memory, stack])
        if self._base is None:
            self._base = contents
            self._memory_size = len(memory)
        positions = np.flatnonzero(contents != self._base)
        narrow = positions.astype(np.uint16 if len(contents) <= 2**16 else np.uint32)
        self._at = State(narrow, contents[positions], tuple(registers))
        return self._at

    def _restore(self, state: State) -> None:
        if self._at is state:
            return
        contents = self._base.copy()
        contents[state.positions] = state.values
        memory, stack = contents[: self._memory_size], contents[self._memory_size:]
        # The last entry is the text printed last, which has no part in what comes next.
        self._frotz.set_state((memory, stack, *state.registers, b""))
        self._at = state


class Track:
    """TextWorld's knowledge of what is true in a game after certain events.

    Most commands bring no event about, and episodes of one game share many: what is known is kept
    in a tree by events, next to the tree of commands.

    Attributes:
        policy_length: how many actions the shortest known way to win takes; None if there is none,
            or if it is not tracked.
        admissible_commands: commands that would change the world; () if not tracked.
    """

    def __init__(self, progression, inform7, extras: Extras):
        self._progression = progression
        self._inform7 = inform7
        self._extras = extras
        self._after: dict[tuple[str, ...], Track] = {}
        self.policy_length: int | None = None
        self.admissible_commands: tuple[str, ...] = ()
        if extras.intermediate_reward:
            policy = progression.winning_policy
            self.policy_length = None if policy is None else len(policy)
        if extras.admissible_commands:
            commands = inform7.gen_commands_from_actions(_valid_actions(progression))
            self.admissible_commands = tuple(sorted(set(commands)))

    @classmethod
    def opening(cls, game, extras: Extras) -> "Track":
        """What is true when a `textworld.Game` begins."""
        from textworld.generator.game import GameProgression
        from textworld.generator.inform7 import Inform7Game

        progression = GameProgression(game, track_quests=extras.intermediate_reward)
        return cls(progression, Inform7Game(game), extras)

    def after(self, events: tuple[str, ...]) -> "Track":
        """What is true after the events of one more command."""
        if not events:
            return self
        known = self._after.get(events)
        if known is None:
            known = self._after[events] = self._compute(events)
        return known

    def _compute(self, events: tuple[str, ...]) -> "Track":
        progression = self._progression
        for event in events:
            action = self._inform7.detect_action(event, _valid_actions(progression))
            if action is not None:
                progression = _updated(progression, action)
        if progression is self._progression:
            return self
        return Track(progression, self._inform7, self._extras)


def _updated(progression, action):
    """A copy of a `GameProgression` after an action.

    TextWorld's own `copy` and `update` search for the valid actions twice, which is most of their
    time; here `_valid_actions` searches when somebody asks.
    """
    after = copy.copy(progression)
    after.state = progression.state.copy()
    after.state.apply(action)
    after._valid_actions = None
    after.quest_progressions = [quest.copy() for quest in progression.quest_progressions]
    for quest in after.quest_progressions:
        quest.update(action, after.state)
    return after


def _valid_actions(progression) -> list:
    """Actions that can be taken now."""
    if progression._valid_actions is None:
        kb = progression.game.kb
        progression._valid_actions = list(
            progression.state.all_applicable_actions(
                kb.rules.values(), kb.types.constants_mapping
            )
        )
    return progression._valid_actions


def progress(moment: Moment, before: Track, after: Track) -> float:
    """TextWorld's intermediate reward: +1 for a shorter way to win, -1 for a longer one.

    A step after which the game cannot be won counts as -1 (TextWorld's own code raises there).
    """
    if moment.won:
        return 1.0
    if moment.lost:
        return -1.0
    if before.policy_length is None:
        return 0.0
    if after.policy_length is None:
        return -1.0
    shorter = before.policy_length - after.policy_length
    return float((shorter > 0) - (shorter < 0))


def _split(printed: str) -> tuple[dict[str, str], str]:
    """Separates the reports from what a game printed for the player."""
    reports = {name: _split_trace(text)[1].strip() for name, text in _REPORT.findall(printed)}
    return reports, _REPORT.sub("", printed)


def _split_trace(text: str) -> tuple[tuple[str, ...], str]:
    """Separates the actions that succeeded; those with parentheses are parts of others."""
    events = tuple(
        trace.partition(_SUCCEEDED)[0] for trace in _TRACE.findall(text) if _SUCCEEDED in trace
    )
    return tuple(e for e in events if "(" not in e and ")" not in e), _TRACE.sub("", text)


def _number(report: str) -> int:
    return int(report.split("\n")[0])


def _sidecar(file: str) -> str:
    return os.path.splitext(file)[0] + ".json"


def _load_game(path: str):
    import textworld  # Takes a second to import.

    try:
        return textworld.Game.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> GameFileError:
    return GameFileError(
        f"{path} is damaged ({error!r}): delete it and generate the games again."
    )


def _room_names(path: str) -> dict[str, str]:
    """Lower-cased name of each room -> its name.

    Raises:
        GameFileError: the .json file is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as sidecar:
            entities = [entity for _, entity in json.load(sidecar)["infos"]]
        return {e["name"].lower(): e["name"] for e in entities if e["type"] == "r" and e["name"]}
    except OSError as error:
        raise GameFileError(
            f"{path} is missing ({error.strerror}): generate the games again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
