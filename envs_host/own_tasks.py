"""Tasks of an environment of one's own: a file with one JSON object a line.

    {"name": "sum-3", "params": {"numbers": [1, 2]}, "objective": "Add them.", "walkthrough": ["3"]}

The fields are `Task`'s. `name` must be given, the others may be left out: `max_score` is 1.0 then, `digest` (which
seeds what is sampled for the task) is of name, params, file and seed, `seed` a part of it, the rest is empty. A `file`
is sought beside the file of tasks. What `Task.to_json` writes is such a line, too.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from typing import Any

from envs_host.types import Task

FAMILY = "tasks"

_HELD = {  # field: (what it must be, how that is seen)
    "name": ("a text that is not empty", lambda x: isinstance(x, str) and x),
    "env": ("a text", lambda x: isinstance(x, str)),
    "params": ("an object", lambda x: isinstance(x, dict)),
    "file": ("a text", lambda x: isinstance(x, str)),
    "objective": ("a text", lambda x: isinstance(x, str)),
    "max_score": ("a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    "walkthrough": ("texts", lambda x: isinstance(x, list) and all(isinstance(said, str) for said in x)),
    "digest": ("64 hexadecimal digits", lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x)),
    "seed": ("an integer from 0", lambda x: type(x) is int and x >= 0),
}


def read(path: str) -> list[Task]:
    """The tasks of a file, in its order.

    Raises:
        ValueError: it cannot be read, a line is no task, or two are the same.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as opened:
            lines = opened.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file of tasks {path} cannot be read: {error}.") from error
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
    found: dict[str, int] = {}
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = _task(line, folder)
            for key in (task.name, task.digest):
                if found.setdefault(key, number) != number:
                    raise ValueError(f"it has the name or digest of line {found[key]}: every task needs its own")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        tasks.append(task)
    return tasks


def _task(line: str, folder: str) -> Task:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {line[:80]!r} ({error})") from error
    fields = {field.name for field in dataclasses.fields(Task)}
    if not isinstance(given, dict) or set(given) - fields or "name" not in given:
        raise ValueError(f"expected an object with `name`, and of the others {sorted(fields)}, got {line[:80]!r}")
    for name, value in given.items():
        expected, is_right = _HELD[name]
        if not is_right(value):
            raise ValueError(f"`{name}` must be {expected}, got {value!r}")
    identity = {key: given.get(key) for key in ("name", "params", "file", "seed")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    values: dict[str, Any] = {
        "env": "", "params": {}, "file": "", "digest": digest, "objective": "", "max_score": 1.0, "walkthrough": []
    } | given
    values.setdefault("seed", int(values["digest"][:12], 16))
    values["file"] = values["file"] and os.path.join(folder, os.path.expanduser(values["file"]))
    return Task.from_json(values)
