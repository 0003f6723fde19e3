"""The run's folder: one config for ever, one process at a time, no torn files."""

import json
import os
import subprocess
import sys

import pytest

from jaxagentrl import workdir

CONFIG = {"seed": 0, "env": {"name": "textworld", "num_workers": 2}, "buckets": (64, 128)}


def open_once(path, config=CONFIG, **options):
    folder = workdir.open_workdir(path, config, **options)
    folder.close()
    return folder


def open_begun(path, config=CONFIG):
    """A folder whose run has measured something."""
    folder = open_once(path, config)
    folder.metrics.write_text('{"phase": "baseline"}\n')
    return folder


def test_layout(tmp_path):
    folder = open_once(tmp_path / "deep" / "run")
    content = json.loads(folder.config.read_text())
    assert content["config"]["buckets"] == [64, 128]
    assert {"python", "jax", "textworld"} <= set(content["versions"])
    assert {folder.metrics, folder.tensorboard, folder.checkpoints, folder.trajectories,
            folder.tokenizer, folder.model, folder.adapters, folder.curves, folder.report} == {
        folder.root / name for name in workdir._LAYOUT}


def test_same_config_opens_again_and_is_never_rewritten(tmp_path):
    path = open_once(tmp_path).config
    before = path.stat().st_mtime_ns
    assert open_once(tmp_path).version_changes == ()
    assert path.stat().st_mtime_ns == before


def test_other_config_is_refused_key_by_key(tmp_path):
    path = open_begun(tmp_path).config
    before = path.read_bytes()
    other = {"seed": 1, "env": {"name": "textworld", "num_workers": 4, "theme": "house"}}
    with pytest.raises(workdir.WorkdirError) as caught:
        open_once(tmp_path, other)
    message = str(caught.value)
    for part in ("4 key(s) differ", "seed: 0 → 1", "env.num_workers: 2 → 4",
                 'env.theme: (absent) → "house"', "buckets: [64, 128] → (absent)"):
        assert part in message
    assert "\n" not in message
    assert path.read_bytes() == before
    open_once(tmp_path)   # and the refusal holds no lock


def test_a_run_that_has_not_begun_gives_its_place_to_another_config(tmp_path):
    """One that was refused, for its memory for example, is changed and started by the same command."""
    first = open_once(tmp_path)
    first.record("games", {"test": "abc"})
    first.tokenizer.mkdir()
    first.metrics.touch()  # opened, with nothing in it
    other = CONFIG | {"seed": 1}
    second = open_once(tmp_path, other)
    assert second.replaced == ("seed: 0 → 1",) and not second.tokenizer.exists()
    content = json.loads(second.config.read_text())
    assert content["config"]["seed"] == 1 and content["facts"] == {}
    second.tokenizer.mkdir()
    again = open_once(tmp_path, other)
    assert again.replaced == () and again.tokenizer.exists()


@pytest.mark.parametrize("name", ["checkpoints", "trajectories", "model", "adapters"])
def test_what_a_run_has_made_keeps_its_config(name, tmp_path):
    folder = open_once(tmp_path)
    (folder.root / name).mkdir()
    with pytest.raises(workdir.WorkdirError, match="seed: 0 → 1"):
        open_once(tmp_path, CONFIG | {"seed": 1})


def make_begun(path, config=CONFIG):
    folder = open_begun(path, config)
    (folder.checkpoints / "rl").mkdir(parents=True)
    (folder.checkpoints / "rl" / "state").write_text("weights")
    folder.model.mkdir()
    folder.record("games", {"train": "abc"})
    return folder


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_fork_goes_on_in_another_folder_by_another_config(tmp_path):
    old = make_begun(tmp_path / "old")
    before = contents(old.root)
    changed = CONFIG | {"env": CONFIG["env"] | {"num_workers": 8}}
    options = dict(may_differ=["env.num_workers"], after="RL iteration 3")
    told = workdir.fork(old.root, tmp_path / "runs" / "new", changed, **options)
    assert told == ["env.num_workers: 2 → 8"] and contents(old.root) == before
    new = open_once(tmp_path / "runs" / "new", changed)  # it is that config's, without being told what may differ
    assert (new.checkpoints / "rl" / "state").read_text() == "weights"
    assert new.metrics.read_text() == old.metrics.read_text() and not new.model.exists()
    content = json.loads(new.config.read_text())
    assert content["forked"] == [{"after": "RL iteration 3", "changed": told}]
    with pytest.raises(workdir.WorkdirError, match="other games"):
        new.record("games", {"train": "def"})
    # A fork of the fork has both pasts.
    workdir.fork(new.root, tmp_path / "third", CONFIG, may_differ=["env"], after="RL iteration 5")
    assert [fork["after"] for fork in json.loads((tmp_path / "third" / "config.json").read_text())["forked"]] == [
        "RL iteration 3", "RL iteration 5"
    ]


def test_what_cannot_be_forked_is_refused_and_nothing_is_made(tmp_path):
    def refused(words, config=CONFIG, source="old", target="new"):
        with pytest.raises(workdir.WorkdirError, match=words):
            workdir.fork(tmp_path / source, tmp_path / target, config, may_differ=["env.num_workers"], after="")
        assert not (tmp_path / "new").exists()

    refused("holds no config.json: name the workdir of a run")
    begun = open_begun(tmp_path / "old")
    refused("has no checkpoint yet")
    begun.checkpoints.mkdir()
    refused(r"of 1 key\(s\) do not fit, or a past .*seed: 0 → 1", CONFIG | {"seed": 1})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused("full holds something", target="full")
    held = workdir.open_workdir(tmp_path / "old", CONFIG)
    refused("is in use by another running process")
    held.close()
    (tmp_path / "old" / "processes").mkdir()
    refused("of several processes")


@pytest.mark.parametrize("old, new", [(1, True), (0, False), ([1], 1), (None, 0), ("1", 1)])
def test_values_that_only_look_alike_differ(old, new, tmp_path):
    open_begun(tmp_path, {"a": old})
    with pytest.raises(workdir.WorkdirError, match="a: "):
        open_once(tmp_path, {"a": new})


def test_free_keys_may_change(tmp_path):
    open_begun(tmp_path)
    other = {**CONFIG, "env": {"name": "textworld", "num_workers": 16}}
    open_once(tmp_path, other, free_keys=["env.num_workers"])
    kept = open_once(tmp_path, other, free_keys=["env"])
    assert json.loads(kept.config.read_text())["config"]["env"]["num_workers"] == 16
    with pytest.raises(workdir.WorkdirError, match="env.num_workers"):
        open_once(tmp_path, CONFIG, free_keys=["env.num", "seed"])


def test_a_run_of_before_a_key_goes_on_where_it_says_what_runs_did(tmp_path):
    open_begun(tmp_path, {"seed": 0, "rl": {"size": 2}})
    later = {"rl.size": 1, "rl.filter.name": "none", "rl.filter.fraction": workdir.ANY, "seed": 7}

    def config(seed=0, **options):
        return {"seed": seed, "rl": {"size": 2, "filter": {"fraction": 0.5} | options}}

    with pytest.raises(workdir.WorkdirError, match='1 key.*rl.filter.name: "none" → "uncertainty"'):
        open_once(tmp_path, config(name="uncertainty"), later_keys=later)
    with pytest.raises(workdir.WorkdirError, match="1 key.*seed: 0 → 1"):  # it had a seed
        open_once(tmp_path, config(seed=1, name="none"), later_keys=later)
    with pytest.raises(workdir.WorkdirError, match="rl.filter: .absent"):
        open_once(tmp_path, config(name="none"))
    kept = open_once(tmp_path, config(name="none"), later_keys=later)
    assert json.loads(kept.config.read_text())["config"] == config(name="none")
    with pytest.raises(workdir.WorkdirError, match="rl.filter.fraction: 0.5 → 0.25"):  # from here on it has the key
        open_once(tmp_path, config(name="none", fraction=0.25), later_keys=later)


def test_facts_are_recorded_once_and_compared(tmp_path):
    folder = open_once(tmp_path)
    folder.record("games", {"test": "abc"})
    folder.record("games", {"test": "abc"})
    open_once(tmp_path).record("games", {"test": "abc"})
    with pytest.raises(workdir.WorkdirError, match='games.test: "abc" → "xyz"'):
        folder.record("games", {"test": "xyz"})
    assert json.loads(folder.config.read_text())["facts"] == {"games": {"test": "abc"}}
    folder.record("games", {"test": "abc", "train": "def"})  # of a stage that is new
    folder.record("games", {"test": "abc"})
    assert json.loads(folder.config.read_text())["facts"] == {"games": {"test": "abc", "train": "def"}}
    with pytest.raises(workdir.WorkdirError, match="games.train"):
        folder.record("games", {"train": "abc"})


def test_changed_package_version_is_reported(tmp_path):
    path = open_once(tmp_path).config
    content = json.loads(path.read_text())
    here = content["versions"]["jax"]
    content["versions"]["jax"] = "0.8.0"
    path.write_text(json.dumps(content))
    assert open_once(tmp_path).version_changes == (f'jax: "0.8.0" → "{here}"',)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/no_such_folder"):
        with pytest.raises(workdir.WorkdirError, match="cannot write to the workdir"):
            workdir.open_workdir(path, CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(workdir.WorkdirError, match="Permission denied"):
        workdir.open_workdir(tmp_path, CONFIG)


def test_parts_of_a_run_without_its_config(tmp_path):
    (tmp_path / "notes.txt").write_text("a log beside it is fine")
    open_once(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").unlink()
    with pytest.raises(workdir.WorkdirError, match="metrics.jsonl.*no config.json"):
        open_once(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', "\xff\xfe"])
def test_config_that_is_not_ours(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(workdir.WorkdirError, match="config.json"):
        open_once(tmp_path)


def test_config_that_json_cannot_hold(tmp_path):
    with pytest.raises(workdir.WorkdirError, match="the config holds a value that JSON cannot"):
        open_once(tmp_path, {"a": {1, 2}})


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    program = (
        "import sys; from jaxagentrl import workdir\n"
        "folder = workdir.open_workdir(sys.argv[1], {'a': 1})\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(workdir.WorkdirError, match="in use by another running process"):
            workdir.open_workdir(tmp_path, {"a": 1})
        process.kill()   # the kernel frees the lock of a killed process
        process.wait()
    open_once(tmp_path, {"a": 1})


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    open_once(tmp_path)
    (tmp_path / ".metrics.jsonl.tmp").write_text("half")
    (tmp_path / ".model.tmp").mkdir()
    open_once(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    workdir.write_atomic(path, "old é")
    monkeypatch.setattr(os, "replace", lambda *unused: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        workdir.write_atomic(path, b"new")
    assert path.read_text(encoding="utf-8") == "old é"


def test_replacing_folder(tmp_path):
    target = tmp_path / "model"
    with workdir.replacing_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyError), workdir.replacing_folder(target) as folder:
        (folder / "b").write_text("2")
        raise KeyError
    assert [path.name for path in target.iterdir()] == ["a"]
    with workdir.replacing_folder(target) as folder:
        (folder / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with workdir.replacing_folder(target, keeping=["c", "d", "e"]) as folder:
        (folder / "d").write_text("4")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"c": "3", "d": "4"}
    with workdir.replacing_folder(target, keeping=["d"]) as folder:
        (folder / "d").write_text("5")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"d": "5"}


def test_folder_completed_before_a_kill_is_put_in_place(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with workdir.replacing_folder(target) as folder:
        (folder / "old").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "finish_replacing", lambda path: None)   # killed before this
        with workdir.replacing_folder(target) as folder:
            (folder / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["old"]
    workdir.finish_replacing(target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
