"""Compiled programs of sampling: `extend` appends tokens to cache rows, `decode` samples a turn.

Both work on a KV cache that lives on the device for a whole rollout. Everything that varies between
calls (lengths, budgets, temperatures, keys, which rows take part) is data; the few static sizes
(rows, width, filled length) come from fixed buckets, so that nothing recompiles after warm-up.

S slots, R rows of one call, W width of an extend, T token budget of a turn.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxagentrl.models import decoder, kv_cache


class Sampled(NamedTuple):
    """What one decode call produced, per slot."""

    tokens: jax.Array  # [S, T] int32, junk beyond `counts`
    logprobs: jax.Array  # [S, T] float32, of the distribution that was sampled from
    entropies: jax.Array  # [S, T] float32, nats, of that distribution
    counts: jax.Array  # [S] int32, tokens sampled, the end-of-turn token included


class Extend(Protocol):
    def __call__(
        self,
        params: decoder.Params,
        cache: kv_cache.KVCache,
        tokens: jax.Array,
        slots: jax.Array,
        lengths: jax.Array,
        counts: jax.Array,
        *,
        filled: int,
    ) -> kv_cache.KVCache: ...


def make_extend(config: decoder.DecoderConfig) -> Extend:
    """Program that appends tokens [R, W] to the cache rows `slots` [R].

    Rows that are padding name a slot out of range. The cache argument is donated.
    """

    @functools.partial(jax.jit, static_argnames="filled", donate_argnames="cache")
    def extend(params, cache, tokens, slots, lengths, counts, *, filled):
        _, cache = decoder.hidden_cached(
            config, params, tokens, cache, slots, lengths, counts, filled=filled
        )
        return cache

    return extend


def make_decode(config: decoder.DecoderConfig, *, stop_id: int, max_turn_tokens: int):
    """Program that samples one turn for every active row in a single compiled loop.

    Arguments of the program:
        params, cache: the cache is donated.
        pending: [S] int32, the last prompt token of each row, not yet in the cache.
        lengths: [S] int32, tokens in the cache.
        budgets: [S] int32, how many tokens the row may sample (at most `max_turn_tokens`); 0 makes
            the row idle.
        temperatures: [S] float32; 0 is greedy, whose reported log-prob is that of the temperature-1
            distribution (the greedy choice itself has probability one).
        streams: [S, C] uint32, words that identify the turn (run seed, iteration, task, member,
            turn). Every token's key is folded from them and its position, so a trajectory does not
            depend on slot, wave or finishing order.
        filled: static bound on lengths + budgets.

    Returns:
        (Sampled, cache). The last sampled token of a row is in no cache: it opens the next extend.
    """

    @functools.partial(jax.jit, static_argnames="filled", donate_argnames="cache")
    def decode(params, cache, pending, lengths, budgets, temperatures, streams, *, filled):
        keys = stream_keys(streams)
        num_slots = pending.shape[0]
        greedy = temperatures <= 0
        scale = jnp.where(greedy, 1.0, temperatures)[:, None]

        def is_running(carry):
            return jnp.any(carry["active"])

        def step(carry):
            active, lengths = carry["active"], carry["lengths"]
            x, cache = decoder.hidden_cached(
                config,
                params,
                carry["pending"][:, None],
                carry["cache"],
                None,
                lengths,
                active.astype(jnp.int32),
                filled=filled,
            )
            logprobs = jax.nn.log_softmax(decoder.unembed(params, x[:, 0]) / scale)
            token = sample(logprobs, jax.vmap(jax.random.fold_in)(keys, lengths), greedy)
            chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
            entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)
            # Idle rows write at index T, which is dropped.
            where = (jnp.arange(num_slots), jnp.where(active, carry["counts"], max_turn_tokens))
            counts = carry["counts"] + active
            out = carry["out"]
            return {
                "cache": cache,
                "pending": jnp.where(active, token, carry["pending"]),
                "lengths": lengths + active,
                "counts": counts,
                "active": active & (token != stop_id) & (counts < budgets),
                "out": (
                    out[0].at[where].set(token, mode="drop"),
                    out[1].at[where].set(chosen, mode="drop"),
                    out[2].at[where].set(entropy, mode="drop"),
                ),
            }

        shape = (num_slots, max_turn_tokens)
        final = jax.lax.while_loop(
            is_running,
            step,
            {
                "cache": cache,
                "pending": pending,
                "lengths": lengths,
                "counts": jnp.zeros_like(lengths),
                "active": budgets > 0,
                "out": (jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape)),
            },
        )
        return Sampled(*final["out"], final["counts"]), final["cache"]

    return decode


def stream_keys(streams: jax.Array) -> jax.Array:
    """[S] keys folded from the words [S, C] of each row."""

    def fold(words: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        for index in range(words.shape[0]):
            key = jax.random.fold_in(key, words[index])
        return key

    return jax.vmap(fold)(streams)


def sample(logprobs: jax.Array, keys: jax.Array, greedy: jax.Array) -> jax.Array:
    """[S] int32 tokens from log-probs [S, V] by the Gumbel-max trick, one key per row.

    Gumbel-max and not the inverse of the cumulative sum: a float32 cumulative sum over a large
    vocabulary can pick tokens of probability zero.
    """
    size = logprobs.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)
    noise = jnp.where(greedy[:, None], 0.0, noise)
    return jnp.argmax(logprobs + noise, axis=-1).astype(jnp.int32)
