"""Grouped-query attention (Ainslie et al. 2023) of whole sequences, and on a KV cache.

Shapes: B rows, L queries, S keys, H query heads, K key/value heads with K dividing H, E head size.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxagentrl.logprobs import cap
from jaxagentrl.models import cudnn_packed, sharding, splash

# How attention of whole sequences may be computed.
#   products   two matrix products around a float32 softmax: everywhere, in every dtype
#   cudnn      NVIDIA's fused kernels: the [L, S] scores never exist
#   splash     the same on TPUs, by Pallas
KERNELS = ("products", "cudnn", "splash")

# Large and negative instead of -inf: a row that attends to nothing (padding) stays finite.
_MASKED = -1e30

# By products, queries of a sequence in blocks: what is after a block is neither computed nor masked.
# Four blocks leave 5/8 of the scores; more would compile longer for the rest.
_MAX_BLOCKS, _MIN_BLOCK = 4, 64

_CUDNN_HEAD_DIM = 128  # the largest that cuDNN takes on every GPU from Ampere on


def kernel_for(
    dtype: jnp.dtype,
    length: int,
    head_dim: int,
    softcap: float | None,
    *,
    one_window: bool = True,
    is_tree: bool = False,
) -> str:
    """The name in `KERNELS` that suits the backend: a fused one where it takes these inputs.

    Args:
        dtype: of queries, keys and values; cuDNN takes 16 bits only, and GPUs from Ampere on.
        length: L; cuDNN's backward pass with a mask takes even lengths only, splash multiples of
            128.
        head_dim: E.
        softcap: of the scores, see `cap`; cuDNN has none.
        one_window: all layers see equally far; splash must know how far when it is compiled.
        is_tree: rows of `trees`, whose mask no segments say; splash reads nothing else.
    """
    if jax.default_backend() == "tpu" and one_window and not is_tree and splash.takes(length):
        return "splash"
    takes = (
        dtype in (jnp.bfloat16, jnp.float16)
        and length % 2 == 0
        and head_dim % 8 == 0
        and head_dim <= _CUDNN_HEAD_DIM
        and softcap is None
    )
    # On a T4 or V100 jax finds no kernel when the program is compiled (jax-ml/jax#22605).
    return "cudnn" if takes and cudnn_packed.generation() >= 8 else "products"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
    kernel: str = "products",
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    max_segments: int | None = None,
) -> jax.Array:
    """Causal attention of whole sequences with a float32 softmax.

    Args:
        q: [B, L, H, E]. k, v: [B, L, K, E].
        mask: [B or 1, L, L] bool, what a query may see of what is not after it; None is all of it.
        scale: of the scores, normally 1/√E.
        softcap: see `cap`; acts on the scaled scores. Not "cudnn".
        kernel: a name in `KERNELS`, see `kernel_for`.
        segment_ids, window: what the mask was made of, as in `splash.attend`. "splash", which never
            makes one, reads these and not the mask.
        max_segments: of `cudnn_packed.segment_bound`, with which "cudnn" may read segment ids and
            not the mask.

    Returns:
        [B, L, H, E].
    """
    if kernel == "splash":
        return splash.attend(q, k, v, segment_ids, scale=scale, softcap=softcap, window=window)
    if kernel == "cudnn":
        shards = sharding.head_shards_in_use()
        # The packed kernel has not seen windows.
        can_pack = max_segments is not None and window is None and k.shape[2] % shards == 0
        if can_pack and cudnn_packed.takes(q.shape[2] // shards, k.shape[2] // shards, k.shape[3], q.dtype.name):
            return cudnn_packed.attend(q, k, v, segment_ids, max_segments, scale=scale)
        return _attend_fused(q, k, v, mask, scale=scale, implementation="cudnn")
    length = q.shape[1]
    index = jnp.arange(length)
    seen = (index[None, :] <= index[:, None])[None]
    seen = seen if mask is None else seen & mask
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    size = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    blocks = [(start, min(start + size, length)) for start in range(0, length, size)]
    attended = [
        attend_cached(
            q[:, start:end],
            [(keys[..., :end], values[:, :, :end], seen[:, start:end, :end])],
            scale=scale,
            softcap=softcap,
        )
        for start, end in blocks
    ]
    return jnp.concatenate(attended, axis=1)


def _attend_fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    implementation: str,
) -> jax.Array:
    """`attend` by `jax.nn.dot_product_attention`; "xla" for its reference, in tests."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )


def attend_cached(
    q: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of new tokens on keys and values as `kv_cache` lays them out.

    Few tokens on a cache, or a whole sequence on itself: one layout, since XLA on CPU transposes the
    scores of any other in the backward pass.

    Args:
        q: [R, W, H, E].
        parts: keys [R, K, E, S], or in C blocks [R, C, K, E, S / C], values [R, K, S, E] and a mask [R or 1, W, S]
            bool, of each place that keys and values lie at.
        scale, softcap: as in `attend`.

    Returns:
        [R, W, H, E].
    """
    rows, width, heads, size = q.shape
    num_kv_heads = parts[0][0].shape[-3]
    # Queries of one key/value head side by side: one matrix product per row and head.
    q = q.reshape(rows, width, num_kv_heads, heads // num_kv_heads, size)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, -1, size)

    def scores_of(k: jax.Array, mask: jax.Array) -> jax.Array:
        mask = jnp.tile(mask, (1, heads // num_kv_heads, 1))[:, None]
        return jnp.where(mask, cap(_products(q, k) * scale, softcap), _MASKED)

    scores, values = [scores_of(k, mask) for k, _, mask in parts], [v for _, v, _ in parts]
    out = _weighted_sum(scores[0], values[0]) if len(parts) == 1 else _sum_of_parts(scores, values)
    out = out.reshape(rows, num_kv_heads, heads // num_kv_heads, width, size)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, width, heads, size)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """[R, K, Q, S] float32 of [R, K, Q, E] and keys as `attend_cached` takes them."""
    if k.ndim == 4:
        return jnp.einsum("rkqe,rkes->rkqs", q, k, preferred_element_type=jnp.float32)
    # q repeated and the order of the result are spelt out: of an einsum that has them to itself XLA on
    # CPU makes a transposed copy of the keys, or a product in four times the time.
    q = jnp.broadcast_to(q[:, None], (*k.shape[:3], *q.shape[2:]))
    scores = jnp.einsum("rckqe,rckep->rckqp", q, k, preferred_element_type=jnp.float32)
    scores = jnp.moveaxis(scores, 1, 3)
    return scores.reshape(*scores.shape[:3], -1)


@jax.custom_vjp
def _weighted_sum(scores: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(scores) · v: [..., Q, S] float32 and [..., S, E] to [..., Q, E].

    In the manner of FlashAttention (Dao et al. 2022): divided after the product, and the derivative of
    the softmax from the output. jax's own takes a pass over [Q, S] more in each direction.

        o = Σₛ eˢ vₛ / Σₛ eˢ,   ∂scores = p (dp − ⟨do, o⟩),   dp = do · vᵀ
    """
    return _weighted_sum_fwd(scores, v)[0]


def _weighted_sum_fwd(
    scores: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    masses = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(masses, axis=-1, keepdims=True)
    out = jnp.matmul(masses.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype), (masses, total, v, out)


def _weighted_sum_bwd(
    saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    masses, total, v, out = saved
    d_out = d_out / total  # masses are probabilities times their total
    inner = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    d_v = jnp.einsum("...qs,...qe->...se", masses.astype(v.dtype), d_out)
    d_masses = jnp.einsum("...qe,...se->...qs", d_out, v, preferred_element_type=jnp.float32)
    return masses * (d_masses - inner), d_v


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


def _sum_of_parts(scores: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """`_weighted_sum` of what lies at several places."""
    highest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
    masses = [jnp.exp(x - highest) for x in scores]
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in masses)
    sums = [
        jnp.matmul(x.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for x, v in zip(masses, values, strict=True)
    ]
    return (sum(sums) / total).astype(values[0].dtype)
