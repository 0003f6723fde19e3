"""Causal attention of whole sequences by the Pallas kernel for TPUs: the [L, S] scores never exist.

jax's own splash attention, which skips the blocks that no query sees. The kernel is written for one
device and one sequence; here it is mapped over rows and, under a mesh, over the devices' shares of
rows and heads. Shapes as in `attention`.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxagentrl.models import by_device

_BLOCKS = (512, 256, 128)  # in tokens; the kernel wants multiples of 128
_BLOCK_NAMES = (
    "block_q", "block_kv", "block_kv_compute",
    "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
    "block_q_dq", "block_kv_dq",
)


def takes(length: int) -> bool:
    """Whether sequences of this length can be cut into the kernel's blocks."""
    return length % _BLOCKS[-1] == 0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, for masks that consist of segments and of one window.

    Args:
        q: [B, L, H, E]. k, v: [B, L, K, E]. `takes(L)` holds.
        segment_ids: [B, L] int32, attention stays within equal ids.
        scale, softcap: as in `attention.attend`.
        window: how many tokens a query sees, its own included; None is all of those before.
        interpret: run the kernel's program on any backend, slowly: for tests.

    Returns:
        [B, L, H, E].
    """
    local = functools.partial(
        _attend_local, softcap=softcap, window=window, interpret=interpret
    )
    split = by_device.over_rows_and_heads(local, k.shape, (True, True, True, False), True)
    return split(q * scale, k, v, segment_ids)


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    softcap: float | None,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """The rows and heads of one device."""
    kernel = _kernel(q.shape[1], q.shape[2], softcap, window, interpret)

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
        segments = None if ids is None else kernels.SegmentIds(ids, ids)
        return kernel(q, k, v, segment_ids=segments).swapaxes(0, 1)

    return jax.vmap(one)(q, k, v, segment_ids)


def _kernel(
    length: int, num_heads: int, softcap: float | None, window: int | None, interpret: bool
) -> Any:
    shape = (length, length)
    seen = masks.CausalMask(shape)
    if window is not None:
        seen = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = next(size for size in _BLOCKS if length % size == 0)
    sizes = kernels.BlockSizes(**dict.fromkeys(_BLOCK_NAMES, block))
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([seen] * num_heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
