"""The official ALFWorld games, as `alfworld-download` leaves them; read, never written to.

    $ALFWORLD_DATA/json_2.1.1/<split>/<type>-<object>-<..>-<receptacle>-<scene>/<trial>/
        game.tw-pddl  initial_state.pddl  traj_data.json

with 3,553 playable games in `train`, 140 in `valid_seen` and 134 in `valid_unseen`, among 8,810
folders. They are read once into a manifest in the cache; afterwards a start looks at the names of
the task folders only. What ALFWorld itself leaves out is left out (movable receptacles, sliced
objects, games without or unsolvable); what is damaged is left out, too, and counted.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from envs_host import alfworld_engine, alfworld_experts, arrival
from envs_host.games import Progress
from envs_host.specs import TASK_TYPES
from envs_host.types import GameFileError, Task

SPLITS = ("train", "valid_seen", "valid_unseen")
FAMILY = "alfworld-data"
_MANIFEST_FORMAT = 1
_VERSION = "json_2.1.1"
_OBJECTIVE = re.compile(r'"rhs"\s*:\s*"Your task is to: ([^"]*)"')
_DOWNLOAD = "run `alfworld-download` (it fills $ALFWORLD_DATA, or ~/.cache/alfworld without it)"


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What `read` found.

    Attributes:
        tasks: the playable games, in the order of their names.
        left_out: why games were left out -> how many.
        damaged: game file -> what is wrong with it; these are counted in `left_out`, too.
        indexed: False if the manifest was found in the cache.
    """

    tasks: list[Task]
    left_out: dict[str, int]
    damaged: dict[str, str]
    indexed: bool


def directory(given: str | None = None) -> str:
    """The folder of the data: `given`, or $ALFWORLD_DATA, or where the download puts it by default."""
    path = given or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld"
    return os.path.abspath(os.path.expanduser(os.path.expandvars(path)))


def read(
    split: str,
    *,
    cache_dir: str,
    data_dir: str | None = None,
    task_types: Sequence[str] = TASK_TYPES,
    progress: bool = True,
) -> DataReport:
    """Finds the official games of a split.

    Args:
        split: "train", "valid_seen" or "valid_unseen".
        cache_dir: where manifests are kept; made if need be, may start with "~".
        data_dir: see `directory`; the folder that holds json_2.1.1.
        task_types: which of `specs.TASK_TYPES` to return.
        progress: show a progress bar while indexing.

    Raises:
        ValueError: the split or a task type is unknown, the data is not there, or the folder holds
            no game.
    """
    if split not in SPLITS:
        raise ValueError(f"the split {split!r} is unknown: it must be one of {list(SPLITS)}.")
    unknown = sorted(set(task_types) - set(TASK_TYPES))
    if unknown or not task_types:
        raise ValueError(
            f"task_types must be some of {list(TASK_TYPES)}, got {list(task_types)}."
        )
    root = directory(data_dir)
    folder = os.path.join(root, _VERSION, split)
    try:
        stamp = _stamp(folder)
    except OSError as error:
        raise ValueError(
            f"there are no ALFWorld games at {folder} ({error.strerror}): {_DOWNLOAD}."
        ) from error
    path = _manifest_path(cache_dir, folder)
    manifest = _load(path, stamp)
    indexed = manifest is None
    if manifest is None:
        manifest = _index(folder, split, progress) | {"stamp": stamp}
        if not manifest["tasks"]:
            raise ValueError(
                f"{folder} holds no playable game ({manifest['left_out'] or 'no traj_data.json'}): "
                f"it is not ALFWorld's data, or the download is not complete; {_DOWNLOAD}."
            )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        arrival.write_json(manifest, path)
    tasks = [Task.from_json(task) for task in manifest["tasks"]]
    left_out = collections.Counter(manifest["left_out"])
    kept = [task for task in tasks if task.params["task_type"] in task_types]
    if len(kept) < len(tasks):
        left_out["other task type"] += len(tasks) - len(kept)
    return DataReport(kept, dict(left_out), manifest["damaged"], indexed)


def _stamp(folder: str) -> str:
    """Changes when task folders come, go or get other trials, and when trials get files: a download brings the
    games last."""
    seen = []
    with os.scandir(folder) as tasks:
        for task in tasks:
            seen.append((task.name, task.stat().st_mtime_ns))
            if task.is_dir():
                with os.scandir(task.path) as trials:
                    seen += ((f"{task.name}/{trial.name}", trial.stat().st_mtime_ns) for trial in trials)
    seen.sort()
    content = [_MANIFEST_FORMAT, folder, seen]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _manifest_path(cache_dir: str, folder: str) -> str:
    key = hashlib.sha256(folder.encode()).hexdigest()[:24]
    return os.path.join(os.path.abspath(os.path.expanduser(cache_dir)), f"{key}.manifest.json")


def _load(path: str, stamp: str) -> dict[str, Any] | None:
    try:
        with open(path) as file:
            manifest = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest if manifest["stamp"] == stamp else None


def _index(folder: str, split: str, progress: bool) -> dict[str, Any]:
    trials = sorted(
        where for where, _, files in os.walk(folder) if "traj_data.json" in files
    )
    tasks, damaged = [], {}
    left_out: collections.Counter[str] = collections.Counter()
    with Progress("Reading ALFWorld's games", len(trials), progress) as advance:
        for trial in trials:
            advance()
            try:
                outcome = _task(trial, os.path.relpath(trial, folder), split)
            except GameFileError as error:
                damaged[os.path.join(trial, "game.tw-pddl")] = str(error)
                outcome = "damaged"
            if isinstance(outcome, Task):
                tasks.append(outcome.to_json())
            else:
                left_out[outcome] += 1
    return {"tasks": tasks, "left_out": dict(left_out), "damaged": damaged}


def _task(trial: str, name: str, split: str) -> Task | str:
    """Reads a game; or says why ALFWorld leaves it out.

    Raises:
        GameFileError: a file is damaged.
    """
    if "movable" in name or "Sliced" in name:
        return "movable receptacle or sliced object"
    try:
        with open(os.path.join(trial, "traj_data.json"), encoding="utf-8") as file:
            traj_data = json.load(file)
        task_type, params = traj_data["task_type"], traj_data["pddl_params"]
        scene = traj_data["scene"]["scene_num"]
        targets = {key: params[f"{key}_target"] for key in ("object", "parent", "toggle")}
    except (ValueError, KeyError, TypeError) as error:
        raise GameFileError(f"{trial}/traj_data.json is damaged ({error!r})") from error
    if task_type not in TASK_TYPES:
        return "unknown task type"
    file = os.path.join(trial, "game.tw-pddl")
    if not os.path.exists(file):
        return "no game file"
    game = alfworld_engine.read(file)
    if not game.solvable:
        return "not solvable, or not known to be"
    walkthrough = game.walkthrough or _solved(game, file)
    objective = _OBJECTIVE.search(game.grammar)
    if not walkthrough or objective is None:
        raise GameFileError(f"the game file {file} has no walkthrough or no task")
    digest = alfworld_engine.content_digest(game)
    return Task(
        env="alfworld",
        name=f"{split}/{name}",
        params={"family": FAMILY, "split": split, "task_type": task_type, "scene": scene} | targets,
        # Games have no seed; this tells them apart as a seed would.
        seed=int(digest[:12], 16),
        file=file,
        digest=digest,
        objective=objective[1],
        max_score=1.0,
        walkthrough=tuple(walkthrough),
    )


def _solved(game: alfworld_engine.GameFile, file: str) -> list[str] | None:
    """A walkthrough for a game that was stored without one."""
    engine = alfworld_engine.Engine(game, file)
    goal = alfworld_experts.goal(engine.goal)
    return None if goal is None else alfworld_experts.plan(engine, engine.opening.facts, goal)
