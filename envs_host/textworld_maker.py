"""The making of a TextWorld game: generate, compile, play through. See maker.py."""

import errno
import functools
import os
import subprocess
import tempfile

from envs_host import textworld_engine, textworld_text
from envs_host.specs import SetAside, Spec
from envs_host.types import Task

_ENDED_EARLY = "Game has ended before"  # TextWorld's words when a walkthrough goes wrong.
_CHALLENGES = {
    "tw-simple": "tw-simple",
    "tw-cooking": "tw-cooking",
    "coin_collector": "tw-coin_collector",
    "treasure_hunter": "tw-treasure_hunter",
}


def prepare() -> None:
    """Imports the generator and takes two wastes out of it; the games stay the same (tested).

    Knowledge bases are parsed once per process instead of once per game (0.3 s), and the games
    that the challenges compile only to derive their quests are compiled without an index, too.
    """
    import textworld.challenges
    import textworld.generator
    from textworld.generator.data import KnowledgeBase

    KnowledgeBase.load = functools.cache(KnowledgeBase.load)
    textworld.generator.compile_inform7_game = _compile


def build(spec: Spec, story_path: str, sidecar_path: str) -> Task:
    """Generates, compiles and plays through one game.

    Raises:
        SetAside: there is no such game, or its walkthrough does not win.
    """
    import textworld
    from textworld.generator import QuestGenerationError, generate_inform7_source

    textworld.g_rng.set_seed(spec.seed)
    try:
        game = _game(spec)
    except QuestGenerationError as error:
        raise SetAside(f"no quest of this kind: {error}") from error
    except ValueError as error:
        if _ENDED_EARLY not in str(error):
            raise
        raise SetAside(f"the walkthrough does not win: {error}") from error
    walkthrough = game.walkthrough
    if not walkthrough:
        raise SetAside("the game has no walkthrough")
    game.save(sidecar_path)
    _compile(generate_inform7_source(game), story_path)
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


def _compile(source: str, story_path: str, verbose: bool = False) -> None:
    """Compiles Inform 7 source as TextWorld does, but without Inform's HTML index.

    The index takes a quarter of the time and nobody reads it; the game is the same byte for byte.

    Args:
        source: Inform 7 source.
        story_path: the .z8 file to write.
        verbose: not used; TextWorld's function, which this replaces, has it.

    Raises:
        SetAside: the source does not compile, e.g. because the game is too big for a .z8 file.
    """
    from textworld.generator.inform7.world2inform7 import I7_DEFAULT_PATH

    inform = os.path.join(os.environ.get("INFORM_HOME", I7_DEFAULT_PATH), "share", "inform7")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(story_path)) as project:
        os.mkdir(os.path.join(project, "Source"))
        os.mkdir(os.path.join(project, "Build"))
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
                if ended.returncode < 0 or os.strerror(errno.ENOSPC) in output:  # no fault of the game's
                    raise OSError(
                        f"{command[0]} ended with {ended.returncode}, for want of memory or of room in "
                        f"{tempfile.gettempdir()} perhaps: {output or 'it said nothing'}"
                    )
                raise SetAside(f"does not compile ({os.path.basename(command[0])}): {output}")


def _play_through(story_path: str, walkthrough: list[str]) -> None:
    """Plays the walkthrough in the real engine, through the cleaning every command goes through.

    Raises:
        SetAside: it does not win.
    """
    engine = textworld_engine.Engine(story_path, textworld_engine.Extras())
    try:
        outcome = engine.opening
        for command in walkthrough:
            cleaned, refusal = textworld_text.clean_command(command)
            if refusal is not None or cleaned != command:
                raise SetAside(f"the walkthrough command {command!r} cannot be sent as it is")
            outcome = engine.step(outcome.state, outcome.moment, command)
            if outcome.moment.won or outcome.moment.lost:
                break
    finally:
        engine.close()
    if not outcome.moment.won or command is not walkthrough[-1]:
        raise SetAside("the walkthrough does not win")
