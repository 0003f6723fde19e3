"""What is sampled in a decode call, apart from the cache until the call is over: for TPUs.

A step writes one token of every row. In a cache these are places of their own for each row, which is a scatter;
of some caches (int8, heads of 128) the compiler lays all of it out anew around that. In the tail they lie at one
place for all rows, that of the step, and what rows held when the call began is only read. Attention
is over both (`attention.attend_cached`); at the end the rows are written as stretches (`kv_cache.settled`). MaxText
divides its cache likewise, into a prefilled and an autoregressive one (https://github.com/AI-Hypercomputer/maxtext).

Of rings what a call may see is taken out once as well: their blocks, which begin elsewhere in each row,
would be gathered in every step.

N layers, R rows, T tokens of a call at the most, K heads, E head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Before(NamedTuple):
    """Of rings, what rows held when the call began and its tokens may see, P positions."""

    keys: jax.Array  # [N, R, K, E, P]
    values: jax.Array  # [N, R, K, P, E]
    starts: jax.Array  # [R] int32, each row's first position


class Tail(NamedTuple):
    """In the dtype of the computation, of numbers as the cache will hold them."""

    keys: jax.Array  # [N, R, K, E, T]
    values: jax.Array  # [N, R, K, T, E]
    begins: jax.Array  # [R] int32, positions that the rows held when the call began
    before: Before | None


def empty(
    num_layers: int, begins: jax.Array, heads: tuple[int, int], most: int, dtype: jnp.dtype, before: Before | None
) -> Tail:
    """`heads` are K and E, `most` is T."""
    num_heads, size = heads
    shape = (num_layers, len(begins), num_heads)
    return Tail(jnp.zeros((*shape, size, most), dtype), jnp.zeros((*shape, most, size), dtype), begins, before)


def write(
    tail: Tail, layer: jax.Array | int, is_active: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
) -> Tail:
    """With a token's keys and values [R, K, E] at `positions` [R], in the rows that are active [R].

    All active rows have had the same number of tokens in this call; the others keep what they have.
    """
    step = jnp.max(jnp.where(is_active, positions - tail.begins, 0))

    def put(array: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        at = [layer, *[0] * (array.ndim - 1)]
        at[axis] = step
        new = jnp.expand_dims(new, (0, axis)).astype(array.dtype)
        held = jax.lax.dynamic_slice(array, at, new.shape)
        new = jnp.where(is_active[None, :, None, None, None], new, held)
        return jax.lax.dynamic_update_slice(array, new, at)

    return tail._replace(keys=put(tail.keys, keys, 4), values=put(tail.values, values, 3))


def seen(tail: Tail, positions: jax.Array, window: int | None) -> jax.Array:
    """[R, 1, T] bool, what of the tail the tokens at `positions` [R] see, themselves included."""
    distance = (positions - tail.begins)[:, None, None] - jnp.arange(tail.keys.shape[-1])[None, None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
