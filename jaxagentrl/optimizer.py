"""An optax chain from plain numbers."""

import jax
import optax


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
        max_grad_norm: gradients of a larger global norm are scaled down to it.
    """
    schedules = [optax.constant_schedule(learning_rate)]
    boundaries = []
    if decay_steps is not None:
        if decay_steps <= warmup_steps:
            raise ValueError(
                f"optimizer.decay_steps ({decay_steps}) must exceed optimizer.warmup_steps "
                f"({warmup_steps}); use None for a constant rate."
            )
        schedules = [
            optax.linear_schedule(
                learning_rate, final_fraction * learning_rate, decay_steps - warmup_steps
            )
        ]
    if warmup_steps:
        schedules.insert(0, optax.linear_schedule(0.0, learning_rate, warmup_steps))
        boundaries.append(warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            optax.join_schedules(schedules, boundaries),
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: optax.Params) -> optax.Params:
    """True for leaves named kernel or embedding; stacked layers give norms a second axis too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )
