"""The official layout (laid out from generated houses), splits, collections, bad folders."""

import json
import os
import pathlib
import shutil

import pytest

pytest.importorskip("alfworld", reason="needs the files of alfworld")

from envs_host import alfworld, alfworld_data, collect, games
from envs_host.specs import TASK_TYPES
from jaxagentrl import prepare

COUNTS = {"train": 8, "valid_seen": 2, "valid_unseen": 3}


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """A cache with small houses, and the tasks by split."""
    cache = str(tmp_path_factory.mktemp("houses"))
    made = {}
    for split, count in COUNTS.items():
        specs = [
            {"family": "alfworld", "split": split, "seed": 100 + number, "num_receptacles": 6,
             "num_objects": 8, "task_type": TASK_TYPES[number % 6]}
            for number in range(count)
        ]
        made[split] = games.generate(specs, cache_dir=cache, progress=False).tasks
        assert len(made[split]) == count
    return made


@pytest.fixture
def data(houses, tmp_path):
    """A folder as `alfworld-download` leaves it: everything it unpacks, playable or not."""
    root = tmp_path / "data"
    for split, tasks in houses.items():
        for number, task in enumerate(tasks):
            traj = json.loads(open(task.file.replace(".tw-pddl", ".json")).read())
            params = traj["pddl_params"]
            name = (f"{traj['task_type']}-{params['object_target']}-None-"
                    f"{params['parent_target'] or params['toggle_target']}-{task.params['scene']}")
            trial = root / "json_2.1.1" / split / name / f"trial_T20190907_{number:06d}_1"
            trial.mkdir(parents=True)
            (trial / "traj_data.json").write_text(json.dumps(traj))
            game = json.loads(open(task.file).read())
            (trial / "initial_state.pddl").write_text(game["pddl_problem"])
            (trial / "game.tw-pddl").write_text(json.dumps(game))
    train = root / "json_2.1.1" / "train"
    some = next(path.parent for path in sorted(train.rglob("traj_data.json")))
    for name in ("pick_and_place_with_movable_recep-Mug-Bowl-Desk-1", "pick_x-AppleSliced-None-Y-2"):
        shutil.copytree(some, train / name / "trial_T1")
    for name, change in (("a-A-None-B-3", {"solvable": False}), ("b-B-None-C-4", None)):
        shutil.copytree(some, train / name / "trial_T1")
        game = train / name / "trial_T1" / "game.tw-pddl"
        if change is None:
            game.unlink()
        else:
            game.write_text(json.dumps(json.loads(game.read_text()) | change))
    for folder in ("logic", "detectors"):
        (root / folder).mkdir()
    return root


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))
    }


def test_reads_what_the_download_leaves(data, houses, tmp_path):
    before = snapshot(data)
    for split in alfworld_data.SPLITS:
        report = alfworld_data.read(
            split, data_dir=str(data), cache_dir=str(tmp_path / "cache"), progress=False)
        assert report.indexed and not report.damaged
        assert {t.digest for t in report.tasks} == {t.digest for t in houses[split]}
        by_digest = {task.digest: task for task in houses[split]}
        for task in report.tasks:
            house = by_digest[task.digest]
            assert task.objective == house.objective and task.walkthrough == house.walkthrough
            for key in ("task_type", "scene", "split"):
                assert task.params[key] == house.params[key]
            assert task.params["object"]
    assert alfworld_data.read(
        "train", data_dir=str(data), cache_dir=str(tmp_path / "cache"), progress=False
    ).left_out == {"movable receptacle or sliced object": 2,
                   "not solvable, or not known to be": 1, "no game file": 1}
    assert snapshot(data) == before  # Nothing is written there.


def test_they_are_played(data, tmp_path):
    env = alfworld.AlfworldEnv()
    for task in alfworld_data.read(
        "valid_unseen", data_dir=str(data), cache_dir=str(tmp_path), progress=False
    ).tasks:
        env.reset(task)
        assert [env.step(command) for command in task.walkthrough][-1].info.won


def test_alfworlds_own_collector_finds_the_same_games(data, tmp_path):
    pytest.importorskip("fast_downward", reason="needs the extra 'alfworld'")
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    config = {"env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
              "dataset": {"data_path": str(data / "json_2.1.1" / "train"), "num_train_games": -1}}
    theirs = AlfredTWEnv(config, train_eval="train").game_files
    ours = alfworld_data.read(
        "train", data_dir=str(data), cache_dir=str(tmp_path), progress=False).tasks
    assert sorted(theirs) == sorted(task.file for task in ours)


def test_the_manifest_is_kept_until_the_folders_change(data, tmp_path, monkeypatch):
    options = {"data_dir": str(data), "cache_dir": str(tmp_path / "cache"), "progress": False}
    first = alfworld_data.read("train", **options)
    with monkeypatch.context() as patched:
        patched.setattr(os, "walk", None)  # A second start walks no folders.
        again = alfworld_data.read("train", **options)
    assert not again.indexed and again.tasks == first.tasks
    # The games come last, into folders that are there.
    game = pathlib.Path(first.tasks[0].file)
    game.rename(game.with_name("later"))
    assert len(alfworld_data.read("train", **options).tasks) == len(first.tasks) - 1
    game.with_name("later").rename(game)
    assert alfworld_data.read("train", **options).tasks == first.tasks
    shutil.rmtree(data / "json_2.1.1" / "train" / "a-A-None-B-3")
    assert alfworld_data.read("train", **options).indexed
    manifest = next((tmp_path / "cache").glob("*.manifest.json"))
    manifest.write_text(manifest.read_text()[:100])
    assert alfworld_data.read("train", **options).tasks == first.tasks


def test_task_types_are_chosen(data, tmp_path):
    options = {"data_dir": str(data), "cache_dir": str(tmp_path), "progress": False}
    report = alfworld_data.read("train", task_types=TASK_TYPES[:1], **options)
    assert {task.params["task_type"] for task in report.tasks} == {TASK_TYPES[0]}
    assert report.left_out["other task type"] == 6
    with pytest.raises(ValueError, match="task_types must be some of"):
        alfworld_data.read("train", task_types=["dance"], **options)


def test_a_missing_download_names_the_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="run `alfworld-download`"):
        alfworld_data.read("train", cache_dir=str(tmp_path))
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        alfworld_data.read("test", cache_dir=str(tmp_path))


def test_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "json_2.1.1" / "train" / "photos").mkdir(parents=True)
    (tmp_path / "json_2.1.1" / "train" / "photos" / "cat.txt").write_text("meow")
    with pytest.raises(ValueError, match="no playable game"):
        alfworld_data.read("train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "c"),
                           progress=False)


def test_damaged_games_are_counted_and_left_out(data, tmp_path):
    files = sorted((data / "json_2.1.1" / "train").rglob("game.tw-pddl"))
    playable = [f for f in files if "-None-" in str(f) and "Sliced" not in str(f)][-2:]
    playable[0].write_text(playable[0].read_text()[:500])
    playable[1].with_name("traj_data.json").write_text("{}")
    report = alfworld_data.read(
        "train", data_dir=str(data), cache_dir=str(tmp_path), progress=False)
    assert report.left_out["damaged"] == 2 and len(report.tasks) == 6
    assert "cut short" in report.damaged[str(playable[0])]
    assert "traj_data.json is damaged" in report.damaged[str(playable[1])]


# The run's splits.
ONCE = {"demo": 1, "train": 1}  # every game under its own names


def test_splits_of_official_games(data, tmp_path):
    env = {"params": {"family": "alfworld-data", "split": "train", "data_dir": str(data)},
           "cache_dir": str(tmp_path), "num_workers": 1}
    splits = {"demo": (0, 3), "train": (3, 5), "test": (100, 3, {"split": "valid_unseen"}),
              "test_seen": (200, 2, {"split": "valid_seen"})}
    made = prepare.games(env, splits, ONCE)
    assert {name: len(tasks) for name, tasks in made.items()} == {
        "demo": 3, "train": 5, "test": 3, "test_seen": 2}
    assert {task.params["split"] for task in made["test"]} == {"valid_unseen"}
    assert prepare.held_out(splits) == {"test": "eval", "test_seen": "eval_seen"}
    with pytest.raises(ValueError, match="there are 8 tasks"):
        prepare.games(env, splits | {"train": (3, 6)}, ONCE)
    assert prepare.games(env, splits, ONCE) == made


def test_splits_of_houses(tmp_path):
    env = {"params": {"family": "alfworld", "num_receptacles": 5, "num_objects": 6},
           "cache_dir": str(tmp_path), "num_workers": 1}
    splits = {"demo": (1, 3, {"expert": "handcoded"}), "train": (1001, 3),
              "test": (2001, 2, {"split": "valid_unseen"})}
    made = prepare.games(env, splits, ONCE)
    assert {task.params["expert"] for task in made["demo"]} == {"handcoded"}
    assert {task.params["split"] for task in made["test"]} == {"valid_unseen"}


@pytest.mark.parametrize("params, environment", [
    ({"family": "custom"}, "textworld"), ({"family": "alfworld"}, "alfworld"),
    ({"family": "alfworld-data"}, "alfworld")])
def test_who_plays_a_family(params, environment):
    assert collect.environment(params) == environment


def test_unknown_families_and_parameters(tmp_path):
    with pytest.raises(ValueError, match="family 'chess' is unknown"):
        collect.environment({"family": "chess"})
    with pytest.raises(ValueError, match="needs the parameters split"):
        collect.tasks({"family": "alfworld-data", "split": "train", "rooms": 3}, range(1), first=0,
                      cache_dir=str(tmp_path), num_workers=1)
