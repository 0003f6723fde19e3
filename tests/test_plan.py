"""The plan before a run: bytes that are really there, the largest shape executed, refusals."""

import dataclasses
import functools
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import OPTIMIZER, UNTIED, params

from jaxagentrl import (
    compiles,
    engine,
    imitate,
    learner,
    objectives,
    optimizer,
    plan,
    plan_sampling,
    reinforce,
    sampling,
    settings,
    states,
    trees,
)
from jaxagentrl.models import lora, sharding

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

SAMPLING = dict(
    num_slots=8,
    num_waves=2,
    max_length=24,
    max_turn_tokens=4,
    filled_buckets=(24,),
    width_buckets=(4, 8),
    row_divisors=(1, 2),
    cache_dtype="float32",
)
SHAPES = dict(length_buckets=(16, 24), tokens_per_part=96, row_multiple=4, packing=False)


def make_plan(mesh=None, *, shapes=SHAPES, limit=10**9, needs_reference=False, **options):
    chain = optimizer.make(**OPTIMIZER, **options)
    update = learner.make_step(objectives.make_sft_loss(UNTIED), chain)
    trainable = sharding.place(jax.tree.map(jnp.asarray, params(UNTIED)), mesh)
    with sharding.use(mesh):
        at_sampling = measure(trainable, mesh, limit=limit)
        made = plan.make(
            "RL",
            update,
            optimizer=chain,
            trainable=trainable,
            at_hand=plan.per_device(trainable),
            frozen=None,
            mesh=mesh,
            num_rows=16,
            works=plan.largest_works(16, **shapes),
            width=24,
            at_sampling=at_sampling,
            needs_reference=needs_reference,
            limit=limit,
        )
    return made, update, trainable


def measure(trainable, mesh=None, *, limit=10**9, restricted=False, **options):
    """What the plan says of sampling."""
    return plan_sampling.measured(
        UNTIED,
        trainable,
        None,
        mesh,
        options=SAMPLING | options,
        compute_dtype="float32",
        stop_ids=(3, 5),
        restricted=restricted,
        limit=limit,
    )


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
    held = sampling.init(UNTIED, 4, 24, "float32", most=16)
    assert made.always["cache"] == 2 * sum(x.nbytes for x in jax.tree.leaves(held))
    # Logits of the largest micro-batch are in it, and it is compiled once and for all.
    assert made.updating["update"] > 4 * 24 * UNTIED.vocab_size * 4
    assert update._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert made.peak < 10**9
    made.check()


def test_a_frozen_base_is_counted_in_its_own_dtype():
    policy = jax.tree.map(jnp.asarray, params(UNTIED)["policy"])
    adapters = {"adapters": lora.init(policy, jax.random.key(0), rank=2, targets=["mlp/.*"])}
    chain = optimizer.make(**OPTIMIZER)
    size = sum(x.size for x in jax.tree.leaves(policy))
    counted = {}
    for dtype in ("float32", "bfloat16"):
        base = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), policy)
        frozen = {"policy": base, "lora_scale": jnp.float32(1.0)}
        loss_fn = objectives.make_sft_loss(UNTIED, compute_dtype="bfloat16")
        counted[dtype] = plan.make(
            "RL",
            learner.make_step(loss_fn, chain),
            optimizer=chain,
            trainable=adapters,
            at_hand=plan.per_device(adapters),
            frozen=frozen,
            mesh=None,
            num_rows=16,
            works=plan.largest_works(16, **SHAPES),
            width=24,
            at_sampling=plan.Sampling(0, {}),
            limit=10**9,
        )
    parameters = {dtype: made.always["parameters"] for dtype, made in counted.items()}
    assert parameters["bfloat16"] == 2 * size + plan.per_device(adapters) + 4
    assert parameters["float32"] - parameters["bfloat16"] == 2 * size


def test_on_a_mesh_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    made, _, trainable = make_plan(mesh, moment_dtype="bfloat16")
    device = mesh.devices.flat[0]
    assert made.always["parameters"] == bytes_on(device, trainable)
    assert made.always["parameters"] < bytes_on(device, plain()[2]) / 4
    assert made.always["optimizer"] < 1.2 * made.always["parameters"]
    with sharding.use(sharding.decoding_mesh(mesh)):
        # Four groups, two slots of a wave: each has one, and two have nothing to do.
        held = engine.Engine(UNTIED, stop_ids=(3, 5), **SAMPLING | {"num_slots": 4})._held
        one = engine.Engine(UNTIED, stop_ids=(3, 5), **SAMPLING)._held
    assert made.always["cache"] == sum(bytes_on(device, part) for part in one)
    few = measure(trainable, mesh, num_slots=4)
    assert few.cache == sum(bytes_on(device, part) for part in held)
    # Without what lies on every device anyway: the scales of the norms.
    policy = trainable["policy"]
    leaves = jax.tree.leaves(policy)
    copies = jax.tree.leaves(sharding.for_decoding(policy, mesh))
    copied = [x for x, leaf in zip(copies, leaves, strict=True) if address(x) != address(leaf)]
    assert made.sampling["decoding copy"] == bytes_on(device, copied)
    assert len(copied) == len(leaves) - 3


def test_waves_that_run_side_by_side_need_room_side_by_side(monkeypatch):
    monkeypatch.setattr(plan_sampling, "_SMALL_SHARE", 0)  # so that programs are measured
    needed = []
    for cores in (1, 2):
        monkeypatch.setattr(compiles, "cores", lambda cores=cores: cores)
        needed.append(measure(plain()[2]).needed["sampling"])
    assert needed[1] == 2 * needed[0] > 0


def sizes_of_programs(trainable, mesh, *, restricted, **options):
    """Bytes beside its arguments of every program that the engine compiles, by name."""
    with sharding.use(None if mesh is None else sharding.decoding_mesh(mesh)):
        made = engine.Engine(UNTIED, stop_ids=(3, 5), **SAMPLING | options)
        policy = sharding.for_decoding(trainable["policy"], mesh)
        return {
            call.name: plan.program_bytes(call.program.lower(held=made._held[0], **call.arguments), "sampling")
            for call in made._every_call(policy, restricted)
        }


@pytest.mark.parametrize(
    "sizes, options, largest",
    [
        # The width is cut to the slot's 24 positions.
        (None, dict(restricted=False, width_buckets=(4, 99)), ("extend", 4, 24, 24)),
        (None, dict(restricted=True), ("decode", 4, 24, "restricted")),
        ((1, 2, 2), dict(restricted=False, row_divisors=(2, 4)), ("extend", 2, 8, 24)),
    ],
)
def test_no_program_of_sampling_needs_more_than_the_plan_says(monkeypatch, sizes, options, largest):
    monkeypatch.setattr(plan_sampling, "_SMALL_SHARE", 0)  # so that programs are measured
    monkeypatch.setattr(compiles, "cores", lambda: 1)
    mesh = sizes and sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    trainable = sharding.place(plain()[2], mesh)
    found = sizes_of_programs(trainable, mesh, **options)
    assert measure(trainable, mesh, **options).needed["sampling"] == found[largest]
    assert found[largest] == max(found.values())


def test_programs_are_measured_where_caches_are_small_and_scores_are_not():
    trainable = plain()[2]
    small = measure(trainable, limit=10**12)
    assert "sampling" not in small.needed
    held = small.cache + plan.per_device(trainable["policy"])
    scores = 4 * 4 * UNTIED.num_heads * 8 * 24
    assert "sampling" in measure(trainable, limit=20 * held + 10 * scores).needed
    assert "sampling" not in measure(trainable, limit=20 * (held + scores) + 20).needed


def test_the_reference_of_a_kl_term_is_counted():
    made, _, trainable = make_plan(needs_reference=True)
    policy = sum(x.nbytes for x in jax.tree.leaves(trainable["policy"]))
    assert made.always["reference"] == policy
    assert made.peak == plain()[0].peak + policy
    small = dataclasses.replace(made, always={"reference": 10**6}, limit=10)
    with pytest.raises(plan.PlanError, match="reference: .*rl.kl.placement='none'"):
        small.check()


def test_advice_for_sampling_names_what_makes_an_extend_large():
    made = plan.Plan("RL", {"cache": 1}, {}, {"sampling": 10}, limit=10)
    with pytest.raises(plan.PlanError, match="sampling: .*width_buckets.*row_divisors"):
        made.check()


def shapes_of(work):
    """(rows, length) of a micro-batch of each stack."""
    return [stack.shape for stack in work]


def test_every_micro_batch_that_may_come_is_in_the_step_that_is_measured():
    quickstart = runpy.run_path(str(CONFIGS / "textworld_quickstart.py"))["get_config"]().to_dict()
    shapes = reinforce.part_shapes(quickstart["learner"], None)
    (found,) = plan.largest_works(256, **shapes)
    assert shapes_of(found) == [
        (6, 240), (8, 176), (10, 144), (11, 128), (12, 112), (15, 96), (18, 80)
    ]
    assert all(stack.count == 1 for stack in found)
    # Whatever the lengths of a step, its program is the one that was measured.
    for length in range(1, 241):
        made = imitate.split(
            np.arange(40), np.full(40, length), shape=(256, 240), most_rows=256, **shapes
        )
        assert program_of(made) == program_of(found)
        bucket = min(size for size in shapes["length_buckets"] if size >= length)
        assert [stack.length for stack in made if stack.count] == [bucket]


def test_trees_of_any_step_are_in_the_step_that_is_measured():
    quickstart = runpy.run_path(str(CONFIGS / "textworld_quickstart.py"))["get_config"]().to_dict()
    shapes, length = reinforce.part_shapes(quickstart["learner"], None), reinforce.tree_length(quickstart)
    (found,) = plan.largest_works(256, tree_length=length, **shapes)
    assert shapes_of(found) == [(3, 480)] and found[0].count == 1
    sizes = {key: shapes[key] for key in ("tokens_per_part", "row_multiple")}
    tokens = np.random.default_rng(0).integers(0, 700, (256, 240)).astype(np.int32)
    for rows in (np.arange(256), np.arange(3)):  # nothing alike, so that no step has more rows
        made = trees.grow(rows, tokens, np.full(256, 240), length=length, most_rows=256, **sizes)
        assert program_of((made,)) == program_of(found)


def program_of(work):
    """What a compiled program depends on."""
    return jax.tree.structure(work), [x.shape for x in jax.tree.leaves(work)]


def test_packed_rows_are_as_long_as_the_longest_text_of_a_step():
    """A shorter length has more rows; of those with fewer tokens than a longer one none is needed."""
    quickstart = runpy.run_path(str(CONFIGS / "textworld_quickstart.py"))["get_config"]().to_dict()
    packed = reinforce.part_shapes(quickstart["learner"], None) | {"packing": True}
    packed |= {"tokens_per_part": 3072, "row_multiple": 8}
    assert [shapes_of(work) for work in plan.largest_works(256, **packed)] == [[(8, 240)]]
    # Several contexts in a row of 240: those of a step may all be short.
    # Tokens: 80 → 2560, 96 → 3072, 112 → 2688.
    several = plan.largest_works(16, longest_context=100, **packed)
    assert [shapes_of(work) for work in several] == [[(24, 112)], [(32, 96)]]
    assert several[0][0].places.shape[0] == 2  # 16 rows of two contexts each
    assert all(stack.count == 1 for (stack,) in several)


def test_the_largest_micro_batch_is_measured_and_the_run_s_program_executed():
    # 4 rows of 24 are 96 tokens, 8 of 16 are 128.
    shapes = SHAPES | {"tokens_per_part": 128}
    made, update, _ = make_plan(shapes=shapes)
    assert made.updating["update"] > plain()[0].updating["update"]
    assert update._cache_size() == 1
    chain = optimizer.make(**OPTIMIZER)
    weights = jax.tree.map(jnp.asarray, params(UNTIED))
    state = states.fresh(weights, chain)
    batch, targets = sharding.place_rows(plan._nothing(16, 24), None)
    work = imitate.split(
        np.arange(5), np.full(16, 9), shape=(16, 24), most_rows=16, **shapes
    )
    update(state, batch, targets, work, None)
    assert update._cache_size() == 1  # it is the one that was executed


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_is_measured_and_executed_on_a_state_of_zeros(packing):
    shapes = SHAPES | {"packing": packing}
    made, update, trainable = make_plan(shapes=shapes)
    assert made.updating["update"] > made.always["parameters"]  # the gradients are in it
    assert update._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))


def test_a_step_is_not_executed_where_the_cache_leaves_no_room_for_a_second_set_of_parameters():
    made, _, trainable = make_plan(needs_reference=True)
    assert made.always["cache"] > 1 and made.peak == made.while_updating
    # The reference is made later: meanwhile there is room for parameters in its place.
    room = made.peak - made.always["reference"] + plan.per_device(trainable)
    for limit, is_executed in ((room, True), (room - 1, False)):
        tight, update, _ = make_plan(needs_reference=True, limit=limit)
        assert tight.updating == made.updating and update._cache_size() == is_executed


def test_a_plan_beyond_the_limit_is_refused_and_nothing_executed(monkeypatch):
    chain, executed = optimizer.make(**OPTIMIZER), []

    class Step:
        """The program of a step that says when it is executed."""

        program = staticmethod(learner.make_step(objectives.make_sft_loss(UNTIED), chain))

        def lower(self, *arguments):
            return self.program.lower(*arguments)

        def __call__(self, *arguments):
            executed.append(True)
            return self.program(*arguments)

    monkeypatch.setattr(learner, "make_step", lambda *_: Step())
    made, *_ = make_plan()
    assert executed == [True]
    with pytest.raises(plan.PlanError, match="learner.tokens_per_part"):
        make_plan(limit=made.peak - 1)
    assert executed == [True]


def test_the_index_of_what_a_step_works_off_is_counted():
    (work,) = plan.largest_works(16, **SHAPES)
    # 4 micro-batches of 4 rows of 24, and of 16 as many; two numbers of micro-batches.
    assert plan.per_device(work) == 4 * (4 * 4 + 4 * 4 + 2)
    made = make_plan(shapes=SHAPES | {"packing": True})[0]
    (packed,) = plan.largest_works(16, **SHAPES | {"packing": True})
    both = [each.always["batch"] for each in (plain()[0], made)]
    assert both[1] - both[0] == plan.per_device(packed) - plan.per_device(work)


def test_a_run_that_does_not_fit_is_refused_with_advice():
    small = dataclasses.replace(plain()[0], limit=10**5)
    with pytest.raises(plan.PlanError, match="does not fit") as refusal:
        small.check()
    assert "memory per device in RL" in str(refusal.value)
    assert "learner.tokens_per_part" in str(refusal.value)


def test_a_compiler_that_finds_no_room_is_a_refusal_with_advice():
    class Program:
        def __init__(self, said):
            self.said = said

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.said)

    no_room = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 16.93G exceeds available HBM (15.75G).\nfurther lines"
    with pytest.raises(plan.PlanError, match=r"\(15.75G\).\nWhat would help: fewer sampling.num_slots"):
        plan.program_bytes(Program(no_room), "sampling")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        plan.program_bytes(Program("INTERNAL: another"), "update")


@pytest.mark.parametrize("stage, section", [("imitation", "sft"), ("imitation, batch and programs aside", "sft"), ("RL", "rl")])
def test_advice_names_keys_that_there_are(stage, section):
    for name, advice in plan.ADVICE.items():
        with pytest.raises(plan.PlanError) as error:
            plan.Plan(stage, {name: 2}, {}, {}, 1).check()
        said = str(error.value).partition("What would help")[2]
        assert advice.format(section=section) in said
        keys = re.findall(r"\b(?:\w+\.)+\w+", said)
        assert keys and not set(keys) - set(settings.KEYS)


def test_this_machine_says_what_it_has_and_the_config_what_it_may():
    assert plan.device_limit(1.5) == 1_500_000_000
    assert 10**8 < plan.device_limit(None) * jax.local_device_count() < 10**14


def test_a_plan_beyond_a_gpu_says_how_much_of_it_jax_takes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(plan, "_reserved", lambda: 1)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)

    def is_said(limit=1):
        with pytest.raises(plan.PlanError) as error:
            plan.Plan("RL", {"parameters": 9}, {}, {}, limit).check()
        return "XLA_CLIENT_MEM_FRACTION=0.95" in str(error.value)

    assert is_said()
    assert not is_said(limit=2)  # of `memory_limit_gb`
    for name, value, told in (
        ("XLA_CLIENT_MEM_FRACTION", "", False),
        ("XLA_CLIENT_MEM_FRACTION", "0.9", True),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9", True),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert is_said() != told
