"""The whole run on a mesh, and in two processes: the metrics of one device, line by line."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxagentrl import hosts, metrics

ROOT = pathlib.Path(__file__).parents[1]
# Every stage and a critic-free update, as small as it gets.
SHORT = (
    "--config.sft.num_steps=12",
    "--config.sft.save_every=4",
    "--config.rl.num_iterations=3",
    "--config.rl.eval_every=1",
    "--config.rl.save_every=1",
    "--config.sft.log_every=1",
    # On every mesh the same micro-batches, whose padding is among the metrics.
    "--config.learner.row_multiple=8",
    # Each process chooses for itself, from what all have played.
    "--config.rl.filter.name=uncertainty",
    "--config.rl.filter.fraction=0.5",
    # What is drawn depends on what all have won.
    "--config.rl.curriculum.order=learnability",
    # An iteration plays twice; in episodes as short as these there is hardly a turn to branch at.
    "--config.rl.branching.members=2",
)


def start(workdir, cache, *options, devices=1):
    """The real command line in a new process with this many CPU devices."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jaxagentrl.main",
            f"--config={ROOT / 'configs' / 'textworld_smoke.py'}",
            f"--workdir={workdir}",
            f"--config.env.cache_dir={cache}",
            f"--config.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
            *SHORT,
            *options,
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def lines(workdir) -> list[dict]:
    return [metrics.without_time(line) for line in metrics.read(workdir / "metrics.jsonl")]


def assert_something_was_learned(workdir):
    """Episodes earned credit, so that comparing metrics compares RL's optimizer step, too."""
    norms = [line["optimizer/grad_norm"] for line in lines(workdir) if line["phase"] == "rl"]
    assert len(norms) == 3 and max(norms[:-1]) > 1e-3, norms


def assert_same_metrics(workdir, other):
    """Counts are equal; losses up to what the order of a float32 sum changes."""
    ours, theirs = lines(workdir), lines(other)
    assert len(ours) == len(theirs) > 6
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(two[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
            else:
                assert two[key] == value, key


@pytest.fixture(scope="module")
def alone(tmp_path_factory, smoke_games):
    """The workdir of the run on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir, smoke_games))
    assert_something_was_learned(workdir)
    return workdir


@pytest.mark.slow
def test_a_mesh_of_eight_devices(alone, tmp_path, smoke_games):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    (output,) = finish(start(tmp_path / "run", smoke_games, *mesh, devices=8))
    assert "memory per device" in output and "decoding copy" in output
    assert_same_metrics(alone, tmp_path / "run")


def test_two_processes_of_two_devices(alone, tmp_path, smoke_games):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = [
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=2",
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
    ]
    workdir = tmp_path / "run"
    finish(
        *(
            start(workdir, smoke_games, *options, f"--process_id={number}", devices=2)
            for number in range(2)
        )
    )
    assert_same_metrics(alone, workdir)
    assert lines(workdir) == lines(workdir / "processes" / "001")
    assert (workdir / "model" / "model.safetensors").exists()
    assert not (workdir / "processes" / "001" / "model").exists()


def run_two(program: str, while_running=None, arguments=()) -> list[tuple[int, str]]:
    """(exit status, output) of two processes of this program, which gets the coordinator and its number."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, coordinator, str(number), *arguments],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        if while_running is not None:
            while_running(processes)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


ONE_FAILS = """
import sys
from jaxagentrl import hosts
hosts._LEAVING_S = 3
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
if sys.argv[2] == "1":
    sys.exit("error: no space left")
hosts.gather("a part")
"""


def test_where_one_process_ends_the_others_do_too():
    """With jax's own setting all would wait for five minutes."""
    (first, _), (second, output) = run_two(ONE_FAILS)
    assert first and second and "error: no space left" in output


WAITS = """
import sys, time
from jaxagentrl import hosts
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
print("started", flush=True)
time.sleep(100)
"""


def test_processes_end_when_they_are_told_to():
    """As Slurm and Kubernetes tell them, by SIGTERM, which jax would catch."""

    def terminate(processes):
        for process in processes:
            while process.stdout.readline() != "started\n":
                assert process.poll() is None
        for process in processes:
            process.terminate()

    assert [status for status, _ in run_two(WAITS, terminate)] == [-signal.SIGTERM] * 2


DIFFER = """
import pathlib, sys
from jaxagentrl import hosts, train, workdir
coordinator, number, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
hosts.start(coordinator, 2, number)
train._check_processes_agree({"seed": 0, "pool": {"num_workers": number}})
try:
    train._open(folder, {"seed": 1})
except workdir.WorkdirError as error:
    print("refused:", error, flush=True)
train._check_processes_agree({"seed": number, "pool": {"num_workers": 1}})
"""


def test_what_one_process_refuses_all_refuse(tmp_path):
    """Another config than the others', and a workdir, which the first alone looks into: nobody waits for it."""
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for status, output in run_two(DIFFER, arguments=[str(tmp_path)]):
        assert status == 1 and "different configs: seed. seed is 0 in process 0 and 1 in process 1" in output
        assert f"refused: {tmp_path} holds parts of a run" in output


@pytest.mark.parametrize("coordinator", ["host0", "host0:", ":1234", "host0:http", "host0:70000"])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
    with pytest.raises(ValueError, match="--coordinator must be host:port of process 0, such as host0:1234"):
        hosts.start(coordinator, 2, 0)
