"""The benchmarks run: each as a program of its own, at the smallest size that it takes.

What they print is for people and not checked; that they still fit the functions they time is.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

COMMANDS = (
    "bench_cache_layout.py --slots 2 --filled 64 --length 64",
    "bench_core.py --rows 4 --length 16 --groups 2 --repeats 1",
    "bench_decode.py --model tiny --slots 2 --filled 64 --steps 4 --repeats 1 --dtype float32",
    "bench_packed.py --model tiny --length 128 --rows 1 --parts 1 --repeats 1 "
    "--compute_dtype float32",
    "bench_update.py --sizes 1M --rows 1 --length 16 --repeats 1",
    "bench_rollout.py --size tiny --turns 1 --episodes 1 --repeats 1 --cache-dir {games}",
    "bench_rollout.py --size tiny --turns 1 --episodes 1 --per-turn --cache-dir {games}",
    "bench_rollout.py --size tiny --turns 2 --episodes 1 --spread --slots 1 --cache-dir {games}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs(command, smoke_games):
    script, *options = command.format(games=smoke_games).split()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / script, *options],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip()
