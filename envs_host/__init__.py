"""Text environments and the worker processes they run in. Nothing here imports jax."""

import importlib
import inspect
from typing import Any

from envs_host.registry import ENVIRONMENTS
from envs_host.types import TextEnv

# Of options; other annotations are the environment's own matter.
_TYPES = {
    bool: "True or False", int: "an integer", float: "a number", str: "a text", str | None: "a text or None",
}


def make(name: str, **kwargs) -> TextEnv:
    """Makes an environment, ready for `reset`.

    Args:
        name: a name of `ENVIRONMENTS`, or "package.module:Class" for an environment of your own: a `TextEnv`, or a class
            without `step` whose methods are tools (`envs_host.tools`).
        **kwargs: options of that environment.

    Raises:
        ValueError: the name is unknown, or its module has no such class.
    """
    return _class_of(name)(**kwargs)


def check_options(name: str, options: dict[str, Any]) -> None:
    """Looks whether an environment takes options of these names, and of the types that it says.

    Raises:
        ValueError: it does not, or is unknown; as of `make`.
    """
    taken = inspect.signature(_class_of(name)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    unknown = sorted(set(options) - set(taken))
    if unknown:
        raise ValueError(
            f"environment {name!r} has no option {', '.join(unknown)}; it takes {', '.join(sorted(taken))}."
        )
    for option, value in options.items():
        said = taken[option].annotation
        if said in _TYPES and not _fits(value, said):
            raise ValueError(f"env.options.{option} must be {_TYPES[said]}, got {value!r}.")


def _fits(value: Any, said: Any) -> bool:
    """bool is a kind of int, and NaN a float that is within no bounds."""
    if said in (int, float):
        is_number = isinstance(value, int if said is int else int | float) and not isinstance(value, bool)
        return is_number and value == value
    return isinstance(value, said)


def takes(name: str, option: str) -> bool:
    """Whether an environment has an option of this name."""
    taken = inspect.signature(_class_of(name)).parameters
    return option in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def check_here(name: str, options: dict[str, Any]) -> None:
    """Looks whether this machine has what an environment needs, before hours are spent on its games. A class
    that needs something says so by a `check_here` of its own, which takes the options.

    Raises:
        ValueError: it has not; the message says what to do.
    """
    check = getattr(_class_of(name), "check_here", None)
    if check is not None:
        check(**options)


def _class_of(name: str) -> type:
    if ":" not in name and name not in ENVIRONMENTS:
        raise ValueError(
            f"environment {name!r} is unknown: take one of {sorted(ENVIRONMENTS)}, or name a class "
            "of your own as 'package.module:Class'."
        )
    target = name if ":" in name else ENVIRONMENTS[name].played_by
    module, _, attribute = target.partition(":")
    try:
        members = vars(importlib.import_module(module))
    except ImportError as error:
        hint = f": run pip install 'jaxagentrl[{name}]'" if name in ENVIRONMENTS else ""
        raise ValueError(f"environment {name!r}: the module {module!r} cannot be imported ({error}){hint}.") from error
    if attribute not in members:
        own = [
            key
            for key, value in members.items()
            if isinstance(value, type) and value.__module__ == module
        ]
        raise ValueError(
            f"environment {name!r}: the module {module!r} has no class {attribute!r}: name one of "
            f"its classes {sorted(own)} after the colon, or another module before it."
        )
    found = members[attribute]
    missing = sorted({"reset", "step", "close"} - set(dir(found)))
    if isinstance(found, type) and "step" in missing and "reset" not in missing:
        from envs_host import tools  # not above: pydantic takes a fifth of a second, of other environments' workers, too

        return tools.played(found)
    if isinstance(found, type) and missing:
        raise ValueError(
            f"environment {name!r}: the class has no {', '.join(missing)}: an environment has what "
            "envs_host.types.TextEnv has, or `reset` and methods that are tools (envs_host/tools.py)."
        )
    return found
