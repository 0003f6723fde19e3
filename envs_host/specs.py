"""What a game is made from: a family, its parameters and a seed."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from envs_host import swe_workspace
from envs_host.registry import ENVIRONMENTS
from envs_host.types import GameFileError

_REQUIRED = object()
_MOST_COIN_ROOMS = 100  # Of TextWorld 1.7's challenge.

# ALFWorld's task types under its own names, in the order of its own numbers (1 to 6).
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)


class SetAside(Exception):
    """No usable game comes out of a spec; the message says why."""


class _Parameter(NamedTuple):
    """A parameter of a game family.

    Attributes:
        default: `_REQUIRED` if there is none.
        form: its place in the task's name; a parameter at None or False has none, nor one whose form is empty.
        allowed: `int` (from 0), a range of integers, `float` (above 0), `bool`, `str` or `pathlib.Path` (a text that is
            made an absolute path), `list` (of texts) or `dict` (of what JSON can hold, as which it is kept), or a tuple
            of the values to choose from. Of a text with slashes the name has what is behind the last.
    """

    default: Any
    form: str
    allowed: Any = int


_FROM_1 = range(1, sys.maxsize)

FAMILIES: dict[str, dict[str, _Parameter]] = {
    # As of `tw-make custom`.
    "custom": {
        "world_size": _Parameter(_REQUIRED, "w{}", _FROM_1),
        "nb_objects": _Parameter(_REQUIRED, "o{}"),
        "quest_length": _Parameter(_REQUIRED, "q{}", _FROM_1),
        "theme": _Parameter("house", "{}", ("house", "basic")),
        "quest_breadth": _Parameter(None, "breadth{}", _FROM_1),
        "nb_parallel_quests": _Parameter(None, "parallel{}", _FROM_1),
        "include_adj": _Parameter(False, "adj", bool),
        "only_last_action": _Parameter(False, "last", bool),
        "blend_instructions": _Parameter(False, "blend", bool),
        "blend_descriptions": _Parameter(False, "blenddesc", bool),
        "ambiguous_instructions": _Parameter(False, "ambiguous", bool),
        "entity_numbering": _Parameter(False, "numbered", bool),
    },
    "tw-simple": {
        "rewards": _Parameter(_REQUIRED, "{}", ("sparse", "balanced", "dense")),
        "goal": _Parameter("detailed", "{}", ("detailed", "brief", "none")),
        "test": _Parameter(False, "test", bool),
    },
    "tw-cooking": {
        "recipe": _Parameter(1, "recipe{}", range(1, 6)),
        "take": _Parameter(0, "take{}"),
        "go": _Parameter(1, "go{}", (1, 6, 9, 12)),
        "open": _Parameter(False, "open", bool),
        "cook": _Parameter(False, "cook", bool),
        "cut": _Parameter(False, "cut", bool),
        "drop": _Parameter(False, "drop", bool),
        "recipe_seed": _Parameter(0, "r{}"),
        "split": _Parameter(None, "{}", (None, "train", "valid", "test")),
    },
    "coin_collector": {"level": _Parameter(_REQUIRED, "l{}", range(1, 301))},
    "treasure_hunter": {"level": _Parameter(_REQUIRED, "l{}", range(1, 31))},
    # Houses of ALFWorld; see alfworld_houses.py.
    "alfworld": {
        "split": _Parameter("train", "{}", ("train", "valid_seen", "valid_unseen")),
        "task_type": _Parameter("any", "{}", ("any", *TASK_TYPES)),
        "room": _Parameter("any", "{}", ("any", "kitchen", "livingroom", "bedroom", "bathroom")),
        "scene": _Parameter(None, "f{}", _FROM_1),
        "num_receptacles": _Parameter(None, "r{}", _FROM_1),
        "num_objects": _Parameter(None, "o{}", _FROM_1),
        "closed": _Parameter(True, "closed", bool),
        "expert": _Parameter("planner", "{}", ("planner", "handcoded")),
    },
    # Mistakes planted in a repository; see swe_maker.py.
    "swe-bugs": {
        "repository": _Parameter(_REQUIRED, "{}", pathlib.Path),
        "files": _Parameter("*.py", "{}", str),
        "tests": _Parameter(None, "{}", str),
        "python": _Parameter(None, "{}", pathlib.Path),
        "expert": _Parameter("reader", "{}", ("reader", "direct", "looker")),
        "window_lines": _Parameter(None, "{}", _FROM_1),
    },
    # A Gymnasium environment of anyone's; see gymnasium_maker.py.
    "gymnasium": {
        "id": _Parameter(_REQUIRED, "{}", str),
        "kwargs": _Parameter({}, "{}", dict),
        "actions": _Parameter(None, "", list),
        "expert": _Parameter(None, "", str),
        "objective": _Parameter(None, "", str),
        "max_score": _Parameter(1.0, "", float),
    },
}

# The environment that plays a family; TextWorld, unless it is named here.
_ENVIRONMENTS = {"alfworld": "alfworld", "swe-bugs": "swe", "gymnasium": "gymnasium"}


def environment(family: str) -> str:
    """Name of the environment that plays a family, and of the library that its making takes."""
    return _ENVIRONMENTS.get(family, "textworld")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A game to be: a family, all its parameters, a seed."""

    family: str
    params: tuple[tuple[str, Any], ...]
    seed: int

    @classmethod
    def parse(cls, spec: Mapping[str, Any]) -> "Spec":
        """Reads a dict with "family", "seed" and the family's parameters.

        Raises:
            ValueError: a family or parameter is unknown, a required one is missing, or one has no such value.
        """
        given = dict(spec)
        family = given.pop("family", None)
        if family not in FAMILIES:
            raise ValueError(
                f"the game family {family!r} is unknown: 'family' must be one of "
                f"{sorted(FAMILIES)}."
            )
        seed = given.pop("seed", None)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"a game needs an integer 'seed' of 0 or more, got {seed!r}.")
        known = FAMILIES[family]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{family} has no parameter {unknown}: it takes {sorted(known)}.")
        params = {name: given.get(name, known[name].default) for name in known}
        missing = [name for name, value in params.items() if value is _REQUIRED]
        if missing:
            raise ValueError(f"{family} needs the parameter {missing}: add it to {dict(spec)}.")
        for name, value in params.items():
            _check(family, name, value)
            params[name] = _kept(known[name].allowed, value)
        _check_makeable(family, params)
        return cls(family, tuple(params.items()), seed)

    @property
    def env(self) -> str:
        """See `environment`."""
        return environment(self.family)

    @property
    def name(self) -> str:
        """E.g. "custom-w2-o3-q4-basic-s50001"."""
        forms = FAMILIES[self.family]
        parts = [
            forms[name].form.format(_shown(value))
            for name, value in self.params
            if value is not None and value is not False and value != "{}" and forms[name].form
        ]
        return "-".join([self.family, *parts, f"s{self.seed}"])

    @functools.cached_property
    def key(self) -> str:
        """Where the cache keeps it."""
        content = [ENVIRONMENTS[self.env].cache_format, self._version(), self.family, sorted(self.params), self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

    def _version(self) -> str:
        """Of what a game is made with: a library, or the files of a repository."""
        params = dict(self.params)
        if self.env == "swe":
            return _tree(params["repository"])
        try:
            version = importlib.metadata.version(self.env)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"games of the family {self.family!r} need the library {self.env!r}: run "
                f"pip install 'jaxagentrl[{self.env}]' (from a checkout: pip install -e "
                f"'.[{self.env}]')."
            ) from None
        if self.env == "gymnasium":  # the library is the least of it
            from envs_host import gymnasium_world

            version = " ".join([version, *gymnasium_world.sources(params["id"], params["expert"])])
        return version

    def paths(self, cache_dir: str) -> tuple[str, str, str]:
        """Absolute paths of the entry in a cache: game, description, record."""
        stem = os.path.join(os.path.abspath(cache_dir), self.key)
        return stem + ENVIRONMENTS[self.env].suffix, stem + ".json", stem + ".task.json"


@functools.cache
def _tree(repository: str) -> str:
    """Read once for all games of a repository; until `forget_repositories`."""
    try:
        return swe_workspace.tree(repository)
    except GameFileError as error:
        raise ValueError(f"swe-bugs: {error}") from None


def forget_repositories() -> None:
    """Has repositories read again: they may have changed."""
    _tree.cache_clear()


def _kept(allowed: Any, value: Any) -> Any:
    """A parameter that was found right, as a `Spec` can hold it."""
    if value is None:
        return None
    if allowed is pathlib.Path:
        return os.path.abspath(os.path.expanduser(value))
    if allowed is dict:
        return json.dumps(dict(value), sort_keys=True)
    return tuple(value) if allowed is list else value


def _shown(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        return ",".join(f"{key}={entry}" for key, entry in json.loads(value).items())
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value


def _check(family: str, name: str, value: Any) -> None:
    """Raises ValueError if a parameter's value is not allowed."""
    default, _, allowed = FAMILIES[family][name]
    if isinstance(allowed, tuple):
        good, expected = value in allowed, f"one of {list(allowed)}"
    elif allowed is bool:
        good, expected = isinstance(value, bool), "True or False"
    elif allowed in (str, pathlib.Path):
        good, expected = isinstance(value, str) and bool(value), "a text"
    elif allowed is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        good, expected = is_number and 0 < value < math.inf, "a number above 0"
    elif allowed is list:
        good = isinstance(value, list | tuple) and all(isinstance(text, str) and text.strip() == text for text in value)
        good = good and "" not in value and 0 < len(value) == len({text.casefold() for text in value})
        expected = "different texts, without spaces around them"
    elif allowed is dict:
        good, expected = isinstance(value, Mapping) and _is_json(dict(value)), "named values that JSON can hold"
    else:
        bounds = range(sys.maxsize) if allowed is int else allowed
        good = isinstance(value, int) and not isinstance(value, bool) and value in bounds
        expected = f"an integer of {bounds.start} or more"
        if bounds.stop < sys.maxsize:
            expected = f"an integer from {bounds.start} to {bounds.stop - 1}"
    if not good and not (value is None and default is None):
        raise ValueError(f"{family}: {name} must be {expected}, got {value!r}.")


def _is_json(value: dict[Any, Any]) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return all(isinstance(key, str) for key in value)


def _check_makeable(family: str, params: dict[str, Any]) -> None:
    """Raises ValueError if TextWorld makes no games of these parameters, whatever the seed."""
    if family == "tw-cooking" and params["take"] > params["recipe"]:
        raise ValueError(
            f"tw-cooking: take is {params['take']}, but of recipe = {params['recipe']} ingredients no more can "
            "lie elsewhere: lower the first or raise the second."
        )
    if family == "swe-bugs" and params["window_lines"] and params["expert"] != "looker":
        raise ValueError(
            f"swe-bugs: window_lines is {params['window_lines']}, but only the expert \"looker\" goes by what a window "
            f"shows, and expert is {params['expert']!r}: set one of them otherwise."
        )
    if family == "custom" and params["ambiguous_instructions"]:
        raise ValueError(
            "custom: ambiguous_instructions is True, but TextWorld makes no such games: its code for them is an "
            "assertion that fails, \"not tested\". Leave it False."
        )
    if family == "coin_collector":
        # Hundreds of levels, each of which begins with quests of one step and ends with those of a hundred.
        kind, step = divmod(params["level"] - 1, 100)
        if (num_rooms := (kind + 1) * (step + 1)) > _MOST_COIN_ROOMS:
            raise ValueError(
                f"coin_collector: level {params['level']} has {num_rooms} rooms, but TextWorld makes no games of more "
                f"than {_MOST_COIN_ROOMS}: take a level from 1 to 150, or from 201 to 233."
            )
