"""A Gymnasium environment, spoken to in texts, and the file that one of its games is.

What is asked of the environment: observations are texts, and a seed given to `reset` tells all that is random in an
episode. Its actions are texts (a space `Text`), or the numbers of a `Discrete` space, which the config names.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium

from envs_host import arrival
from envs_host.types import finite_reward

_FORMAT = 1
_SHOWN = 200  # characters of what a message quotes


@dataclasses.dataclass(frozen=True)
class Game:
    """The content of a game file.

    Attributes:
        id: as `gymnasium.make` takes it, with or without a module in front: "lake:Lake-v0".
        kwargs: of `gymnasium.make`.
        actions: names of the actions of a `Discrete` space; None where actions are texts.
        seed: of `reset`.
        opening: the observation that the game begins with.
        identity: what the environment says that tells its games apart; None where the seed does.
    """

    id: str
    kwargs: dict[str, Any]
    actions: tuple[str, ...] | None
    seed: int
    opening: str
    identity: str | None


class Answer(NamedTuple):
    """What `step` answered."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class World:
    """A made environment whose answers are looked at."""

    def __init__(self, id: str, kwargs: dict[str, Any], actions: Sequence[str] | None):
        """Makes it.

        Raises:
            ValueError: it cannot be made, or has actions that are neither texts nor named.
        """
        try:
            # Its checker holds texts to a space's alphabet, which few declare: what matters is looked at here.
            with theirs(f"gymnasium.make({id!r})"):
                self.env = gymnasium.make(id, disable_env_checker=True, **kwargs)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ValueError(f"gymnasium.make({id!r}, **{kwargs}) fails: {error}") from error
        self.actions = None if actions is None else tuple(actions)
        space = self.env.action_space
        if isinstance(space, gymnasium.spaces.Discrete):
            self._first = int(space.start)
            if self.actions is None or len(self.actions) != space.n:
                raise ValueError(
                    f"{id} has {space.n} actions, of which env.params.actions names "
                    f"{0 if actions is None else len(actions)}: give a text for each, in the order of their numbers."
                )
        elif not isinstance(space, gymnasium.spaces.Text):
            raise ValueError(
                f"{id} takes actions of {space}, but an agent says texts: wrap it (gymnasium.wrappers.TransformAction) "
                "so that its action_space is a Text or a Discrete."
            )
        elif self.actions is not None:
            raise ValueError(f"{id} takes texts as its actions, so env.params.actions must be None, got {actions}.")
        self._id = id

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        """Starts the episode of a seed; returns its first observation and what is known beside it."""
        with theirs(f"reset of {self._id}"):
            answer = self.env.reset(seed=seed)
        observation, info = self._parts("reset", answer, ("observation", "info"))
        return self._text(observation), info

    def action(self, command: str) -> Any | None:
        """The action that a command is; None if it is none."""
        if self.actions is None:
            return command
        named = {name.casefold(): self._first + number for number, name in enumerate(self.actions)}
        return named.get(command.casefold())

    def step(self, action: Any) -> Answer:
        with theirs(f"step of {self._id}"):
            answer = self.env.step(action)
        observation, reward, terminated, truncated, info = self._parts("step", answer, Answer._fields)
        return Answer(self._text(observation), finite_reward(reward, self._id), bool(terminated), bool(truncated), info)

    def admissible(self, info: dict[str, Any]) -> tuple[str, ...]:
        """The commands that make sense now, where that is known: as `info` has them under "admissible_commands", or
        the names of the actions, without those that its "action_mask" rules out."""
        if "admissible_commands" in info:
            return tuple(map(str, info["admissible_commands"]))
        if self.actions is None:
            return ()
        allowed = info.get("action_mask", [True] * len(self.actions))
        return tuple(name for name, is_allowed in zip(self.actions, allowed, strict=True) if is_allowed)

    def close(self) -> None:
        self.env.close()

    def _parts(self, method: str, answer: Any, names: Sequence[str]) -> tuple[Any, ...]:
        """What the environment answered, whose last part is the info."""
        if not isinstance(answer, tuple) or len(answer) != len(names) or not isinstance(answer[-1], dict):
            raise ValueError(
                f"{self._id}: {method} must return ({', '.join(names)}), the info being a dict, as Gymnasium's do, got "
                f"{repr(answer)[:_SHOWN]}."
            )
        return answer

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, str):
            raise ValueError(
                f"{self._id}: an observation must be a text, got {type(observation).__name__} "
                f"{repr(observation)[:_SHOWN]}: wrap it (gymnasium.wrappers.TransformObservation)."
            )
        return observation


@contextlib.contextmanager
def theirs(what: str) -> Iterator[None]:
    """Around code of the environment's authors, whose ValueErrors are not to be taken for those of a setting, which are
    told without where they came from."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"{what} raised {error!r}") from error


def save(game: Game, path: str) -> None:
    """Writes the game file, whole or not at all."""
    arrival.save_game(game, _FORMAT, path)


def load(path: str) -> Game:
    """Reads what `save` wrote.

    Raises:
        GameFileError: the file is missing or damaged.
    """

    def build(content: dict[str, Any]) -> Game:
        actions = content["actions"]
        return Game(**content | {"actions": None if actions is None else tuple(actions)})

    return arrival.load_game(path, _FORMAT, build)


def digest(path: str) -> str:
    """SHA-256, in hexadecimal, of what tells a game from others: its identity, or else all that it is made from.

    Raises:
        GameFileError: the file is missing or damaged.
    """
    game = load(path)
    content = [game.id, game.identity] if game.identity is not None else dataclasses.asdict(game)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sources(id: str, expert: str | None) -> list[str]:
    """Digests of the files that an environment and its expert are written in, so that games are made again once they
    have changed. Files that these import are not among them.

    Raises:
        ValueError: no environment of this id is registered, or there is no such module.
    """
    registered_by, _, name = id.rpartition(":")
    try:
        if registered_by:
            importlib.import_module(registered_by)
        entry = gymnasium.spec(name).entry_point
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"env.params.id is {id!r}, which Gymnasium does not know: {error}") from error
    modules = {registered_by, entry.partition(":")[0] if isinstance(entry, str) else entry.__module__}
    if expert:
        modules.add(expert.partition(":")[0])
    digests = []
    for module in sorted(modules - {""}):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None or not found.has_location:
            raise ValueError(
                f"the module {module!r} of {id} is not found: it must lie in the folder that the command is given in, "
                "or on PYTHONPATH."
            )
        with open(found.origin, "rb") as file:
            digests.append(hashlib.sha256(file.read()).hexdigest())
    return digests
