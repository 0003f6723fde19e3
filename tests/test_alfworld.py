"""ALFWorld: houses, stepping against the engine it ships with, experts, bad input."""

import dataclasses
import json
import pathlib
import random
import re

import pytest

pytest.importorskip("alfworld", reason="needs the files of alfworld")

from envs_host import (
    alfworld,
    alfworld_engine,
    alfworld_experts,
    alfworld_houses,
    alfworld_maker,
    alfworld_text,
    games,
)
from envs_host.pool import EnvPool
from envs_host.specs import TASK_TYPES, SetAside, Spec
from envs_host.types import EnvFailure, GameFileError

HOUSE = {"family": "alfworld"}
SMALL = HOUSE | {"num_receptacles": 6, "num_objects": 8}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("houses"))


@pytest.fixture(scope="module")
def tasks(cache_dir):
    """A small house of each type, and whole rooms of two."""
    specs = [SMALL | {"task_type": task_type, "seed": 1} for task_type in TASK_TYPES]
    specs += [HOUSE | {"task_type": TASK_TYPES[i], "seed": 2, "split": "valid_unseen"} for i in (2, 5)]
    report = games.generate(specs, cache_dir=cache_dir, progress=False)
    assert report.set_aside == 0
    return report.tasks


def engine_of(task):
    return alfworld_engine.Engine(alfworld_engine.read(task.file), task.file)


def play(env, task, commands):
    return [env.reset(task), *(env.step(command) for command in commands)]


# The engine as oracle.


def test_answers_equal_those_of_the_engine_alfworld_ships_with(tasks):
    """Feedback byte for byte, admissible commands and win; tools/bench_alfworld.py does more."""
    pytest.importorskip("fast_downward", reason="needs the extra 'alfworld'")
    original = alfworld_engine.Original()
    steps = 0
    for number, task in enumerate([tasks[1], tasks[2], tasks[5]]):
        rng = random.Random(number)
        engine = engine_of(task)
        outcome, theirs = engine.opening, original.reset(task.file)
        walk = [None] * 6 + list(task.walkthrough)
        while walk and not outcome.won:
            commands = engine.commands(outcome.facts)
            assert (outcome.feedback, tuple(sorted(commands)), outcome.won) == theirs
            command = walk.pop(0) or rng.choice([*sorted(commands), "help", "sing", "go to mug 1"])
            outcome, theirs = engine.step(outcome.facts, command), original.step(command)
            steps += 1
        assert outcome.feedback == theirs[0] and outcome.won == theirs[2]
    assert steps > 25


def test_walkthroughs_win_in_that_engine_and_are_as_short_as_its_planners(tasks):
    pytest.importorskip("fast_downward", reason="needs the extra 'alfworld'")
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs import PddlEnv

    infos = textworld.EnvInfos(policy_commands=True)
    env = AlfredDemangler(PddlEnv(infos), shuffle=False)
    for task in (tasks[1], tasks[3]):
        env.load(task.file)
        assert len(env.reset()["policy_commands"]) == len(task.walkthrough), task.name
        infos.policy_commands = False
        won = [env.step(command)[0]["won"] for command in task.walkthrough]
        assert won == [False] * (len(won) - 1) + [True], task.name
        infos.policy_commands = True


# Houses.


def test_a_seed_makes_the_same_house_anywhere(tmp_path, tasks):
    spec = SMALL | {"task_type": TASK_TYPES[0], "seed": 1}
    (again,) = games.generate([spec], cache_dir=str(tmp_path), progress=False).tasks
    assert again.digest == tasks[0].digest and again.walkthrough == tasks[0].walkthrough
    assert again.file != tasks[0].file


def test_every_type_every_difficulty_and_both_splits(cache_dir):
    specs = [
        HOUSE | {"task_type": task_type, "split": split, "seed": seed, "num_receptacles": size,
                 "num_objects": size and 2 * size, "closed": bool(seed % 2), "expert": expert}
        for task_type in TASK_TYPES for seed, split, size, expert in (
            (3, "train", 4, "planner"), (4, "valid_seen", None, "handcoded"),
            (5, "valid_unseen", 12, "handcoded"))
    ]
    report = games.generate(specs, cache_dir=cache_dir, progress=False)
    assert report.set_aside == 0, report.reasons
    test_scenes = set(alfworld_houses.scenes("valid_unseen"))
    for task in report.tasks:
        assert (task.params["scene"] in test_scenes) == (task.params["split"] == "valid_unseen")
        engine = engine_of(task)
        receptacles = engine.world.static["receptacleatlocation"]
        if task.params["num_receptacles"] is not None:
            assert len(receptacles) <= task.params["num_receptacles"]
            assert len(engine.opening.facts["inreceptacle"]) <= task.params["num_objects"]
        opened = engine.opening.facts["opened"]
        assert not opened if task.params["closed"] else opened == engine.world.static["openable"]
        alfworld_maker.play_through(engine, list(task.walkthrough))


def test_a_sink_is_a_basin():
    kinds = {kind for room in alfworld_houses.library().rooms.values()
             for kind, _ in room.receptacles.values()}
    assert "SinkBasin" in kinds and "Sink" not in kinds


def test_what_does_not_fit_is_set_aside_and_counted(cache_dir):
    specs = [
        HOUSE | {"task_type": "pick_heat_then_place_in_recep", "room": "bedroom", "seed": 1},
        HOUSE | {"task_type": "pick_two_obj_and_place", "num_objects": 1, "seed": 1},
        HOUSE | {"task_type": "pick_clean_then_place_in_recep", "num_receptacles": 2, "seed": 1},
        SMALL | {"seed": 11},
    ]
    report = games.generate(specs, cache_dir=cache_dir, progress=False)
    assert report.set_aside == 3 and len(report.tasks) == 1
    assert sorted(reason.split(":")[0] for reason in report.reasons.values()) == [
        "no room of split train with room=bedroom, scene=None supports pick_heat_then_place_in_recep",
        "num_objects=1", "num_receptacles=2"]
    again = games.generate(specs, cache_dir=cache_dir, progress=False)
    assert again.generated == 0 and again.reasons == report.reasons


@pytest.mark.parametrize("change, complaint", [
    ({"task_type": "pick_and_juggle"}, "task_type must be one of"),
    ({"split": "test"}, "split must be one of"),
    ({"num_receptacles": -1}, "num_receptacles must be an integer"),
    ({"rooms": 2}, "no parameter"),
])
def test_a_wrong_spec_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        Spec.parse(HOUSE | {"seed": 1} | change)


# Experts.


def test_the_way_to_the_goal_gets_shorter_along_the_plan_and_from_anywhere(tasks):
    for task in tasks:
        engine = engine_of(task)
        goal = alfworld_experts.goal(engine.goal)
        rng = random.Random(0)
        facts = engine.opening.facts
        for _ in range(12):
            facts = engine.step(facts, rng.choice(sorted(engine.commands(facts)))).facts
            if engine.world.reached(facts):
                break
        plan = alfworld_experts.plan(engine, facts, goal)
        for left in range(len(plan), 0, -1):
            assert alfworld_experts.distance(engine, facts, goal) == left
            facts = engine.step(facts, plan[len(plan) - left]).facts
        assert engine.world.reached(facts)
        assert alfworld_experts.distance(engine, facts, goal) == 0


def test_the_explorer_takes_only_what_it_has_seen(cache_dir):
    specs = [HOUSE | {"expert": "handcoded", "seed": seed} for seed in range(20, 26)]
    for task in games.generate(specs, cache_dir=cache_dir, progress=False).tasks:
        engine = engine_of(task)
        facts, seen = engine.opening.facts, ""
        for command in task.walkthrough:
            if command.startswith("take "):
                assert command.split(" from ")[0].removeprefix("take ") in seen
            outcome = engine.step(facts, command)
            facts, seen = outcome.facts, seen + outcome.feedback


# The environment.


def test_an_episode(tasks):
    env = alfworld.AlfworldEnv(intermediate_reward=True, admissible_commands=True)
    for task in tasks:
        results = play(env, task, task.walkthrough)
        opening = results[0]
        assert opening.observation.startswith("You are in the middle of a room.")
        assert "Your task" not in opening.observation and opening.info.objective == task.objective
        assert task.walkthrough[0] in opening.info.admissible_commands
        assert [r.reward for r in results[1:]] == [0.0] * (len(results) - 2) + [1.0]
        assert all(r.info.intermediate_reward == 1.0 for r in results[1:])
        assert results[-1].terminated and results[-1].info.won and not results[-1].truncated
        with pytest.raises(RuntimeError, match="call reset first"):
            env.step("look")


def test_ways_that_end_where_they_began_earn_nothing(tasks):
    """What the progress signal sums to depends on the end alone: wherever an episode wanders, and on a loop that
    goes away in one step (what was heated is cooled) and comes back in two."""
    env = alfworld.AlfworldEnv(intermediate_reward=True, admissible_commands=True)
    for task in tasks:
        engine, rng = engine_of(task), random.Random(0)
        goal = alfworld_experts.goal(engine.goal)
        result, facts, gained = env.reset(task), engine.opening.facts, 0.0
        for _ in range(15):
            command = rng.choice(result.info.admissible_commands)
            result, facts = env.step(command), engine.step(facts, command).facts
            gained += result.info.intermediate_reward
            left = alfworld_experts.distance(engine, facts, goal)
            assert gained == len(task.walkthrough) - left
            if result.terminated:
                break
    task = tasks[TASK_TYPES.index("pick_heat_then_place_in_recep")]
    heat = next(number for number, command in enumerate(task.walkthrough) if command.startswith("heat"))
    play(env, task, task.walkthrough[: heat + 1])
    thing, oven = re.fullmatch("heat (.*) with (.*)", task.walkthrough[heat]).groups()
    loop = ["go to fridge 1", f"cool {thing} with fridge 1", f"go to {oven}", task.walkthrough[heat]]
    steps = [env.step(command) for command in loop]
    assert all(step.info.valid_command for step in steps)
    assert [step.info.intermediate_reward for step in steps] == [0, -2, 1, 1]


def test_a_refused_command_changes_nothing(tasks):
    env = alfworld.AlfworldEnv()
    before = env.reset(tasks[0])
    assert before.info.admissible_commands == ()
    for text in ("dance", "", "go to nowhere 1", "\x00", "take it all" * 50, "<|im_end|>"):
        result = env.step(text)
        assert result.observation == "Nothing happens." and not result.info.valid_command
        assert not result.terminated and result.reward == 0.0
    for text in [f" {command.upper()}. " for command in tasks[0].walkthrough]:
        result = env.step(text)
        assert result.info.valid_command
    assert result.info.won


def test_put_as_before_version_0_4(tasks):
    last = tasks[0].walkthrough[-1]
    put = last.replace("move", "put").replace(" to ", " in/on ")
    for accept in (False, True):
        env = alfworld.AlfworldEnv(accept_put=accept)
        assert play(env, tasks[0], [*tasks[0].walkthrough[:-1], put])[-1].info.won == accept


def test_a_game_that_says_put_is_played_as_it_was_made(tasks, tmp_path):
    made = json.loads(pathlib.Path(tasks[0].file).read_text())
    made["grammar"] = re.sub(
        r'template :: "move ([^"]*?) to ([^"]*)"', r'template :: "put \1 in/on \2"', made["grammar"])
    file = tmp_path / "game.tw-pddl"
    file.write_text(json.dumps(made))
    walkthrough = tuple(
        re.sub("^move (.*) to (.*)$", r"put \1 in/on \2", command) for command in tasks[0].walkthrough)
    assert walkthrough != tasks[0].walkthrough
    old = dataclasses.replace(
        tasks[0], file=str(file), digest=alfworld_engine.digest(str(file)), walkthrough=walkthrough)
    for accept in (False, True, True):  # the last from memory
        env = alfworld.AlfworldEnv(accept_put=accept)
        last = play(env, old, walkthrough)[-1].info
        assert last.won and last.command == walkthrough[-1]


def test_memory_changes_no_answer(tasks):
    rng = random.Random(1)
    scripts = [[rng.choice(["look", "inventory", "go to x 1", *task.walkthrough])
                for _ in range(12)] for task in tasks]
    options = {"intermediate_reward": True, "admissible_commands": True}
    alone = alfworld.AlfworldEnv(remember=False, **options)
    for _ in range(2):
        shared = alfworld.AlfworldEnv(**options)
        for task, script in zip(tasks, scripts, strict=True):
            one, two = alone.reset(task), shared.reset(task)
            assert one == two
            for command in script:
                one, two = alone.step(command), shared.step(command)
                assert one == two
                if one.terminated:
                    break
    assert shared.counters["hits"] > 0


def test_no_expert_and_no_library_code_is_run_in_training(tasks, monkeypatch):
    """Stepping without progress signal never plans."""
    def forbidden(*_):
        raise AssertionError("planned")

    for name in ("plan", "distance", "explore"):
        monkeypatch.setattr(alfworld_experts, name, forbidden)
    env = alfworld.AlfworldEnv(admissible_commands=True, remember=False)
    assert play(env, tasks[1], tasks[1].walkthrough)[-1].info.won


# Bad input.


def broken(task, tmp_path, text):
    path = tmp_path / "game.tw-pddl"
    path.write_text(text)
    return alfworld_engine.read(task.file), str(path)


@pytest.mark.parametrize("part, change, complaint", [
    ("pddl_problem", lambda text: text[: len(text) // 2], "cut short or damaged"),
    ("pddl_problem", lambda text: text.replace("(:goal", "(:metric"), "lacks its objects"),
    ("pddl_problem", lambda text: text.replace("(atlocation", "(at").replace("agent1 ", "x ", 1),
     "unknown objects"),
    ("pddl_domain", lambda text: text.replace(":action", ":axiom"), "no actions"),
    ("pddl_domain", lambda text: text.replace("(when", "(forall"), "not supported"),
    ("grammar", lambda text: text[:500], "no actions"),
    ("grammar", lambda text: text.replace("{r.name}", "{__import__('os')}"), "not supported"),
])
def test_a_damaged_part_is_told(tasks, tmp_path, part, change, complaint):
    data = json.loads(open(tasks[0].file).read())
    data[part] = change(data[part])
    path = tmp_path / "game.tw-pddl"
    path.write_text(json.dumps(data))
    with pytest.raises(GameFileError, match=complaint):
        alfworld_engine.Engine(alfworld_engine.read(str(path)), str(path))


def test_a_file_cut_short_or_replaced_or_missing(tasks, tmp_path):
    text = open(tasks[0].file).read()
    path = tmp_path / "game.tw-pddl"
    path.write_text(text[:1000])
    env = alfworld.AlfworldEnv()
    fields = tasks[0].to_json()
    moved = type(tasks[0]).from_json(fields | {"file": str(path)})
    with pytest.raises(GameFileError, match="cut short or damaged"):
        env.reset(moved)
    path.write_text(open(tasks[1].file).read())
    with pytest.raises(GameFileError, match="not the one of task"):
        env.reset(moved)
    path.unlink()
    with pytest.raises(GameFileError, match="cannot be read"):
        env.reset(moved)


def test_a_game_without_solution_is_set_aside(tasks, monkeypatch):
    furnish = alfworld_houses.furnish

    def without_target(spec):
        house = furnish(spec)
        kind = house.traj_data["pddl_params"]["object_target"]
        problem = house.game["pddl_problem"]
        lines = [line for line in problem.split("\n")
                 if not line.startswith(f"(pickupable {kind}_bar_")]
        return house._replace(game=house.game | {"pddl_problem": "\n".join(lines)})

    monkeypatch.setattr(alfworld_houses, "furnish", without_target)
    with pytest.raises(SetAside, match="cannot be done"):
        alfworld_maker.build(Spec.parse(SMALL | {"seed": 1}), "unused", "unused")


def test_a_walkthrough_that_goes_wrong_is_set_aside(tasks):
    engine = engine_of(tasks[0])
    for walkthrough in (["look"], list(tasks[0].walkthrough[1:]), ["sing"]):
        with pytest.raises(SetAside):
            alfworld_maker.play_through(engine, walkthrough)


def test_a_killed_worker_loses_nothing(tasks):
    """In the pool: replayed after a kill in mid-episode; a damaged game is a counted failure."""
    import os
    import signal

    bad = type(tasks[0]).from_json(tasks[0].to_json() | {"file": "/nowhere.tw-pddl"})
    with EnvPool("alfworld", {}, num_workers=1, step_limit_s=10.0, reset_limit_s=30.0,
                 worker_memory_mb=2000.0) as pool:
        pool.reset("bad", bad)
        pool.reset("good", tasks[0])
        answers = {}
        while len(answers) < 2:
            answers.update(pool.poll())
        assert isinstance(answers["bad"], EnvFailure) and answers["bad"].reason == "game file"
        for number, command in enumerate(tasks[0].walkthrough):
            if number == 2:
                os.kill(pool.worker_pids[0], signal.SIGKILL)
            pool.step("good", command)
            ((_, answer),) = pool.poll()
        assert answer.info.won
        assert pool.counters["crashes"] == 1 and pool.counters["failures"] == 1


def test_text_of_lists():
    """The grammar's own separators: none, one, two, three."""
    grammar = alfworld_text.parse(alfworld_houses.library().grammar)
    assert grammar.feedback["gotolocation"] == "GotoLocation.feedback"
    assert {"inreceptacle", "not_inreceptacle", "istoggled"} <= grammar.read
