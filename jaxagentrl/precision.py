"""Products in the precision that was asked for, by the instructions that a device has for it."""

import math

import jax
import jax.numpy as jnp


def keep_float32(compute_dtype: str) -> None:
    """Has products of float32 arrays keep all their bits from here on, in the whole process, where the
    computation is to be in float32.

    By default GPUs round what they multiply to 10 bits (TF32) and TPUs to 8, and the sampler and the
    scoring pass, whose products have other shapes, drift apart: by 1e-4 instead of 1e-6 in a small model
    on an H200 (`docs/performance_log.md`).
    """
    if compute_dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")


def matmul(x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., D] @ y [D, F] in `dtype`, as of `contract`."""
    return contract(x, y, ((x.ndim - 1,), (0,)), dtype)


def contract(
    x: jax.Array, y: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: jnp.dtype | None = None
) -> jax.Array:
    """The sums over these axes of x and of y; in `dtype`, by default theirs (the wider of the two).

    XLA on CPU has the processor's products of bfloat16 numbers (AVX512_BF16) for float32 results alone: for others it
    makes float32 of both sides first, in every call. For a single row it has but a loop, ten times as slow as for two.
    """
    together = jnp.promote_types(x.dtype, y.dtype)
    x, y, wanted = x.astype(together), y.astype(together), together if dtype is None else dtype
    if x.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=wanted)
    is_single = x.size == math.prod(x.shape[axis] for axis in axes[0])
    if is_single:
        x, axes = jnp.stack([x, x]), (tuple(axis + 1 for axis in axes[0]), axes[1])
    sums = jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=jnp.float32).astype(wanted)
    return sums[0] if is_single else sums
