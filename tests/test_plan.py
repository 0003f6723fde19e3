"""The plan before a run: bytes that are really there, the largest shape executed, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_sharding import OPTIMIZER, UNTIED, params

from jaxagentrl import learner, optimizer, plan
from jaxagentrl.models import kv_cache, sharding

SAMPLING = dict(
    num_slots=8, num_waves=2, max_length=24, max_turn_tokens=4, cache_dtype="float32"
)
SHAPES = dict(length_buckets=(16, 24), tokens_per_part=96, row_multiple=4, packing=False)


def make_plan(mesh=None, packing=False, **options):
    chain = optimizer.make(**OPTIMIZER, **options)
    update = learner.make_update(learner.make_sft_loss(UNTIED), chain)
    trainable = sharding.place(jax.tree.map(jnp.asarray, params(UNTIED)), mesh)
    with sharding.use(mesh):
        made = plan.make(
            update,
            optimizer=chain,
            trainable=trainable,
            frozen=None,
            model=UNTIED,
            mesh=mesh,
            num_rows=16,
            work=plan.largest_work(16, **SHAPES | {"packing": packing}),
            width=24,
            sampling_options=SAMPLING,
            limit=10**9,
        )
    return made, update, trainable


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def address(leaf):
    return leaf.addressable_shards[0].data.unsafe_buffer_pointer()


def test_the_plan_counts_what_arrays_take_and_runs_the_largest_micro_batch():
    made, update, trainable = make_plan()
    assert made.always["parameters"] == sum(x.nbytes for x in jax.tree.leaves(trainable))
    assert made.always["optimizer"] == 2 * made.always["parameters"] + 8  # two counters
    cache = kv_cache.init(2, 4, 24, 4, 8, "float32")
    assert made.always["cache"] == 2 * sum(x.nbytes for x in jax.tree.leaves(cache))
    # Logits of the largest micro-batch are in it, and it is compiled once and for all.
    assert made.updating["update"] > 4 * 24 * UNTIED.vocab_size * 4
    assert update.accumulate._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert made.peak < 10**9
    made.check()


def test_on_a_mesh_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    made, _, trainable = make_plan(mesh, moment_dtype="bfloat16")
    device = mesh.devices.flat[0]
    assert made.always["parameters"] == bytes_on(device, trainable)
    assert made.always["parameters"] < bytes_on(device, make_plan()[2]) / 4
    assert made.always["optimizer"] < 1.2 * made.always["parameters"]
    # Without what lies on every device anyway: the scales of the norms.
    policy = trainable["policy"]
    leaves = jax.tree.leaves(policy)
    copies = jax.tree.leaves(sharding.for_decoding(policy, mesh))
    copied = [x for x, leaf in zip(copies, leaves, strict=True) if address(x) != address(leaf)]
    assert made.sampling["decoding copy"] == bytes_on(device, copied)
    assert len(copied) == len(leaves) - 3


def test_a_packed_step_is_measured_by_compiling_it():
    made, update, _ = make_plan(packing=True)
    assert made.updating["update"] > made.always["parameters"]
    assert "gradients" not in made.updating  # within the program


def test_a_run_that_does_not_fit_is_refused_with_advice():
    small = dataclasses.replace(make_plan()[0], limit=10**5)
    with pytest.raises(plan.PlanError, match="does not fit") as refusal:
        small.check()
    assert "memory per device" in str(refusal.value)
    assert "learner.tokens_per_part" in str(refusal.value)


def test_this_machine_says_what_it_has():
    assert 10**8 < plan.device_limit() * jax.local_device_count() < 10**14
