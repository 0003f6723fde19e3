"""Environments of Gymnasium's shape: games made of them, how these are played, and what is refused."""

import contextlib
import json
import os
import pathlib
import re
import sys
import types

import gymnasium_worlds
import pytest

import envs_host
from envs_host import gymnasium_world, specs
from envs_host.games import GenerationError, generate
from envs_host.gymnasium import GymnasiumEnv
from envs_host.pool import EnvPool
from envs_host.types import GameFileError, StepResult
from jaxagentrl import prepare

WALK = {
    "family": "gymnasium", "id": "gymnasium_worlds:Walk-v0", "actions": gymnasium_worlds.ACTIONS,
    "expert": "gymnasium_worlds:way", "max_score": 2.0,
}  # fmt: skip


def made(tmp_path, *seeds, **params):
    """The games of these seeds, and what was set aside."""
    wanted = [WALK | params | {"seed": seed} for seed in seeds]
    report = generate(wanted, cache_dir=str(tmp_path), num_workers=1, progress=False)
    return report.tasks, report.reasons


def echo(**kwargs):
    return {"id": "gymnasium_worlds:Echo-v0", "actions": None, "expert": None, "kwargs": kwargs}


def test_games_are_made_by_seed_and_kept(tmp_path):
    tasks, _ = made(tmp_path, *range(6), objective="Go right.", kwargs={"length": 4})
    names = [f"gymnasium-gymnasium_worlds:Walk-v0-length=4-s{seed}" for seed in range(6)]
    assert [task.name for task in tasks] == names
    assert {(task.env, task.objective, task.max_score) for task in tasks} == {("gymnasium", "Go right.", 2.0)}
    assert all(set(task.walkthrough) == {"right"} for task in tasks)
    assert tasks[0].params["kwargs"] == {"length": 4} and tasks[0].params["actions"] == ["Left", "right"]
    games = [gymnasium_world.load(task.file) for task in tasks]
    # The same place is the same game, whatever the seed, since the environment says what tells its games apart.
    assert len({task.digest for task in tasks}) == len({game.opening for game in games}) < 6
    assert len({task.digest for task in made(tmp_path, *range(6), kwargs={"named": False})[0]}) == 6

    again = generate([WALK | {"seed": 3, "objective": "Go right.", "kwargs": {"length": 4}}], cache_dir=str(tmp_path))
    assert (again.tasks, again.cached) == ([tasks[3]], 1)
    played = json.loads(pathlib.Path(tasks[0].file.replace(".gymnasium.json", ".json")).read_text())["answers"]
    assert [answer["command"] for answer in played] == list(tasks[0].walkthrough) and played[-1]["reward"] == 2.0


def test_a_game_is_won_lost_or_cut_short(tmp_path):
    [task], _ = made(tmp_path, 0, kwargs={"limit": 9, "length": 8})
    env = GymnasiumEnv()
    place = int(re.search(r"\d", env.reset(task).observation)[0])
    assert 1 < len(task.walkthrough) < 8
    for command in task.walkthrough[:-1]:
        answer = env.step(f" {command.upper()}\n")  # whatever its case
        assert not (answer.terminated or answer.truncated or answer.info.won) and answer.reward == 0
    answer = env.step(task.walkthrough[-1])
    assert (answer.terminated, answer.info.won, answer.info.lost) == (True, True, False)
    assert (answer.info.score, answer.reward) == (2.0, 2.0)
    with pytest.raises(RuntimeError, match="without a live episode"):
        env.step("right")

    env.reset(task)
    for _ in range(place + 1):
        answer = env.step("left")
    assert (answer.terminated, answer.info.won, answer.info.lost, answer.info.score) == (True, False, True, -0.5)

    env.reset(task)
    for command in (*("left", "right") * 4, "left"):
        answer = env.step(command)
    assert (answer.terminated, answer.truncated, answer.info.won, answer.info.lost) == (False, True, False, False)
    with pytest.raises(RuntimeError, match="without a live episode"):
        env.step("right")
    env.close()
    env.close()


def test_what_is_no_action_is_refused_and_leads_nowhere(tmp_path):
    [task], _ = made(tmp_path, 1)
    env = GymnasiumEnv(admissible_commands=True)
    opening = env.reset(task)
    refused = env.step("fly away")
    assert refused.observation == "Say one of: Left, right." and not refused.info.valid_command and refused.reward == 0
    assert refused.info.command == "fly away" and refused.info.admissible_commands == opening.info.admissible_commands
    for command in task.walkthrough:
        answer = env.step(command)
    assert answer.info.won


def test_actions_that_make_sense(tmp_path):
    tasks, _ = made(tmp_path, *range(16), kwargs={"masked": True})
    seen = set()
    for task in tasks:
        answer = GymnasiumEnv(admissible_commands=True).reset(task)
        seen.add((answer.observation, answer.info.admissible_commands))
        assert GymnasiumEnv().reset(task).info.admissible_commands == ()
    assert seen >= {("You stand at 0 of 3.", ("right",)), ("You stand at 1 of 3.", ("Left", "right"))}


def test_actions_that_are_texts(tmp_path):
    [task], _ = made(tmp_path, 0, **echo())
    env = GymnasiumEnv(admissible_commands=True)
    assert env.reset(task).info.admissible_commands == ("hi", "bye") and task.walkthrough == ()
    answer = env.step(" open the door, please \n")
    assert answer.observation == "You said 'open the door, please'." and answer.info.valid_command
    assert not env.step(" ").info.valid_command
    answer = env.step("bye")
    assert answer.info.won and answer.terminated and answer.info.score == 0  # as "is_success" says


def test_one_environment_plays_games_of_several_makings(tmp_path):
    (short,), _ = made(tmp_path, 0)
    (long,), _ = made(tmp_path, 0, kwargs={"length": 9})
    env = GymnasiumEnv()
    env.reset(short)
    first = env._world.env.unwrapped
    env.reset(short)
    assert env._world.env.unwrapped is first and not first.closed
    assert env.reset(long).observation.endswith("of 9.") and first.closed
    assert env.reset(short).observation.endswith("of 3.")


def test_the_pool_plays_them_and_survives_a_killed_worker(tmp_path):
    [task], _ = made(tmp_path, 2)
    limits = dict(step_limit_s=10.0, reset_limit_s=30.0, worker_memory_mb=2000.0)
    with EnvPool("gymnasium", {}, num_workers=1, **limits) as pool:

        def answered():
            while not (answers := list(pool.poll())):
                pass
            return answers[0][1]

        pool.reset(0, task)
        assert answered().observation == gymnasium_world.load(task.file).opening
        for number, command in enumerate(task.walkthrough):
            if number == len(task.walkthrough) - 1:
                os.kill(pool.worker_pids[0], 9)
            pool.step(0, command)
            answer = answered()
        assert isinstance(answer, StepResult) and answer.info.won and pool.counters["crashes"] == 1


@pytest.mark.parametrize(
    "params, words",
    [
        ({"id": "gymnasium_worlds:None-v0"}, "env.params.id is 'gymnasium_worlds:None-v0', which Gymnasium does not know"),
        ({"id": "no_such_module:Walk-v0"}, "which Gymnasium does not know: No module named 'no_such_module'"),
        ({"kwargs": {"width": 3}}, r"gymnasium.make\('gymnasium_worlds:Walk-v0', \*\*{'width': 3}\) fails"),
        ({"actions": ("left", "right", "up")}, "has 2 actions, of which env.params.actions names 3"),
        ({"actions": None}, "has 2 actions, of which env.params.actions names 0"),
        (echo() | {"actions": ("hi",)}, r"takes texts as its actions, so env.params.actions must be None"),
        (echo() | {"id": "gymnasium_worlds:Grid-v0"}, r"takes actions of Box\(.*wrap it"),
        (echo(opening=3), "an observation must be a text, got int 3: wrap it"),
        (echo() | {"id": "gymnasium_worlds:Moody-v0"}, r"reset\(seed=0\) began with 'Hello .*', and then with 'Hello"),
        ({"expert": "gymnasium_worlds:nobody"}, "env.params.expert must be 'module:function'"),
        ({"expert": "nowhere:way"}, "the module 'nowhere' of .* is not found"),
        ({"expert": "gymnasium_worlds:one_word"}, "must return a list of the texts that win"),
    ],
)  # fmt: skip
def test_what_cannot_be_played_is_told_before_anything_is_learned(tmp_path, params, words):
    with pytest.raises(ValueError, match=words):
        made(tmp_path, 0, **params)


@pytest.mark.parametrize(
    "oddity, error, words",
    [
        ("old reset", ValueError, r"Odd-v0: reset must return \(observation, info\), .* got 'Hello\?'"),
        ("old step", ValueError, r"step must return \(observation, reward, terminated, truncated, info\)"),
        ("no info", ValueError, "the info being a dict, .* None"),
        ("nan", ValueError, "a reward must be a number, and a finite one, got nan"),
        ("array", ValueError, r"a reward must be a number, and a finite one, got array\(\[0"),
        # With where it came from, as every error that is theirs.
        ("raises", GenerationError, r"(?s)gymnasium_worlds.py.*step of gymnasium_worlds:Odd-v0 raised ValueError\("),
        ("not made", GenerationError, r"(?s)gymnasium_worlds.py.*gymnasium.make\('gymnasium_worlds:Odd-v0'\) raised ValueError"),
        ("numpy", None, ""),
    ],
)  # fmt: skip
def test_odd_answers_are_told(tmp_path, oddity, error, words):
    params = echo(oddity=oddity) | {"id": "gymnasium_worlds:Odd-v0", "expert": "gymnasium_worlds:bye"}
    with pytest.raises(error, match=words) if error else contextlib.nullcontext():
        made(tmp_path, 0, **params)


def test_an_experts_error_is_told_with_where_it_came_from(tmp_path):
    with pytest.raises(GenerationError, match=r"(?s)in bye.*gymnasium_worlds:bye raised ValueError\('too sad to go'\)"):
        made(tmp_path, 0, **echo(opening="sad") | {"expert": "gymnasium_worlds:bye"})


@pytest.mark.parametrize(
    "expert, words",
    [
        ("no_way", "the expert finds no way"),
        ("wrong_way", "the walkthrough goes wrong at command"),
        ("way_off", "the walkthrough goes wrong at command"),
    ],
)
def test_games_whose_expert_does_not_win_are_set_aside(tmp_path, expert, words):
    tasks, reasons = made(tmp_path, 0, kwargs={"length": 5}, expert=f"gymnasium_worlds:{expert}")
    assert not tasks and words in next(iter(reasons.values()))


@pytest.mark.parametrize(
    "params, words",
    [
        ({}, "needs the parameter .'id'"),
        ({"id": ""}, "id must be a text, got ''"),
        ({"id": "x", "kwargs": [1]}, "kwargs must be named values that JSON can hold"),
        ({"id": "x", "kwargs": {"a": float("nan")}}, "kwargs must be named values"),
        ({"id": "x", "kwargs": {1: 2}}, "kwargs must be named values"),
        ({"id": "x", "actions": "left"}, "actions must be different texts"),
        ({"id": "x", "actions": ("left", "Left")}, "actions must be different texts"),
        ({"id": "x", "actions": ("left ",)}, "actions must be different texts"),
        ({"id": "x", "actions": ()}, "actions must be different texts"),
        ({"id": "x", "max_score": 0}, "max_score must be a number above 0, got 0"),
        ({"id": "x", "max_score": True}, "max_score must be a number above 0, got True"),
    ],
)
def test_parameters_are_looked_at(params, words):
    with pytest.raises(ValueError, match=words):
        specs.Spec.parse({"family": "gymnasium", "seed": 0} | params)


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
def test_games_are_made_again_when_their_code_has_changed(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    source = pathlib.Path(gymnasium_worlds.__file__).read_text().replace("gymnasium_worlds", "changing_worlds")
    source = source.replace("-v0", "-v1")
    (folder / "changing_worlds.py").write_text(source)
    params = {"id": "changing_worlds:Walk-v1", "expert": "changing_worlds:way", "kwargs": {"length": 4}}
    [task], _ = made(tmp_path, 0, **params)
    (folder / "changing_worlds.py").write_text(source.replace("You stand", "You are"))
    sys.modules.pop("changing_worlds")
    [changed], _ = made(tmp_path, 0, **params)
    assert changed.file != task.file and gymnasium_world.load(changed.file).opening.startswith("You are")
    # The earlier game cannot be played any more, and says why.
    with pytest.raises(GameFileError, match="does not begin as it did when it was made: with 'You are.* of 'You stand"):
        GymnasiumEnv().reset(task)


def test_a_damaged_game_is_found_out(tmp_path):
    (one, two), _ = made(tmp_path, 0, 1, kwargs={"named": False})
    pathlib.Path(one.file).write_text(pathlib.Path(two.file).read_text())
    with pytest.raises(GameFileError, match="is not the one of task"):
        GymnasiumEnv().reset(one)
    other = json.loads(pathlib.Path(two.file).read_text()) | {"format": 0}
    pathlib.Path(two.file).write_text(json.dumps(other))
    with pytest.raises(GameFileError, match="was written by another version"):
        GymnasiumEnv().reset(two)
    pathlib.Path(two.file).write_text("{")
    with pytest.raises(GameFileError, match="cannot be read"):
        GymnasiumEnv().reset(two)
    assert made(tmp_path, 0, 1, kwargs={"named": False})[0] == [one, two]  # and made again


def test_games_that_came_out_twice_are_left_out_and_told(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(prepare.progress, "notice", told.append)
    env = {"params": WALK, "cache_dir": str(tmp_path), "num_workers": 1}
    splits = {"train": (100, 10, {"kwargs": {"length": 9}}), "test": (0, 10, {"kwargs": {"length": 9}})}
    found = prepare.games(env, splits, {"demo": 1, "train": 1})
    digests = [task.digest for split in found.values() for task in split]
    assert len(set(digests)) == len(digests) < 20
    for name, others in (("test", ""), ("train", " or of test")):
        gone = 10 - len(found[name])
        assert f"{name}: {gone} of 10 games left out: other seeds of it{others} gave the same" in told


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for module in ("envs_host.gymnasium", "envs_host.gymnasium_world"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(envs_host, "gymnasium_world", types.ModuleType("gone"), raising=False)
    monkeypatch.delattr(envs_host, "gymnasium_world")
    with pytest.raises(ValueError, match=r"cannot be imported .*pip install 'jaxagentrl\[gymnasium\]'"):
        envs_host.make("gymnasium")
