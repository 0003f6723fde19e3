"""Keys and values of every slot, on the device for the whole rollout.

Layout [N layers, S slots, M positions, K heads, E head size]. A slot's first `length` positions are
filled; what lies beyond is junk that no mask lets anyone read. Reads and writes touch one layer at a
time so that the cache can be a scan carry, which XLA updates in place.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    keys: jax.Array  # [N, S, M, K, E]
    values: jax.Array  # [N, S, M, K, E]

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]


def init(
    num_layers: int, num_slots: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: str
) -> KVCache:
    shape = (num_layers, num_slots, max_length, num_kv_heads, head_dim)
    return KVCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def write(
    cache: KVCache,
    layer: jax.Array,
    slots: jax.Array | None,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> KVCache:
    """Writes [R, W, K, E] keys and values of one layer at (slots [R], positions [R, W]).

    `slots` None means all slots in order. A slot or position out of range is dropped.
    """
    if slots is None:
        slots = jnp.arange(positions.shape[0])
    where = (layer, slots[:, None], positions)
    return KVCache(
        keys=cache.keys.at[where].set(keys.astype(cache.keys.dtype), mode="drop"),
        values=cache.values.at[where].set(values.astype(cache.values.dtype), mode="drop"),
    )


def read(
    cache: KVCache, layer: jax.Array, slots: jax.Array | None, filled: int
) -> tuple[jax.Array, jax.Array]:
    """[R, filled, K, E] keys and values of one layer; `slots` None means all slots in order."""
    def take(array: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)[:, :filled]
        return block if slots is None else jnp.take(block, slots, axis=0, mode="clip")

    return take(cache.keys), take(cache.values)
