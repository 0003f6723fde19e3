"""Files that arrive in a cache whole or not at all, whoever else writes the same ones."""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from envs_host.types import GameFileError

PARTIAL = ".partial"  # Ending of a file on its way.

Game = TypeVar("Game")


def write_json(content: Any, path: str) -> None:
    """Writes a JSON file."""
    partial = _partial(path)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(partial, path)


def save_game(game: Any, version: int, path: str) -> None:
    """Writes a dataclass as a game file of this version of its form."""
    write_json({"format": version, **dataclasses.asdict(game)}, path)


def load_game(path: str, version: int, build: Callable[[dict[str, Any]], Game]) -> Game:
    """Reads what `save_game` wrote; `build` makes the game of its fields, whose tuples are lists.

    Raises:
        GameFileError: the file is missing, damaged, or of another version.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content.pop("format") != version:
            raise GameFileError(f"{path} was written by another version: make the games again.")
        return build(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GameFileError(f"the game file {path} cannot be read ({error!r}): make the games again.") from error


def move(source: str, path: str) -> None:
    """Moves a file, perhaps from another disk, where a move is not atomic."""
    partial = _partial(path)
    shutil.move(source, partial)
    os.replace(partial, path)


def _partial(path: str) -> str:
    # Not of the process's number: other hosts may share the folder.
    return f"{path}.{uuid.uuid4().hex}{PARTIAL}"
