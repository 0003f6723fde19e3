"""An optax chain from plain numbers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENT_DTYPES = ("float32", "bfloat16")


def make(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_steps: int | None,
    final_fraction: float,
    b1: float,
    b2: float,
    weight_decay: float,
    max_grad_norm: float,
    moment_dtype: str = "float32",
    where: str = "optimizer",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with clipping by global norm, warm-up and linear decay.

    Args:
        learning_rate: peak rate.
        warmup_steps: steps of linear warm-up from 0; 0 starts at the peak.
        decay_steps: steps from the start until `final_fraction` of the peak is reached, linearly
            after warm-up; None keeps the peak.
        final_fraction: share of the peak that remains after decay.
        b1, b2: Adam's moment decays.
        weight_decay: decoupled decay, on matrices only: norms' scales and biases are left alone.
        max_grad_norm: gradients of a larger global norm are scaled down to it; infinity is no clipping.
        moment_dtype: "bfloat16" keeps Adam's moments in half the memory, see `scale_by_small_adam`.
        where: where these are in the config, for errors.

    Raises:
        ValueError: a number that cannot work, with its key, what was got, what was expected.
    """
    if moment_dtype not in MOMENT_DTYPES:
        raise ValueError(
            f"{where}.moment_dtype must be one of {', '.join(MOMENT_DTYPES)}, got {moment_dtype!r}."
        )
    for key, value, is_right, expected in (
        ("learning_rate", learning_rate, 0 <= learning_rate < math.inf, "at least 0"),
        ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
        ("final_fraction", final_fraction, 0 <= final_fraction <= 1, "in [0, 1]"),
        ("b1", b1, 0 <= b1 < 1, "in [0, 1)"),
        ("b2", b2, 0 <= b2 < 1, "in [0, 1)"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0"),
        # At 0 every update would be 0, and without a gradient not a number.
        ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "above 0 (float('inf') does not clip)"),
    ):
        if not is_right:
            raise ValueError(f"{where}.{key} must be {expected}, got {value}.")
    if decay_steps is not None and decay_steps <= warmup_steps:
        raise ValueError(
            f"{where}.decay_steps ({decay_steps}) must exceed {where}.warmup_steps ({warmup_steps}); use None "
            "for a constant rate."
        )
    schedules = [optax.constant_schedule(learning_rate)]
    boundaries = []
    if decay_steps is not None:
        schedules = [
            optax.linear_schedule(
                learning_rate, final_fraction * learning_rate, decay_steps - warmup_steps
            )
        ]
    if warmup_steps:
        schedules.insert(0, optax.linear_schedule(0.0, learning_rate, warmup_steps))
        boundaries.append(warmup_steps)
    schedule = optax.join_schedules(schedules, boundaries)
    if moment_dtype == "float32":
        rule = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_is_matrix)
    else:
        rule = optax.chain(
            scale_by_small_adam(b1=b1, b2=b2),
            optax.add_decayed_weights(weight_decay, _is_matrix),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule)


def with_critic(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation
) -> optax.GradientTransformation:
    """A chain for the policy and one for the critic ("critic", "value_head"), of parameters that are a
    dict of those: each has its rate, and clips the norm of its own gradient, so that the policy's steps
    do not shrink where the critic's error is large."""

    def labels(params: optax.Params) -> dict[str, str]:
        return {key: "critic" if key in ("critic", "value_head") else "policy" for key in params}

    return optax.partition({"policy": policy, "critic": critic}, labels)


class SmallAdamState(NamedTuple):
    count: jax.Array  # [] int32
    mu: optax.Updates  # bfloat16
    nu: optax.Updates  # bfloat16


def scale_by_small_adam(
    *, b1: float, b2: float, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with both moments stored in bfloat16, computed in float32.

    A moment changes by a share 1 − β per step. bfloat16 has 8 bits, so that rounding to nearest
    would drop changes below 1/256 for ever: a second moment with β₂ = 0.999 would never move.
    Storing rounds up or down at random in proportion instead, which is right on average. The random
    bits are a function of the step and the leaf, so a resumed run draws the same.
    """

    def init(params: optax.Params) -> SmallAdamState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)

        return SmallAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(
        grads: optax.Updates, state: SmallAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SmallAdamState]:
        count = state.count + 1

        def moment(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
            return decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)

        mu = jax.tree.map(lambda m, g: moment(m, g, b1), state.mu, grads)
        nu = jax.tree.map(lambda m, g: moment(m, jnp.square(g), b2), state.nu, grads)
        steps = count.astype(jnp.float32)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + epsilon)

        key = jax.random.fold_in(jax.random.key(0), count)
        stored = SmallAdamState(
            count,
            _stored(mu, jax.random.fold_in(key, 0)),
            _stored(nu, jax.random.fold_in(key, 1)),
        )
        return jax.tree.map(direction, mu, nu), stored

    return optax.GradientTransformation(init, update)


def _stored(tree: optax.Updates, key: jax.Array) -> optax.Updates:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([_round_at_random(x, k) for x, k in zip(leaves, keys, strict=True)])


def _round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probability that makes the mean right.

    bfloat16 is the upper half of a float32: random bits added to the lower half carry over as often
    as that half is large. Infinities and NaN stay as they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(
        ((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16
    )
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _is_matrix(params: optax.Params) -> optax.Params:
    """By the leaf's name: stacked layers give norms a second axis too."""
    names = ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
