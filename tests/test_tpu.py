"""What TPUs are given. Their compiler runs without one where libtpu is installed (`tools/plan_for.py`)."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_sharding import OPTIMIZER, UNTIED, params

from jaxagentrl import engine, learner, objectives, optimizer, plan
from jaxagentrl.models import decoder

ROOT = pathlib.Path(__file__).parents[1]
TOOL = ROOT / "tools" / "plan_for.py"
SAMPLING = dict(
    num_slots=4,
    num_waves=1,
    max_length=128,
    max_turn_tokens=4,
    filled_buckets=(128,),
    width_buckets=(8,),
    row_divisors=(2,),
)
WINDOWS = dataclasses.replace(UNTIED, sliding_window=9, window_layers=(True, False))
MODELS = {"all alike": (UNTIED, "float32"), "int8": (UNTIED, "int8"), "windows": (WINDOWS, "float32")}


@pytest.fixture
def on_tpu(monkeypatch):
    """What is traced here is for TPUs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def operations(jaxpr):
    """All of a program, those of loops and calls within it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


@pytest.mark.parametrize("name", MODELS)
def test_no_cache_is_scattered_into(name, on_tpu):
    config, cache_dtype = MODELS[name]
    made = engine.Engine(config, stop_ids=(3,), cache_dtype=cache_dtype, **SAMPLING)
    held = jax.eval_shape(lambda: made._held[0])
    caches = {x.shape for x in jax.tree.leaves(held.caches)}
    assert {x[-1] for x in caches} <= {128, config.head_dim}
    for call in made._every_call(decoder.init(config, jax.random.key(0)), False):
        traced = call.program.trace(held=held, **call.arguments)
        scattered = {
            out.aval.shape for eqn in operations(traced.jaxpr) if "scatter" in eqn.primitive.name for out in eqn.outvars
        }
        assert not scattered & caches, (call.name, scattered)
        traced.lower(lowering_platforms=("tpu",))


def test_an_optimizer_step_with_the_kernel_for_tpus(on_tpu):
    chain = optimizer.make(**OPTIMIZER)
    update = learner.make_step(objectives.make_sft_loss(UNTIED, compute_dtype="bfloat16"), chain)
    state = plan._state(params(UNTIED), chain, None)
    shapes = dict(length_buckets=(128,), tokens_per_part=512, row_multiple=4)
    for packing in (False, True):
        works = plan.largest_works(8, packing=packing, **shapes)
        program = update.trace(state, *plan._nothing(8, 128), works[0], None).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in program.as_text()


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, "--config=configs/textworld_smoke.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@needs_libtpu
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_the_tool_compiles_a_run(axis):
    done = run("--topology=v5e:2x2", f"--config.mesh.{axis}=4")
    assert done.returncode == 0 and f"'{axis}': 4" in done.stdout, done.stderr
    for stage in ("imitation", "RL"):
        assert f"memory per device in {stage}: " in done.stdout
    assert done.stdout.count("compiled in") == 2


@needs_libtpu
def test_a_run_that_does_not_fit_is_refused_with_advice():
    done = run("--topology=v5e:2x2", "--config.memory_limit_gb=0.001")
    assert done.returncode == 1 and "What would help" in done.stderr and "Traceback" not in done.stderr


def test_a_topology_that_there_is_not():
    done = run("--topology=v5x:2x2")
    assert done.returncode == 1 and "error: --topology=v5x:2x2" in done.stderr and "v5e:2x4" in done.stderr
    assert "Traceback" not in done.stderr


@needs_libtpu
@pytest.mark.parametrize("name", MODELS)
def test_no_copy_of_a_cache_is_made(name, on_tpu):
    """By the compiler: its programs need less than a cache beside their arguments."""
    from jax.experimental import topologies

    config, cache_dtype = MODELS[name]
    config = dataclasses.replace(config, num_layers=8, window_layers=config.window_layers and (True, False) * 4)
    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    options = SAMPLING | dict(num_slots=64, max_length=1024, filled_buckets=(1024,), row_divisors=(16,))
    made = engine.Engine(config, stop_ids=(3,), cache_dtype=cache_dtype, **options)

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), tree)

    held, weights = abstract(made._held[0]), abstract(decoder.init(config, jax.random.key(0)))
    size = max(plan.per_device(cache.keys) for cache in held.caches)
    for call in made._every_call(weights, False):
        assert plan.program_bytes(call.program.lower(held=held, **call.arguments), "sampling") < size / 2, call.name


