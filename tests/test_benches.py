"""The benchmarks run: each as a program of its own, at the smallest size that it takes.

What they print is for people and not checked; that they still fit the functions they time is.
"""

import argparse
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_reinforce import MODEL, make_config, make_trajectories, policy

ROOT = pathlib.Path(__file__).parents[1]

COMMANDS = (
    "bench_cache_layout.py --slots 2 --filled 64 --length 64",
    "bench_core.py --rows 4 --length 16 --groups 2 --repeats 1",
    "bench_decode.py --model tiny --slots 2 --filled 64 --steps 4 --repeats 1 --dtype float32",
    "bench_packed.py --model tiny --length 128 --rows 1 --parts 1 --repeats 1 "
    "--compute_dtype float32",
    "bench_update.py --sizes 1M --rows 1 --length 16 --repeats 1",
    "bench_rollout.py --size tiny --turns 1 --episodes 2 --group-size 2 --repeats 1 --cache-dir {games}",
    "bench_rollout.py --size tiny --turns 1 --episodes 1 --per-turn --workers 1 --dtype bfloat16 "
    "--cache-dir {games}",
    "bench_rollout.py --size tiny --turns 2 --episodes 8 --alike --cache-dir {games}",
    "bench_rollout.py --size tiny --turns 2 --episodes 1 --spread --slots 2 --cache-dir {games}",
    "bench_environments.py --size tiny --turns 1 --games 1 --group_size 2 --slots 2 --waves 1 2 "
    "--workers 1 --repeats 1 --cache_dir {games}",
)


def test_what_counts_something_is_at_least_one(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    positive = importlib.import_module("counts").positive
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}, expected a whole number"):
            positive(text)


@pytest.fixture
def finished_run(tmp_path):
    """The workdir of a run of RL, as far as a benchmark reads it."""
    from jaxagentrl.models import pretrained

    config = make_config() | {"seed": 0}
    config["rl"] |= {"skip_zero_signal": True}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    pretrained.save(tmp_path / "model", MODEL, policy())
    (tmp_path / "trajectories").mkdir()
    records = [json.dumps(trajectory.to_json()) for trajectory in make_trajectories()]
    (tmp_path / "trajectories" / "rl_000001.jsonl").write_text("\n".join(records))
    return tmp_path


@pytest.mark.slow
def test_the_benchmark_of_trees_runs(finished_run):
    # Beside torch, too, whose loss and gradient norm must be ours.
    run(f"bench_trees.py {finished_run} --lengths 48 96 --repeats 1 --torch")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs(command, smoke_games):
    run(command.format(games=smoke_games))


def run(command):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / script, *options],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()


WRONG = (
    ("bench_trees.py /nope", "/nope holds no config.json: name the workdir"),
    ("plot_rollout.py /nope x.png", "/nope is no file that bench_rollout.py --record wrote"),
    ("plot_rollout.py README.md x.png", "README.md is no file that bench_rollout.py --record wrote"),
    ("bench_rollout.py --alike --turns 1", "--alike times the turns after the first"),
    ("bench_rollout.py --slots 3", "--slots must be a multiple of --waves, got 3 and 2"),
    ("bench_rollout.py --group-size 3", "--group-size 3 must divide --episodes (32)"),
    ("mutate_core.py --at foo:1 losses:20", "--at: there is no mutant at foo:1"),
)


@pytest.mark.parametrize(("command", "words"), WRONG)
def test_a_wrong_argument_gets_a_sentence(command, words):
    script, *options = command.split()
    command = [sys.executable, ROOT / "tools" / script, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("bench", "missing", "words"),
    [("bench_tunix", "tunix", "pip install google-tunix"),
     ("bench_alfworld", "alfworld.agents", "ALFWorld's own engine cannot be loaded: pip install")],
)  # fmt: skip
def test_a_library_that_is_missing_gets_a_sentence(monkeypatch, bench, missing, words):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setitem(sys.modules, missing, None)  # makes any import of it an ImportError
    with pytest.raises(SystemExit, match=words):
        importlib.import_module(bench).compare([], num_steps=1, seed=0)


def test_the_comparison_refuses_bfloat16():
    command = [sys.executable, ROOT / "tools" / "bench_rollout.py", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "goes with --per-turn, --alike or --spread" in done.stderr


class Numbered:
    """A pool that answers each request with its number."""

    def __init__(self):
        self.numbers, self.answers = itertools.count(), []

    def reset(self, handle, task):
        self.step(handle, "")

    def step(self, handle, text):
        self.answers.append((handle, next(self.numbers)))

    def poll(self, limit_s=None, until=None):
        answers, self.answers = self.answers, []
        return answers

    def wake(self):
        pass

    def release(self, handle):
        pass


def test_a_detached_pool_answers_as_recorded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    benches = importlib.import_module("bench_environments")
    recorder = benches.Recorder(Numbered())
    recorder.reset("a", None)
    recorder.reset("b", None)
    assert recorder.poll() == [("a", 0), ("b", 1)]
    recorder.step("b", "look")
    assert recorder.poll() == [("b", 2)]

    detached = benches.Recorded(recorder.answers)
    detached.reset("b", None)
    detached.reset("a", None)
    assert detached.poll() == [("b", 1), ("a", 0)]
    for _ in range(2):  # the second time, beyond what was recorded, the last of it again
        detached.step("b", "another command")
        assert detached.poll() == [("b", 2)]
    detached.release("b")
    detached.reset("b", None)
    assert detached.poll() == [("b", 1)]
