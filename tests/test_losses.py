"""Losses: goldens by hand, float64 oracles, the KL enumeration, leaks, and on-policy identities."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxagentrl import advantages, losses
import oracles
from core_cases import SEEDS, batch

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
few = settings(max_examples=25, deadline=None)
junk = st.sampled_from([0.0, np.nan, np.inf, -np.inf])
shapes = st.sampled_from([(3, 9), (2, 1)])
ROWS = ("logprobs", "old_logprobs", "advantages", "action_mask")
ALL = np.ones((1, 2), bool)


@functools.cache
def jitted(name, **options):
    return jax.jit(functools.partial(getattr(losses, name), **options))


def check(got, expected, mask):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.all(np.asarray(got)[~mask] == 0.0)


# --- policy losses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, dual, expected",
    [
        (1.1, 2.0, None, -2.2),  # inside
        (1.5, 2.0, None, -2.56),  # 1.28 · 2
        (0.5, 2.0, None, -1.0),  # the lower clip does not bind for A > 0
        (1.5, -2.0, None, 3.0),  # nor the upper for A < 0
        (0.5, -2.0, None, 1.6),  # .8 · 2
        (4.0, -2.0, None, 8.0),
        (4.0, -2.0, 3.0, 6.0),  # dual clip: 3 · 2
        (2.0, -2.0, 3.0, 4.0),
        (4.0, 2.0, 3.0, -2.56),  # dual clip is for A < 0 only
    ],
)
def test_clipped_surrogate_golden(ratio, advantage, dual, expected):
    got = losses.clipped_surrogate(
        jnp.log(jnp.array([ratio])),
        jnp.zeros(1),
        jnp.array([advantage]),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual,
    )
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@given(SEEDS, junk, shapes, st.sampled_from([None, 1.2]))
@few
def test_clipped_surrogate_matches_definition(seed, junk, shape, dual):
    new, old, adv, mask = (batch(seed, *shape, junk=junk)[k] for k in ROWS)
    got = jitted("clipped_surrogate", dual_clip=dual)(
        new, old, adv, clip_low=0.2, clip_high=0.28, action_mask=mask
    )
    expected = oracles.clipped_surrogate(new, old, adv, mask, low=0.2, high=0.28, dual=dual)
    check(got, expected, mask)


@given(SEEDS, junk, shapes, st.booleans())
@few
def test_sequence_surrogate_matches_definition(seed, junk, shape, by_turn):
    case = batch(seed, *shape, junk=junk)
    turn_ids = case["turn_ids"] if by_turn else None
    rows = [case[k] for k in ROWS]
    got = jitted("sequence_surrogate", clip_low=0.05, clip_high=0.1)(*rows, turn_ids=turn_ids)
    expected = oracles.sequence_surrogate(*rows, low=0.05, high=0.1, turn_ids=turn_ids)
    check(got, expected, case["action_mask"])


def test_sequence_surrogate_has_the_gradient_of_the_sequence_form():
    """With one advantage per row the token form's gradient is that of min(s A, clip(s) A)."""
    case = batch(7, 4, 9)
    mask, old = case["action_mask"], case["old_logprobs"]
    scores = np.array([1.0, -1.0, 0.5, -2.0], np.float32)
    clips = {"clip_low": 0.05, "clip_high": 0.1}

    def ours(new):
        per_token = losses.sequence_surrogate(
            new, old, advantages.spread(scores, mask), mask, **clips
        )
        return losses.aggregate(per_token, mask, mode="sequence_mean_token_mean")

    def paper(new):
        length = mask.sum(1)
        ratio = jnp.exp(jnp.sum(jnp.where(mask, new - old, 0.0), 1) / np.maximum(length, 1))
        surrogate = jnp.minimum(ratio * scores, jnp.clip(ratio, 0.95, 1.1) * scores)
        return -jnp.sum(jnp.where(length > 0, surrogate, 0.0)) / (length > 0).sum()

    new = case["logprobs"]
    np.testing.assert_allclose(ours(new), paper(new), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(new), jax.grad(paper)(new), **CLOSE)


def test_sequence_surrogate_by_turn_of_one_token_is_the_token_surrogate():
    case = batch(7, 4, 9)
    rows = [case[k] for k in ROWS]
    ids = np.tile(np.arange(9, dtype=np.int32), (4, 1))
    clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    got = losses.sequence_surrogate(*rows, turn_ids=ids, **clips)
    expected = losses.clipped_surrogate(*rows[:3], action_mask=rows[3], **clips)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_on_policy_every_surrogate_has_the_reinforce_gradient():
    case = batch(3, 4, 9)
    new, mask, adv = case["logprobs"], case["action_mask"], case["advantages"]
    clips = {"clip_low": 0.2, "clip_high": 0.28}

    @jax.jit
    def gradients(new):
        per_token = [
            lambda x: losses.policy_gradient(x, adv, action_mask=mask),
            lambda x: losses.clipped_surrogate(x, new, adv, action_mask=mask, **clips),
            lambda x: losses.clipped_surrogate(
                x, new, adv, action_mask=mask, dual_clip=3.0, **clips
            ),
            lambda x: losses.cispo(x, new, adv, action_mask=mask, **clips),
            lambda x: losses.sequence_surrogate(x, new, adv, mask, **clips),
        ]
        return [
            jax.grad(lambda x: losses.aggregate(f(x), mask, mode="token_mean"))(new)
            for f in per_token
        ]

    got = gradients(new)
    expected = np.where(mask, -adv / mask.sum(), 0.0)
    for gradient in got:
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_cispo_golden_and_gradient():
    # ρ = 1.5 is clipped to 1.28; value −1.28 · 2 · log π; the gradient stays −1.28 · 2.
    new, old = jnp.array([-1.0]), jnp.array([-1.0 - math.log(1.5)])
    cispo = functools.partial(losses.cispo, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(cispo(new, old, jnp.array([2.0])), [2.56], rtol=1e-5)
    gradient = jax.grad(lambda x: cispo(x, old, jnp.array([2.0]))[0])(new)
    np.testing.assert_allclose(gradient, [-2.56], rtol=1e-5)
    low = cispo(new, jnp.array([-1.0 + math.log(2.0)]), jnp.array([1.0]))
    np.testing.assert_allclose(low, [0.8], rtol=1e-5)


def test_clipping_removes_the_surrogates_gradient():
    clips = {"clip_low": 0.2, "clip_high": 0.28}

    def gradient(log_ratio, advantage, dual=None):
        return jax.grad(
            lambda x: losses.clipped_surrogate(
                x, jnp.zeros(1), jnp.array([advantage]), dual_clip=dual, **clips
            )[0]
        )(jnp.array([log_ratio]))[0]

    assert gradient(0.5, 1.0) == 0.0
    assert gradient(-0.5, -1.0) == 0.0
    assert gradient(-0.5, 1.0) == pytest.approx(-math.exp(-0.5))
    assert gradient(0.5, -1.0) == pytest.approx(math.exp(0.5))
    assert gradient(2.0, -1.0, dual=3.0) == 0.0


@pytest.mark.parametrize("bounds", [(0.0, 0.2, None), (0.0, 0.0, None), (0.2, 0.2, 1.0)])
def test_a_bound_at_ratio_1_leaves_the_gradient_there_whole(bounds):
    low, high, dual = bounds
    credit, mask = jnp.array([[1.0, -2.0]]), jnp.ones((1, 2), bool)

    def loss(x):
        return jnp.sum(losses.clipped_surrogate(
            x, jnp.zeros((1, 2)), credit, action_mask=mask, clip_low=low, clip_high=high, dual_clip=dual))

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((1, 2))), -credit)


def test_huge_log_ratios_stay_finite():
    new, old = jnp.array([0.0, -1000.0]), jnp.array([-1000.0, 0.0])
    options = {"clip_low": 0.2, "clip_high": 0.2}
    for got in [
        losses.clipped_surrogate(new, old, -jnp.ones(2), **options),
        losses.cispo(new, old, jnp.ones(2), **options),
        losses.sequence_surrogate(new, old, -jnp.ones(2), jnp.ones(2, bool), **options),
        losses.kl(new, old, estimator="k3"),
        losses.importance_ratios(new, old, jnp.ones(2, bool)),
    ]:
        assert np.all(np.isfinite(got))
    top = losses.importance_ratios(new, old, jnp.ones(2, bool))
    np.testing.assert_allclose(np.log(top), [20.0, -20.0], rtol=1e-6)


# --- value loss, entropy -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, old, target, clip, expected",
    [
        (1.0, 0.0, 2.0, None, 0.5),
        (1.0, 0.0, 2.0, 0.5, 1.125),  # near = .5, ½ · 1.5²
        (1.0, 0.0, 0.0, 0.5, 0.5),  # the max: ½ · max(1, .25)
        (-1.0, 0.0, -2.0, 0.5, 1.125),
        (0.25, 0.0, 1.0, 0.5, 0.28125),  # within the clip
    ],
)
def test_value_loss_golden(value, old, target, clip, expected):
    got = losses.value_loss(*(jnp.array([x]) for x in (value, old, target)), clip=clip)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)
    assert oracles.value_loss(value, old, target, clip) == pytest.approx(expected)


@given(SEEDS, junk, st.sampled_from([None, 0.5]))
@few
def test_value_loss_matches_definition(seed, junk, clip):
    case = batch(seed, 3, 9, junk=junk)
    value, old, target, mask = (
        case[k] for k in ("values", "advantages", "ref_logprobs", "action_mask")
    )
    got = jitted("value_loss", clip=clip)(value, old, target, action_mask=mask)
    expected = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask)):
        expected[i, t] = oracles.value_loss(
            float(value[i, t]), float(old[i, t]), float(target[i, t]), clip
        )
    check(got, expected, mask)


def test_entropy():
    logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -jnp.inf], [0, 1e4, 0, 0]])
    np.testing.assert_allclose(losses.entropy(logits), [math.log(4), math.log(3), 0], atol=1e-6)
    gradient = jax.grad(lambda x: losses.entropy(x).sum())(logits)
    assert np.all(np.isfinite(gradient))
    # Half of log p weighs each: p = (.25, .75).
    got = losses.entropy(jnp.log(jnp.array([0.25, 0.75])))
    assert got == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), rel=1e-6)
    # NaN is no impossible token.
    assert np.isnan(losses.entropy(jnp.array([jnp.nan, 0.0, -jnp.inf])))


# --- KL ----------------------------------------------------------------------------------------

P, REF = np.array([0.6, 0.4]), np.array([0.3, 0.7])


def expected_kl(logits, estimator):
    """Σ π · estimate, the tokens' distribution held fixed as sampling does."""
    logprobs = jax.nn.log_softmax(logits)
    weights = jax.lax.stop_gradient(jnp.exp(logprobs))
    ref = jnp.log(jnp.asarray(REF, jnp.float32))
    return jnp.sum(weights * losses.kl(logprobs, ref, estimator=estimator))


@pytest.mark.parametrize(
    "estimator, value, gradient",
    [
        ("k1", 0.19204, 0.0),  # true KL as a value; as a loss it does nothing
        ("k2", 0.20677, 0.30066),  # the true gradient
        ("k3", 0.19204, 0.3),  # p − q: the gradient of the forward KL
        ("k3_straight_through", 0.19204, 0.30066),
    ],
)
def test_kl_by_enumeration(estimator, value, gradient):
    logits = jnp.log(jnp.asarray(P, jnp.float32))
    got, slope = jax.value_and_grad(expected_kl)(logits, estimator)
    assert got == pytest.approx(value, abs=1e-5)
    assert slope[0] == pytest.approx(gradient, abs=1e-5)
    assert slope[1] == pytest.approx(-gradient, abs=1e-5)


def test_true_kl_gradient():
    """What the enumeration is compared with: p₀ (log(p₀/q₀) − KL) in float64."""
    kl = (P * np.log(P / REF)).sum()
    assert P[0] * (np.log(P[0] / REF[0]) - kl) == pytest.approx(0.30066, abs=1e-5)
    assert P[0] - REF[0] == pytest.approx(0.3)


def test_k1_is_refused_as_a_loss():
    with pytest.raises(ValueError, match="reward"):
        losses.kl_loss(jnp.zeros(1), jnp.zeros(1), estimator="k1")
    with pytest.raises(ValueError, match="k3_straight_through"):
        losses.kl(jnp.zeros(1), jnp.zeros(1), estimator="k4")
    got = losses.kl_loss(jnp.array([-1.0]), jnp.array([-2.0]), estimator="k2")
    np.testing.assert_allclose(got, [0.5])


@given(SEEDS, junk, st.sampled_from(["k1", "k2", "k3", "k3_straight_through"]))
@few
def test_kl_matches_definition(seed, junk, estimator):
    case = batch(seed, 3, 9, junk=junk)
    new, ref, mask = (case[k] for k in ("logprobs", "ref_logprobs", "action_mask"))
    got = jitted("kl", estimator=estimator)(new, ref, action_mask=mask)
    expected = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask)):
        u = float(new[i, t]) - float(ref[i, t])
        expected[i, t] = {"k1": u, "k2": u * u / 2}.get(estimator, math.exp(-u) - 1 + u)
    check(got, expected, mask)
    if estimator != "k1":
        assert np.all(np.asarray(got) >= 0)


@pytest.mark.parametrize("estimator", ["k3", "k3_straight_through"])
def test_kl_keeps_its_digits_where_the_policies_are_close(estimator):
    """As after one step at a low rate, where exp(−u) − 1 + u in float32 is rounding of either sign."""
    u = np.float32([-3, -1e-1, -1e-2, -1e-3, -1e-4, -1e-6, 0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 3])
    got = jitted("kl", estimator=estimator)(u, np.zeros_like(u))
    # u²/2 − u³/6 + u⁴/24 is k3 to ten digits below 1e-3, where float64 cancels, too.
    wide = u.astype(np.float64)
    series = wide**2 / 2 - wide**3 / 6 + wide**4 / 24
    expected = np.where(np.abs(wide) < 1e-2, series, np.exp(-wide) - 1 + wide)
    assert np.all(np.asarray(got) >= 0)
    # A rounding of expm1, 2⁻²⁴ u or so, is all that is lost.
    np.testing.assert_array_less(np.abs(got - expected), 2.0**-22 * np.abs(wide) + 1e-30)


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_straight_through"])
def test_kl_never_drives_policies_apart(estimator):
    """However far apart they are: beyond the bound of the exponent, too."""
    u = np.float32([-300, -21, -19, -1, 1, 19, 21, 300])
    slope = jax.grad(lambda u: jnp.sum(losses.kl(u, jnp.zeros_like(u), estimator=estimator)))(u)
    assert np.all(np.isfinite(slope)) and np.all(np.asarray(slope) * u >= 0)
    assert np.all(np.asarray(slope)[2:] * u[2:] > 0)


def test_no_gradient_reaches_what_is_held_fixed():
    case = batch(3, 2, 9)
    new, old, adv, mask = (case[k] for k in ROWS)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    for f in [
        lambda old, adv: losses.clipped_surrogate(new, old, adv, **clips),
        lambda old, adv: losses.sequence_surrogate(new, old, adv, mask, **clips),
        lambda old, adv: losses.cispo(new, old, adv, **clips),
        lambda old, adv: losses.policy_gradient(new, adv),
        lambda old, adv: losses.value_loss(new, old, adv, clip=0.5),
        lambda old, adv: losses.value_loss(new, old, adv, clip=0.01),  # most of it clipped
        lambda old, adv: losses.trajectory_dpo(
            new, old, mask, np.array([True, False]), np.zeros(2, np.int32), num_groups=1, beta=0.1
        ),
        lambda old, adv: losses.kl(new, old, estimator="k3"),
        lambda old, adv: losses.truncated_importance_weights(
            losses.importance_ratios(old, adv, mask)
        ),
    ]:
        for gradient in jax.grad(lambda *x: jnp.sum(jnp.where(mask, f(*x), 0)), (0, 1))(old, adv):
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_importance_ratios_pass_no_gradient(level):
    case = batch(3, 2, 9)
    mask = case["action_mask"]
    turns = case["turn_ids"] if level == "turn" else None

    def weight(old, sampled):
        return jnp.sum(losses.importance_ratios(old, sampled, mask, level=level, turn_ids=turns))

    for gradient in jax.grad(weight, (0, 1))(case["logprobs"], case["old_logprobs"]):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    # Nor through the cap, wherever the ratios come from.
    slope = jax.grad(lambda x: jnp.sum(losses.truncated_importance_weights(x, cap=2.0)))
    np.testing.assert_array_equal(slope(jnp.array([0.5, 3.0])), np.zeros(2))


def test_kl_coefficients():
    fixed = losses.fixed_kl_coefficient(jnp.array(0.1), jnp.array(5.0))
    assert fixed == pytest.approx(0.1)
    adapt = functools.partial(losses.adaptive_kl_coefficient, target=0.1, horizon=1000.0)
    # KL 10 % over target, 100 of 1000 episodes: 1 + .1 · .1. Far over: 1 + .2 · .1.
    assert adapt(0.5, jnp.array(0.11), num_episodes=100) == pytest.approx(0.505)
    assert adapt(0.5, jnp.array(9.0), num_episodes=100) == pytest.approx(0.51)
    assert adapt(0.5, jnp.array(0.0), num_episodes=100) == pytest.approx(0.49)
    assert adapt(0.5, jnp.array(0.1), num_episodes=100) == pytest.approx(0.5)
    # However many episodes, it never reaches 0.
    assert adapt(0.5, jnp.array(0.0), num_episodes=10**6) == pytest.approx(0.4)


# --- aggregation -------------------------------------------------------------------------------

LOSS = np.array([[1, 2, 3], [4, 7, 9], [5, 5, 5]], np.float32)
KEPT = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)  # sums 3 and 7; the last row drops out


@pytest.mark.parametrize(
    "mode, constant, expected",
    [
        ("token_mean", None, 10 / 3),
        ("sequence_mean_token_mean", None, (1.5 + 7) / 2),
        ("sequence_mean_token_sum", None, (3 + 7) / 2),
        ("constant", 4.0, (3 + 7) / 2 / 4),
    ],
)
def test_aggregate_golden(mode, constant, expected):
    got = losses.aggregate(LOSS, KEPT, mode=mode, constant=constant)
    assert got == pytest.approx(expected)


@given(SEEDS, junk, st.sampled_from(losses.AGGREGATION_MODES), st.booleans())
@few
def test_aggregate_matches_definition(seed, junk, mode, by_turn):
    case = batch(seed, 3, 9, junk=junk)
    constant = 6.0 if mode == "constant" else None
    ids = case["turn_ids"] if by_turn else None
    loss, mask = case["advantages"], case["action_mask"]
    got = jitted("aggregate", mode=mode, constant=constant)(loss, mask, sequence_ids=ids)
    expected = oracles.aggregate(loss, mask, mode=mode, constant=constant, sequence_ids=ids)
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("mode", losses.AGGREGATION_MODES)
def test_an_empty_mask_gives_zero_with_zero_gradient(mode):
    constant = 6.0 if mode == "constant" else None
    value, slope = jax.value_and_grad(
        lambda x: losses.aggregate(x, np.zeros((2, 3), bool), mode=mode, constant=constant)
    )(jnp.full((2, 3), jnp.nan))
    assert value == 0.0
    np.testing.assert_array_equal(slope, np.zeros((2, 3)))


def test_aggregate_refuses_wrong_modes():
    with pytest.raises(ValueError, match="token_mean"):
        losses.aggregate(LOSS, KEPT, mode="mean")
    with pytest.raises(ValueError, match="constant"):
        losses.aggregate(LOSS, KEPT, mode="constant")
    with pytest.raises(ValueError, match="constant"):
        losses.aggregate(LOSS, KEPT, mode="token_mean", constant=3.0)
    with pytest.raises(ValueError, match="constant: got 0.0, expected a number of tokens above 0"):
        losses.aggregate(LOSS, KEPT, mode="constant", constant=0.0)
    with pytest.raises(ValueError, match=r"mask is bool .*expected bool \[B, L\] with B = 1 as of per_token"):
        losses.aggregate(LOSS[:1], KEPT, mode="token_mean")
    with pytest.raises(ValueError, match=r"old_logprobs is float32 .* as of logprobs"):
        losses.clipped_surrogate(LOSS, LOSS[:1], LOSS, clip_low=0.2, clip_high=0.2)


# --- sampler mismatch --------------------------------------------------------------------------


@given(SEEDS, junk, st.sampled_from(["token", "turn", "sequence"]), st.booleans())
@few
def test_importance_ratios_match_definition(seed, junk, level, geometric):
    case = batch(seed, 3, 9, junk=junk)
    old, sampler, mask = (case[k] for k in ("old_logprobs", "logprobs", "action_mask"))
    ids = case["turn_ids"] if level == "turn" else None
    got = jitted("importance_ratios", level=level, geometric=geometric)(
        old, sampler, mask, turn_ids=ids
    )
    expected = oracles.importance_ratios(
        old, sampler, mask, level=level, turn_ids=ids, geometric=geometric
    )
    check(got, expected, mask)


@pytest.mark.parametrize("mode", losses.AGGREGATION_MODES)
def test_aggregation_weights_are_zero_off_the_mask(mode):
    mask = np.array([[1, 0, 1], [0, 0, 0]], bool)
    constant = 4.0 if mode == "constant" else None
    weights = np.asarray(losses.aggregation_weights(mask, mode=mode, constant=constant))
    np.testing.assert_array_equal(weights != 0, mask)


def test_a_sequence_ratio_is_a_product_unless_asked():
    new, old = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.5, -1.5]])
    mask = np.ones((1, 2), bool)
    plain = losses.importance_ratios(new, old, mask, level="sequence")
    np.testing.assert_allclose(plain, np.exp([[1.0, 1.0]]), rtol=1e-6)
    mean = losses.importance_ratios(new, old, mask, level="sequence", geometric=True)
    np.testing.assert_allclose(mean, np.exp([[0.5, 0.5]]), rtol=1e-6)


def test_a_sequence_ratio_beyond_float32_stays_finite():
    """The exponent is cut at 20: exp(300) would be ∞, and a negative advantage times it NaN."""
    new, old, mask = jnp.array([[-1.0, -1.0]]), jnp.array([[-301.0, -301.0]]), np.ones((1, 2), bool)
    loss = losses.sequence_surrogate(
        new, old, -jnp.ones((1, 2)), mask, clip_low=0.2, clip_high=0.28
    )
    np.testing.assert_allclose(loss, np.full((1, 2), np.exp(20.0)), rtol=1e-5)


def test_truncated_and_masked_importance_sampling():
    ratios = jnp.array([[0.4, 1.0, 3.0], [1.0, 1e-5, 1.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    weights = losses.truncated_importance_weights(ratios, cap=2.0)
    np.testing.assert_allclose(weights, [[0.4, 1, 2], [1, 1e-5, 1]])
    kept = losses.importance_mask(ratios, mask, low=0.5, high=2.0)
    np.testing.assert_array_equal(kept, [[0, 1, 0], [1, 0, 0]])
    # These bounds are the defaults, and so is the cap.
    edges = jnp.array([[0.49, 0.5, 2.0, 2.01, 2.9]])
    every = np.ones((1, 5), bool)
    np.testing.assert_array_equal(losses.importance_mask(edges, every), [[0, 1, 1, 0, 0]])
    np.testing.assert_allclose(
        losses.truncated_importance_weights(edges), [[0.49, 0.5, 2, 2, 2]], rtol=1e-6
    )
    kept = losses.importance_mask(ratios, mask, low=0.5, high=2.0, veto=1e-4)
    np.testing.assert_array_equal(kept, [[0, 1, 0], [0, 0, 0]])
    # The veto may look at tokens while the bounds look at sequences; bounds are inclusive.
    ones = jnp.ones((2, 3))
    kept = losses.importance_mask(
        2.0 * ones, mask, low=0.5, high=2.0, veto=1e-4, token_ratios=ratios
    )
    np.testing.assert_array_equal(kept, [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(losses.importance_mask(0.5 * ones, mask), mask)
    # A token off the mask vetoes nothing.
    kept = losses.importance_mask(jnp.array([[1.0, 0.0]]), np.array([[1, 0]], bool), veto=1e-4)
    np.testing.assert_array_equal(kept, [[1, 0]])


def test_masked_importance_sampling_shrinks_the_denominator():
    loss = jnp.array([[1.0, 100.0, 3.0]])
    kept = losses.importance_mask(jnp.array([[1.0, 5.0, 1.0]]), np.ones((1, 3), bool))
    assert losses.aggregate(loss, kept, mode="token_mean") == pytest.approx(2.0)


def test_importance_levels_are_checked():
    rows = (jnp.zeros((1, 2)), jnp.zeros((1, 2)), ALL)
    with pytest.raises(ValueError, match="level"):
        losses.importance_ratios(*rows, level="episode")
    with pytest.raises(ValueError, match="turn_ids"):
        losses.importance_ratios(*rows, level="turn")
    with pytest.raises(ValueError, match="turn_ids"):
        losses.importance_ratios(*rows, turn_ids=jnp.zeros((1, 2), jnp.int32))


# --- implicit process rewards ------------------------------------------------------------------


@given(SEEDS, junk)
@few
def test_trajectory_dpo_matches_definition(seed, junk):
    case = batch(seed, 6, 9, junk=junk)
    rows = [case[k] for k in ("logprobs", "old_logprobs", "action_mask", "succeeded", "group_ids")]
    got = jitted("trajectory_dpo", num_groups=2, beta=0.5)(*rows)
    expected = oracles.trajectory_dpo(*rows, num_groups=2, beta=0.5)
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_trajectory_dpo_golden():
    # Scores .1 · 2 and .1 · (−1): −log σ(.3) = .554355. One pair of the same group.
    new = jnp.array([[1.0, 1.0], [-1.0, np.nan], [5.0, 5.0]])
    mask = np.array([[1, 1], [1, 0], [1, 1]], bool)
    args = (mask, np.array([True, False, False]), np.array([0, 0, 1], np.int32))
    got = losses.trajectory_dpo(new, jnp.zeros((3, 2)), *args, num_groups=2, beta=0.1)
    assert got == pytest.approx(0.554355, abs=1e-6)


def test_trajectory_dpo_teaches_the_reward_model():
    """The gradient reaches the parameters, raises successes and lowers failures."""
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (8, 5, 4))
    direction = jnp.array([1.0, -1.0, 0.5, 0.0])
    succeeded = jnp.sum(inputs @ direction, axis=1) > 0
    ids = jnp.zeros(8, jnp.int32)
    mask = jnp.ones((8, 5), bool)

    def loss(weights):
        return losses.trajectory_dpo(
            inputs @ weights, jnp.zeros((8, 5)), mask, succeeded, ids, num_groups=1, beta=0.5
        )

    step = jax.jit(lambda w: w - 0.5 * jax.grad(loss)(w))
    weights = jnp.zeros(4)
    for _ in range(60):
        weights = step(weights)
    assert jnp.linalg.norm(weights) > 0.1
    held_out = jax.random.normal(jax.random.key(1), (200, 5, 4))
    score, truth = jnp.sum(held_out @ weights, 1), jnp.sum(held_out @ direction, 1)
    better = (truth[:, None] > 0) & (truth[None, :] <= 0)
    accuracy = jnp.sum(better & (score[:, None] > score[None, :])) / jnp.sum(better)
    assert accuracy > 0.85


def test_implicit_step_rewards_stand_on_turn_ends():
    new = jnp.array([[1.0, 2.0, jnp.nan, 4.0]])
    mask = np.array([[1, 1, 0, 1]], bool)
    turns, ends = np.array([[0, 0, 1, 1]], np.int32), np.array([[0, 1, 0, 1]], bool)
    old = jnp.array([[0.5, 0.5, jnp.inf, 3.0]])
    got = losses.implicit_step_rewards(new, old, mask, turns, ends, beta=0.5)
    np.testing.assert_allclose(got, [[0, 1.0, 0, 0.5]])
    slope = jax.grad(
        lambda x: losses.implicit_step_rewards(
            x, jnp.zeros((1, 4)), mask, turns, ends, beta=0.5
        ).sum()
    )(jnp.ones((1, 4)))
    np.testing.assert_array_equal(slope, np.zeros((1, 4)))


# --- gradients ---------------------------------------------------------------------------------


@jax.jit
def total_loss_and_gradients(new, old, ref, adv, mask, turn_ids, succeeded, ids):
    def total(new, values):
        clips = {"clip_low": 0.2, "clip_high": 0.28}
        rows = (new, old, adv)
        per_token = [
            losses.clipped_surrogate(*rows, dual_clip=3.0, action_mask=mask, **clips),
            losses.sequence_surrogate(*rows, mask, **clips),
            losses.sequence_surrogate(*rows, mask, turn_ids=turn_ids, **clips),
            losses.cispo(*rows, action_mask=mask, **clips),
            losses.policy_gradient(new, adv, action_mask=mask),
            losses.kl(new, ref, estimator="k2", action_mask=mask),
            losses.kl(new, ref, estimator="k3", action_mask=mask),
            losses.value_loss(values, old, adv, clip=0.2, action_mask=mask),
        ]
        modes = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
        return losses.trajectory_dpo(
            new, old, mask, succeeded, ids, num_groups=2, beta=0.5
        ) + sum(losses.aggregate(x, mask, mode=mode) for x in per_token for mode in modes)

    return jax.value_and_grad(total, (0, 1))(new, ref)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_junk_off_the_mask_reaches_no_loss_and_no_gradient(bad):
    names = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "action_mask", "turn_ids")
    names += ("succeeded", "group_ids")
    clean, dirty = (batch(5, 4, 9, junk=junk) for junk in (0.0, bad))
    value, slopes = total_loss_and_gradients(*(clean[k] for k in names))
    dirty_value, dirty_slopes = total_loss_and_gradients(*(dirty[k] for k in names))
    assert np.isfinite(value)
    assert value == dirty_value
    for a, b in zip(slopes, dirty_slopes):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.asarray(b)[~clean["action_mask"]] == 0.0)


def test_gradients_against_finite_differences():
    case = batch(9, 2, 9)
    new, old, adv, mask = (case[k] for k in ROWS)
    ids, won = np.zeros(2, np.int32), np.array([True, False])
    wide = {"clip_low": 0.9, "clip_high": 5.0}  # the kinks of the clip are no place for this

    @jax.jit
    def everything(new):
        return (
            losses.clipped_surrogate(new, old, adv, action_mask=mask, **wide),
            losses.policy_gradient(new, adv, action_mask=mask),
            losses.value_loss(new, old, adv, clip=None, action_mask=mask),
            losses.kl(new, old, estimator="k2", action_mask=mask),
            losses.kl(new, old, estimator="k3", action_mask=mask),
            losses.aggregate(new, mask, mode="sequence_mean_token_mean"),
            losses.trajectory_dpo(new, old, mask, won, ids, num_groups=1, beta=0.5),
            losses.entropy(new),
        )

    check_grads(everything, (new,), order=1, rtol=2e-2, atol=2e-2)


# --- parity with rlax --------------------------------------------------------------------------


def test_rlax_parity():
    """Where rlax overlaps: one unmasked sequence, mean over its tokens."""
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(0)
    new, old, adv = (rng.standard_normal(7).astype(np.float32) * 0.3 for _ in range(3))
    rewards, values = (rng.standard_normal(n).astype(np.float32) for n in (7, 8))
    discounts = np.array([1, 0.9, 0.9, 0, 1, 0.5, 1], np.float32)
    mask, row = np.ones(7, bool), np.ones((1, 7), bool)

    got = losses.clipped_surrogate(new, old, adv, clip_low=0.2, clip_high=0.2)
    expected = rlax.clipped_surrogate_pg_loss(jnp.exp(new - old), jnp.asarray(adv), 0.2)
    got = losses.aggregate(got[None], row, mode="token_mean")
    np.testing.assert_allclose(got, expected, **CLOSE)

    logits = rng.standard_normal((7, 5)).astype(np.float32)
    actions, weights = rng.integers(0, 5, 7), np.ones(7, np.float32)
    logprobs = jax.nn.log_softmax(logits)[np.arange(7), actions]
    expected = rlax.policy_gradient_loss(logits, actions, adv, weights)
    np.testing.assert_allclose(losses.policy_gradient(logprobs, adv).mean(), expected, **CLOSE)
    expected = rlax.entropy_loss(logits, weights)
    np.testing.assert_allclose(-losses.entropy(logits).mean(), expected, **CLOSE)

    got = advantages.gae(
        rewards, values[:-1], discounts, mask, gae_lambda=0.8, bootstrap_values=values[-1]
    )
    expected = rlax.truncated_generalized_advantage_estimation(
        jnp.asarray(rewards), jnp.asarray(discounts), 0.8, jnp.asarray(values)
    )
    np.testing.assert_allclose(got, expected, **CLOSE)
    got = advantages.rewards_to_go(rewards, discounts, mask)
    expected = rlax.discounted_returns(jnp.asarray(rewards), jnp.asarray(discounts), 0.0)
    np.testing.assert_allclose(got, expected, **CLOSE)
