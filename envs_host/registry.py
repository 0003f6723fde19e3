"""The environments that come with the package, one record each."""

import importlib
from typing import Any, NamedTuple


class Registered(NamedTuple):
    """An environment, and how its games are made and kept.

    Modules are named, not imported: each needs its own library.

    Attributes:
        played_by: "module:class", see `types.TextEnv`.
        maker: a module with `prepare()`, called once per process, and `build(spec, game path, description path) -> Task`,
            which raises `specs.SetAside`.
        digest: "module:function", from the path of a game to what `Task.digest` is.
        suffix: what the file of a game ends with.
        cache_format: raised when the same spec would give another entry in the cache.
    """

    played_by: str
    maker: str
    digest: str
    suffix: str
    cache_format: int


ENVIRONMENTS = {
    "textworld": Registered(
        played_by="envs_host.textworld:TextWorldEnv",
        maker="envs_host.textworld_maker",
        digest="envs_host.textworld_engine:digest",
        suffix=".z8",
        cache_format=1,
    ),
    "alfworld": Registered(
        played_by="envs_host.alfworld:AlfworldEnv",
        maker="envs_host.alfworld_maker",
        digest="envs_host.alfworld_engine:digest",
        suffix=".tw-pddl",
        cache_format=1,
    ),
    "swe": Registered(
        played_by="envs_host.swe:SweEnv",
        maker="envs_host.swe_maker",
        digest="envs_host.swe_problem:digest",
        suffix=".swe.json",
        cache_format=2,
    ),
    "gymnasium": Registered(
        played_by="envs_host.gymnasium:GymnasiumEnv",
        maker="envs_host.gymnasium_maker",
        digest="envs_host.gymnasium_world:digest",
        suffix=".gymnasium.json",
        cache_format=1,
    ),
}


def find(target: str) -> Any:
    """The object that "module:name" names, its module imported if need be."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
