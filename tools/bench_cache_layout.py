"""Times one decode step's attention for several layouts of the KV cache, on this machine.

    python tools/bench_cache_layout.py --slots 128 --filled 128

Every formulation writes one position per slot and attends to the filled part, in a compiled loop over
layers, as decoding does; the mirrors' time includes making them, once for all steps. "floor" is the
time in which this machine reads the filled keys and values once, by the bandwidth of a sum over a
large array in the same run.
"""

if __name__ == "__main__":
    from jaxagentrl import pages

    pages.use_huge_ones()  # before jax is imported: it starts this process again

import argparse
import time

import jax
import jax.numpy as jnp

from counts import positive
from jaxagentrl import pages
from jaxagentrl.models import attention, kv_cache

LAYERS, STEPS = 3, 20


def best(call, repeats: int = 8) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        since = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - since)
    return min(seconds)


def bandwidth() -> float:
    """Bytes per second of summing a large array."""
    x = jnp.ones((64 * 2**20,), jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / best(lambda: total(x).block_until_ready())


def softmax(scores, mask, size):
    return jax.nn.softmax(jnp.where(mask, scores * size**-0.5, -1e30), -1)


def formulations(s, k, g, e, m, f):
    """name → (key shape, value shape, write(keys, values, layer, new), attend(q, keys, values))."""
    rows, heads = jnp.arange(s)[:, None], jnp.arange(k)[None]
    place = jnp.full((s, 1), f - 28)
    mask = (jnp.arange(f)[None] <= place)[:, None, None]

    def positions_first_write(keys, values, layer, new):
        where = (layer, rows, place, heads)
        return keys.at[where].set(new), values.at[where].set(new)

    def positions_first(q, keys, values):
        scores = jnp.einsum("skge,smke->skgm", q, keys[:, :f])
        return jnp.einsum("skgm,smke->skge", softmax(scores, mask, e), values[:, :f])

    def heads_first_write(keys, values, layer, new):
        where = (layer, rows, heads, place)
        return keys.at[where].set(new), values.at[where].set(new)

    def heads_first(q, keys, values):
        scores = jnp.einsum("skge,skme->skgm", q, keys[:, :, :f])
        return jnp.einsum("skgm,skme->skge", softmax(scores, mask, e), values[:, :, :f])

    def ours_write(keys, values, layer, new):
        keys = keys.at[layer, rows, heads, :, place].set(new)
        return keys, values.at[layer, rows, heads, place].set(new)

    def ours(q, keys, values):
        scores = jnp.einsum("skge,skem->skgm", q, keys[..., :f])
        return jnp.einsum("skgm,skme->skge", softmax(scores, mask, e), values[:, :, :f])

    def elementwise(q, keys, values):
        scores = jnp.sum(q[..., None] * keys[:, :, None, :, :f], axis=3)
        weights = softmax(scores, mask, e)
        return jnp.sum(weights[..., None] * values[:, :, None, :f], axis=3)

    first, second, transposed = (s, m, k, e), (s, k, m, e), (s, k, e, m)
    return {
        "positions first, dots": (first, first, positions_first_write, positions_first),
        "heads first, dots": (second, second, heads_first_write, heads_first),
        "keys transposed, dots (stored)": (transposed, second, ours_write, ours),
        "keys transposed, multiply and sum": (transposed, second, ours_write, elementwise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=positive, default=128)
    parser.add_argument("--filled", type=positive, default=128)
    parser.add_argument("--length", type=positive, default=176)
    parser.add_argument("--kv-heads", type=positive, default=2)
    parser.add_argument("--queries-per-head", type=positive, default=2)
    parser.add_argument("--head-dim", type=positive, default=32)
    args = parser.parse_args()
    pages.keep()
    s, k, g, e = args.slots, args.kv_heads, args.queries_per_head, args.head_dim
    floor = LAYERS * 2 * s * args.filled * k * e * 4 / bandwidth()
    print(f"floor {1e3 * floor:.2f} ms a step ({LAYERS} layers, {jax.devices()[0].platform})")

    def report(name: str, run, *given) -> None:
        q = jnp.ones((s, k, g, e))
        seconds = best(lambda: run(*given, q).block_until_ready()) / STEPS
        print(f"{name:36} {1e3 * seconds:6.2f} ms a step  {seconds / floor:5.1f} x the floor")

    for name, (key_shape, value_shape, write, attend) in formulations(
        s, k, g, e, args.length, args.filled
    ).items():
        @jax.jit
        def run(keys, values, q, write=write, attend=attend):
            def layer(carry, index):
                keys, values, q = carry
                keys, values = write(keys, values, index, q[:, :, 0])
                read = jax.lax.dynamic_index_in_dim
                q = attend(q, read(keys, index, keepdims=False), read(values, index, keepdims=False))
                return (keys, values, q), None

            def step(_, carry):
                return jax.lax.scan(layer, carry, jnp.arange(LAYERS))[0]

            return jax.lax.fori_loop(0, STEPS, step, (keys, values, q))[2]

        report(name, run, jnp.ones((LAYERS, *key_shape)), jnp.ones((LAYERS, *value_shape)))

    @jax.jit
    def run_mirrored(cache, q):
        cache = kv_cache.mirrored(
            cache, jnp.arange(s), jnp.zeros(s, jnp.int32), args.filled, q.dtype, most=1
        )
        held = kv_cache.Stretch(None, kv_cache.in_blocks(args.filled))
        places = jnp.full((s, 1), args.filled - 28)
        mask = (jnp.arange(held.size) <= places)[:, None]

        def step(_, carry):
            cache, q = carry
            for index in range(LAYERS):
                new = q[:, None, :, 0]
                cache = kv_cache.write(cache, index, None, places, new, new)
                q = q.reshape(s, 1, k * g, e)
                keys, values = kv_cache.read(cache, index, None, held, q.dtype)
                q = attention.attend_cached(q, [(keys, values, mask)], scale=e**-0.5)
                q = q.reshape(s, k, g, e)
            return cache, q

        return jax.lax.fori_loop(0, STEPS, step, (cache, q))[1]

    cache = kv_cache.init(LAYERS, s, args.length, k, e, "float32")
    report("mirrors of the stored (ours on CPU)", run_mirrored, jax.tree.map(jnp.ones_like, cache))


if __name__ == "__main__":
    main()
