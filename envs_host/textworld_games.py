"""Generation of TextWorld games into a content-addressed cache.

A game is named by a spec, e.g. `dict(family="custom", world_size=2, nb_objects=3, quest_length=4,
theme="basic", seed=50001)`, and stored under the hash of the full spec and TextWorld's version:

    <key>.z8          the game
    <key>.json        TextWorld's description of it, for state tracking
    <key>.task.json   its `Task`, or why it was set aside; written last, so an entry without it does
                      not exist and an interrupted generation leaves nothing broken

A game whose walkthrough does not win when played in the real engine is set aside: that happens, and
such a game can neither be demonstrated nor trusted to be winnable.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from envs_host import textworld_engine, textworld_text
from envs_host.processes import Child
from envs_host.types import GameFileError, Task

_CACHE_FORMAT = 1
_PARTIAL = ".partial"
_SCRATCH = "jaxagentrl-games-"
_STALE_S = 3600.0
_REQUIRED = object()


class _Parameter(NamedTuple):
    """A parameter of a game family.

    Attributes:
        default: `_REQUIRED` if there is none.
        form: its place in the task's name; a parameter at None or False has none.
        allowed: `int` or `bool`, or a tuple of the values to choose from.
    """

    default: Any
    form: str
    allowed: Any = int


FAMILIES: dict[str, dict[str, _Parameter]] = {
    # As of `tw-make custom`.
    "custom": {
        "world_size": _Parameter(_REQUIRED, "w{}"),
        "nb_objects": _Parameter(_REQUIRED, "o{}"),
        "quest_length": _Parameter(_REQUIRED, "q{}"),
        "theme": _Parameter("house", "{}", ("house", "basic")),
        "quest_breadth": _Parameter(None, "breadth{}"),
        "nb_parallel_quests": _Parameter(None, "parallel{}"),
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
        "recipe": _Parameter(1, "recipe{}"),
        "take": _Parameter(0, "take{}"),
        "go": _Parameter(1, "go{}", (1, 6, 9, 12)),
        "open": _Parameter(False, "open", bool),
        "cook": _Parameter(False, "cook", bool),
        "cut": _Parameter(False, "cut", bool),
        "drop": _Parameter(False, "drop", bool),
        "recipe_seed": _Parameter(0, "r{}"),
        "split": _Parameter(None, "{}", (None, "train", "valid", "test")),
    },
    "coin_collector": {"level": _Parameter(_REQUIRED, "l{}")},
    "treasure_hunter": {"level": _Parameter(_REQUIRED, "l{}")},
}
_CHALLENGES = {
    "tw-simple": "tw-simple",
    "tw-cooking": "tw-cooking",
    "coin_collector": "tw-coin_collector",
    "treasure_hunter": "tw-treasure_hunter",
}


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
            ValueError: a family or parameter is unknown, or a required one is missing.
        """
        given = dict(spec)
        family = given.pop("family", None)
        if family not in FAMILIES:
            raise ValueError(
                f"the game family {family!r} is unknown: 'family' must be one of {sorted(FAMILIES)}."
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
        return cls(family, tuple(params.items()), seed)

    @property
    def name(self) -> str:
        """E.g. "custom-w2-o3-q4-basic-s50001"."""
        forms = FAMILIES[self.family]
        parts = [
            forms[name].form.format(value)
            for name, value in self.params
            if value is not None and value is not False
        ]
        return "-".join([self.family, *parts, f"s{self.seed}"])

    @functools.cached_property
    def key(self) -> str:
        """Where the cache keeps it."""
        version = importlib.metadata.version("textworld")
        content = [_CACHE_FORMAT, version, self.family, sorted(self.params), self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _check(family: str, name: str, value: Any) -> None:
    """Raises ValueError if a parameter's value is not allowed."""
    default, _, allowed = FAMILIES[family][name]
    if isinstance(allowed, tuple):
        good, expected = value in allowed, f"one of {list(allowed)}"
    elif allowed is bool:
        good, expected = isinstance(value, bool), "True or False"
    else:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        expected = "an integer of 0 or more"
    if not good and not (value is None and default is None):
        raise ValueError(f"{family}: {name} must be {expected}, got {value!r}.")


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
        specs: one dict per game, see the top of this file and `FAMILIES`.
        cache_dir: made if need be; may be shared by several runs at once.
        num_workers: processes; by default as many as this process may use cores.
        progress: show a progress bar if games must be made.

    Raises:
        ValueError: a spec is wrong, or two are the same.
        RuntimeError: a worker process died.
    """
    wanted = [Spec.parse(spec) for spec in specs]
    twice = [spec.name for spec, count in collections.Counter(wanted).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} games are asked for more than once, e.g. {twice[0]}.")
    os.makedirs(cache_dir, exist_ok=True)
    _sweep(cache_dir, "*" + _PARTIAL)
    _sweep(tempfile.gettempdir(), _SCRATCH + "*")
    records = {spec: _load(spec, cache_dir) for spec in wanted}
    missing = [spec for spec in wanted if records[spec] is None]
    if missing:
        num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(missing))
        with _Progress(len(missing), progress) as advance:
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
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _paths(spec: Spec, cache_dir: str) -> tuple[str, str, str]:
    """Paths of an entry: game, description, record."""
    stem = os.path.join(os.path.abspath(cache_dir), spec.key)
    return stem + ".z8", stem + ".json", stem + ".task.json"


def _load(spec: Spec, cache_dir: str) -> Task | str | None:
    """Reads an entry: its task, or why it was set aside, or None if it must be made (again)."""
    story_path, sidecar_path, record_path = _paths(spec, cache_dir)
    try:
        with open(record_path) as record_file:
            record = json.load(record_file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if record["set_aside"] is not None:
        return record["set_aside"]
    try:
        with open(sidecar_path, "rb") as sidecar:
            intact = hashlib.sha256(sidecar.read()).hexdigest() == record["sidecar_digest"]
        intact = intact and textworld_engine.digest(story_path) == record["task"]["digest"]
    except (FileNotFoundError, GameFileError):
        intact = False
    # A damaged entry is made again: the same spec gives the same game.
    return Task.from_json(record["task"] | {"file": story_path}) if intact else None


def _generate_in_processes(specs: list[Spec], cache_dir: str, num_workers: int) -> Iterable[Spec]:
    """Makes games and yields each spec when its entry is written."""
    queue = list(reversed(specs))
    at_work: dict[Connection, Spec | None] = {}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH))
        children = {}
        for _ in range(num_workers):
            child = Child("envs_host.textworld_games:work", os.path.abspath(cache_dir), scratch)
            stack.callback(child.close)
            children[child.connection] = child
            at_work[child.connection] = None
        while at_work:
            for connection in wait(list(at_work)):
                spec = at_work[connection]
                try:
                    complaint = connection.recv()
                except (EOFError, OSError) as error:
                    raise RuntimeError(
                        f"a process making {spec.name if spec else 'games'} died "
                        f"({children[connection].last_words()}). The games made so far are kept: "
                        "run the same again to go on."
                    ) from error
                if complaint:
                    raise ValueError(f"TextWorld cannot make {spec.name}: {complaint}")
                if queue:
                    at_work[connection] = queue.pop()
                    connection.send(at_work[connection])
                else:
                    del at_work[connection]
                if spec is not None:
                    yield spec


class _Progress:
    """A progress bar, or nothing; entering it gives a function to call per game made."""

    def __init__(self, total: int, show: bool):
        self._total = total
        self._show = show
        self._bar = None

    def __enter__(self):
        if not self._show:
            return lambda: None
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("Generating TextWorld games"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        self._bar.start()
        row = self._bar.add_task("games", total=self._total)
        return lambda: self._bar.advance(row)

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()


# What follows runs in the worker processes.


def work(connection: Connection, cache_dir: str, scratch: str) -> None:
    """Makes the games whose specs come through the connection, until it ends."""
    # Inform keeps a folder in HOME, and TextWorld looks for a `textworld_data` folder where it runs.
    os.environ["HOME"] = scratch
    os.chdir(scratch)
    _import_textworld()
    connection.send(None)
    while True:
        try:
            spec = connection.recv()
        except EOFError:
            return
        complaint = None
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            try:
                _make(spec, cache_dir, folder)
            except (AssertionError, ValueError) as error:
                # How TextWorld rejects parameters, e.g. more ingredients to take than in a recipe.
                complaint = str(error) or repr(error)
        connection.send(complaint)


def _import_textworld() -> None:
    """Imports the generator, with its knowledge bases parsed once instead of once per game.

    Parsing takes 0.3 s; a knowledge base is not changed by making a game (a test compares games
    made with and without this).
    """
    import textworld.challenges  # noqa: F401
    from textworld.generator.data import KnowledgeBase

    parse = KnowledgeBase.load
    KnowledgeBase.load = functools.cache(parse)
    functools.update_wrapper(KnowledgeBase.load, parse)


def _make(spec: Spec, cache_dir: str, folder: str) -> None:
    """Makes one game in `folder` and moves it into the cache, record last."""
    paths = _paths(spec, cache_dir)
    built = [os.path.join(folder, name) for name in ("game.z8", "game.json", "game.task.json")]
    record: dict[str, Any] = {"set_aside": None, "task": None, "sidecar_digest": None}
    try:
        task = _build(spec, built[0], built[1], folder)
    except _SetAside as reason:
        record["set_aside"] = str(reason)
    else:
        with open(built[1], "rb") as sidecar:
            record["sidecar_digest"] = hashlib.sha256(sidecar.read()).hexdigest()
        record["task"] = task.to_json() | {"file": os.path.basename(paths[0])}
    with open(built[2], "w") as record_file:
        json.dump(record, record_file)
    for source, destination in zip(built, paths):
        if os.path.exists(source) and (record["task"] is not None or source == built[2]):
            # The scratch folder may be on another disk, where a move is not atomic.
            partial = f"{destination}.{os.getpid()}{_PARTIAL}"
            shutil.move(source, partial)
            os.replace(partial, destination)


class _SetAside(Exception):
    """No usable game comes out of a spec; the message says why."""


def _build(spec: Spec, story_path: str, sidecar_path: str, folder: str) -> Task:
    """Generates, compiles and plays through one game.

    Raises:
        _SetAside: there is no such game, or its walkthrough does not win.
    """
    import textworld
    from textworld.generator import QuestGenerationError, generate_inform7_source

    textworld.g_rng.set_seed(spec.seed)
    try:
        game = _game(spec)
    except QuestGenerationError as error:
        raise _SetAside(f"no quest of this kind: {error}") from error
    walkthrough = game.walkthrough
    if not walkthrough:
        raise _SetAside("the game has no walkthrough")
    game.save(sidecar_path)
    _compile(generate_inform7_source(game), story_path, folder)
    _play_through(story_path, walkthrough)
    return Task(
        env="textworld",
        name=spec.name,
        params={"family": spec.family} | dict(spec.params),
        seed=spec.seed,
        file=story_path,
        digest=textworld_engine.digest(story_path),
        objective=game.objective,
        max_score=float(game.max_score),
        walkthrough=tuple(walkthrough),
    )


def _game(spec: Spec):
    """Makes a `textworld.Game` as the command `tw-make` does."""
    import textworld
    from textworld.challenges import CHALLENGES

    params = dict(spec.params)
    options = textworld.GameOptions()
    options.seeds = spec.seed
    if spec.family in _CHALLENGES:
        _, make, _ = CHALLENGES[_CHALLENGES[spec.family]]
        return make(settings=params, options=options)
    options.nb_rooms = params["world_size"]
    options.nb_objects = params["nb_objects"]
    options.nb_parallel_quests = params["nb_parallel_quests"] or 1
    options.chaining.min_length = params["quest_length"]
    options.chaining.max_length = params["quest_length"]
    options.chaining.max_depth = params["quest_length"]
    options.chaining.min_depth = 1
    options.chaining.min_breadth = params["quest_breadth"] or 1
    options.chaining.max_breadth = params["quest_breadth"] or 5
    options.grammar.theme = params["theme"]
    options.grammar.include_adj = params["include_adj"]
    options.grammar.only_last_action = params["only_last_action"]
    options.grammar.blend_instructions = params["blend_instructions"]
    options.grammar.blend_descriptions = params["blend_descriptions"]
    options.grammar.ambiguous_instructions = params["ambiguous_instructions"]
    options.grammar.allowed_variables_numbering = params["entity_numbering"]
    return textworld.generator.make_game(options)


def _compile(source: str, story_path: str, folder: str) -> None:
    """Compiles Inform 7 source as TextWorld does, but without Inform's HTML index.

    The index takes a quarter of the time and nobody reads it; the game is the same byte for byte.

    Raises:
        _SetAside: the source does not compile, e.g. because the game is too big for a .z8 file.
    """
    from textworld.generator.inform7.world2inform7 import I7_DEFAULT_PATH

    inform = os.path.join(os.environ.get("INFORM_HOME", I7_DEFAULT_PATH), "share", "inform7")
    project = os.path.join(folder, "project")
    os.makedirs(os.path.join(project, "Source"))
    os.makedirs(os.path.join(project, "Build"))
    with open(os.path.join(project, "Source", "story.ni"), "w") as story:
        story.write(source)
    open(os.path.join(project, "uuid.txt"), "w").close()
    ni = [os.path.join(inform, "Compilers", "ni"), "-noindex", "-noprogress", "--format=.z8"]
    ni += ["--internal", os.path.join(inform, "Internal"), "--project", project]
    inform6 = [os.path.join(inform, "Compilers", "inform6"), "-E2wSv8F0"]
    inform6 += [os.path.join(project, "Build", "auto.inf"), story_path]
    for command in (ni, inform6):
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if ended.returncode != 0:
            output = ended.stdout.decode(errors="replace").strip()[-500:]
            raise _SetAside(f"does not compile ({os.path.basename(command[0])}): {output}")


def _play_through(story_path: str, walkthrough: list[str]) -> None:
    """Plays the walkthrough in the real engine, through the cleaning every command goes through.

    Raises:
        _SetAside: it does not win.
    """
    engine = textworld_engine.Engine(story_path, textworld_engine.Extras())
    try:
        moment = engine.reset()
        for command in walkthrough:
            cleaned, refusal = textworld_text.clean_command(command)
            if refusal is not None or cleaned != command:
                raise _SetAside(f"the walkthrough command {command!r} cannot be sent as it is")
            moment = engine.step(command)
            if moment.won or moment.lost:
                break
    finally:
        engine.close()
    if not moment.won or command != walkthrough[-1]:
        raise _SetAside("the walkthrough does not win")
