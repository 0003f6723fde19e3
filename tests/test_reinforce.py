"""Learning: the gradient knows nothing of micro-batches, every algorithm runs, and one of them learns."""

import copy
import dataclasses
import functools
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import make_task, make_trajectory, make_turn
from test_sharding import rows_in_parts

from envs_host.types import StopReason
from jaxagentrl import (
    batching, diagnostics, engine, estimate, learner, plan, reinforce, rewards, states,
)
from jaxagentrl.models import decoder, sharding

ROOT = pathlib.Path(__file__).parents[1]
STOP = 3
MODEL = decoder.DecoderConfig(
    vocab_size=24,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
)
LENGTHS = (16, 32, 48)


@functools.cache
def smoke_config() -> dict:
    return runpy.run_path(str(ROOT / "configs" / "textworld_smoke.py"))["get_config"]().to_dict()


def make_config(**rl) -> dict:
    config = copy.deepcopy(smoke_config())
    config["learner"] = dict(
        length_buckets=(48,),
        tokens_per_part=144,
        row_multiple=3,
        packing=False,
        tree_length=0,
        remat="none",
        compute_dtype="float32",
    )
    config["rl"] |= dict(tasks_per_iteration=3, group_size=2, num_minibatches=1, num_epochs=1)
    config["rl"]["optimizer"] |= dict(warmup_steps=0)
    config["rl"]["skip_zero_signal"] = False
    for key, value in rl.items():
        config["rl"][key] = config["rl"][key] | value if isinstance(value, dict) else value
    return config


def make_trajectories(seed: int = 0) -> list:
    """Three groups of two, ragged, some won; the first group without any signal."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(6):
        turns = []
        for turn in range(rng.integers(1, 5)):
            action = rng.integers(4, 24, rng.integers(1, 4)).tolist() + [STOP]
            turns.append(
                make_turn(
                    rng.integers(4, 24, rng.integers(2, 6)).tolist(),
                    action,
                    logprobs=np.log(rng.uniform(0.02, 0.06, len(action))),
                    intermediate_reward=float(rng.integers(-1, 2)) if index > 1 else 0.0,
                    anchor=f"state {turn % 2}",
                )
            )
        won = index % 2 == 1 and index > 1
        made.append(
            make_trajectory(
                turns,
                task=make_task(f"game-{index // 2}", index // 2),
                group=index // 2,
                member=index % 2,
                won=won,
                score=2.0 if won else 0.0,
                stop_reason=StopReason.DONE if won else StopReason.TURN_LIMIT,
            )
        )
    return made


def make_state(config: dict, critic: str = "none"):
    params = {"policy": jax.tree.map(jnp.asarray, policy())}
    params = learner.with_critic(params, MODEL, critic=critic)
    programs, chain = reinforce.make_programs(config, MODEL)
    reference = jax.tree.map(jnp.copy, {"policy": params["policy"]})
    return states.fresh(params, chain), reference, programs


@functools.cache
def policy() -> dict:
    return jax.device_get(decoder.init(MODEL, jax.random.key(0)))


CRITICS = {"gae": "head", "turn_gae": "separate", "bilevel_gae": "head"}


@pytest.mark.parametrize("name", estimate.NAMES)
def test_every_algorithm_updates_and_reports(name):
    critic = CRITICS.get(name, "none")
    config = make_config(advantage=dict(name=name), critic=critic)
    state, reference, programs = make_state(config, critic)
    before = jax.device_get(state.params)
    state, measured, credit = reinforce.learn(
        state, reference, make_trajectories(), programs, config, iteration=0
    )
    assert all(np.isfinite(value) for value in measured.values())
    assert int(state.step) == 1
    assert [len(row) for row in credit] == [t.num_tokens for t in make_trajectories()]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert moved["policy"]["embed"]["embedding"]
    if critic != "none":
        assert moved["value_head"]["kernel"] and measured["loss/value"] > 0
    # Of an untrained critic, which says 0 everywhere.
    assert measured.get("value/explained_variance") == (None if critic == "none" else 0.0)


def test_turn_gae_trains_the_value_of_a_turn_on_its_first_token():
    advantage = dict(name="turn_gae", whiten=False, negative_weight=1.0)
    config = make_config(advantage=advantage, critic="head")
    state, reference, programs = make_state(config, "head")
    state.params["value_head"]["kernel"] += 0.1  # values that differ from token to token
    made = make_trajectories()
    turn_rewards = [rewards.turn_rewards(t, **config["reward"]) for t in made]
    batch = batching.to_batch(
        made, turn_rewards, discount=0.9, length_buckets=[48], row_multiple=1
    )
    whole = rows_in_parts([range(len(made))], length=48)
    scores = programs.score(state.params, batch.tokens, batch.action_mask, whole)
    anchors = batching.anchor_ids(made, num_rows=len(made), max_turns=8)
    credit, returns, mask = programs.estimate(batch, scores, scores.logprobs, anchors)
    assert int(mask.sum()) == sum(t.num_turns for t in made)
    for row, trajectory in enumerate(made):
        starts = np.cumsum([0] + [t.num_tokens for t in trajectory.turns])[:-1]
        firsts = starts + [len(turn.prompt_ids) for turn in trajectory.turns]
        np.testing.assert_array_equal(np.flatnonzero(mask[row]), firsts)
        np.testing.assert_allclose(
            returns[row, firsts], credit[row, firsts] + scores.values[row, firsts], rtol=1e-6
        )
    assert not np.any(np.where(mask, 0, returns))


def test_a_critic_can_have_a_rate_and_a_clip_of_its_own():
    params = {"policy": {"kernel": jnp.ones((2, 2))}, "value_head": {"kernel": jnp.ones(2)}}
    small = {"policy": {"kernel": jnp.full((2, 2), 1e-3)}, "value_head": {"kernel": jnp.ones(2)}}
    large = small | {"value_head": {"kernel": jnp.full(2, 1e6)}}
    rl = make_config(
        critic="head", critic_learning_rate=0.5,
        optimizer=dict(learning_rate=0.1, warmup_steps=0, decay_steps=None, max_grad_norm=1.0),
    )["rl"]

    def step(rl, grads):
        # Plain Adam forgets the scale of a first gradient: two steps show what the clip did.
        chain = reinforce.make_optimizer(rl)
        state = chain.init(params)
        _, state = chain.update(small, state, params)
        return chain.update(grads, state, params)[0]

    apart, apart_large = step(rl, small), step(rl, large)
    together = step(rl | {"critic_learning_rate": None}, small)
    together_large = step(rl | {"critic_learning_rate": None}, large)
    np.testing.assert_allclose(apart["policy"]["kernel"], apart_large["policy"]["kernel"])
    assert np.any(together["policy"]["kernel"] != together_large["policy"]["kernel"])
    np.testing.assert_allclose(apart["policy"]["kernel"], -0.1, rtol=1e-3)
    np.testing.assert_allclose(apart["value_head"]["kernel"], -0.5, rtol=1e-3)


def test_a_critic_of_its_own_rate_is_trained():
    config = make_config(
        advantage=dict(name="gae"), critic="separate", critic_learning_rate=0.0,
        optimizer=dict(learning_rate=0.01),
    )
    state, reference, programs = make_state(config, "separate")
    before = jax.device_get(state.params)
    state, measured, _ = reinforce.learn(
        state, reference, make_trajectories(), programs, config, iteration=0
    )
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert moved["policy"]["embed"]["embedding"] and not any(jax.tree.leaves(moved["critic"]))


@pytest.mark.parametrize(
    "surrogate, expected",
    [
        # Ratios 2, 1, 1/2 and 1; advantages +, +, -, -: the first and the third have nothing to gain.
        ("clipped", [True, False, True, False]),
        ("cispo", [True, False, True, False]),
        ("gspo", [False] * 4),  # the sequence's ratio is 1
        ("policy_gradient", [False] * 4),
    ],
)
def test_what_counts_as_clipped(surrogate, expected):
    log_ratio = np.log(np.array([[2.0, 1.0, 0.5, 1.0]], np.float32))
    signs, mask = np.array([[1.0, 1.0, -1.0, -1.0]], np.float32), np.ones((1, 4), bool)
    clips = dict(clip_low=0.2, clip_high=0.28)
    got = diagnostics.is_clipped(surrogate, log_ratio, signs, mask, **clips)
    np.testing.assert_array_equal(got[0], expected)
    turned = diagnostics.is_clipped(surrogate, log_ratio, -signs, mask, **clips)
    assert np.any(turned) == (surrogate == "cispo")


def test_clipped_by_texts_where_a_row_holds_several():
    log_ratio = np.log(np.array([[2.0, 1.0, 0.5, 1.0, 3.0]], np.float32))
    mask = np.array([[True, True, True, True, False]])
    got = diagnostics.is_clipped(
        "gspo", log_ratio, np.ones((1, 5), np.float32), mask,
        clip_low=0.2, clip_high=0.28, sequence_ids=np.array([[0, 0, 1, 1, -1]]),
    )
    np.testing.assert_array_equal(got[0], [True, True, False, False, False])  # √2, and 1/√2 with A > 0


@pytest.mark.parametrize("num_minibatches, steps", [(3, 3), (6, 4)])
def test_rows_without_credit_make_minibatches_smaller(num_minibatches, steps):
    # Four of the six rows have credit: three minibatches of 2, 1 and 1, or, of six, four of one row.
    config = make_config(
        num_minibatches=num_minibatches, skip_zero_signal=True, advantage=dict(name="leave_one_out")
    )
    state, reference, programs = make_state(config)
    state, measured, credit = reinforce.learn(
        state, reference, make_trajectories(), programs, config, iteration=0
    )
    assert sum(bool(np.any(row)) for row in credit) == 4
    assert int(state.step) == steps and measured["batch/rows_used_share"] == 4 / 6


@pytest.mark.parametrize(
    "kl",
    [
        dict(placement="reward", estimator="k1", coefficient=0.1),
        dict(placement="loss", estimator="k2", coefficient=0.1),
        dict(placement="loss", estimator="k3_straight_through", coefficient=0.1),
    ],
)
def test_kl_to_the_reference_is_zero_at_the_start_and_grows(kl):
    config = make_config(kl=kl, advantage=dict(name="leave_one_out"), optimizer=dict(warmup_steps=0))
    state, reference, programs = make_state(config)
    values = []
    for iteration in range(3):
        state, measured, _ = reinforce.learn(
            state, reference, make_trajectories(), programs, config, iteration=iteration
        )
        values.append(measured.get("loss/kl", measured.get("policy/reference_kl")))
    if kl["placement"] == "reward":
        assert values[0] == 0.0 != values[2]
    else:
        assert abs(values[0]) < 1e-9 < values[2]


def test_scoring_first_gives_the_same_gradient_as_bypassing_it():
    """One update per batch: the old log-probs are the current ones, whichever way they come."""
    trajectories = make_trajectories()
    config = make_config(advantage=dict(name="leave_one_out"))
    with_kl = make_config(
        advantage=dict(name="leave_one_out"),
        kl=dict(placement="reward", estimator="k1", coefficient=1e-12),
    )
    outcomes = []
    for each in (config, with_kl):
        state, reference, programs = make_state(each)
        state, _, _ = reinforce.learn(state, reference, trajectories, programs, each, iteration=0)
        outcomes.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *outcomes)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_rows_without_signal_can_stay_out(aggregation):
    """The update is the one that the rows with signal alone would give."""
    skipping = make_config(
        advantage=dict(name="leave_one_out"), skip_zero_signal=True, aggregation=aggregation
    )
    trajectories = make_trajectories()
    assert {t.won for t in trajectories[:2]} == {False}
    outcomes = []
    for played in (trajectories, trajectories[2:]):
        state, reference, programs = make_state(skipping)
        state, measured, credit = reinforce.learn(
            state, reference, played, programs, skipping, iteration=0
        )
        outcomes.append((jax.device_get(state.params), np.concatenate(credit[-4:]), measured))
    (params, credit, measured), (alone, credit_alone, _) = outcomes
    assert measured["batch/rows_used_share"] == 4 / 6
    np.testing.assert_allclose(credit, credit_alone, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, alone)


def test_padding_is_that_of_the_micro_batches_that_were_computed():
    config = make_config(advantage=dict(name="leave_one_out"), skip_zero_signal=True)
    config["learner"] |= dict(length_buckets=LENGTHS, tokens_per_part=96, row_multiple=1)
    trajectories = make_trajectories()
    state, reference, programs = make_state(config)
    _, measured, _ = reinforce.learn(
        state, reference, trajectories, programs, config, iteration=0
    )
    # Of the four rows that are used. 96 tokens are two rows of 48, three of 32, six of 16.
    lengths = sorted((t.num_tokens for t in trajectories[2:]), reverse=True)
    assert lengths == [25, 24, 14, 7]
    assert measured["batch/padding_share"] == pytest.approx(1 - 70 / (3 * 32 + 6 * 16))


def test_trees_learn_what_episodes_learn():
    """Groups with one first prompt each; two epochs of two minibatches, KL to a reference."""
    config = make_config(
        advantage=dict(name="leave_one_out"),
        kl=dict(placement="loss", estimator="k2", coefficient=0.1),
        num_minibatches=2,
        num_epochs=2,
    )
    trajectories = []
    for played in make_trajectories():
        prompt = 5 * [4 + played.group]
        opening = dataclasses.replace(played.turns[0], prompt_ids=prompt)
        trajectories.append(dataclasses.replace(played, turns=[opening, *played.turns[1:]]))
    outcomes = []
    for tree_length in (0, 60):
        config["learner"]["tree_length"] = tree_length
        state, reference, programs = make_state(config)
        state, measured, _ = reinforce.learn(
            state, reference, trajectories, programs, config, iteration=0
        )
        outcomes.append((jax.device_get(state.params), measured))
    (params, alone), (params_of_trees, measured) = outcomes
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, params_of_trees
    )
    tokens = sum(t.num_tokens for t in trajectories)
    assert measured.pop("batch/shared_share") == pytest.approx(3 * 5 / tokens)
    assert alone.pop("batch/shared_share") == 0
    for facts in (alone, measured):
        del facts["batch/padding_share"]
    assert measured == pytest.approx(alone, abs=1e-5)


def test_a_batch_without_any_signal_takes_no_step():
    config = make_config(advantage=dict(name="leave_one_out"), skip_zero_signal=True)
    state, reference, programs = make_state(config)
    before = jax.device_get(state.params)
    state, measured, _ = reinforce.learn(
        state, reference, make_trajectories()[:2], programs, config, iteration=0
    )
    assert int(state.step) == 0
    assert measured["batch/rows_used_share"] == measured["batch/shared_share"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_rows_stay_in_while_something_else_trains_on_them():
    rl = make_config(skip_zero_signal=True)["rl"]
    assert reinforce.skips_rows(rl)
    for change in (
        dict(critic="head"),
        dict(observation_weight=0.1),
        dict(kl=dict(placement="loss", coefficient=0.1)),
        dict(loss=dict(entropy_coefficient=0.1)),
    ):
        assert not reinforce.skips_rows(make_config(skip_zero_signal=True, **change)["rl"])


def test_minibatches_and_epochs_take_their_steps_and_clip():
    config = make_config(
        num_minibatches=3, num_epochs=2, advantage=dict(name="leave_one_out"),
        optimizer=dict(learning_rate=0.05, warmup_steps=0),
    )
    state, reference, programs = make_state(config)
    state, measured, _ = reinforce.learn(
        state, reference, make_trajectories(), programs, config, iteration=0
    )
    assert int(state.step) == 6
    assert measured["policy/clip_fraction"] > 0 and measured["policy/old_kl"] > 0


@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
@pytest.mark.parametrize(
    "num_played, skip, used",
    [
        (6, False, [0, 1, 2, 3, 4, 5]),
        (6, True, [2, 3, 4, 5]),  # the first group has no signal
        (5, False, [0, 1, 2, 3, 4]),  # not a multiple of the minibatches; row 5 is padding
    ],
)
def test_every_used_row_is_in_one_minibatch_of_every_epoch(num_minibatches, num_played, skip, used):
    config = make_config(
        num_minibatches=num_minibatches,
        num_epochs=2,
        skip_zero_signal=skip,
        advantage=dict(name="leave_one_out"),
    )
    programs, _ = reinforce.make_programs(config, MODEL)
    steps = []

    def record(state, batch, targets, work, frozen):
        action, weights = np.asarray(batch.action_mask), np.asarray(targets.weights)
        weighed = np.any(weights != 0, axis=1)
        np.testing.assert_array_equal(weights != 0, action & weighed[:, None])  # whole rows
        np.testing.assert_array_equal(targets.value_weights, weights)
        np.testing.assert_allclose(np.sum(weights), 1.0, rtol=1e-6)
        held = np.concatenate([stack.rows[: int(stack.count)].reshape(-1) for stack in work])
        computed = held[held < len(weights)].tolist()
        assert sorted(computed) == np.flatnonzero(weighed).tolist()
        steps.append(sorted(computed))
        return state, {}

    recorded = dataclasses.replace(
        programs,
        score=lambda params, tokens, needed, work: learner.empty_scores(tokens.shape),
        update=record,
    )
    state = types.SimpleNamespace(params={})
    played = make_trajectories()[:num_played]
    reinforce.learn(state, {}, played, recorded, config, iteration=0)
    epochs = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == used
    assert (epochs[0] != epochs[1]) == (num_minibatches > 1)


def test_the_program_of_the_plan_is_the_one_that_learns_on_a_mesh():
    """Equal places that are spelled otherwise would be another program, compiled at the first update."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1)
    config = make_config(advantage=dict(name="gae"), critic="head", num_minibatches=2)
    config["learner"]["row_multiple"] = 1
    programs, chain = reinforce.make_programs(config, MODEL, mesh=mesh)
    params = sharding.place({"policy": jax.tree.map(jnp.asarray, policy())}, mesh)
    with sharding.use(mesh):
        plan.of_rl(
            config, programs, chain, MODEL, params, mesh=mesh, frozen=None, limit=10**9,
            at_sampling=plan.Sampling(0, {}),
        )
        state = states.fresh(learner.with_critic(params, MODEL, critic="head"), chain, mesh)
        for iteration in range(2):
            state, *_ = reinforce.learn(
                state, {}, make_trajectories(iteration), programs, config, iteration=iteration
            )
    assert programs.update._cache_size() == programs.score._cache_size() == 1


def test_negative_weight_scales_only_what_is_below_the_baseline():
    outcomes = []
    for weight in (1.0, 0.25):
        config = make_config(advantage=dict(name="leave_one_out", negative_weight=weight))
        state, reference, programs = make_state(config)
        _, _, credit = reinforce.learn(
            state, reference, make_trajectories(), programs, config, iteration=0
        )
        outcomes.append(np.concatenate(credit))
    plain, damped = outcomes
    np.testing.assert_allclose(damped[plain > 0], plain[plain > 0])
    np.testing.assert_allclose(damped[plain < 0], 0.25 * plain[plain < 0], rtol=1e-6)
    assert np.any(plain < 0)


def test_reinforcement_learns_a_bandit_through_the_engine():
    """One turn, one right first token: success must go from rare to usual."""
    right = 7
    config = make_config(
        tasks_per_iteration=2,
        group_size=8,
        advantage=dict(name="leave_one_out"),
        optimizer=dict(learning_rate=0.01, warmup_steps=0, decay_steps=None),
    )
    config["reward"] = dict(
        kind="single",
        invalid_penalty=0.0,
        no_end_of_turn_penalty=0.0,
        intermediate_scale=None,
    )
    state, reference, programs = make_state(config)
    eng = engine.Engine(
        MODEL,
        num_slots=16,
        num_waves=1,
        max_length=16,
        max_turn_tokens=2,
        stop_ids=[STOP],
        filled_buckets=(16,),
        width_buckets=(8,),
        row_divisors=(1,),
    )
    success = []
    for iteration in range(40):
        requests = [
            engine.TurnRequest(slot, np.array([1, 2 + slot // 8]), 2, (iteration, slot))
            for slot in range(16)
        ]
        for request in requests:
            eng.submit(0, request)
        eng.launch(state.params["policy"], 0)
        samples = eng.receive(0)
        trajectories = []
        for slot, request in enumerate(requests):
            sample, won = samples[slot], int(samples[slot].ids[0]) == right
            turn = make_turn(
                request.new_ids, sample.ids, logprobs=sample.logprobs, entropies=sample.entropies
            )
            trajectories.append(
                make_trajectory(
                    [turn],
                    task=make_task(f"game-{slot // 8}"),
                    group=slot // 8,
                    member=slot % 8,
                    won=won,
                    score=2.0 * won,
                )
            )
            eng.release(0, slot)
        success.append(np.mean([t.won for t in trajectories]))
        state, measured, _ = reinforce.learn(
            state, reference, trajectories, programs, config, iteration=iteration
        )
        assert measured["policy/sampler_gap_max"] < 1e-4
    assert np.mean(success[:3]) < 0.3 and np.mean(success[-5:]) > 0.8, success


def test_the_signal_of_groups_is_their_sample_std():
    def of(groups, returns):
        made = [make_trajectory([make_turn([5], [8])], group=group) for group in groups]
        return reinforce._signal_of_groups(made, returns)

    found = of([0, 0, 0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0, 2.0, 2.0])
    assert found == {"batch/group_std_mean": pytest.approx(0.25), "batch/groups_without_signal": 0.5}
    assert of([0, 1, 2], [1.0, 0.0, 2.0]) == {}  # no group has anybody to be compared with
