"""The whole functional core gives one answer: eagerly, compiled, mapped, sharded, split, reordered.

All public functions are called in one bundle, so that each transformation compiles once. Statistics
are global: with `axis_name` the devices of a mapped axis must return what one device would.
"""

import doctest
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from jaxagentrl import advantages, diagnostics, losses, transforms
from core_cases import batch

NUM_GROUPS = 3
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
CORE = (
    "advantages anchors buffers diagnostics divergences group_advantages importance losses masking "
    "preference transforms turn_credit types"
).split()


def estimators(case, axis_name=None):
    """Every advantage estimator: {name: [B] or [B, L]}."""
    r, v, d = case["rewards"], case["values"], case["discounts"]
    mask, turns, ends = case["action_mask"], case["turn_ids"], case["turn_ends"]
    scores, ids = case["scores"], case["group_ids"]
    group = {"num_groups": NUM_GROUPS, "axis_name": axis_name}
    anchored = functools.partial(
        advantages.gigpo, r, mask, turns, case["anchor_ids"], ids, num_anchors=3, **group
    )
    lengths = jnp.sum(mask, axis=-1).astype(jnp.float32)
    return {
        "gae": advantages.gae(r, v, d, mask, gae_lambda=0.9, bootstrap_values=scores),
        "turn_gae": advantages.turn_gae(r, v, d, mask, ends, gae_lambda=0.9),
        "bilevel_gae": advantages.bilevel_gae(
            r, v, mask, ends, token_discount=0.99, turn_discount=0.9, gae_lambda=0.8
        ),
        "rewards_to_go": advantages.rewards_to_go(r, d, mask),
        "grpo": advantages.group_normalized(scores, ids, **group),
        "dr_grpo": advantages.group_normalized(scores, ids, scale="none", **group),
        "leave_one_out": advantages.leave_one_out(scores, ids, **group),
        "opo": advantages.opo(scores, lengths, ids, **group),
        "remax": advantages.remax(scores, jnp.full_like(scores, 0.5)),
        "reinforce_plus_plus": advantages.reinforce_plus_plus(r, d, mask, axis_name=axis_name),
        "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline(
            scores, ids, mask, **group
        ),
        "rewards_to_go_group": advantages.rewards_to_go_group(
            r, d, mask, turns, ids, scale="std", **group
        ),
        "gigpo": anchored(),
        "gigpo_variants": anchored(scale="none", episode_mean_over="steps", first_visit=True),
        "mt_grpo": advantages.mt_grpo(r, scores, mask, turns, ids, **group),
        "istar": advantages.istar(scores, r, mask, turns, ids, **group),
        "istar_loo": advantages.istar(
            scores, r, mask, turns, ids, baseline="leave_one_out", **group
        ),
        "whiten": advantages.whiten(v, mask, axis_name=axis_name),
        "spread": advantages.spread(scores, mask),
    }


def per_token_losses(case):
    """Every per-token loss and weight: {name: [B, L]}."""
    new, old, adv = case["logprobs"], case["old_logprobs"], case["advantages"]
    mask, turns = case["action_mask"], case["turn_ids"]
    tokens = {"action_mask": mask}
    ratios = losses.importance_ratios(old, new, mask, level="turn", turn_ids=turns)
    return {
        "clipped": losses.clipped_surrogate(new, old, adv, dual_clip=3.0, **CLIPS, **tokens),
        "gspo": losses.sequence_surrogate(new, old, adv, mask, **CLIPS),
        "gspo_turn": losses.sequence_surrogate(new, old, adv, mask, turn_ids=turns, **CLIPS),
        "cispo": losses.cispo(new, old, adv, **CLIPS, **tokens),
        "policy_gradient": losses.policy_gradient(new, adv, **tokens),
        "value_loss": losses.value_loss(case["values"], old, adv, clip=0.2, **tokens),
        "kl": losses.kl_loss(new, case["ref_logprobs"], estimator="k3_straight_through", **tokens),
        "importance": losses.truncated_importance_weights(ratios),
        "importance_mask": losses.importance_mask(ratios, mask, veto=1e-4),
        "implicit": losses.implicit_step_rewards(
            new, old, mask, turns, case["turn_ends"], beta=0.1
        ),
    }


def shaped(case, axis_name=None):
    """Every transform that returns rows: {name: [B] or [B, L]}."""
    r, d, mask, turns = (case[k] for k in ("rewards", "discounts", "action_mask", "turn_ids"))
    ids, scores = case["group_ids"], case["scores"]
    flags = case["anchor_ids"] > 0
    potentials = case["anchor_ids"].astype(jnp.float32)
    group = {"num_groups": NUM_GROUPS, "axis_name": axis_name}
    return {
        "dynamic": transforms.dynamic_sampling(case["succeeded"], ids, **group).keep,
        "uncertain": transforms.uncertainty_filter(scores, ids, fraction=0.5, **group).keep,
        "penalized": transforms.penalize_turns(r, mask, turns, flags, penalty=0.1)[0],
        "normalized": transforms.normalize_dense_rewards(r, scores + 0.5, mask)[0],
        "potential": transforms.potential_shaping(r, d, mask, turns, potentials, scores),
        "kl_shaped": transforms.shape_with_kl(r, case["values"], mask, coefficient=0.1),
        "overlong": transforms.overlong_penalty(jnp.sum(mask, -1), max_length=6, margin=3),
    }


def summaries(case, axis_name=None):
    """Everything that is one number, or one per turn, for the global batch."""
    names = ("logprobs", "old_logprobs", "advantages", "action_mask", "turn_ids", "group_ids")
    new, old, adv, mask, turns, ids = (case[k] for k in names)
    over = {"axis_name": axis_name}
    group = {"num_groups": NUM_GROUPS, **over}
    constants = dict.fromkeys(losses.AGGREGATION_MODES) | {"constant": 9.0}
    ratios = losses.importance_ratios(old, new, mask)
    kept = transforms.dynamic_sampling(case["succeeded"], ids, **group)
    return {
        **{
            f"aggregate/{mode}": losses.aggregate(adv, mask, mode=mode, constant=c, **over)
            for mode, c in constants.items()
        },
        "aggregate/turns": losses.aggregate(
            adv, mask, mode="sequence_mean_token_mean", sequence_ids=turns, **over
        ),
        "trajectory_dpo": losses.trajectory_dpo(
            new, old, mask, case["succeeded"], ids, beta=0.1, **group
        ),
        "kept": (kept.kept_groups, kept.dropped_groups, kept.is_empty),
        "explained": diagnostics.explained_variance(case["values"], adv, mask, **over),
        "explained_per_turn": diagnostics.explained_variance_per_turn(
            case["values"], adv, mask, turns, num_turns=4, **over
        ),
        "clip_fractions": diagnostics.clip_fractions(new, old, adv, mask, **CLIPS, **over),
        "approximate_kl": diagnostics.approximate_kl(old, new, mask, **over),
        "ess": diagnostics.effective_sample_size(ratios, mask, **over),
        "mismatch": diagnostics.sampler_mismatch(old, new, mask, **over),
        "signal": diagnostics.group_signal(case["scores"], ids, **group),
        "entropy": diagnostics.mean_entropy(case["values"], mask, **over),
        "credit": diagnostics.credit_by_turn(adv, mask, turns, num_turns=4, **over),
    }


def core(case, axis_name=None):
    """(what has rows, what is global)."""
    by_row = estimators(case, axis_name) | per_token_losses(case) | shaped(case, axis_name)
    return by_row, summaries(case, axis_name)


@functools.cache
def case(seed=21, junk=np.nan):
    return {
        k: jnp.asarray(v)
        for k, v in batch(seed, 8, 9, num_groups=NUM_GROUPS, junk=junk).items()
    }


jitted_core = jax.jit(core)
jitted_losses = jax.jit(per_token_losses)


@functools.cache
def expected():
    return jitted_core(case())


def assert_same(got, wanted):
    chex.assert_trees_all_close(got, wanted, rtol=2e-4, atol=2e-5)


def data_mesh():
    return Mesh(np.array(jax.devices()[:4]), ("data",))


def test_results_are_finite_and_zero_off_the_mask():
    """The case holds NaN in every float array off the action mask."""
    by_row, whole = expected()
    mask = case()["action_mask"]
    for name, x in by_row.items():
        assert jnp.all(jnp.isfinite(x)), name
        if x.ndim == 2:
            assert jnp.all(jnp.where(mask, 0, x) == 0), name
    chex.assert_tree_all_finite(whole)


def test_eager_is_jit():
    assert_same(core(case()), expected())


def test_vmap_is_a_loop():
    cases = [case(seed) for seed in (21, 22)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    got = jax.jit(jax.vmap(core))(stacked)
    for i, one in enumerate(cases):
        assert_same(jax.tree.map(lambda x: x[i], got), jitted_core(one))


def test_shard_map_with_global_statistics():
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(core, axis_name="data"),
        mesh=data_mesh(),
        in_specs=rows,
        out_specs=(rows, whole),
    )
    assert_same(jax.jit(sharded)(case()), expected())


def test_pmap_with_global_statistics():
    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), case())
    by_row, whole = jax.pmap(functools.partial(core, axis_name="data"), axis_name="data")(split)
    wanted_rows, wanted_whole = expected()
    assert_same(jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), by_row), wanted_rows)
    for device in range(4):
        assert_same(jax.tree.map(lambda x: x[device], whole), wanted_whole)


def test_leading_axes_are_batch():
    """Token functions take any leading axes: none, one or two."""
    names = (
        "rewards values discounts action_mask turn_ends turn_ids logprobs old_logprobs advantages "
        "ref_logprobs scores"
    ).split()
    options = {"token_discount": 0.99, "turn_discount": 0.9, "gae_lambda": 0.8}

    def run(case):
        r, v, d, m, e = (case[k] for k in names[:5])
        return per_token_losses(case) | {
            "gae": advantages.gae(r, v, d, m, gae_lambda=0.8),
            "turn_gae": advantages.turn_gae(r, v, d, m, e, gae_lambda=0.8),
            "bilevel_gae": advantages.bilevel_gae(r, v, m, e, **options),
            "rewards_to_go": advantages.rewards_to_go(r, d, m),
            "spread": advantages.spread(case["scores"], m),
            "turn_returns": advantages.turn_returns(r, d, m, case["turn_ids"], num_turns=4),
            "kl_shaped": transforms.shape_with_kl(r, v, m, coefficient=0.1),
            "overlong": transforms.overlong_penalty(jnp.sum(m, -1), max_length=6, margin=3),
        }

    run = jax.jit(run)
    rows = {k: case()[k] for k in names}
    wanted = run(rows)
    deep = run(jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), rows))
    assert_same(jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), deep), wanted)
    for row in (2, 3):
        single = run(jax.tree.map(lambda x, row=row: x[row], rows))
        assert_same(single, jax.tree.map(lambda x, row=row: x[row], wanted))


# --- loss and gradient do not depend on how the batch lies --------------------------------------


def policy_loss(weights, case, axis_name=None):
    """A little of everything that a policy update does, as a function of parameters [L]."""
    mask, ids = case["action_mask"], case["group_ids"]
    credit = advantages.rewards_to_go_group(
        case["rewards"],
        case["discounts"],
        mask,
        case["turn_ids"],
        ids,
        num_groups=NUM_GROUPS,
        axis_name=axis_name,
    )
    credit = advantages.whiten(credit, mask, axis_name=axis_name)
    features = jnp.where(mask, case["values"], 0.0)
    new = case["old_logprobs"] + weights[0] * features + weights[1] * jnp.square(features)
    per_token = losses.clipped_surrogate(
        new, case["old_logprobs"], credit, action_mask=mask, **CLIPS
    ) + 0.1 * losses.kl_loss(new, case["ref_logprobs"], estimator="k2", action_mask=mask)
    return sum(
        losses.aggregate(per_token, mask, mode=mode, axis_name=axis_name)
        for mode in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
    )


WEIGHTS = jnp.array([0.1, -0.05])


@functools.cache
def loss_and_gradient():
    return jax.jit(jax.value_and_grad(policy_loss))


def test_padding_changes_nothing():
    def pad(x, value):
        return jnp.pad(x, [(0, 3)] + [(0, 4)] * (x.ndim - 1), constant_values=value)

    values = {"action_mask": False, "turn_ends": False, "valid_mask": False, "turn_ids": -1}
    values |= {"group_ids": NUM_GROUPS, "succeeded": False, "tokens": 0, "anchor_ids": -1}
    padded = {k: pad(v, values.get(k, jnp.nan)) for k, v in case().items()}
    assert_same(
        loss_and_gradient()(WEIGHTS, padded), loss_and_gradient()(WEIGHTS, case())
    )
    wanted_rows, wanted = expected()
    by_row, whole = jitted_core(padded | {"anchor_ids": padded["anchor_ids"][:, :4]})
    assert_same(whole, wanted)
    by_row = {k: v[:8, :9] if v.ndim == 2 else v[:8] for k, v in by_row.items()}
    assert_same(by_row, wanted_rows)


def test_row_order_changes_nothing():
    order = jnp.array([5, 2, 7, 0, 1, 6, 4, 3])
    moved = {k: v[order] for k, v in case().items()}
    assert_same(loss_and_gradient()(WEIGHTS, moved), loss_and_gradient()(WEIGHTS, case()))
    by_row, whole = jitted_core(moved)
    assert_same(whole, expected()[1])
    assert_same(by_row, jax.tree.map(lambda x: x[order], expected()[0]))


@pytest.mark.parametrize("mode", losses.AGGREGATION_MODES)
@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_add_up(mode, parts):
    constant = 9.0 if mode == "constant" else None
    mask, loss = case()["action_mask"], case()["advantages"]
    weights = losses.aggregation_weights(mask, mode=mode, constant=constant)
    total = sum(
        jnp.sum(w * jnp.where(m, x, 0.0))
        for w, m, x in zip(*(jnp.split(a, parts) for a in (weights, mask, loss)))
    )
    whole = losses.aggregate(loss, mask, mode=mode, constant=constant)
    np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_vmap_with_an_axis_name():
    split = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), case())
    mapped = jax.vmap(
        functools.partial(policy_loss, axis_name="data"), in_axes=(None, 0), axis_name="data"
    )
    wanted, _ = loss_and_gradient()(WEIGHTS, case())
    assert_same(jax.jit(mapped)(WEIGHTS, split), jnp.stack([wanted, wanted]))


def test_the_gradient_is_the_same_on_four_devices():
    wanted = loss_and_gradient()(WEIGHTS, case())
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        jax.value_and_grad(functools.partial(policy_loss, axis_name="data")),
        mesh=data_mesh(),
        in_specs=(whole, rows),
        out_specs=(whole, whole),
    )
    assert_same(jax.jit(sharded)(WEIGHTS, case()), wanted)

    def step(weights, part):
        value, slope = jax.value_and_grad(functools.partial(policy_loss, axis_name="data"))(
            weights, part
        )
        # A psum in the loss is a psum in the transpose too, hence the mean here.
        return value, jax.lax.pmean(slope, "data")

    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), case())
    value, slope = jax.pmap(step, axis_name="data", in_axes=(None, 0))(WEIGHTS, split)
    assert_same((value[0], slope[0]), wanted)


# --- what compiled code must not hold ------------------------------------------------------------


def equations(jaxpr):
    """All equations, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_no_float64_no_callback_no_host():
    """Even where 64 bits are allowed, no array of ours asks for them (Python numbers are weak)."""
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(core)(case()).jaxpr
    for equation in equations(jaxpr):
        assert "callback" not in equation.primitive.name
        for out in equation.outvars:
            wide = out.aval.dtype == jnp.float64 and not out.aval.weak_type
            assert not wide, equation
    for leaf in jax.tree.leaves(expected()):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)


def test_one_trace_over_many_calls():
    traced = jax.jit(chex.assert_max_traces(policy_loss, 1))
    for seed in range(5):
        traced(WEIGHTS, case(seed, 0.0))


def test_bfloat16_is_computed_in_float32():
    def cast(dtype, case):
        return {k: v.astype(dtype) if v.dtype.kind in "fV" else v for k, v in case.items()}

    low = cast(jnp.bfloat16, case())
    got, wanted = (jitted_losses(c) for c in (low, cast(jnp.float32, low)))
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype in (jnp.float32, jnp.bool_)
    assert_same(got, wanted)
    for row in jax.eval_shape(estimators, low).values():
        assert row.dtype == jnp.float32


@pytest.mark.parametrize("name", CORE)
def test_docstring_examples(name):
    module = importlib.import_module(f"jaxagentrl.{name}")
    names = {"jax": jax, "jnp": jnp, "np": np}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


@pytest.mark.parametrize("module", [advantages, losses])
def test_every_public_name_is_listed_and_documented(module):
    for name in module.__all__:
        function = getattr(module, name)
        assert function.__doc__ and "Returns:" in function.__doc__ or name == "kl_loss", name
