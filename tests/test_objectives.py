"""The RL loss of the learner: which surrogate, which terms, which signs.

`losses` has tests of its own; here it is what `make_rl_loss` does with it. Expected values are
float64 sums over tokens, written from the definitions. So are the expected derivatives by each
token's log-prob, entropy and value; the model's own chain rule carries them to the parameters.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxagentrl import learner, objectives
from jaxagentrl.models import decoder, sharding
from jaxagentrl.types import TrajectoryBatch

MODEL = decoder.DecoderConfig(
    vocab_size=12,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
)
LENGTH = 16
# (observed, acted) tokens of every turn: long and short, nothing but a prompt, padding.
TURNS = ([(2, 4), (1, 5), (1, 3)], [(1, 2)], [(4, 0)], [(3, 1), (2, 4), (1, 3)], [])
# Of each row's log ratios: sequences inside the clips, below them, above the dual clip.
SHIFTS = np.array([[0.0], [-0.5], [0.0], [0.6], [0.0]])
TOKENS = np.random.default_rng(0).integers(0, 12, (len(TURNS), LENGTH)).astype(np.int32)
LOW, HIGH, DUAL = 0.15, 0.3, 1.5
SURROGATES = ("clipped", "gspo", "cispo", "policy_gradient")
# Nothing but the surrogate.
PLAIN = dict(
    surrogate="clipped",
    clip_low=LOW,
    clip_high=HIGH,
    dual_clip=DUAL,
    temperature=0.7,
    kl_coefficient=0.0,
    kl_estimator="k2",
    entropy_coefficient=0.0,
    value_coefficient=0.0,
    value_clip=None,
    importance_cap=None,
    old_is_current=False,
)
TERMS = {
    "entropy": dict(entropy_coefficient=0.7),
    "value": dict(value_coefficient=0.3),
    "clipped value": dict(value_coefficient=0.3, value_clip=0.4),
    "k2": dict(kl_coefficient=0.6, kl_estimator="k2"),
    "k3": dict(kl_coefficient=0.6, kl_estimator="k3"),
    "k3 with the gradient of k2": dict(kl_coefficient=0.6, kl_estimator="k3_straight_through"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    params: learner.Params
    scores: learner.Scores  # float64 numpy, at `params`
    batch: TrajectoryBatch
    targets: learner.Targets


# The loss looks `learner.forward` up when it is made. Compiled apart, the model is compiled once for
# all losses, and these are run operation by operation.
uncompiled_forward = learner.forward
compiled_forward = jax.jit(
    learner.forward, static_argnums=0, static_argnames=("temperature", "remat", "compute_dtype")
)


@pytest.fixture(scope="module", autouse=True)
def model_is_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "forward", compiled_forward)
        yield


def forward(params):
    options = dict(temperature=PLAIN["temperature"], remat="none", compute_dtype="float32")
    return compiled_forward(MODEL, params, TOKENS, jnp.ones(TOKENS.shape, bool), **options)


@functools.cache
def case() -> Case:
    """Ragged rows; what is not about an action token is NaN, so that reading it shows."""
    rng = np.random.default_rng(2)
    shape = TOKENS.shape
    action, valid = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, turns in enumerate(TURNS):
        t = 0
        for observed, acted in turns:
            action[i, t + observed : t + observed + acted] = True
            t += observed + acted
        valid[i, :t] = True
    policy = decoder.init(MODEL, jax.random.key(1))
    params = learner.with_critic({"policy": policy}, MODEL, critic="head")
    # Far from uniform distributions, and from the value 0.
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.4, x.shape).astype(np.float32), params)
    scores = jax.tree.map(lambda x: np.asarray(x, np.float64), forward(params))

    def on_actions(x):
        return np.where(action, x, np.nan).astype(np.float32)

    def near(x, spread):
        return on_actions(x + rng.normal(0, spread, shape))

    def weights_on(mask):
        return np.where(mask, rng.uniform(0.5, 2, shape), 0).astype(np.float32)

    read = valid & ~action
    read[:, 0] = False
    targets = learner.Targets(
        advantages=on_actions(rng.normal(0, 1, shape)),
        returns=near(scores.values, 0.8),
        old_logprobs=near(scores.logprobs - SHIFTS, 0.5),
        old_values=near(scores.values, 0.5),
        ref_logprobs=near(scores.logprobs, 0.7),
        weights=weights_on(action),
        mean_weights=weights_on(action),
        value_weights=weights_on(action & (rng.random(shape) < 0.7)),
        observation_weights=weights_on(read),
    )
    batch = TrajectoryBatch(
        tokens=TOKENS,
        valid_mask=valid,
        action_mask=action,
        turn_ids=np.zeros(shape, np.int32),
        turn_ends=np.zeros(shape, bool),
        sampler_logprobs=near(scores.logprobs, 0.1),
        rewards=on_actions(0.0),
        discounts=on_actions(1.0),
        group_ids=np.zeros(shape[0], np.int32),
    )
    return Case(params, scores, batch, targets)


def measure(targets, **options):
    """Loss, metrics and gradient of the learner."""
    loss_fn = jax.value_and_grad(objectives.make_rl_loss(MODEL, **PLAIN | options), has_aux=True)
    (loss, metrics), gradient = loss_fn(case().params, case().batch, targets)
    return float(loss), metrics, gradient


def changed(**changes):
    """The targets with some arrays replaced; no weight on observations unless told."""
    silent = {"observation_weights": np.zeros_like(case().targets.weights)}
    return dataclasses.replace(case().targets, **silent | changes)


def no_credit():
    return np.zeros_like(case().targets.weights)


# --- definitions: value and derivative of one token's term -----------------------------------------


def surrogate_terms(name, targets):
    """[B, L] losses, and their derivatives by the log-prob. Only −ρA depends on the policy."""
    new, old = case().scores.logprobs, targets.old_logprobs
    value, slope = np.zeros(new.shape), np.zeros(new.shape)
    for i in range(len(new)):
        places = oracles.action_positions(case().batch.action_mask[i])
        gaps = {t: new[i, t] - float(old[i, t]) for t in places}
        for t in places:
            advantage = float(targets.advantages[i, t])
            ratio = math.exp(gaps[t])
            if name == "gspo":
                ratio = math.exp(sum(gaps.values()) / len(places))
            if name in ("clipped", "gspo"):
                value[i, t] = oracles.surrogate(ratio, advantage, LOW, HIGH, DUAL)
                slope[i, t] = -ratio * advantage if value[i, t] == -ratio * advantage else 0.0
            else:
                weight = 1.0
                if name == "cispo":
                    weight = min(max(ratio, 1 - LOW), 1 + HIGH)
                value[i, t] = -weight * advantage * new[i, t]
                slope[i, t] = -weight * advantage
    return value, slope


def kl_terms(estimator, targets):
    new, ref = case().scores.logprobs, targets.ref_logprobs
    value, slope = np.zeros(new.shape), np.zeros(new.shape)
    for i, t in zip(*np.nonzero(case().batch.action_mask)):
        u = new[i, t] - float(ref[i, t])
        value[i, t] = u**2 / 2 if estimator == "k2" else math.exp(-u) - 1 + u
        slope[i, t] = 1 - math.exp(-u) if estimator == "k3" else u
    return value, slope


def value_terms(clip, targets):
    values = case().scores.values
    loss, slope = np.zeros(values.shape), np.zeros(values.shape)
    for i, t in zip(*np.nonzero(case().batch.action_mask)):
        v, old, target = values[i, t], float(targets.old_values[i, t]), float(targets.returns[i, t])
        loss[i, t] = oracles.value_loss(v, old, target, clip)
        # Where the clipped error is the larger, the value has left the clip and no slope is left.
        slope[i, t] = v - target if loss[i, t] == 0.5 * (v - target) ** 2 else 0.0
    return loss, slope


def expected(targets, **options):
    """Loss, metrics, gradient, for the options of `measure`."""
    options = PLAIN | options
    weights = targets.weights.astype(np.float64)
    policy, by_logprob = surrogate_terms(options["surrogate"], targets)
    kl, kl_slope = kl_terms(options["kl_estimator"], targets)
    value, value_slope = value_terms(options["value_clip"], targets)
    metrics = {
        "loss/policy": np.sum(weights * policy),
        "loss/kl": np.sum(weights * kl),
        "loss/value": np.sum(targets.value_weights * value),
        "loss/observation": -np.sum(targets.observation_weights * case().scores.logprobs),
        "policy/entropy": np.sum(targets.mean_weights * case().scores.entropies),
    }
    loss = (
        metrics["loss/policy"]
        + options["kl_coefficient"] * metrics["loss/kl"]
        + options["value_coefficient"] * metrics["loss/value"]
        + metrics["loss/observation"]
        - options["entropy_coefficient"] * np.sum(weights * case().scores.entropies)
    )
    slopes = learner.Scores(
        logprobs=weights * (by_logprob + options["kl_coefficient"] * kl_slope)
        - targets.observation_weights,
        entropies=-options["entropy_coefficient"] * weights,
        values=options["value_coefficient"] * targets.value_weights * value_slope,
    )
    slopes = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), slopes)
    _, back = jax.vjp(forward, case().params)
    if not options["kl_coefficient"]:
        del metrics["loss/kl"]
    return float(loss), metrics, back(slopes)[0]


def check(got, wanted):
    loss, metrics, gradient = got
    wanted_loss, wanted_metrics, wanted_gradient = wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    for key, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert ("loss/kl" in metrics) == ("loss/kl" in wanted_metrics)
    check_gradients(gradient, wanted_gradient)


def check_gradients(gradient, wanted):
    """Equal to 1e-5 of each array's largest entry: float32, of sums of what partly cancels."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))

    jax.tree.map(close, gradient, wanted)


# --- the tests -------------------------------------------------------------------------------------


def test_the_case_meets_every_branch():
    """Else the tests below show less than they say."""
    mask, scores, targets = case().batch.action_mask, case().scores, case().targets
    advantages = targets.advantages[mask].astype(np.float64)
    ratios = np.exp(scores.logprobs - targets.old_logprobs)[mask]
    for condition in (
        (ratios < 1 - LOW) & (advantages < 0),
        (ratios < 1 - LOW) & (advantages > 0),
        (ratios > 1 + HIGH) & (advantages > 0),
        (ratios > 1 + HIGH) & (ratios < DUAL) & (advantages < 0),
        (ratios > DUAL) & (advantages < 0),
        (ratios > 1 - LOW) & (ratios < 1 + HIGH),
    ):
        assert np.any(condition)
    terms = [np.array(surrogate_terms(name, targets)) for name in SURROGATES]
    for i, one in enumerate(terms):
        for other in terms[:i]:
            assert np.all(np.max(np.abs(one - other), axis=(1, 2)) > 0.1)
    by_sequence, slope = (x[mask] for x in terms[SURROGATES.index("gspo")])
    for condition in (
        (slope != 0) & (advantages < 0),
        (slope != 0) & (advantages > 0),
        (slope == 0) & (advantages > 0),
        (slope == 0) & (advantages < 0) & (by_sequence < -advantages),  # below the clip
        by_sequence == -DUAL * advantages,
    ):
        assert np.any(condition)
    clipped, slope = value_terms(0.4, targets)
    assert np.any(clipped > value_terms(None, targets)[0]) and np.any(slope != 0)
    assert np.std(scores.entropies[mask]) > 0.1


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_each_surrogate_is_its_definition(surrogate):
    """Off-policy, advantages of both signs, nothing else in the loss."""
    targets = changed()
    check(measure(targets, surrogate=surrogate), expected(targets, surrogate=surrogate))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_enters_with_its_sign_and_coefficient(term):
    """Without credit the loss is the term alone: −c H, +c KL, +c times the value's error."""
    targets, options = changed(advantages=no_credit()), TERMS[term]
    got = measure(targets, **options)
    check(got, expected(targets, **options))
    coefficient = next(value for key, value in options.items() if key.endswith("coefficient"))
    keys = {"entropy": "policy/entropy", "value": "loss/value", "clipped value": "loss/value"}
    metric = float(got[1][keys.get(term, "loss/kl")])
    assert metric > 0.1
    if term == "entropy":  # told as a mean, weighed as the loss is
        metric = -np.sum(targets.weights * case().scores.entropies)
    np.testing.assert_allclose(got[0], coefficient * metric, rtol=1e-6 if term == "entropy" else 1e-7)


def test_observations_are_imitated_with_their_own_weights():
    targets = changed(
        advantages=no_credit(), observation_weights=case().targets.observation_weights
    )
    got = measure(targets)
    check(got, expected(targets))
    assert got[0] > 0.1  # a cross-entropy


@pytest.mark.parametrize("is_rl", [True, False])
def test_losses_ask_for_the_log_probs_that_they_read_and_no_others(is_rl, monkeypatch):
    asked = []

    def spy(config, params, tokens, needed, **options):
        asked.append(np.asarray(needed))
        return compiled_forward(config, params, tokens, needed, **options)

    monkeypatch.setattr(learner, "forward", spy)
    loss = objectives.make_rl_loss(MODEL, **PLAIN) if is_rl else objectives.make_sft_loss(MODEL)
    for targets in (changed(), case().targets):  # without weight on observations, and with
        loss(case().params, case().batch, targets)
    mask = case().batch.action_mask
    np.testing.assert_array_equal(asked[0], mask)
    np.testing.assert_array_equal(asked[1], mask | (case().targets.observation_weights > 0))
    assert mask.sum() < asked[1].sum() < mask.size


@pytest.mark.parametrize("critic", ["none", "separate", "head"])
def test_a_model_of_few_layers_is_finished_where_it_is_read(critic, monkeypatch):
    """The last feed-forward runs on needed positions, if no head reads the others; nothing else changes."""
    needed, finished = case().batch.action_mask, []
    params = learner.with_critic({"policy": case().params["policy"]}, MODEL, critic=critic)
    finish = decoder.finish

    def spy(config, params, x):
        finished.append(x.shape)
        return finish(config, params, x)

    def run():
        def loss(params):
            scores = uncompiled_forward(MODEL, params, TOKENS, needed, temperature=0.8)
            return sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(scores)), scores

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    monkeypatch.setattr(decoder, "finish", spy)
    ours = run()
    assert bool(finished) == (critic != "head")
    assert not finished or set(finished) == {(min(TOKENS.size, 256), MODEL.hidden_size)}
    monkeypatch.setattr(decoder, "finishes_apart", lambda config: False)
    finished.clear()
    theirs = run()
    assert not finished
    assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(assert_near, ours, theirs)


def test_deep_models_and_meshes_are_finished_everywhere():
    assert decoder.finishes_apart(MODEL)
    assert not decoder.finishes_apart(dataclasses.replace(MODEL, num_layers=17))
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        assert not decoder.finishes_apart(MODEL)


def test_scores_of_what_is_not_needed_are_zero_and_values_are_of_every_token():
    mask, options = case().batch.action_mask, dict(temperature=PLAIN["temperature"])
    few = compiled_forward(MODEL, case().params, TOKENS, mask, **options)
    for name in ("logprobs", "entropies"):
        wanted = np.where(mask, getattr(case().scores, name), 0.0)
        np.testing.assert_allclose(getattr(few, name), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(few.values, case().scores.values, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_sum_of_its_terms():
    options = TERMS["entropy"] | TERMS["clipped value"] | TERMS["k3"] | dict(surrogate="gspo")
    check(measure(case().targets, **options), expected(case().targets, **options))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_old_log_probs_that_are_the_current_ones_need_not_be_given(surrogate):
    current = np.asarray(case().scores.logprobs, np.float32)
    targets = changed(old_logprobs=current)
    loss, _, gradient = measure(targets, surrogate=surrogate)
    unread = changed(old_logprobs=np.full_like(current, np.nan))
    got, metrics, same = measure(unread, surrogate=surrogate, old_is_current=True)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    check_gradients(same, gradient)
    # And it is REINFORCE's.
    check_gradients(same, expected(targets, surrogate="policy_gradient")[2])
    assert metrics["policy/clip_fraction"] == 0 and abs(float(metrics["policy/old_kl"])) < 1e-6


@pytest.mark.parametrize("old_is_current", [False, True])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_truncated_importance_weights_multiply_the_policys_term_alone(surrogate, old_is_current):
    """min(π_old/μ, C) of the token, without gradient; entropy and observations keep their weights."""
    cap, mask = 1.1, case().batch.action_mask
    new, sampler = case().scores.logprobs, case().batch.sampler_logprobs.astype(np.float64)
    targets = changed()
    if old_is_current:
        targets = changed(old_logprobs=new.astype(np.float32))
    ratios = np.exp(targets.old_logprobs.astype(np.float64) - sampler)[mask]
    assert np.any(ratios < 1) and np.any(ratios > cap) and np.any((ratios > 1) & (ratios < cap))
    factors = np.zeros(mask.shape)
    factors[mask] = np.minimum(ratios, cap)
    weighed = dataclasses.replace(targets, weights=(targets.weights * factors).astype(np.float32))
    options = dict(surrogate=surrogate, old_is_current=old_is_current)
    loss, metrics, gradient = measure(targets, importance_cap=cap, **options)
    wanted_loss, _, wanted_gradient = expected(weighed, surrogate=surrogate)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy"], wanted_loss, rtol=1e-5)
    check_gradients(gradient, wanted_gradient)
    capped = np.sum(targets.mean_weights[mask] * (ratios > cap))
    np.testing.assert_allclose(metrics["policy/importance_capped"], capped, rtol=1e-5)
    plain = measure(targets, **options)[1]
    assert "policy/importance_capped" not in plain
    np.testing.assert_allclose(metrics["policy/entropy"], plain["policy/entropy"], rtol=1e-6)


def test_reports_how_far_the_policy_is_from_the_old_one_and_the_old_one_from_the_sampler():
    mask, targets = case().batch.action_mask, changed()
    weights, new = targets.mean_weights[mask].astype(np.float64), case().scores.logprobs[mask]
    old, sampler = targets.old_logprobs[mask], case().batch.sampler_logprobs[mask]
    ratios, gaps = np.exp(new - old), np.abs(old.astype(np.float64) - sampler)
    _, metrics, _ = measure(targets)
    for key, value in {
        "policy/old_kl": np.sum(weights * (ratios - 1 - np.log(ratios))),
        "policy/sampler_gap_mean": np.sum(weights * gaps),
        "policy/sampler_gap_max": np.max(gaps),
    }.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_reports_the_share_of_the_tokens_on_which_the_clip_acts(surrogate):
    """There the surrogate has no slope, or CISPO's weight is not the ratio. The dual clip is none."""
    mask, targets = case().batch.action_mask, changed()
    value, slope = (x[mask] for x in surrogate_terms(surrogate, targets))
    advantages, weights = (x[mask].astype(np.float64) for x in (targets.advantages, targets.mean_weights))
    clipped = (slope == 0) & (value != -DUAL * advantages)
    if surrogate == "cispo":
        clipped = np.isin(np.round(-slope / advantages, 5), [1 - LOW, 1 + HIGH])
    _, metrics, _ = measure(targets, surrogate=surrogate)
    assert np.any(clipped) == (surrogate != "policy_gradient")
    np.testing.assert_allclose(metrics["policy/clip_fraction"], np.sum(weights * clipped), rtol=1e-5)


def test_a_policy_that_has_hardly_moved_is_reported_to_have_moved_as_far():
    new = case().scores.logprobs
    away = 1e-4 * np.where(np.arange(new.size).reshape(new.shape) % 2, 1, -1)
    targets = changed(old_logprobs=(new - away).astype(np.float32))
    mask = case().batch.action_mask
    log_ratios = (new - targets.old_logprobs.astype(np.float64))[mask]
    _, metrics, _ = measure(targets)
    expected = np.sum(targets.mean_weights[mask] * log_ratios**2 / 2)
    np.testing.assert_allclose(metrics["policy/old_kl"], expected, rtol=0.05)
