"""Files that arrive in a cache whole or not at all, whoever else writes the same ones."""

import json
import os
import shutil
import uuid
from typing import Any

PARTIAL = ".partial"  # Ending of a file on its way.


def write_json(content: Any, path: str) -> None:
    """Writes a JSON file."""
    partial = _partial(path)
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(partial, path)


def move(source: str, path: str) -> None:
    """Moves a file, perhaps from another disk, where a move is not atomic."""
    partial = _partial(path)
    shutil.move(source, partial)
    os.replace(partial, path)


def _partial(path: str) -> str:
    # Not of the process's number: other hosts may share the folder.
    return f"{path}.{uuid.uuid4().hex}{PARTIAL}"
