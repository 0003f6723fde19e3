"""Checkpoints: exact, atomic under real kills and under a fault at every file operation, clear."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxagentrl import checkpoints
from jaxagentrl.types import TrainState

HOST = {"phase": "rl", "sampler": {"order": [3, 1, 2], "epoch": 0}, "rng": 2**127 + 1, "x": 0.1,
        "none": None}
BIG = checkpoints._PACK_LIMIT_BYTES // 4 + 3   # float32 leaf that is not packed


def make_state(seed=0, big=True):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (5, 3))},
        "half": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16),
        "ids": jnp.array([2**31 - 1, -(2**31), 0], jnp.int32),
        "flags": jnp.array([[True, False]]),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "scalar": jnp.float32(1 / 3),
        "empty": jnp.zeros((0, 4)),
    }
    if big:
        params["big"] = jax.random.normal(keys[2], (BIG,))
    optimizer = optax.adamw(1e-3)
    return TrainState(step=jnp.int32(12), iteration=jnp.int32(3), params=params,
                      opt_state=optimizer.init({"w": params["embed"]["embedding"]}))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("big", [False, True])
def test_round_trip_is_bit_exact(big, tmp_path):
    state = make_state(big=big)
    checkpoints.save(tmp_path / "c", step=12, state=state, host=HOST)
    restored, host = checkpoints.restore(tmp_path / "c", make_state(seed=9, big=big))
    assert_same_bits(restored, state)
    assert host == HOST
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_abstract_like(tmp_path):
    state = make_state()
    checkpoints.save(tmp_path, step=1, state=state, host={})
    restored, _ = checkpoints.restore(tmp_path, jax.eval_shape(lambda: make_state()))
    assert_same_bits(restored, state)


def test_restored_state_can_be_donated(tmp_path):
    checkpoints.save(tmp_path, step=1, state=make_state(), host={})
    restored, _ = checkpoints.restore(tmp_path, make_state())
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)
    assert_same_bits(bump(restored), make_state())
    # Reading again is not disturbed by what happened to the first reading's buffers.
    assert_same_bits(checkpoints.restore(tmp_path, make_state())[0], make_state())


def test_sharded_leaves_come_back_in_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((4,), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = {"split": jnp.arange(8.0), "big": jnp.arange(4.0 * BIG), "copies": jnp.arange(3)}
    state = {
        "split": jax.device_put(values["split"], split),
        "big": jax.device_put(values["big"], split),
        "copies": jax.device_put(values["copies"], whole),
    }
    checkpoints.save(tmp_path, step=1, state=state, host={})
    restored, _ = checkpoints.restore(tmp_path, state)
    assert_same_bits(restored, values)
    assert {name: leaf.sharding for name, leaf in restored.items()} == {
        "split": split, "big": split, "copies": whole}
    # Another layout than the saved one, too.
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
            for name, x in state.items()}
    assert_same_bits(checkpoints.restore(tmp_path, like)[0], values)


def test_newest_wins_and_old_ones_go(tmp_path):
    assert checkpoints.restore(tmp_path / "none", make_state(big=False)) is None
    assert checkpoints.latest_step(tmp_path / "none") is None
    for step in (100, 200, 5):   # the step may count anew in a later phase
        checkpoints.save(tmp_path, step=step, state={"x": jnp.float32(step)}, host={"s": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000001_step_200", "000002_step_5"]
    restored, host = checkpoints.restore(tmp_path, {"x": jnp.float32(0)})
    assert (float(restored["x"]), host) == (5.0, {"s": 5})
    assert checkpoints.latest_step(tmp_path) == 5
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoints.save(tmp_path, step=6, state={"x": jnp.float32(1)}, host={}, keep=0)


def save_counted(directory, number, keep=1):
    state = {"big": jnp.full(BIG, number, jnp.float32), "small": jnp.int32(number)}
    checkpoints.save(directory, step=number, state=state, host={"number": number}, keep=keep)


def read_counted(directory):
    """The number of the newest checkpoint, after making sure that all of it is of that number."""
    like = {"big": jnp.zeros(BIG), "small": jnp.int32(0)}
    restored, host = checkpoints.restore(directory, like)
    assert int(restored["small"]) == host["number"]
    assert np.all(np.asarray(restored["big"]) == host["number"])
    return host["number"]


class Crash(BaseException):
    """Stands for the death of the process: nothing may catch it."""


def test_a_death_at_every_file_operation_leaves_old_or_new(tmp_path, monkeypatch):
    """Dies before the k-th operation of a save, for every k there is."""
    keep = 2
    operations = [(os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"),
                  (os, "fsync"), (pathlib.Path, "mkdir"), (checkpoints.ocp.Checkpointer, "save")]
    finished = False
    for fatal in itertools.count():
        directory = tmp_path / str(fatal)
        save_counted(directory, 1, keep)
        save_counted(directory, 2, keep)
        counter = itertools.count()
        with monkeypatch.context() as patch:
            for owner, name in operations:
                original = vars(owner)[name]

                def dying(*args, original=original, **options):
                    if next(counter) == fatal:
                        raise Crash
                    return original(*args, **options)

                patch.setattr(owner, name, dying)
            try:
                save_counted(directory, 3, keep)
                finished = True
            except Crash:
                pass
        assert read_counted(directory) in ((3,) if finished else (2, 3))
        # A half-deleted old one must not pass for a checkpoint either.
        for folder in directory.glob("[0-9]*"):
            assert (folder / "checkpoint.json").exists()
            assert (folder / "state" / "manifest.ocdbt").exists()
        save_counted(directory, 4, keep)   # and the next process can go on
        assert read_counted(directory) == 4
        assert len([p for p in directory.iterdir() if not p.name.startswith(".")]) == keep
        assert not list(directory.glob(".*"))
        if finished:
            break
    assert fatal > 8   # the operations were indeed counted


def test_real_kills(tmp_path):
    """A process saves without pause and is killed; what it reported as saved is never lost."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import test_checkpoints as t\n"
        "number = int(sys.argv[3])\n"
        "while True:\n"
        "    number += 1\n"
        "    t.save_counted(sys.argv[1], number, keep=1)\n"
        "    print(number, flush=True)\n"
    )
    newest = 0
    for delay in (0.02, 0.11):
        command = [sys.executable, "-c", program, str(tmp_path), os.path.dirname(__file__)]
        with subprocess.Popen(
            [*command, str(newest)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        ) as process:
            reported = [int(process.stdout.readline()) for _ in range(3)]
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            reported += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        newest = read_counted(tmp_path)
        assert reported[0] == reported[-1] - len(reported) + 1
        assert newest in (reported[-1], reported[-1] + 1)


def test_other_model_is_named_leaf_by_leaf(tmp_path):
    checkpoints.save(tmp_path, step=1, host={}, state={
        "params": {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "gone": jnp.zeros(1)}})
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.restore(tmp_path, {
            "params": {"a": jnp.zeros((2, 5)), "b": jnp.zeros(4, jnp.int32), "new": jnp.zeros(1)}})
    message = str(caught.value)
    assert "params/a is float32[2, 3] in the checkpoint, expected float32[2, 5]" in message
    assert "params/b is float32[4] in the checkpoint, expected int32[4]" in message
    assert "params/new is not in the checkpoint" in message
    assert "params/gone is only in the checkpoint" in message
    assert "\n" not in message


def test_newer_format_is_refused(tmp_path):
    folder = checkpoints.save(tmp_path, step=1, state={"x": jnp.zeros(1)}, host={})
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(record | {"format_version": 99}))
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(checkpoints.CheckpointError, match="format version 99, written by a newer"):
        checkpoints.restore(tmp_path, {"x": jnp.zeros(1)})
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_damaged_checkpoint_names_the_way_out(tmp_path):
    like = {"x": jnp.zeros(1)}
    for number in range(2):
        checkpoints.save(tmp_path, step=number, state={"x": jnp.full(1, number)}, host={})
    folder = tmp_path / "000001_step_1"
    for file in (folder / "state").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointError, match="damaged.*Remove that folder"):
        checkpoints.restore(tmp_path, {"x": jnp.zeros(1, jnp.int32)})
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="missing or damaged"):
        checkpoints.restore(tmp_path, like)
    shutil.rmtree(folder)
    restored, _ = checkpoints.restore(tmp_path, {"x": jnp.zeros(1, jnp.int32)})
    assert int(restored["x"][0]) == 0


DAMAGES = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one byte flipped": lambda content: (
        content[: (half := len(content) // 2)] + bytes([content[half] ^ 255]) + content[half + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found(damage, tmp_path):
    state = {"big": jnp.ones(BIG), "small": jnp.arange(3)}
    folder = checkpoints.save(tmp_path, step=1, state=state, host={})
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        changed = DAMAGES[damage](content)
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        with pytest.raises(checkpoints.CheckpointError, match="damaged.*Remove that folder") as caught:
            checkpoints.restore(tmp_path, state)
        assert file.name in str(caught.value)
        file.write_bytes(content)
    assert_same_bits(checkpoints.restore(tmp_path, state)[0], state)


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path):
    state = {"big": jnp.ones(BIG), "small": jnp.arange(3)}
    folder = checkpoints.save(tmp_path, step=1, state=state, host={})
    record = json.loads((folder / "checkpoint.json").read_text())
    del record["files"]
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert_same_bits(checkpoints.restore(tmp_path, state)[0], state)
    # What makes a file unreadable is found by TensorStore then.
    largest = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(checkpoints.CheckpointError, match="damaged.*Remove that folder") as caught:
        checkpoints.restore(tmp_path, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"format_version": "1"}, {"format_version": True}, {"leaves": None}, {"leaves": {"x": 3}},
    {"leaves": {"x": {"shape": [1]}}}, {"host": 3}, {"step": "1"}, {"files": []},
])
def test_a_record_that_is_none_names_the_way_out(change, tmp_path):
    folder = checkpoints.save(tmp_path, step=1, state={"x": jnp.zeros(1)}, host={})
    record = json.loads((folder / "checkpoint.json").read_text()) | change
    (folder / "checkpoint.json").write_text(json.dumps(record))
    named = next(iter(change))
    with pytest.raises(checkpoints.CheckpointError, match=f"{named}.*Remove the folder"):
        checkpoints.restore(tmp_path, {"x": jnp.zeros(1)})
    if named in ("leaves", "host"):
        del record[named]
        (folder / "checkpoint.json").write_text(json.dumps(record))
        with pytest.raises(checkpoints.CheckpointError, match=f"{named}.*Remove the folder"):
            checkpoints.restore(tmp_path, {"x": jnp.zeros(1)})


@pytest.mark.parametrize("host, named", [
    ({"a": {1: 2}}, r"host\['a'\] has the key 1"),
    ({"a": [np.float32(1)]}, r"host\['a'\]\[0\] is float32"),
    ({"a": object()}, r"host\['a'\] is object"),
])
def test_host_state_that_json_would_change_is_refused(host, named, tmp_path):
    with pytest.raises(TypeError, match=named):
        checkpoints.save(tmp_path, step=1, state={"x": jnp.zeros(1)}, host=host)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leaf, named", [
    (1.5, "x of the state is float"), (jax.random.key(0), "x of the state is a typed key"),
])
def test_state_that_is_no_array_is_refused(leaf, named, tmp_path):
    with pytest.raises(TypeError, match=named):
        checkpoints.save(tmp_path, step=1, state={"x": leaf}, host={})


def test_saving_a_small_state_is_quick(tmp_path):
    """The bound is loose (machines are shared); the time itself is in the module's docstring."""
    state = {f"leaf{i}": jnp.ones((100, 100)) for i in range(40)}
    checkpoints.save(tmp_path, step=0, state=state, host={})
    times = []
    for step in range(1, 6):
        start = time.perf_counter()
        checkpoints.save(tmp_path, step=step, state=state, host={})
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_a_restored_state_is_called_by_the_program_of_a_fresh_one(tmp_path):
    """Arrays that are bound to a device would be another program to jax, compiled in the middle of a run."""
    state = make_state()
    checkpoints.save(tmp_path / "c", step=12, state=state, host=HOST)
    restored, _ = checkpoints.restore(tmp_path / "c", jax.eval_shape(lambda: state))
    assert restored.params["big"].nbytes > checkpoints._PACK_LIMIT_BYTES
    program = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    program(program(state))
    program(program(restored))
    assert program._cache_size() == 1


@pytest.mark.parametrize("method", ["save", "restore"])
def test_a_checkpoint_is_not_blamed_for_another_process(tmp_path, monkeypatch, method):
    """Which has died while all of them wrote or read it: the checkpoint is whole, and the disk not full."""
    state = make_state()
    checkpoints.save(tmp_path / "c", step=1, state=state, host=HOST)

    def fails(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, method, fails)
    monkeypatch.setattr(checkpoints.hosts, "may_be_of_another", lambda error: "Gloo" in str(error))
    with pytest.raises(ValueError, match="^UNKNOWN: Gloo"):
        if method == "save":
            checkpoints.save(tmp_path / "c", step=2, state=state, host=HOST)
        else:
            checkpoints.restore(tmp_path / "c", state)


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    state = make_state()
    checkpoints.save(tmp_path / "c", step=1, state=state, host=HOST)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "save", full)
    with pytest.raises(checkpoints.CheckpointError, match="cannot be written .*No space left.*make room"):
        checkpoints.save(tmp_path / "c", step=2, state=state, host=HOST)
    assert checkpoints.latest_step(tmp_path / "c") == 1
