"""Meshes: every factorization of eight devices computes what one device does."""

import dataclasses
import functools
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxagentrl import hosts, learner, objectives, optimizer
from jaxagentrl.models import decoder, sharding
from jaxagentrl.packing import Rows, pack
from jaxagentrl.types import TrainState, TrajectoryBatch

# As deep models do it.
pytestmark = pytest.mark.usefixtures("looped_layers")

MODEL = decoder.DecoderConfig(
    vocab_size=61,  # a prime: no axis divides it
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=48,
    attention_bias=True,
)
UNTIED = dataclasses.replace(MODEL, vocab_size=64, tie_embeddings=False, attention_bias=False)
ROWS, LENGTH = 16, 24
MAX_NORM = 0.1
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
RL = dict(
    surrogate="clipped",
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=3.0,
    temperature=0.8,
    kl_coefficient=0.1,
    kl_estimator="k2",
    entropy_coefficient=0.01,
    value_coefficient=0.5,
    value_clip=0.5,
    importance_cap=None,
    old_is_current=False,
)
OPTIMIZER = dict(
    learning_rate=1e-2,
    warmup_steps=0,
    decay_steps=None,
    final_fraction=1.0,
    b1=0.9,
    b2=0.95,
    weight_decay=0.1,
    max_grad_norm=1.0,
)


@functools.cache
def lengths() -> np.ndarray:
    return np.random.default_rng(1).integers(4, LENGTH + 1, ROWS)


@functools.cache
def data() -> tuple[TrajectoryBatch, learner.Targets]:
    """A ragged batch and targets of every kind, on the host."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    valid = np.arange(LENGTH)[None] < lengths()[:, None]
    action = valid & (rng.random(shape) < 0.5) & (np.arange(LENGTH)[None] > 0)
    read = valid & ~action & (np.arange(LENGTH)[None] > 0)

    def numbers(mask, scale=1.0):
        return np.where(mask, scale * rng.standard_normal(shape), 0.0).astype(np.float32)

    zeros = np.zeros(shape, np.float32)
    batch = TrajectoryBatch(
        tokens=np.where(valid, rng.integers(0, 60, shape), 0).astype(np.int32),
        valid_mask=valid,
        action_mask=action,
        turn_ids=np.where(valid, 0, -1).astype(np.int32),
        turn_ends=np.zeros(shape, bool),
        sampler_logprobs=numbers(action) - 4,
        rewards=zeros,
        discounts=zeros,
        group_ids=np.zeros(ROWS, np.int32),
    )
    targets = learner.Targets(
        advantages=numbers(action),
        returns=numbers(action),
        old_logprobs=np.where(action, -4.1, 0).astype(np.float32),
        old_values=numbers(action, 0.1),
        ref_logprobs=np.where(action, -4.2, 0).astype(np.float32),
        weights=(action / action.sum()).astype(np.float32),
        mean_weights=(action / action.sum()).astype(np.float32),
        value_weights=(action / action.sum()).astype(np.float32),
        observation_weights=(0.5 * read / read.sum()).astype(np.float32),
    )
    return batch, targets


@functools.cache
def params(model: decoder.DecoderConfig) -> learner.Params:
    made = learner.with_critic(
        {"policy": decoder.init(model, jax.random.key(0))}, model, critic="head"
    )
    made["value_head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), (model.hidden_size,))
    return jax.device_get(made)


def fresh_state(model, mesh):
    weights = jax.tree.map(jnp.asarray, params(model))
    opt_state = optimizer.make(**OPTIMIZER).init(weights)
    state = TrainState(jnp.int32(0), jnp.zeros((), jnp.int32), weights, opt_state)
    return sharding.place(state, mesh)


def test_the_moments_of_two_optimizers_lie_where_their_parameters_do():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    weights = jax.tree.map(jnp.asarray, params(UNTIED))
    chain = optimizer.with_critic(optimizer.make(**OPTIMIZER), optimizer.make(**OPTIMIZER))
    placed = sharding.place((weights, chain.init(weights)), mesh)
    where = {x.shape: x.sharding for x in jax.tree.leaves(placed[0]["policy"])}
    moments = [x for x in jax.tree.leaves(placed[1]) if x.ndim >= 2]
    assert len(moments) == 2 * sum(x.ndim >= 2 for x in jax.tree.leaves(weights))
    assert all(x.sharding == where[x.shape] for x in moments if x.ndim == 3)


def rows_in_parts(parts, length=LENGTH):
    """Work: rows of the batch in these micro-batches."""
    return (Rows(np.array(parts, np.int32), np.int32(len(parts)), length),)


def whole_rows():
    return rows_in_parts([range(ROWS)])


def step_for_gradients(model, mesh, loss_fn):
    """A step whose optimizer state is the gradient afterwards, and what it takes before its work."""
    chain = optax.trace(0.0)
    state = fresh_state(model, mesh)
    state = dataclasses.replace(state, opt_state=chain.init(state.params))
    state = sharding.place(state, mesh)
    return learner.make_step(loss_fn, chain), (state, *sharding.place_rows(data(), mesh))


def gradients(model, mesh, loss_fn, work=None):
    """(metrics, gradient) of a loss on a mesh."""
    with sharding.use(mesh):
        step, arguments = step_for_gradients(model, mesh, loss_fn)
        state, metrics = step(*arguments, whole_rows() if work is None else work)
    del metrics["optimizer/grad_norm"]
    return metrics, state.opt_state.trace


@functools.cache
def imitation_on_one_device():
    return jax.device_get(gradients(UNTIED, None, objectives.make_sft_loss(UNTIED)))


def assert_close(one, other):
    """Float32 ≤ 1e-5, absolute: losses are of order 1, gradients below."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one, other)


def assert_placed(tree, mesh):
    for leaf, where in zip(
        jax.tree.leaves(tree), jax.tree.leaves(sharding.shardings(tree, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (leaf.sharding, where)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_factorization_gives_the_loss_and_gradient_of_one_device(shape):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    metrics, grads = gradients(UNTIED, mesh, objectives.make_sft_loss(UNTIED))
    assert_close(imitation_on_one_device(), jax.device_get((metrics, grads)))
    assert_placed(grads, mesh)


@functools.cache
def rl_on_one_device():
    return jax.device_get(gradients(MODEL, None, objectives.make_rl_loss(MODEL, **RL)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)], ids=str)
def test_the_whole_rl_loss_with_a_tied_prime_vocabulary(shape):
    """On all three axes, and on each alone."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    found = gradients(MODEL, mesh, objectives.make_rl_loss(MODEL, **RL))
    assert_close(rl_on_one_device(), jax.device_get(found))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 2, 1), (4, 1, 2), (8, 1, 1)], ids=str)
def test_several_micro_batches_by_parts_of_the_mesh_are_one_devices_step(shape):
    """One of eight rows, two of four: too few for `data` = 8, which leaves them to the compiler."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    rows = np.arange(ROWS)
    work = rows_in_parts([rows[:8]]) + rows_in_parts([rows[8:12], rows[12:]])
    loss_fn = objectives.make_rl_loss(MODEL, **RL)
    one, other = (jax.device_get(gradients(MODEL, where, loss_fn, work)) for where in (None, mesh))
    assert_close(one, other)
    assert one[0]["policy/sampler_gap_max"] > 0


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_parts_of_the_mesh_sum_their_gradients_once_a_step(is_packed):
    """Not in loops over micro-batches or layers: in the program's entry, which comes last in its text."""
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
    work = (packed_rows(tokens_per_part=8 * LENGTH, row_multiple=8),) if is_packed else whole_rows()
    with sharding.use(mesh):
        step, arguments = step_for_gradients(UNTIED, mesh, objectives.make_sft_loss(UNTIED))
        program = step.lower(*arguments, work).compile().as_text()
    loops, _, entry = program.partition("\nENTRY ")
    assert " while(" in entry and " all-reduce(" in entry
    assert " while(" in loops and " all-reduce(" not in loops


def under_pmap(loss_fn, chain, num_devices):
    """`learner.make_step` as a user of pmap has it: gradients are summed over devices, since tokens have
    their weights in the loss of the whole batch, and every device applies the optimizer to the sum."""

    def step(state, batch, targets):
        layout = {}
        grads, metrics = learner._gradient(loss_fn, state.params, None, batch, targets, layout)
        state, applied = learner._apply(chain, state, jax.lax.psum(grads, "devices"))
        highest = {
            key: jax.lax.pmax(x, "devices") for key, x in metrics.items() if key.endswith("_max")
        }
        return state, jax.lax.psum(metrics, "devices") | highest | applied

    return jax.pmap(step, "devices", devices=jax.devices()[:num_devices])


@pytest.mark.parametrize("name", ["imitation", "RL"])
@pytest.mark.parametrize("rule", ["momentum", "Adam"])
def test_an_update_step_under_pmap_is_that_of_one_device(name, rule):
    """The same parameters on every device, though the gradient is clipped by its global norm."""
    model = {"imitation": UNTIED, "RL": MODEL}[name]
    loss_fn = objectives.make_sft_loss(model) if name == "imitation" else objectives.make_rl_loss(model, **RL)
    chain, num_steps = optimizer.make(**OPTIMIZER | {"max_grad_norm": MAX_NORM}), 1
    if rule == "momentum":  # Adam's later steps amplify rounding
        sgd = optax.sgd(1.0, momentum=0.9)
        chain, num_steps = optax.chain(optax.clip_by_global_norm(MAX_NORM), sgd), 3
    alone = fresh_state(model, None)
    alone = dataclasses.replace(alone, opt_state=chain.init(alone.params))
    everywhere = jax.tree.map(lambda x: jnp.stack([x] * 4), alone)
    batch, targets = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), data())
    step, parallel = learner.make_step(loss_fn, chain), under_pmap(loss_fn, chain, 4)
    for _ in range(num_steps):
        alone, expected = step(alone, *data(), whole_rows())
        everywhere, metrics = parallel(everywhere, batch, targets)
        assert expected["optimizer/grad_norm"] > 2 * MAX_NORM
    alone, everywhere = jax.device_get((alone, everywhere))
    if rule == "Adam":
        alone, everywhere = (without_signs_of_rounding(x, alone) for x in (alone, everywhere))
    for index in range(4):
        here = jax.tree.map(lambda x, index=index: x[index], (everywhere, metrics))
        assert_close((alone, expected), here)


def without_signs_of_rounding(state, alone):
    """A state, on one device or on several, without parameters whose gradient is rounding: Adam's first
    step is a gradient's sign, of length `learning_rate` however small the gradient is. Clipped gradients
    agree to 7e-9; those below 1e-7 are one in a thousand."""
    gradient = jax.tree.map(lambda x: np.abs(x) / (1 - OPTIMIZER["b1"]), alone.opt_state[1][0].mu)
    is_rounding = jax.tree.map(lambda x: (x > 0) & (x < 1e-7), gradient)
    counts = [(x.sum(), x.size) for x in jax.tree.leaves(is_rounding)]
    assert sum(count for count, _ in counts) < 0.01 * sum(size for _, size in counts)
    kept = jax.tree.map(lambda x, dropped: np.where(dropped, 0.0, x), state.params, is_rounding)
    return dataclasses.replace(state, params=kept)


def packed_rows(**options):
    return pack(
        np.arange(ROWS),
        lengths(),
        shape=(ROWS, LENGTH),
        **dict(length=LENGTH, tokens_per_part=4 * LENGTH, row_multiple=4) | options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 1)], ids=str)
def test_a_packed_step_on_a_mesh_changes_parameters_as_one_device_does(shape):
    """Plain gradient descent: its step is the gradient, and Adam's would amplify rounding."""
    loss_fn = objectives.make_sft_loss(UNTIED)
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    outcomes = []
    for where, work in ((None, whole_rows()), (mesh, (packed_rows(),))):
        chain = optax.trace(0.9)
        with sharding.use(where):
            state = fresh_state(UNTIED, where)
            state = dataclasses.replace(state, opt_state=chain.init(state.params))
            state = sharding.place(state, where)
            batch, targets = sharding.place_rows(data(), where)
            state, metrics = learner.make_step(loss_fn, chain)(state, batch, targets, work)
        if where is not None:
            assert_placed(state, where)
        outcomes.append(jax.device_get((state, metrics)))
    assert_close(*outcomes)


def test_a_sharded_cache_decodes_the_same_tokens():
    model, prompt = UNTIED, np.arange(12, dtype=np.int32).reshape(4, 3)
    counts = np.full(4, 3, np.int32)
    outcomes = []
    for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        local = None if mesh is None else sharding.decoding_mesh(mesh)
        with sharding.use(local):
            policy = sharding.for_decoding(
                sharding.place(jax.tree.map(jnp.asarray, params(model)), mesh)["policy"], mesh
            )
            caches = decoder.init_caches(model, 4, 8, "float32", most=3)
            (cache,) = caches
            if local is not None:
                places = sharding.abstract_cache(cache.keys, local).sharding
                assert cache.keys.sharding.is_equivalent_to(places, 5)
                assert cache.keys.addressable_shards[0].data.shape == (2, 1, 2, 8, 8)
            program = jax.jit(functools.partial(decoder.hidden_cached, model, filled=8))
            hidden, caches = program(policy, prompt, caches, None, 0 * counts, counts)
        outcomes.append(jax.device_get((hidden, caches)))
    assert_close(*outcomes)


def test_rules_cover_the_optimizer_and_name_what_they_do_not_know():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    for model in (MODEL, UNTIED):
        state = fresh_state(model, mesh)
        assert_placed(state, mesh)
        moment = state.opt_state[1][0].mu["policy"]["layers"]["mlp"]["down"]["kernel"]
        assert {shard.data.shape for shard in moment.addressable_shards} == {(2, 24, 8)}
    embedding = fresh_state(MODEL, mesh).params["policy"]["embed"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(61, 8)}
    unknown = {"policy": {"layers": {"mlp": {"side": {"kernel": np.zeros((2, 3, 4))}}}}}
    with pytest.raises(sharding.ShardingError, match="policy/layers/mlp/side/kernel"):
        sharding.place(unknown, mesh)
    with pytest.raises(sharding.ShardingError, match="3 dimensions, but its rule"):
        sharding.axes_of("lm_head/kernel", 3)


@pytest.mark.parametrize(
    "sizes, words",
    [((3, 1, 4), "does not fit the 8 devices"), ((-1, -1, 1), "-1"), ((0, 1, 1), "mesh.data is 0"),
     ((-1, 3, 1), "does not fit")],
)
def test_meshes_that_cannot_be_are_refused(sizes, words):
    with pytest.raises(sharding.ShardingError, match=words):
        sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


def test_a_mesh_of_one_device_is_none():
    assert sharding.make_mesh(data=1, fsdp=1, tensor=1) is None
    assert sharding.make_mesh(data=-1, fsdp=2, tensor=1).shape["data"] == 4


def test_parameters_go_to_decoding_straight_into_their_places(monkeypatch):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    policy = sharding.place(params(UNTIED)["policy"], mesh)
    whole = sum(x.nbytes for x in jax.tree.leaves(policy))

    def refuse(*_):
        raise AssertionError("whole on every device, or by way of the host")

    # Two processes in all but name; each would take its own devices' shards.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "gather", refuse)
    monkeypatch.setattr(jax, "device_put", refuse)
    with sharding.use(mesh):
        copy = sharding.for_decoding(policy, mesh)
    held = [
        [x.addressable_shards[index].data for x in jax.tree.leaves(copy)] for index in range(8)
    ]
    norms = 3 * 4 * 2 * 32  # two scales of two layers and the final one, at most
    assert all(sum(part.nbytes for part in parts) <= whole / 2 + norms for parts in held)
    assert_placed(copy, sharding.decoding_mesh(mesh))
    assert_close(jax.device_get(policy), jax.device_get(copy))


def test_parameters_that_lie_as_decoding_wants_them_are_not_copied():
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
    policy = sharding.place(params(UNTIED)["policy"], mesh)
    copy = sharding.for_decoding(policy, mesh)
    for one, other in zip(jax.tree.leaves(policy), jax.tree.leaves(copy), strict=True):
        for shard, part in zip(one.addressable_shards, other.addressable_shards, strict=True):
            assert shard.data.unsafe_buffer_pointer() == part.data.unsafe_buffer_pointer()


@dataclasses.dataclass(frozen=True)
class Device:
    """Enough of one to make meshes of."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


def test_a_tensor_group_of_two_processes_is_refused():
    """Also where every process has as many devices as a group."""
    devices = np.array([Device(id, process_index=id % 2) for id in range(4)])
    with pytest.raises(sharding.ShardingError, match="several processes in one tensor group"):
        sharding.decoding_mesh(sharding._mesh(devices.reshape(2, 1, 2)))
    local = sharding.decoding_mesh(sharding._mesh(devices[[0, 2, 1, 3]].reshape(2, 1, 2)))
    assert [device.id for device in local.devices.flat] == [0, 2]


def test_the_first_process_gets_one_tensor_after_another(monkeypatch):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    policy = sharding.place(params(UNTIED)["policy"], mesh)
    assert sharding.to_first(policy, mesh) is policy  # one process reads its devices anyway
    sizes, gather = [], sharding.gather

    def spy(leaf, mesh):
        sizes.append(leaf.nbytes)
        return gather(leaf, mesh)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "gather", spy)
    found = sharding.to_first(policy, mesh)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(policy), found)
    assert max(sizes) == policy["lm_head"]["kernel"].nbytes  # larger than any one layer's
    assert len(sizes) == 3 + UNTIED.num_layers * 9
    # The other takes part and keeps nothing.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    sizes.clear()
    assert jax.tree.leaves(sharding.to_first(policy, mesh)) == []
    assert len(sizes) == 3 + UNTIED.num_layers * 9


@pytest.mark.parametrize(
    "variables, ids",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, []),  # one task per node: all it sees
        ({"SLURM_NTASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, None),  # one of what they all see
        # --gpus-per-task=1: that one, whatever the task's number
        ({"SLURM_NTASKS": "32", "SLURM_STEP_NUM_NODES": "4", "CUDA_VISIBLE_DEVICES": "5"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_which_devices_of_a_host_a_process_takes(variables, ids):
    assert hosts._device_ids(variables) == ids


def test_under_slurm_a_process_alone_on_its_node_sees_all_devices():
    """jax's own detection of Slurm, in a process of its own, with the variables that srun sets."""
    program = (
        "import jax\n"
        "from jaxagentrl import hosts\n"
        "hosts.start()\n"
        "print(jax.config.values['jax_cuda_visible_devices'], jax.local_device_count())\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_NUM_CPU_DEVICES": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["all", "3"]
