"""One ALFWorld game, played: what a command answers, what could be done, whether the task is done.

`Engine` steps the PDDL state itself (alfworld_pddl.py) and tells it by the game's own grammar
(alfworld_text.py); the texts equal those of TextWorld's engine with ALFWorld's wrapper byte for
byte, which a test and tools/bench_alfworld.py hold by playing both side by side. `Original` is
that engine, under the same interface: the oracle, and what its speed is measured against.
"""

import functools
import hashlib
import json
from typing import NamedTuple

from envs_host import alfworld_pddl, alfworld_text
from envs_host.alfworld_pddl import Facts, Ground
from envs_host.alfworld_text import Entity
from envs_host.types import GameFileError

# The parts of a game file that make the game; a walkthrough may be added or changed.
_PARTS = ("pddl_domain", "grammar", "pddl_problem")
REFUSED = "Nothing happens."
_BANNER = "-= Welcome to TextWorld, ALFRED! =-"
_TASK = "Your task is to:"


class Outcome(NamedTuple):
    """What a command led to."""

    feedback: str
    facts: Facts
    won: bool
    valid: bool  # False: "Nothing happens."


class GameFile(NamedTuple):
    """What a .tw-pddl file holds; a walkthrough is () if the file has none."""

    domain: str
    grammar: str
    problem: str
    walkthrough: tuple[str, ...]
    solvable: bool | None


def read(file: str) -> GameFile:
    """Reads a game file.

    Raises:
        GameFileError: it cannot be read, is cut short, or lacks a part.
    """
    try:
        with open(file, encoding="utf-8") as game_file:
            data = json.load(game_file)
        walkthrough = tuple(data.get("walkthrough") or ())
        return GameFile(*(data[part] for part in _PARTS), walkthrough, data.get("solvable"))
    except OSError as error:
        raise GameFileError(
            f"the game file {file} cannot be read ({error.strerror}): generate the games again, or "
            "run alfworld-download again."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GameFileError(
            f"the game file {file} is no complete .tw-pddl game ({error!r}): it is cut short or "
            "damaged. Delete it and generate the games again, or run alfworld-download -f."
        ) from error


def digest(file: str) -> str:
    """SHA-256 of what makes the game (not of its walkthrough), in hexadecimal.

    Raises:
        GameFileError: the file cannot be read or is damaged.
    """
    return content_digest(read(file))


def content_digest(game: GameFile) -> str:
    content = [game.domain, game.grammar, game.problem]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def _domain(text: str) -> alfworld_pddl.Domain:
    return alfworld_pddl.parse_domain(text)


@functools.lru_cache(maxsize=64)
def _grammar(text: str) -> alfworld_text.Grammar:
    return alfworld_text.parse(text)


class Engine:
    """A game that can be played from any state it has been in.

    Attributes:
        world: its PDDL.
        names: object -> what the game calls it.
        opening: the outcome of starting it.
    """

    def __init__(self, game: GameFile, file: str):
        """Args: game, as read; file, its name for error messages.

        Raises:
            GameFileError: the game cannot be understood.
        """
        try:
            domain, grammar = _domain(game.domain), _grammar(game.grammar)
            problem = alfworld_pddl.parse_problem(game.problem)
            negations = {p[len("not_"):] for p in grammar.read if p.startswith("not_")}
            asked = {p for p in grammar.read if not p.startswith("not_")}
            self.world = alfworld_pddl.World(domain, problem, keep=asked, negations=negations)
            self.goal = problem.goal
            self.names = names(arg for facts in problem.init.values() for f in facts for arg in f)
            entities = {id_: Entity(id_, name) for id_, name in self.names.items()}
            self._narrator = alfworld_text.Narrator(grammar, self.world, entities)
            self._commands: dict[tuple, str] = {}
            intro = self._narrator.derive("intro", {}, self.world.initial)
            won = self.world.reached(self.world.initial)
        except (alfworld_pddl.PddlError, alfworld_text.GrammarError, KeyError, RecursionError) as e:
            raise GameFileError(f"the game file {file} cannot be played: {e}") from e
        self.opening = Outcome(intro, self.world.initial, won, valid=True)

    def commands(self, facts: Facts) -> dict[str, Ground]:
        """Every command that can be given, in no particular order."""
        found: dict[str, Ground] = {}
        for ground in self.world.applicable(facts):
            key = (ground.action.name, ground.args)
            command = self._commands.get(key)
            if command is None:
                # What a template asks for never changes (where receptacles stand).
                command = self._narrator.command(*self._context(ground), facts)
                self._commands[key] = command
            found.setdefault(command, ground)
        return found

    def command(self, action: str, roles: dict[tuple[str, str], str]) -> str:
        """The command for an action, from what its template names: (placeholder, type) -> object."""
        return self._narrator.command(action, roles, self.world.initial)

    def step(self, facts: Facts, command: str, commands: dict[str, Ground] | None = None) -> Outcome:
        """Gives a command; `commands` may be handed in if they are known."""
        ground = (self.commands(facts) if commands is None else commands).get(command.strip())
        if ground is None:
            return Outcome(REFUSED, facts, self.world.reached(facts), valid=False)
        after = self.world.apply(facts, ground)
        feedback = self._narrator.feedback(*self._context(ground), after)
        return Outcome(feedback, after, self.world.reached(after), valid=True)

    def close(self) -> None:
        """Nothing is held that would have to be freed."""

    @staticmethod
    def _context(ground: Ground) -> tuple[str, dict[tuple[str, str], str]]:
        return ground.action.name, dict(zip(ground.action.parameters, ground.args, strict=True))


def names(ids) -> dict[str, str]:
    """What ALFWorld calls each object: its type and a number, e.g. "cabinet 3".

    Ids of one type are numbered from the last in sorted order, as ALFWorld's `Demangler` does; what
    has no place in its id (the agent, types) gets no number, but the space before it.
    """
    ids = sorted(set(ids))
    kinds: dict[str, str] = {}
    count: dict[str, int] = {}
    for id_ in ids:
        kind, found, _ = id_.partition("_bar_")
        if found:
            kinds[id_] = kind + "basin" if "basin" in id_ else kind
            count[kinds[id_]] = count.get(kinds[id_], 0) + 1
    named = {}
    for id_ in ids:
        kind = kinds.get(id_)
        if kind is None:
            named[id_] = f"{id_} "
        else:
            named[id_] = f"{kind} {count[kind]}"
            count[kind] -= 1
    return named


def split_opening(feedback: str) -> tuple[str, str]:
    """What is seen at first and what is to be done, out of a game's opening text."""
    seen, _, task = feedback.partition(_TASK)
    return seen.removeprefix(_BANNER).strip(), task.strip()


class Original:
    """The engine that ALFWorld ships with, one episode at a time. Slow; needs `alfworld`."""

    def __init__(self):
        """Loads the library; raises ModuleNotFoundError without the extra `alfworld`."""
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        # What it computes for every state anyway; no expert plan.
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._env = AlfredDemangler(PddlEnv(infos), shuffle=False)

    def reset(self, file: str) -> tuple[str, tuple[str, ...], bool]:
        """Returns (feedback, admissible commands, won)."""
        self._env.load(file)
        state = self._env.reset()
        return state["feedback"], tuple(state["admissible_commands"]), state["won"]

    def step(self, command: str) -> tuple[str, tuple[str, ...], bool]:
        """Returns (feedback, admissible commands, won)."""
        state, _, _ = self._env.step(command)
        return state["feedback"], tuple(state["admissible_commands"]), state["won"]
