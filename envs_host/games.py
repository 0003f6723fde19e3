"""Generation of games into a content-addressed cache.

A game is named by a spec, e.g. `dict(family="custom", world_size=2, nb_objects=3, quest_length=4,
theme="basic", seed=50001)`, and stored under the hash of the full spec and its library's version:

    <key>.z8          the game; <key>.tw-pddl for ALFWorld, <key>.swe.json for a repository
    <key>.json        a description of it: TextWorld's for state tracking, ALFWorld's `traj_data`, a
                      planted mistake
    <key>.task.json   its `Task`, or why it was set aside; written last, so an entry without it does
                      not exist and an interrupted generation leaves nothing broken

A game whose walkthrough does not win when played in the real engine is set aside: that happens, and
such a game can neither be demonstrated nor trusted to be winnable.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from envs_host import registry
from envs_host.arrival import PARTIAL
from envs_host.processes import Child
from envs_host.specs import Spec, forget_repositories
from envs_host.types import GameFileError, Task

_SCRATCH = "jaxagentrl-games-"
_STALE_S = 3600.0
_LINE_EVERY_S = 10.0


class GenerationError(RuntimeError):
    """Games could not be made, by no fault of theirs; the message says what happened and what to do."""


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """What `generate` did.

    Attributes:
        tasks: the usable games, in the order of the specs.
        set_aside: how many specs gave no usable game.
        reasons: name of each game set aside -> why.
        generated: how many were made now, set aside ones included.
        cached: how many were found in the cache, set aside ones included.
    """

    tasks: list[Task]
    set_aside: int
    reasons: dict[str, str]
    generated: int
    cached: int


def generate(
    specs: Iterable[Mapping[str, Any]],
    *,
    cache_dir: str,
    num_workers: int | None = None,
    progress: bool = True,
) -> GenerationReport:
    """Makes games, or finds them in the cache.

    Args:
        specs: one dict per game, see the top of this file and `specs.FAMILIES`.
        cache_dir: made if need be; may be shared by several runs at once, and may start with "~".
        num_workers: processes; by default as many as this process may use cores.
        progress: show a progress bar if games must be made.

    Raises:
        ValueError: a spec is wrong, or two are the same.
        GenerationError: a worker process died.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, or None for as many as there are cores, got {num_workers}.")
    forget_repositories()
    wanted = [Spec.parse(spec) for spec in specs]
    twice = [spec.name for spec, count in collections.Counter(wanted).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} games are asked for more than once, e.g. {twice[0]}.")
    cache_dir = os.path.abspath(os.path.expanduser(cache_dir))
    os.makedirs(cache_dir, exist_ok=True)
    _sweep(cache_dir, "*" + PARTIAL)
    _sweep(tempfile.gettempdir(), _SCRATCH + "*")
    records = {spec: _load(spec, cache_dir) for spec in wanted}
    missing = [spec for spec in wanted if records[spec] is None]
    if missing:
        num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(missing))
        with Progress("Generating games", len(missing), progress) as advance:
            for spec in _generate_in_processes(missing, cache_dir, num_workers):
                records[spec] = _load(spec, cache_dir)
                advance()
    tasks, reasons = [], {}
    for spec in wanted:
        record = records[spec]
        if isinstance(record, Task):
            tasks.append(record)
        else:
            reasons[spec.name] = record
    return GenerationReport(
        tasks, len(reasons), reasons, len(missing), cached=len(wanted) - len(missing)
    )


def _sweep(directory: str, pattern: str) -> None:
    """Removes what killed runs have left behind; nothing that is younger than an hour."""
    for path in glob.glob(os.path.join(glob.escape(directory), pattern)):
        try:
            if time.time() - os.stat(path).st_mtime < _STALE_S:
                continue
        except FileNotFoundError:
            continue  # Another run was faster.
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            # Gone by now, or somebody else's: folders of temporary files are shared.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.remove(path)


def _load(spec: Spec, cache_dir: str) -> Task | str | None:
    """Reads an entry: its task, or why it was set aside, or None if it must be made (again)."""
    story_path, sidecar_path, record_path = spec.paths(cache_dir)
    # A damaged entry, whatever is left of it, is made again: the same spec gives the same game.
    try:
        with open(record_path) as record_file:
            record = json.load(record_file)
        if record["set_aside"] is not None:
            return record["set_aside"]
        task = Task.from_json(record["task"] | {"file": story_path})
        with open(sidecar_path, "rb") as sidecar:
            intact = hashlib.sha256(sidecar.read()).hexdigest() == record["sidecar_digest"]
        digest = registry.find(registry.ENVIRONMENTS[spec.env].digest)
        return task if intact and digest(story_path) == task.digest else None
    except (FileNotFoundError, GameFileError, ValueError, KeyError, TypeError):
        return None


def _generate_in_processes(specs: list[Spec], cache_dir: str, num_workers: int) -> Iterable[Spec]:
    """Makes games and yields each spec when its entry is written."""
    queue = list(reversed(specs))
    at_work: dict[Connection, Spec | None] = {}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH))
        children = {}
        for _ in range(num_workers):
            child = Child("envs_host.maker:work", cache_dir, scratch)
            stack.callback(child.close)
            children[child.connection] = child
            at_work[child.connection] = None
        while at_work:
            for connection in wait(list(at_work)):
                spec = at_work[connection]
                try:
                    complaint = connection.recv()
                except (EOFError, OSError) as error:
                    raise GenerationError(
                        f"a process making {spec.name if spec else 'games'} died "
                        f"({children[connection].last_words()}). The games made so far are kept: "
                        "run the same again to go on."
                    ) from error
                if complaint:
                    raise ValueError(f"{spec.env} cannot make {spec.name}: {complaint}")
                if queue:
                    at_work[connection] = queue.pop()
                    connection.send(at_work[connection])
                else:
                    del at_work[connection]
                if spec is not None:
                    yield spec


class Progress:
    """A progress bar, a line now and then where there is no terminal, or nothing; entering it gives a function to
    call per game."""

    def __init__(self, what: str, total: int, show: bool):
        self._what = what
        self._total = total
        self._show = show
        self._bar = None

    def __enter__(self):
        if not self._show:
            return lambda: None
        from rich import console as rich_console
        from rich import progress as rich_progress

        console = rich_console.Console(stderr=True)
        if not console.is_terminal:
            return self._lines()
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn(self._what),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=console,
        )
        self._bar.start()
        row = self._bar.add_task("games", total=self._total)
        return lambda: self._bar.advance(row)

    def _lines(self):
        """Prints how far it is, now and then and at the end."""
        count, began = 0, time.monotonic()
        told = began

        def advance() -> None:
            nonlocal count, told
            count, now = count + 1, time.monotonic()
            if count == self._total or now - told >= _LINE_EVERY_S:
                told = now
                print(f"{self._what}: {count}/{self._total}, {now - began:.0f} s", file=sys.stderr, flush=True)

        return advance

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()
