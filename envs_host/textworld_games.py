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

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from envs_host import textworld_engine, textworld_text
from envs_host.processes import Child
from envs_host.types import GameFileError, Task

_CACHE_FORMAT = 1
_REQUIRED = object()

# Family -> {parameter: (default, form in the task's name)}. A parameter at None, False or "" has no
# place in the name.
FAMILIES: dict[str, dict[str, tuple[Any, str]]] = {
    "custom": {
        "world_size": (_REQUIRED, "w{}"),
        "nb_objects": (_REQUIRED, "o{}"),
        "quest_length": (_REQUIRED, "q{}"),
        "theme": ("house", "{}"),
        "quest_breadth": (None, "breadth{}"),
        "nb_parallel_quests": (None, "parallel{}"),
        "include_adj": (False, "adj"),
        "only_last_action": (False, "last"),
        "blend_instructions": (False, "blend"),
        "blend_descriptions": (False, "blenddesc"),
        "ambiguous_instructions": (False, "ambiguous"),
        "entity_numbering": (False, "numbered"),
    },
    "tw-simple": {
        "rewards": (_REQUIRED, "{}"),
        "goal": ("detailed", "{}"),
        "test": (False, "test"),
    },
    "tw-cooking": {
        "recipe": (1, "recipe{}"),
        "take": (0, "take{}"),
        "go": (1, "go{}"),
        "open": (False, "open"),
        "cook": (False, "cook"),
        "cut": (False, "cut"),
        "drop": (False, "drop"),
        "recipe_seed": (0, "r{}"),
        "split": (None, "{}"),
    },
    "coin_collector": {"level": (_REQUIRED, "l{}")},
    "treasure_hunter": {"level": (_REQUIRED, "l{}")},
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
                f"game family {family!r} is unknown: 'family' must be one of {sorted(FAMILIES)}."
            )
        seed = given.pop("seed", None)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"a game needs an integer 'seed' of 0 or more, got {seed!r}.")
        known = FAMILIES[family]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{family} has no parameter {unknown}: it takes {sorted(known)}.")
        params = {name: given.get(name, default) for name, (default, _) in known.items()}
        missing = [name for name, value in params.items() if value is _REQUIRED]
        if missing:
            raise ValueError(f"{family} needs the parameter {missing}: add it to {dict(spec)}.")
        return cls(family, tuple(params.items()), seed)

    @property
    def name(self) -> str:
        """E.g. "custom-w2-o3-q4-basic-s50001"."""
        forms = FAMILIES[self.family]
        parts = [
            forms[name][1].format(value)
            for name, value in self.params
            if value is not None and value is not False and value != ""
        ]
        return "-".join([self.family, *parts, f"s{self.seed}"])

    @functools.cached_property
    def key(self) -> str:
        """Where the cache keeps it."""
        version = importlib.metadata.version("textworld")
        content = [_CACHE_FORMAT, version, self.family, sorted(self.params), self.seed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


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
        num_workers: processes; by default one per core.
        progress: show a progress bar if games must be made.

    Raises:
        ValueError: a spec is wrong, or two are the same.
        RuntimeError: a worker process died.
    """
    wanted = [Spec.parse(spec) for spec in specs]
    duplicates = sorted({spec.name for spec in wanted if wanted.count(spec) > 1})
    if duplicates:
        raise ValueError(f"{len(duplicates)} games are asked for twice, e.g. {duplicates[0]}.")
    os.makedirs(cache_dir, exist_ok=True)
    records = {spec: _load(spec, cache_dir) for spec in wanted}
    missing = [spec for spec in wanted if records[spec] is None]
    if missing:
        num_workers = min(num_workers or os.cpu_count() or 1, len(missing))
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
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="textworld-"))
        children = {}
        for _ in range(num_workers):
            child = Child("envs_host.textworld_games:work", os.path.abspath(cache_dir), scratch)
            stack.callback(child.close)
            children[child.connection] = child
            at_work[child.connection] = None
        while at_work:
            for connection in wait(list(at_work)):
                try:
                    connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    spec = at_work[connection]
                    raise RuntimeError(
                        f"a process making {spec.name if spec else 'games'} died "
                        f"({children[connection].last_words()}). The games made so far are kept: "
                        "run the same again to go on."
                    ) from error
                done, at_work[connection] = at_work[connection], None
                if queue:
                    at_work[connection] = queue.pop()
                    connection.send(at_work[connection])
                else:
                    del at_work[connection]
                if done is not None:
                    yield done


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
    connection.send("ready")
    while True:
        try:
            spec = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            _make(spec, cache_dir, folder)
        connection.send("done")


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
            partial = f"{destination}.{os.getpid()}.partial"
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
