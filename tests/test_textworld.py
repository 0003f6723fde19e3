"""TextWorld for real: games are generated, compiled and played."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import hypothesis
import pytest
from fake_engine import FakeEngine
from hypothesis import strategies as st

from envs_host import games, textworld, textworld_maker, textworld_text
from envs_host.textworld_engine import Engine, Extras, Moment, Outcome, digest
from envs_host.games import GenerationError
from envs_host.memory import Engines, Memory
from envs_host.specs import FAMILIES, SetAside, Spec
from envs_host.pool import EnvPool
from envs_host.types import GameFileError, Task
from jaxagentrl import chat, demos, rollout, tokenizer

# Jericho's word for games other than the famous ones it has hints for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not fully supported")

ROOT = pathlib.Path(__file__).resolve().parent.parent

BASIC = {"family": "custom", "world_size": 2, "nb_objects": 3, "quest_length": 4, "theme": "basic"}
SPECS = {
    "basic": BASIC | {"seed": 50001},
    "eat": BASIC | {"seed": 50003},
    "house": BASIC | {"seed": 50004, "theme": "house"},
    "simple": {"family": "tw-simple", "rewards": "dense", "goal": "brief", "seed": 1},
    "coin": {"family": "coin_collector", "level": 3, "seed": 1},
}
SLOW_SPECS = {
    "cooking": {"family": "tw-cooking", "recipe": 1, "take": 1, "cook": True, "seed": 1},
    "treasure": {"family": "treasure_hunter", "level": 3, "seed": 1},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SPECS]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "textworld-games"  # Shared with test_pool.py.


@pytest.fixture(scope="module")
def tasks(cache_dir):
    report = textworld.generate(SPECS.values(), cache_dir=cache_dir, progress=False)
    assert report.set_aside == 0 and report.generated + report.cached == len(SPECS)
    return dict(zip(SPECS, report.tasks))


@pytest.fixture(scope="module")
def slow_tasks(cache_dir):
    report = textworld.generate(SLOW_SPECS.values(), cache_dir=cache_dir, progress=False)
    return dict(zip(SLOW_SPECS, report.tasks))


@pytest.fixture
def task(request, name):
    """The task of a test's parameter `name`."""
    return request.getfixturevalue("slow_tasks" if name in SLOW_SPECS else "tasks")[name]


# Commands.


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("take K-key from stand9", "take K-key from stand9"),
        ("  open   box\t\n", "open box"),
        ("open box\nclose box", "open box"),
        ("take coin then go north", "take coin"),
        ("take coin. go north", "take coin"),
        ("take coin, go north", "take coin"),
        (" , take coin,go north", "take coin"),
        ("bob, quit", "bob"),
        ("take coin and key", "take coin and key"),
        ("...take coin", "take coin"),
        ("strengthen door", "strengthen door"),  # Has "then" inside a word.
        ("open \x00\x1b[2Jbox\x7f", "open [2Jbox"),
        (r"open \box\\", "open box"),
        ("ouvre la boîte", "ouvre la boite"),
        ("take 钥匙 key", "take key"),
        ("take coin… go north", "take coin"),  # The ellipsis is three full stops in one letter.
        ("take coin；go north", "take coin"),
        ("take coin thenЖ go north", "take coin"),
        ("take " + "x" * 60 + " " + "y" * 60, "take " + "x" * 60),
    ],
)
def test_clean_command(text, sent):
    assert textworld_text.clean_command(text) == (sent, None)


@pytest.mark.parametrize(
    "text",
    ["quit", "QUIT", "q", " quit now", "\x07restart", "restore", "save", "script on", "transcripts",
     "undo", "oops quit", "o quit", "verbose", "notify off", "tw-trace-actions", "Tw-print version",
     "print_state", "enable print state option", "restrict commands", '"quit', '" "quit', ", q",
     "", "   ", "\x00\x01", "...", "z" * 300],
)
def test_refused_commands(text):
    _, refusal = textworld_text.clean_command(text)
    assert refusal in (textworld_text.REFUSAL, textworld_text.EMPTY)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text() | st.text(alphabet="thn eqiu.,;…；\\Ж\x00\n\u0301", max_size=30))
def test_what_is_sent_is_harmless_and_cleaning_twice_changes_nothing(text):
    command, refusal = textworld_text.clean_command(text)
    assert len(command) <= textworld_text.MAX_COMMAND_LENGTH
    assert command.isascii() and (command.isprintable() or not command) and "\\" not in command
    assert "  " not in command and command == command.strip()
    if refusal is None:
        assert textworld_text.clean_command(command) == (command, None)
        assert not {".", ";", "!", "?", ","} & set(command) and "then" not in command.lower().split()


# Observations.


PRINTED = (
    "\n\n-= Vault =-\nYou find yourself in a vault.\n\nYou can see a counter. On the counter you "
    "can make out a cookie.\n\n\n\nThere is a note on the floor.\n\n\nYour score has just gone up "
    "by one point.\n\n>          -= Vault =-0/12"
)


def test_observation():
    text = textworld_text.clean_feedback(PRINTED, opening=False)
    assert text == (
        "You find yourself in a vault. You can see a counter. On the counter you can make out a "
        "cookie. There is a note on the floor."
    )
    room = textworld_text.room_name(PRINTED, {"vault": "vault"}, "")
    assert textworld_text.observation(room, "You eat it.", "You are carrying:  a pie.") == (
        "You are now in the vault. You eat it. You are carrying: a pie."
    )
    # Told once: the answer to "inventory" is the inventory.
    carried = "You are carrying nothing."
    assert textworld_text.observation("vault", carried, carried) == (
        "You are now in the vault. You are carrying nothing."
    )


def test_lists_keep_their_lines():
    printed = "\nIngredients:\n  apple\n  egg\n\nDirections:\n  fry the egg\n\n>  -= Kitchen =-0/2"
    assert textworld_text.clean_feedback(printed, opening=False) == (
        "Ingredients:\napple\negg\nDirections:\nfry the egg"
    )


# Games.


@pytest.mark.parametrize("name", [*SPECS, *SLOW])
def test_the_walkthrough_wins_every_family(task):
    env = textworld.TextWorldEnv(intermediate_reward=True, admissible_commands=True)
    observation, info = env.reset(task)
    assert info.objective == task.objective and info.max_score == task.max_score > 0
    rewards = 0.0
    for command in task.walkthrough:
        # TextWorld lists only commands that change the world, so not "examine" and "inventory".
        if command.split()[0] not in ("examine", "inventory"):
            assert command in info.admissible_commands
        for junk in ("-=", "$$", "***", "\n>", "Your score", "RESTART"):
            assert junk not in observation
        assert observation.startswith("You are now in the ") and "carrying" in observation
        assert len(observation) < 1200
        assert not task.objective or task.objective not in observation
        observation, reward, terminated, truncated, info = env.step(command)
        rewards += reward
        assert info.valid_command and info.command == command and not truncated
        assert terminated == (command == task.walkthrough[-1] and info.won)
    assert info.won and not info.lost and info.score == rewards == task.max_score
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")


def test_names_and_records(tasks, cache_dir):
    assert [task.name for task in tasks.values()] == [
        "custom-w2-o3-q4-basic-s50001",
        "custom-w2-o3-q4-basic-s50003",
        "custom-w2-o3-q4-house-s50004",
        "tw-simple-dense-brief-s1",
        "coin_collector-l3-s1",
    ]
    assert Spec.parse(SLOW_SPECS["cooking"]).name == "tw-cooking-recipe1-take1-go1-cook-r0-s1"
    for task in tasks.values():
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
        assert digest(task.file) == task.digest and os.path.isabs(task.file)
    with pytest.raises(ValueError, match="objective"):
        Task.from_json({key: 0 for key in tasks["basic"].to_json() if key != "objective"})


def test_the_parsers_refusals_are_invalid_commands(tasks):
    env = textworld.TextWorldEnv()
    env.reset(tasks["basic"])
    for text in ("xyzzy", "take zzz", "open", "go nowhere", "take K-key then quit; quit"):
        info = env.step(text).info
        assert info.valid_command == (text == "take K-key then quit; quit"), text
    for text in ("look", "inventory", "examine K-key", "go south", "open K-box"):  # It is open.
        assert env.step(text).info.valid_command, text


def test_one_command_a_turn(tasks):
    """However they are joined; TextWorld would carry out all."""
    task = tasks["basic"]
    alone = textworld.TextWorldEnv(intermediate_reward=True, admissible_commands=True)
    alone.reset(task)
    first = alone.step(task.walkthrough[0])
    for joint in (", ", ",", " , ", ". ", " then ", "\n", ", then "):
        env = textworld.TextWorldEnv(intermediate_reward=True, admissible_commands=True)
        env.reset(task)
        assert env.step(joint.join(task.walkthrough)) == first


def test_refused_commands_do_not_touch_the_game(tasks):
    task = tasks["basic"]
    env = textworld.TextWorldEnv(remember=False)
    observation, _ = env.reset(task)
    room, carried = "You are now in the room05. ", " You are carrying nothing."
    assert observation.startswith(room) and observation.endswith(carried)
    for text in ("quit", "restart", "", "tw-extra-infos moves", "oops q"):
        result = env.step(text)
        assert not result.info.valid_command and result.reward == 0.0 and not result.terminated
        assert result.observation in (
            room + textworld_text.REFUSAL + carried, room + textworld_text.EMPTY + carried
        )
    for command in task.walkthrough:
        result = env.step(command)
        env_over = result.terminated
        if not env_over:
            assert not env.step("QUIT").info.valid_command
    assert env_over and result.info.won


def test_intermediate_reward(tasks):
    env = textworld.TextWorldEnv(intermediate_reward=True)
    for task in tasks.values():
        env.reset(task)
        gained = [env.step(command).info.intermediate_reward for command in task.walkthrough]
        assert gained[-1] == 1.0 and set(gained) <= {0.0, 1.0}
    env.reset(tasks["basic"])  # take K-key, go south, close K-box, lock K-box with K-key
    assert env.step("take K-key").info.intermediate_reward == 1.0
    assert env.step("drop K-key").info.intermediate_reward == -1.0
    assert env.step("look").info.intermediate_reward == 0.0
    assert env.step("xyzzy").info.intermediate_reward == 0.0
    assert env.step("quit").info.intermediate_reward == 0.0


def test_a_game_made_unwinnable_counts_as_a_step_back(tasks):
    # TextWorld's own intermediate_reward raises here: it takes the length of None.
    env = textworld.TextWorldEnv(intermediate_reward=True)
    task = tasks["simple"]
    env.reset(task)
    for command in task.walkthrough[:-1]:
        env.step(command)
    food = task.walkthrough[-1].removeprefix("put ").removesuffix(" on stove")
    result = env.step(f"eat {food}")
    assert result.terminated and result.info.lost and not result.info.won
    assert result.info.intermediate_reward == -1.0


# Answers from memory.


def random_commands(task, rng):
    verbs = ["take", "drop", "open", "close", "lock", "eat", "go", "look", "inventory", "examine"]
    nouns = [word for command in task.walkthrough for word in command.split()[1:]]
    nouns += ["north", "south", "east", "west"]
    while True:
        draw = rng.random()
        if draw < 0.5:
            yield rng.choice(task.walkthrough)
        elif draw < 0.8:
            yield f"{rng.choice(verbs)} {rng.choice(nouns)}"
        elif draw < 0.9:
            yield rng.choice(["again", "quit", "", "take coin then look", "who are you?", "get"])
        else:
            yield "".join(chr(rng.randrange(300)) for _ in range(rng.randrange(20)))


@pytest.mark.parametrize("extras", [{}, {"intermediate_reward": True, "admissible_commands": True}])
def test_remembered_answers_equal_computed_ones(tasks, extras):
    remembering = textworld.TextWorldEnv(**extras)
    computing = textworld.TextWorldEnv(remember=False, **extras)
    hits = remembering.counters["hits"]
    for name in ("basic", "house", "simple"):
        for episode in range(8):
            # Episodes share openings, and are played in pairs of equals.
            commands = random_commands(tasks[name], random.Random(episode // 2))
            assert remembering.reset(tasks[name]) == computing.reset(tasks[name])
            for _, command in zip(range(15), commands):
                expected = computing.step(command)
                assert remembering.step(command) == expected
                if expected.terminated:
                    break
    assert remembering.counters["hits"] - hits > 100
    assert computing.counters["hits"] == 0


@pytest.mark.parametrize("name", ["basic", "house", "simple", SLOW[0]])
def test_answers_are_those_of_textworld(task):
    """Side by side with TextWorld's own environment, which tracks everything."""
    import textworld as library

    theirs = library.start(
        task.file,
        library.EnvInfos(
            feedback=True, inventory=True, facts=True, admissible_commands=True,
            policy_commands=True, moves=True,
        ),
    )
    ours = textworld.TextWorldEnv(
        remember=False, intermediate_reward=True, admissible_commands=True
    )
    plain = textworld.TextWorldEnv(remember=False)
    for seed in range(3):
        state = theirs.reset()
        policy = state["_winning_policy"]
        observation, info = ours.reset(task)
        assert plain.reset(task).observation == observation
        assert info.admissible_commands == tuple(state.admissible_commands)
        score = 0
        for _, text in zip(range(12), random_commands(task, random.Random(seed))):
            command, refusal = textworld_text.clean_command(text)
            result = ours.step(text)
            untracked = plain.step(text)
            assert untracked.observation == result.observation
            assert untracked.info == dataclasses.replace(
                result.info, intermediate_reward=0.0, admissible_commands=()
            )
            if refusal is not None:
                continue
            state, their_score, done = theirs.step(command)
            (room,) = [f.arguments[1].name for f in state.facts if str(f).startswith("at(P")]
            told = textworld_text.clean_feedback(state.feedback, opening=False)
            assert result.observation == textworld_text.observation(room, told, state.inventory)
            assert result.info.admissible_commands == tuple(state.admissible_commands)
            assert (result.info.score, result.reward) == (their_score, their_score - score)
            assert (result.info.won, result.info.lost) == (state.won, state.lost)
            assert result.terminated == done == (state.won or state.lost)
            after = state["_winning_policy"]
            if not done and policy is not None and after is not None:
                shorter = len(policy) - len(after)
                assert result.info.intermediate_reward == (shorter > 0) - (shorter < 0)
            policy, score = after, their_score
            if done:
                break
    theirs.close()


def test_episodes_that_share_an_interpreter_do_not_mix(tasks):
    for extras in ({}, {"intermediate_reward": True, "admissible_commands": True}):
        alone = textworld.TextWorldEnv(remember=False, **extras)
        envs = [textworld.TextWorldEnv(remember=False, **extras) for _ in range(4)]
        scripts = [
            [c for _, c in zip(range(10), random_commands(tasks["house"], random.Random(seed)))]
            for seed in range(len(envs))
        ]
        interleaved = [[env.reset(tasks["house"])] for env in envs]
        for turn in range(10):
            for env, script, record in zip(envs, scripts, interleaved):
                if not getattr(record[-1], "terminated", False):
                    record.append(env.step(script[turn]))
        for script, record in zip(scripts, interleaved):
            expected = [alone.reset(tasks["house"])]
            for _, command in zip(record[1:], script):
                expected.append(alone.step(command))
            assert record == expected


def test_started_games_are_kept_while_used_and_a_few_after(tasks):
    engines = Engines(max_idle=1)
    names = ["basic", "eat", "house"]

    def acquire(name):
        engines.acquire((name,), lambda: Engine(tasks[name].file, Extras()))

    for name in names + ["basic"]:
        acquire(name)
    assert engines.started == 3
    for name in names:
        engines.release((name,))
    acquire("basic")  # Was in use all the time.
    acquire("house")  # Was idle last.
    assert engines.started == 3
    acquire("eat")
    assert engines.started == 4


def test_a_group_on_one_game_starts_it_once(tasks):
    envs = [textworld.TextWorldEnv(intermediate_reward=True) for _ in range(8)]
    started = envs[0].counters["engines_started"]
    for env in envs:
        env.reset(tasks["coin"])
        for command in tasks["coin"].walkthrough:
            env.step(command)
    assert envs[0].counters["engines_started"] - started <= 1


def test_memory_is_bounded():
    memory = Memory(max_entries=10)
    moment = Moment("", "", "", 0.0, 0, False, False, True)
    outcome = Outcome(moment, None, ())
    for game in range(100):
        node = memory.add((game,), None, "", outcome)
        for command in range(4):
            node = memory.add((game,), node, str(command), outcome)
        assert memory.entries <= 10
    assert memory.root((99,)) is not None and memory.root((0,)) is None
    lone = memory.add(("big",), None, "", outcome)
    for command in range(50):  # A single game over the limit is forgotten; its episode goes on.
        lone = memory.add(("big",), lone, str(command), outcome)
    assert memory.entries == 0 and memory.root(("big",)) is None and lone.outcome is outcome


def test_memory_of_the_process_does_not_grow_with_resets(tasks):
    import psutil

    env = textworld.TextWorldEnv(remember=False)
    process = psutil.Process()

    def play(times):
        for _ in range(times):
            env.reset(tasks["basic"])
            env.step("take K-key")

    play(20)
    before = process.memory_info().rss
    play(100)
    assert process.memory_info().rss - before < 8 * 2**20


# The cache.


def test_games_are_found_again_and_damaged_ones_made_again(tasks, cache_dir, tmp_path):
    specs = [SPECS["basic"], SPECS["eat"]]
    again = textworld.generate(specs, cache_dir=cache_dir, progress=False)
    assert again.tasks == [tasks["basic"], tasks["eat"]]
    assert (again.generated, again.cached) == (0, 2)
    copies = tmp_path / "copy"
    copies.mkdir()
    for suffix in (".z8", ".json", ".task.json"):
        source = pathlib.Path(tasks["basic"].file).with_suffix(suffix)
        (copies / source.name).write_bytes(source.read_bytes())
    game = copies / pathlib.Path(tasks["basic"].file).name
    moved = textworld.generate(specs[:1], cache_dir=copies, progress=False)
    assert moved.cached == 1 and moved.tasks[0].file == str(game)  # A cache may be moved.
    game.write_bytes(game.read_bytes()[:-1000])
    made = textworld.generate(specs[:1], cache_dir=copies, progress=False)
    assert made.generated == 1
    assert made.tasks[0] == dataclasses.replace(tasks["basic"], file=str(game))  # Same digest.
    record = game.with_suffix(".task.json")
    whole = record.read_bytes()
    for damaged in (b"", whole[:-9], b"\xff\xfe" + whole, b"{}", b"[]", b"null", b'{"set_aside": null}'):
        record.write_bytes(damaged)
        assert games._load(Spec.parse(specs[0]), str(copies)) is None, damaged
    record.write_bytes(whole)
    assert games._load(Spec.parse(specs[0]), str(copies)) == made.tasks[0]


def test_the_cache_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert textworld.generate([], cache_dir="~/a/games").tasks == []
    assert (tmp_path / "a" / "games").is_dir()


def test_games_are_those_of_tw_make(tasks, tmp_path):
    program = pathlib.Path(sys.executable).parent / "tw-make"
    command = "custom --world-size 2 --nb-objects 3 --quest-length 4 --theme basic --seed 50001"
    made = tmp_path / "made.z8"
    subprocess.run(
        [sys.executable, program, *command.split(), "--output", made, "--silent"],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "0", "HOME": str(tmp_path)},
    )
    assert digest(str(made)) == tasks["basic"].digest
    mine = pathlib.Path(tasks["basic"].file).with_suffix(".json").read_text()
    assert json.loads(mine) == json.loads(made.with_suffix(".json").read_text())


def test_games_that_cannot_be_are_set_aside_and_remembered(cache_dir):
    impossible = BASIC | {"quest_breadth": 8, "seed": 1}
    report = textworld.generate([impossible], cache_dir=cache_dir, progress=False)
    assert (report.tasks, report.set_aside, report.generated) == ([], 1, 1)
    (reason,) = report.reasons.values()
    assert "quest" in reason
    again = textworld.generate([impossible], cache_dir=cache_dir, progress=False)
    assert (again.set_aside, again.generated, again.cached) == (1, 0, 1)
    assert again.reasons == report.reasons


def test_a_walkthrough_that_does_not_win_sets_the_game_aside(tasks):
    task = tasks["basic"]
    textworld_maker._play_through(task.file, list(task.walkthrough))
    for wrong in (task.walkthrough[:-1], (*task.walkthrough, "look"), ("look",)):
        with pytest.raises(SetAside, match="does not win"):
            textworld_maker._play_through(task.file, list(wrong))
    with pytest.raises(SetAside, match="cannot be sent"):
        textworld_maker._play_through(task.file, ["take K-key. go south"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "chess"}, "chess"),
        ({"wrold_size": 2}, "wrold_size"),
        ({"seed": None}, "seed"),
        ({"seed": True}, "seed"),
        ({"theme": "castle"}, "castle.*|theme.*house"),
        ({"world_size": 0}, "world_size must be an integer of 1 or more, got 0"),
        ({"nb_objects": -1}, "nb_objects must be an integer of 0 or more, got -1"),
        ({"quest_length": 0}, "quest_length must be an integer of 1 or more"),
        ({"quest_breadth": 0}, "quest_breadth must be an integer of 1 or more"),
        ({"include_adj": "yes"}, "include_adj"),
    ],
)
def test_wrong_specs(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        textworld.generate([BASIC | {"seed": 1} | change], cache_dir=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"family": "tw-cooking", "recipe": 9}, "recipe must be an integer from 1 to 5, got 9"),
        ({"family": "tw-cooking", "recipe": 1, "take": 2}, "take is 2, but of recipe = 1 ingredients"),
        ({"family": "coin_collector", "level": 301}, "level must be an integer from 1 to 300, got 301"),
        ({"family": "coin_collector", "level": 151}, "level 151 has 102 rooms, .* from 1 to 150, or from 201 to 233"),
        ({"family": "coin_collector", "level": 200}, "level 200 has 200 rooms"),
        ({"family": "coin_collector", "level": 234}, "level 234 has 102 rooms"),
        (BASIC | {"ambiguous_instructions": True}, "ambiguous_instructions is True, but TextWorld makes no such games"),
        ({"family": "treasure_hunter", "level": 0}, "level must be an integer from 1 to 30, got 0"),
    ],
)
def test_sizes_beyond_a_familys_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        Spec.parse(spec | {"seed": 1})


@pytest.mark.parametrize("level", [1, 100, 101, 150, 201, 233])
def test_levels_that_there_are(level):
    """As the challenge itself says, which is asked for no whole game."""
    from textworld import GameOptions
    from textworld.challenges import CHALLENGES

    assert Spec.parse({"family": "coin_collector", "level": level, "seed": 1}).name == f"coin_collector-l{level}-s1"
    _, make, _ = CHALLENGES["tw-coin_collector"]
    if level in (150, 233):  # the largest; a level more is too much for it
        with pytest.raises(ValueError, match="more than 100 rooms"):
            make({"level": level + 1}, GameOptions())


def test_more_wrong_specs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="world_size"):
        Spec.parse({"family": "custom", "nb_objects": 3, "quest_length": 4, "seed": 0})
    with pytest.raises(ValueError, match="more than once.*s7"):
        textworld.generate([BASIC | {"seed": 7}] * 2, cache_dir=tmp_path, progress=False)
    # What the maker alone knows to be wrong.
    monkeypatch.setitem(FAMILIES["treasure_hunter"], "level", FAMILIES["tw-cooking"]["take"])
    greedy = {"family": "treasure_hunter", "level": 99, "seed": 1}
    with pytest.raises(ValueError, match="treasure_hunter-take99-s1.*1-30"):
        textworld.generate([greedy], cache_dir=tmp_path, progress=False)


def test_damaged_games_are_named(tasks, tmp_path):
    task = tasks["basic"]
    game, sidecar = tmp_path / "x.z8", tmp_path / "x.json"
    moved = dataclasses.replace(task, file=str(game))
    env = textworld.TextWorldEnv(remember=False)
    with pytest.raises(GameFileError, match="cannot be read.*generate"):
        env.reset(moved)
    game.write_bytes(pathlib.Path(task.file).read_bytes()[:5000])
    with pytest.raises(GameFileError, match="is not the one of task custom-.*generate"):
        env.reset(moved)
    game.write_bytes(pathlib.Path(task.file).read_bytes())
    with pytest.raises(GameFileError, match="x.json is missing"):
        Engine(str(game), Extras())
    sidecar.write_text('{"half": ')
    with pytest.raises(GameFileError, match="x.json is damaged"):
        Engine(str(game), Extras())
    sidecar.write_bytes(pathlib.Path(task.file).with_suffix(".json").read_bytes())
    assert env.reset(moved).observation.startswith("You are now in the room05.")


GENERATE = """
import sys
from envs_host import textworld
specs = [dict(family="custom", world_size=2, nb_objects=3, quest_length=4, theme="basic", seed=s)
         for s in range(int(sys.argv[2]))]
textworld.generate(specs, cache_dir=sys.argv[1], num_workers=2)
"""


def test_interrupted_generation_goes_on_where_it_was(tmp_path):
    cache, scratch = tmp_path / "cache", tmp_path / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", GENERATE, cache, "500"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(cache.glob("*.task.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # The workers notice.
    finished = len(list(cache.glob("*.task.json")))
    time.sleep(1.0)
    assert 2 <= finished == len(list(cache.glob("*.task.json"))) < 20
    specs = [BASIC | {"seed": seed} for seed in range(finished + 1)]
    report = textworld.generate(specs, cache_dir=cache, progress=False)
    assert report.cached >= 2 and len(report.tasks) + report.set_aside == finished + 1


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    scratch = tmp_path / "tmp"
    (scratch / "jaxagentrl-games-old").mkdir(parents=True)
    os.utime(scratch / "jaxagentrl-games-old", (1, 1))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    (tmp_path / "cache").mkdir()
    stale, fresh = tmp_path / "cache" / "a.z8.1.partial", tmp_path / "cache" / "b.z8.2.partial"
    stale.touch()
    fresh.touch()
    os.utime(stale, (1, 1))
    report = textworld.generate([BASIC | {"seed": 3}], cache_dir=tmp_path / "cache", progress=False)
    assert report.generated == 1
    assert list(scratch.iterdir()) == []
    assert not stale.exists() and fresh.exists()  # Another run may be at work on it.


def test_a_branch_goes_on_from_the_same_state(tasks, tmp_path):
    """Of a real game: what is said, the score and the possible commands are those of the episode branched."""
    task = tasks["basic"]

    class Walks(FakeEngine):
        def ids(self, request):
            return chat_format.encode_action(task.walkthrough[request.stream[-1]])

    options = {"prompt_style": "brief", "show_admissible": True}
    rules = rollout.Rules(max_turns=9, temperature=1.0, **options)
    with EnvPool(
        "textworld",
        {"admissible_commands": True},
        num_workers=1,
        step_limit_s=60.0,
        reset_limit_s=60.0,
        worker_memory_mb=2000.0,
    ) as pool:
        replays = demos.replay([task], pool)
        texts = list(demos.texts(replays, **options))
        chat_format = chat.make(tokenizer.train(texts, vocab_size=500, directory=tmp_path))
        (walked,) = demos.encode(replays, chat_format, rules)
        engine = Walks(max_length=10_000, stop_ids=[chat_format.end_of_turn_id])
        played = rollout.collect(
            rollout.branch(walked, 2, group=0, num_members=2, stream=(1,)),
            rules=rules,
            pool=pool,
            engine=engine,
            params=None,
            chat_format=chat_format,
        )
    assert not played.failures and len(played.trajectories) == 2 < walked.num_turns
    assert len(engine.requests) == 2 * (walked.num_turns - 2)  # the prefix was not sampled
    for branched in played.trajectories:
        assert branched.won
        for mine, theirs in zip(branched.turns, walked.turns, strict=True):
            assert (mine.observation, mine.score) == (theirs.observation, theirs.score)
            assert mine.prompt_ids.tolist() == theirs.prompt_ids.tolist()  # with the possible commands


@pytest.mark.parametrize("does", ["kill -9 $$", "echo 'No space left on device'; exit 1"])
def test_a_compiler_that_has_no_room_says_nothing_of_the_game(tmp_path, monkeypatch, does):
    """Else a full disk would take games out of the cache for ever."""
    compiler = tmp_path / "home" / "share" / "inform7" / "Compilers" / "ni"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\n{does}\n")
    compiler.chmod(0o755)
    spec, cache_dir = next(iter(SPECS.values())), tmp_path / "games"
    with monkeypatch.context() as broken:
        broken.setenv("INFORM_HOME", str(tmp_path / "home"))
        with pytest.raises(GenerationError, match="want of memory or of room.*kept: run the same again"):
            textworld.generate([spec], cache_dir=cache_dir, num_workers=1, progress=False)
    report = textworld.generate([spec], cache_dir=cache_dir, num_workers=1, progress=False)
    assert report.set_aside == 0 and len(report.tasks) == 1
