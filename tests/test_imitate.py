"""Imitation: its gradient knows nothing of the split, its steps nothing of each other, and the plan's
program is the one that is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_reinforce import LENGTHS, MODEL, make_config, make_trajectories, policy
from test_sharding import rows_in_parts

from jaxagentrl import imitate, learner, objectives, optimizer, plan, reinforce, states
from jaxagentrl.models import sharding

TRACE = optax.trace(0.0)  # an optimizer whose state is the gradient


@functools.cache
def imitation():
    """A batch of demonstrations, their targets and one compiled program for all tests."""
    batch = imitate.load(make_trajectories(), length_buckets=(48,)).batch
    batch = jax.tree.map(lambda x: x[:6], batch)
    targets = imitate.targets(batch, imitate.starts_of(batch.tokens.shape, None), observation_weight=0.5)
    step = learner.make_step(objectives.make_sft_loss(MODEL), TRACE)
    return batch, targets, step


def gradient(work):
    """Gradient of the imitation loss of six trajectories, and the loss, from the given work."""
    batch, targets, step = imitation()
    params = {"policy": jax.tree.map(jnp.asarray, policy())}
    state, metrics = step(states.fresh(params, TRACE), batch, targets, work)
    return state.opt_state.trace, float(metrics["loss/action"])


def in_parts(*parts):
    return rows_in_parts(parts, length=48)


def test_the_gradient_does_not_depend_on_the_split_the_order_or_the_padding():
    whole, loss = gradient(in_parts([0, 1, 2, 3, 4, 5]))
    for work in (
        in_parts([5, 3, 1, 0, 2, 4]),
        # Row 6 does not exist: it fills places.
        in_parts([0, 1, 6, 6, 6, 6], [6, 2, 3, 6, 6, 6], [4, 5, 6, 6, 6, 6]),
    ):
        other, other_loss = gradient(work)
        assert abs(loss - other_loss) < 1e-5
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, other)


def test_cutting_rows_to_their_length_changes_nothing():
    lengths = np.array([t.num_tokens for t in make_trajectories()])
    work = imitate.split(
        np.arange(6), lengths, shape=(6, 48), most_rows=6, length_buckets=LENGTHS,
        tokens_per_part=32, row_multiple=2, packing=False,
    )
    assert sum(stack.count > 0 for stack in work) > 1  # else this shows nothing
    whole, loss = gradient(in_parts([0, 1, 2, 3, 4, 5]))
    cut, cut_loss = gradient(work)
    assert abs(loss - cut_loss) < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, cut)


def test_a_batch_as_wide_as_no_bucket_loses_no_rows():
    with pytest.raises(ValueError, match=r"is 24 tokens wide, but its longest rows are worked off as 32: .* \(8, 16, 32\)"):
        imitate.split(
            np.arange(3), np.array([5, 20, 8]), shape=(3, 24), most_rows=3, length_buckets=(8, 16, 32),
            tokens_per_part=32, row_multiple=1, packing=False,
        )


def test_imitation_rows_cover_every_epoch_and_depend_on_the_step_alone():
    rows = [imitate.step_rows(10, batch_size=3, seed=4, step=step) for step in range(6)]
    for epoch in (rows[:3], rows[3:]):
        assert len(set(np.concatenate(epoch).tolist())) == 9
    assert not np.array_equal(np.concatenate(rows[:3]), np.concatenate(rows[3:]))
    again = imitate.step_rows(10, batch_size=3, seed=4, step=4)
    np.testing.assert_array_equal(rows[4], again)
    with pytest.raises(ValueError, match="sft.batch_size"):
        imitate.step_rows(2, batch_size=3, seed=0, step=0)


def test_weights_of_a_step_sum_to_one():
    batch = imitate.load(make_trajectories(), length_buckets=(48,)).batch
    batch = jax.tree.map(lambda x: x[np.array([1, 4, -1])], batch)  # the last one is padding
    targets = imitate.targets(batch, imitate.starts_of(batch.tokens.shape, None), observation_weight=0.5)
    np.testing.assert_allclose(np.sum(targets.weights), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.sum(targets.observation_weights), 0.5, rtol=1e-6)
    assert not np.any(np.asarray(targets.weights)[2]) and not np.any(batch.valid_mask[2])


def test_the_observation_loss_is_logged_in_nats_and_only_where_there_is_one():
    values = {"loss/action": 6.2, "loss/observation": 3.1}
    assert imitate.with_observation_mean(values, 0.5) == {"loss/action": 6.2, "loss/observation": 6.2}
    assert imitate.with_observation_mean(values, 0.0) == {"loss/action": 6.2}
    assert imitate.with_observation_mean({}, 0.5) == {}  # no step was taken


def test_a_text_s_first_token_is_not_among_what_is_predicted():
    loaded = imitate.load(make_trajectories(), length_buckets=(48,))
    batch = jax.tree.map(lambda x: x[:3], loaded.batch)
    other = int(np.argmin(batch.action_mask[1] | (np.arange(48) == 0)))  # of the second row, not an action
    starts = imitate.starts_of((3, 48), [[(0, 9)], [(0, other), (other, 9)], [(0, 9)]])
    assert starts[:, 0].all() and starts.sum() == 4
    alone = imitate.starts_of((3, 48), None)
    some, all_ = (np.asarray(imitate.targets(batch, x, observation_weight=1.0).observation_weights)
                  for x in (starts, alone))
    assert not some[starts].any() and (all_ > 0).sum() == (some > 0).sum() + 1
    np.testing.assert_allclose([some.sum(), all_.sum()], 1.0, rtol=1e-6)


def run(config, mesh=None, *, num_steps=3, separate_contexts=False):
    """Plans imitation and imitates: (plan, program of a step, metrics of the steps)."""
    chain = optimizer.make(**config["sft"]["optimizer"])
    loaded = imitate.load(make_trajectories(), length_buckets=LENGTHS)
    if separate_contexts:  # as if each trajectory's first five tokens were a text of their own
        pieces = [((0, 5), (5, int(size) - 5)) for size in loaded.lengths]
        loaded = dataclasses.replace(loaded, contexts=pieces)
    stage = imitate.Imitation(loaded, chain, learner.make_step(objectives.make_sft_loss(MODEL), chain))
    trainable = sharding.place({"policy": jax.tree.map(jnp.asarray, policy())}, mesh)
    with sharding.use(mesh):
        made = plan.of_imitation(
            config, stage, trainable, mesh=mesh, frozen=None, limit=10**9,
            at_sampling=plan.Sampling(0, {}),
        )
        steps = imitate.train(
            states.fresh(trainable, chain, mesh),
            stage,
            seed=0,
            first_step=0,
            num_steps=num_steps,
            batch_size=config["sft"]["batch_size"],
            observation_weight=0.5,
            mesh=mesh,
            **reinforce.part_shapes(config["learner"], mesh),
        )
        measured = [jax.device_get(metrics) for _, _, metrics in steps]
    return made, stage.update, measured


def imitation_config(**shapes):
    config = make_config()
    config["learner"] |= dict(length_buckets=LENGTHS, tokens_per_part=64, row_multiple=1) | shapes
    config["sft"]["batch_size"] = 5
    return config


@pytest.mark.parametrize("packing", [False, True])
def test_the_program_of_the_plan_is_the_one_that_imitates(packing):
    made, update, measured = run(imitation_config(packing=packing))
    assert update._cache_size() == 1  # executed by the plan, and by three steps of other lengths
    assert len({metrics["loss/action"].item() for metrics in measured}) == 3
    assert made.stage == "imitation" and "memory per device in imitation:" in made.text()
    # Five rows of demonstrations, of all arrays: tokens to weights 55 bytes a token.
    tokens = 5 * imitate.load(make_trajectories(), length_buckets=LENGTHS).width
    assert 55 * tokens < made.always["batch"] < 80 * tokens
    assert made.updating["update"] > made.always["parameters"]  # the gradients are in it
    assert made.always["optimizer"] > 2 * made.always["parameters"]


def test_a_mesh_imitates_as_one_device_does():
    """Five rows do not divide by four: the devices get rows of padding."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1)
    _, update, measured = run(imitation_config(), mesh)
    assert update._cache_size() == 1
    _, _, alone = run(imitation_config())
    for ours, theirs in zip(measured, alone, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_demonstrations_of_several_contexts_are_packed_by_context():
    _, update, measured = run(imitation_config(), separate_contexts=True)
    _, _, whole = run(imitation_config())
    assert measured[0]["loss/action"] != whole[0]["loss/action"]  # nothing sees its first five tokens
    # The plan measures the lengths that a step may be packed at, and executes the largest.
    assert 1 <= update._cache_size() <= 3


def test_imitation_that_does_not_fit_is_refused_with_its_own_advice():
    made, *_ = run(imitation_config(), num_steps=0)
    small = dataclasses.replace(made, always={"batch": 10**6}, limit=10)
    with pytest.raises(plan.PlanError, match="(?s)in imitation: .*batch: .*sft.batch_size"):
        small.check()
