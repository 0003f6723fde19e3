"""How a cache holds numbers.

As they are, in float32. On CPU bfloat16 as integers of their bits: to write some bfloat16 numbers into an array, XLA
makes float32 of the whole array and bfloat16 again there, which takes 500 times as long. In int8 with a float32 scale
for each vector: x is stored as round(x / s) with s = max |x| / 127, so each entry is off by at most s / 2.
"""

import jax
import jax.numpy as jnp


def stored(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Vectors [..., E] as an array of this dtype holds them, and their scales [...] if it is int8."""
    if dtype == jnp.int8:
        return quantize(x)
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), None
    return x.astype(dtype), None


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 vectors and their float32 scales: x [..., E] ≈ int8 [..., E] · scale [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    safe = jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(x / safe).astype(jnp.int8), scale


def numbers(x: jax.Array, dtype: jnp.dtype, scales: jax.Array | None = None) -> jax.Array:
    """What a cache holds, as numbers of this dtype; `scales` of each of its entries."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(dtype) if scales is None else x.astype(dtype) * scales.astype(dtype)


def as_kept(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Vectors [..., E] as they will be read, in their own dtype, once an array of this one holds them."""
    kept, scales = stored(x, dtype)
    return numbers(kept, x.dtype, None if scales is None else scales[..., None])
