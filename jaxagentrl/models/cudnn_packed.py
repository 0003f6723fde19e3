"""Causal attention of packed rows by cuDNN's kernel, which computes nothing between segments.

The kernel that reads a mask computes the whole square of a row and throws most of it away. jax has no
public name for this one: `jax.nn.dot_product_attention` takes one sequence a row. Shapes as in
`attention`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxagentrl.models import by_device, trial

_TOLERANCE = 2e-2  # two roundings to bfloat16 and to spare; a wrong segment is off by its whole size


def segment_bound(count: int) -> int | None:
    """A static bound on the segments of a packed row for the kernel that wants one, else None.

    Powers of two, so that the counts that occur share few programs. The kernel's time grows with the
    bound.
    """
    return max(1 << (count - 1).bit_length(), 4) if _is_hopper() else None


def takes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> bool:
    """Whether the kernel is here and passes its trial on heads like these."""
    return _is_hopper() and _passes(num_heads, num_kv_heads, head_dim, dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    max_segments: int,
    *,
    scale: float,
) -> jax.Array:
    """`attention.attend` within segments; arguments as in `segments_of`. On a mesh by every device for the rows and
    heads that it holds: a kernel is nothing that the compiler could split."""
    alone = functools.partial(_attend_local, max_segments=max_segments, scale=scale)
    split = by_device.over_rows_and_heads(alone, k.shape, (True, True, True, False), True)
    return split(q, k, v, segment_ids)


def _attend_local(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, max_segments: int, scale: float
) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # jax (0.8 to 0.11) turns the offsets of keys into addresses with the number of query heads, which
    # is right only where both are equal.
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    sizes, starts = segments_of(segment_ids, max_segments)
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=sizes,
        kv_seqlen=sizes,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


def segments_of(segment_ids: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Sizes and starts of the segments of packed rows, the padding at the end being one too.

    Padding gets its own, since the kernel writes nothing outside segments, and what was never written
    may be NaN.

    Args:
        segment_ids: [B, L] int32: 0, 1, ... in order from the left, −1 on padding at the right.
        max_segments: M, bound on the segments of a row, padding not counted.

    Returns:
        sizes [B, M + 1] and starts [B, M + 2], int32; −1 where a row has no such segment.
    """
    count = jnp.max(segment_ids, axis=1, keepdims=True) + 1
    ids = jnp.where(segment_ids < 0, count, segment_ids)
    numbers = jnp.arange(max_segments + 1)
    sizes = jnp.sum(ids[:, None, :] == numbers[None, :, None], axis=-1, dtype=jnp.int32)
    starts = jnp.where(sizes > 0, jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes, -1)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)  # cuDNN's form
    return jnp.where(sizes > 0, sizes, -1), starts


def trial_inputs(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> tuple[Any, ...]:
    """q, k, v, gradient of the result and segment ids of two rows, one of them with padding."""
    rng = np.random.default_rng(0)
    length = 256
    ids = np.repeat([[0, 1, 2, 3], [0, 1, 1, -1]], length // 4, axis=1).astype(np.int32)
    ids[0, : length // 8] = 0
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    arrays = [rng.standard_normal((2, length, n, head_dim)).astype(dtype) for n in heads]
    arrays[-1] *= (ids >= 0)[..., None, None].astype(dtype)
    return *arrays, ids


def products(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The same by jax's own products and an explicit mask."""
    index = jnp.arange(q.shape[1])
    mask = (segment_ids[:, None] == segment_ids[:, :, None]) & (index[:, None] >= index[None])[None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=q.shape[-1] ** -0.5)


def with_gradients(attend: Any) -> Any:
    """Result on real tokens, and gradients of q, k and v, from `trial_inputs`."""

    def run(q, k, v, gradient, ids):
        result, pull_back = jax.vjp(lambda *x: attend(*x, ids), q, k, v)
        return result * (ids >= 0)[..., None, None], pull_back(gradient)

    return run


def generation() -> int:
    """Of NVIDIA's GPUs, the first number of their compute capability: 8 is Ampere, 9 Hopper. 0 of all else."""
    if jax.default_backend() != "gpu":
        return 0
    number = jax.local_devices()[0].compute_capability.partition(".")[0]
    return int(number) if number.isdigit() else 0  # AMD's have names, "gfx942"


def _is_hopper() -> bool:
    """cuDNN attends within segments from Hopper on."""
    return generation() >= 9


@functools.cache
def _passes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> bool:
    kernel = functools.partial(attend, max_segments=4, scale=head_dim**-0.5)
    return trial.agrees(
        "cuDNN's attention of packed rows",
        with_gradients(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids)),
        with_gradients(products),
        trial_inputs(num_heads, num_kv_heads, head_dim, dtype),
        tolerance=_TOLERANCE,
    )
