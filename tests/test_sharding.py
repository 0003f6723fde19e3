"""Meshes: every factorization of eight devices computes what one device does."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxagentrl import learner, optimizer
from jaxagentrl.models import decoder, kv_cache, sharding
from jaxagentrl.packing import pack
from jaxagentrl.types import TrainState, TrajectoryBatch

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
        observation_weights=(0.5 * read / read.sum()).astype(np.float32),
    )
    return batch, targets


@functools.cache
def params(model: decoder.DecoderConfig) -> learner.Params:
    made = learner.init_params(model, jax.random.key(0), critic="head")
    made["value_head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), (model.hidden_size,))
    return jax.device_get(made)


def fresh_state(model, mesh):
    weights = jax.tree.map(jnp.asarray, params(model))
    opt_state = optimizer.make(**OPTIMIZER).init(weights)
    state = TrainState(jnp.int32(0), jnp.zeros((), jnp.int32), weights, opt_state)
    return sharding.place(state, mesh)


def gradients(model, mesh, **options):
    """(metrics, gradient) of the RL loss with every term, on a mesh."""
    loss_fn = learner.make_rl_loss(model, **RL, **options)
    accumulate = learner.make_accumulate(loss_fn)
    with sharding.use(mesh):
        state = fresh_state(model, mesh)
        batch, targets = sharding.place_rows(data(), mesh)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        rows = np.arange(ROWS, dtype=np.int32)
        grads, metrics = accumulate(state.params, zeros, batch, targets, rows, length=LENGTH)
    return metrics, grads


@functools.cache
def on_one_device(model):
    return jax.device_get(gradients(model, None))


def assert_close(one, other):
    """Float32 ≤ 1e-5, absolute: losses are of order 1, gradients below."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one, other)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_factorization_gives_the_loss_and_gradient_of_one_device(shape):
    for model in (MODEL, UNTIED):
        mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
        metrics, grads = gradients(model, mesh)
        assert_close(on_one_device(model), jax.device_get((metrics, grads)))
        places = sharding.shardings(grads, mesh)
        jax.tree.map(
            lambda x, where: x.sharding.is_equivalent_to(where, x.ndim) or pytest.fail(str(where)),
            grads,
            places,
        )
