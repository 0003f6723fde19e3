"""The optimizer against a loop written from its definition, and the numbers it refuses."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxagentrl import optimizer

OPTIONS = dict(
    learning_rate=0.02,
    warmup_steps=3,
    decay_steps=9,
    final_fraction=0.25,
    b1=0.8,
    b2=0.9,
    weight_decay=0.3,
    max_grad_norm=1.5,
)
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


def rate(step):
    """Up from 0 in three steps, then down to a quarter by step 9, where it stays."""
    if step < 3:
        return 0.02 * step / 3
    return 0.02 * (1 - 0.75 * min(step - 3, 6) / 6)


def adamw(weights, gradients):
    """Loshchilov & Hutter 2019, Algorithm 2, in float64."""
    m = {name: 0.0 for name in weights}
    v = {name: 0.0 for name in weights}
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        shrink = min(1.0, 1.5 / norm)
        moved = {}
        for name, g in gradient.items():
            m[name] = 0.8 * m[name] + 0.2 * shrink * g
            v[name] = 0.9 * v[name] + 0.1 * (shrink * g) ** 2
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.9 ** (step + 1))
            decay = 0.3 * weights[name] if name in DECAYED else 0.0
            moved[name] = weights[name] - rate(step) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
        weights = moved
    return weights


def test_rates_decay_and_clipping_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    names = (*DECAYED, "scale", "bias")
    weights = {name: rng.standard_normal((2, 3)) for name in names}  # stacked layers: norms have two axes
    gradients = [
        {name: size * rng.standard_normal((2, 3)) for name in names}
        for size in (1.0, 0.1, 3.0, 0.01, 1.0, 1.0, 0.2, 5.0, 1.0, 1.0, 1.0, 1.0)
    ]
    norms = [math.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
    assert min(norms) < 1.5 < max(norms)
    chain = optimizer.make(**OPTIONS)
    ours = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    state = chain.init(ours)
    for gradient in gradients:
        given = {name: jnp.asarray(g, jnp.float32) for name, g in gradient.items()}
        updates, state = chain.update(given, state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, expected in adamw(weights, gradients).items():
        np.testing.assert_allclose(ours[name], expected, atol=2e-6, err_msg=name)


def test_without_warm_up_and_decay_the_rate_is_constant():
    chain = optimizer.make(**OPTIONS | dict(warmup_steps=0, decay_steps=None, weight_decay=0.0))
    weights = {"kernel": jnp.zeros(1)}
    state, sizes = chain.init(weights), []
    for _ in range(12):
        updates, state = chain.update({"kernel": jnp.ones(1)}, state, weights)
        sizes.append(float(updates["kernel"][0]))
    np.testing.assert_allclose(sizes, -0.02, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(learning_rate=-1e-3), dict(learning_rate=math.nan), dict(warmup_steps=-1),
        dict(final_fraction=1.5), dict(b1=1.0), dict(b2=-0.1), dict(weight_decay=-0.1),
        dict(max_grad_norm=0.0), dict(max_grad_norm=-1.0), dict(decay_steps=3),
        dict(moment_dtype="int8"),
    ],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused_by_their_key(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^optimizer\.{key} .*{value}"):
        optimizer.make(**OPTIONS | wrong)
    with pytest.raises(ValueError, match=rf"^rl\.optimizer\.{key} "):
        optimizer.make(**OPTIONS | wrong, where="rl.optimizer")


def test_no_gradient_and_no_clipping_move_nothing_and_stay_numbers():
    for most in (1e-3, math.inf):
        options = OPTIONS | dict(max_grad_norm=most, weight_decay=0.0, warmup_steps=0)
        chain = optimizer.make(**options)
        weights = {"kernel": jnp.ones(3)}
        updates, _ = chain.update({"kernel": jnp.zeros(3)}, chain.init(weights), weights)
        np.testing.assert_array_equal(updates["kernel"], 0.0)
