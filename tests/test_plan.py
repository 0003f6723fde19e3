"""The plan before a run: bytes that are really there, the largest shape executed, refusals."""

import dataclasses
import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import OPTIMIZER, UNTIED, params

from jaxagentrl import imitate, learner, optimizer, plan, reinforce
from jaxagentrl.models import kv_cache, sharding
from jaxagentrl.packing import Packed

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

SAMPLING = dict(
    num_slots=8, num_waves=2, max_length=24, max_turn_tokens=4, cache_dtype="float32"
)
SHAPES = dict(length_buckets=(16, 24), tokens_per_part=96, row_multiple=4, packing=False)


def make_plan(mesh=None, *, shapes=SHAPES, limit=10**9, needs_reference=False, **options):
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
            works=plan.largest_works(16, **shapes),
            width=24,
            sampling_options=SAMPLING,
            needs_reference=needs_reference,
            limit=limit,
        )
    return made, update, trainable


@functools.cache
def plain():
    """The plan on one device, its update and its parameters."""
    return make_plan()


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
    made, update, trainable = plain()
    assert made.always["parameters"] == sum(x.nbytes for x in jax.tree.leaves(trainable))
    assert made.always["optimizer"] == 2 * made.always["parameters"] + 8  # two counters
    assert made.always["reference"] == 0
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
    assert made.always["parameters"] < bytes_on(device, plain()[2]) / 4
    assert made.always["optimizer"] < 1.2 * made.always["parameters"]
    # Without what lies on every device anyway: the scales of the norms.
    policy = trainable["policy"]
    leaves = jax.tree.leaves(policy)
    copies = jax.tree.leaves(sharding.for_decoding(policy, mesh))
    copied = [x for x, leaf in zip(copies, leaves, strict=True) if address(x) != address(leaf)]
    assert made.sampling["decoding copy"] == bytes_on(device, copied)
    assert len(copied) == len(leaves) - 3


def test_the_reference_of_a_kl_term_is_counted():
    made, _, trainable = make_plan(needs_reference=True)
    policy = sum(x.nbytes for x in jax.tree.leaves(trainable["policy"]))
    assert made.always["reference"] == policy
    assert made.peak == plain()[0].peak + policy
    small = dataclasses.replace(made, always={"reference": 10**6}, limit=10)
    with pytest.raises(plan.PlanError, match="reference: .*rl.kl.placement='none'"):
        small.check()


def shapes_of(works):
    """(rows, length) of each."""
    if isinstance(works[0], Packed):
        return [work.places.shape[1:] for work in works]
    return [(len(rows), length) for ((rows, length),) in works]


def test_the_largest_micro_batch_is_among_the_shapes_that_are_measured():
    """A shorter bucket has more rows; of those with fewer tokens than a longer one none is needed."""
    quickstart = runpy.run_path(str(CONFIGS / "textworld_quickstart.py"))["get_config"]().to_dict()
    shapes = reinforce.part_shapes(quickstart["learner"], None)
    # Tokens: 80 → 2560, 96 → 3072, 112 → 2688, 128 → 3072, 144 → 2304, 176 → 2816, 240 → 1920.
    assert shapes_of(plan.largest_works(256, **shapes)) == [(8, 240), (16, 176), (24, 128)]
    # Every shape that a run can make has no more tokens and no more length than one of them.
    found = plan.largest_works(256, **shapes)
    for length in range(1, 241):
        for rows, bucket in imitate.parts(np.arange(40), np.full(40, length), **without(shapes)):
            tokens = len(rows) * bucket
            assert any(tokens <= r * size and bucket <= size for r, size in shapes_of(found))
    packed = shapes | {"packing": True}
    assert shapes_of(plan.largest_works(256, **packed)) == [(8, 240)]
    # Several contexts in a row of 240: those of a step may all be short.
    several = plan.largest_works(16, longest_context=100, **packed)
    assert shapes_of(several) == [(24, 112), (32, 96)]
    assert several[0].places.shape[0] == 2  # 16 rows of two contexts each
    assert all(work.count == 1 for work in several)


def without(shapes):
    return {key: value for key, value in shapes.items() if key != "packing"}


def test_the_largest_micro_batch_is_measured_and_executed():
    # 4 rows of 24 are 96 tokens, 8 of 16 are 128.
    shapes = SHAPES | {"tokens_per_part": 128}
    works = plan.largest_works(16, **shapes)
    assert shapes_of(works) == [(4, 24), (8, 16)]
    made, update, trainable = make_plan(shapes=shapes)
    assert made.updating["update"] > plain()[0].updating["update"]
    assert update.accumulate._cache_size() == 1
    batch, targets = sharding.place_rows(plan._nothing(16, 24), None)
    ((rows, length),) = works[1]
    grads = learner.zeros_like(trainable)
    update.accumulate(trainable, grads, batch, targets, rows, length=length, frozen=None)
    assert update.accumulate._cache_size() == 1  # it is the one that was executed


def test_a_packed_step_is_measured_and_executed_on_a_state_of_zeros():
    packed = SHAPES | {"packing": True}
    made, update, trainable = make_plan(shapes=packed)
    assert made.updating["update"] > made.always["parameters"]
    assert "gradients" not in made.updating  # within the program
    assert made.always["batch"] > plain()[0].always["batch"]  # the index
    assert update.step._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    # Beside the parameters there is no room for a second set of them.
    tight, update, _ = make_plan(shapes=packed, limit=made.peak - made.always["cache"])
    assert tight.updating == made.updating and update.step._cache_size() == 0


def test_a_run_that_does_not_fit_is_refused_with_advice():
    small = dataclasses.replace(plain()[0], limit=10**5)
    with pytest.raises(plan.PlanError, match="does not fit") as refusal:
        small.check()
    assert "memory per device" in str(refusal.value)
    assert "learner.tokens_per_part" in str(refusal.value)


def test_this_machine_says_what_it_has():
    assert 10**8 < plan.device_limit() * jax.local_device_count() < 10**14
