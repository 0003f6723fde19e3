"""What several GPUs are given. Their compiler runs without one where jax's plugin is installed (`tools/plan_for.py`)."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import MODEL, OPTIMIZER, UNTIED, fresh_state
from test_tpu import operations

from jaxagentrl import imitate, learner, objectives, optimizer, plan
from jaxagentrl.models import layers, sharding

TOOLS = pathlib.Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import absent_gpus  # noqa: E402

MESHES = [(4, 1, 1), (1, 4, 1), (1, 1, 2), (1, 2, 2)]


@pytest.mark.parametrize("axes", [("tensor", "fsdp"), ("fsdp", "tensor")])
def test_a_gathered_table_has_a_gradient_that_is_split(axes):
    """What gathers it is not to hold the gradient, which would be summed whole on every device."""
    table, mesh = jnp.ones((64, 32)), sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def loss(table):
        return jnp.sum(sharding.gathered(table, *axes) ** 2)

    assert sharding.gathered(table, *axes) is table  # without a mesh
    with sharding.use(mesh):
        program = jax.make_jaxpr(jax.grad(loss))(table)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(table), 2 * table)
    found = [x.params["sharding"].spec for x in operations(program.jaxpr) if x.primitive.name == "sharding_constraint"]
    gathered = [axis if axis == "tensor" else None for axis in axes]
    split, whole = (sharding.spec(x, table.shape, mesh.shape) for x in (axes, gathered))
    assert found == [split, whole, split]


@pytest.fixture
def on_h100(monkeypatch):
    """What is traced here is for such GPUs; their kernels pass for tried."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with absent_gpus.pretended(absent_gpus.KINDS["h100"]):
        yield


def traced(model, mesh):
    """An imitation step of packed rows, for a mesh."""
    chain = optimizer.make(**OPTIMIZER)
    update = learner.make_step(objectives.make_sft_loss(model, compute_dtype="bfloat16"), chain)
    rows = np.arange(8)
    work = imitate.split(rows, np.full(8, 16), shape=(8, 64), most_rows=8, length_buckets=(64,), tokens_per_part=256,
                         row_multiple=sharding.num_row_shards(mesh), packing=True)
    state = fresh_state(model, None)  # of this machine, before devices that may not be there are in use
    with sharding.use(mesh):
        batch = plan._abstract_rows(plan._nothing(8, 64), mesh)
        return update.trace(sharding.abstract(state, mesh), *batch, work, None)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_packed_rows_have_their_kernel_on_every_mesh(sizes, on_h100):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    step = traced(UNTIED, mesh)
    with sharding.use(mesh):
        program = step.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$fmha\w+", program)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_a_gated_product_has_the_gradients_of_its_formula(activation):
    gate, up, dy = (jax.random.normal(jax.random.key(i), (5, 7)) for i in range(3))

    def plain(gate, up):
        return layers.ACTIVATIONS[activation](gate) * up

    wanted, ours = (jax.vjp(f, gate, up) for f in (plain, functools.partial(layers._gated_on_gpu, activation)))
    np.testing.assert_array_equal(ours[0], wanted[0])
    for one, two in zip(ours[1](dy), wanted[1](dy), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize(
    "name, found",
    [("h100:8", ("h100", 1, 8)), ("a100-40:2x4", ("a100-40", 2, 4)), ("v5e:2x4", None), ("h100", None), ("h99:8", None)],
)
def test_names_of_gpus(name, found):
    parsed = absent_gpus.parse(name)
    assert parsed == (found and (absent_gpus.KINDS[found[0]], *found[1:]))


def has_compiler() -> bool:
    """jax's plugin for CUDA, whichever version of CUDA it is of."""
    names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, names))


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs jax's plugin for CUDA")


@needs_compiler
@pytest.mark.parametrize("axis", sharding.AXES)
def test_the_tool_compiles_a_run(axis):
    command = [sys.executable, TOOLS / "plan_for.py", "--topology=h100:4", "--config=configs/textworld_smoke.py"]
    done = subprocess.run(
        [*command, f"--config.mesh.{axis}=4"], cwd=TOOLS.parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and f"'{axis}': 4" in done.stdout, done.stderr
    for stage in ("imitation", "RL"):
        assert f"memory per device in {stage}: " in done.stdout


@needs_compiler
@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
def test_tables_are_gathered_as_they_are_read_and_their_gradients_scattered(model, on_h100):
    """By the compiler: no gradient of all of a table on every device, and in bfloat16 what is gathered of it."""
    devices = absent_gpus.devices(absent_gpus.KINDS["h100"], 1, 4)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1, devices=devices)
    step = traced(model, mesh)
    with sharding.use(mesh):
        program = step.lower().compile().as_text()
    sizes = (model.vocab_size, model.hidden_size)

    def shapes(operation):
        lines = [line.partition(f" {operation}-done(") for line in program.splitlines()]
        found = [re.findall(r"(\w+)\[([\d,]*)\]", before) for before, name, _ in lines if name]
        return [(dtype, [int(n) for n in dims.split(",") if n]) for each in found for dtype, dims in each]

    assert {dtype for dtype, dims in shapes("all-gather") if sorted(dims) == sorted(sizes)} == {"bf16"}
    assert max(np.prod(dims, dtype=int) for _, dims in shapes("all-reduce")) < np.prod(sizes)


@needs_compiler
def test_both_gradients_of_a_gated_product_are_one_kernel(on_h100):
    (device,) = absent_gpus.devices(absent_gpus.KINDS["h100"], 1, 1)
    where = jax.sharding.SingleDeviceSharding(device)
    x, narrow, wide = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in ((2048, 128), (128, 512), (512, 128))
    )

    def feed_forward(x, gate, up, down):
        return layers._gated("silu", x @ gate, x @ up) @ down

    gradient = jax.jit(lambda *arrays: jax.vjp(feed_forward, *arrays)[1](arrays[0]))
    program = gradient.lower(x, narrow, narrow, wide).compile().as_text()
    both = r"= \(bf16\[2048,512\]\S*, bf16\[2048,512\]\S*\) fusion\("
    assert len(re.findall(both, program)) == 1
