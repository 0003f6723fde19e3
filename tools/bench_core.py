"""Times the functional core on this machine: per call, and against bytes that must move.

    python tools/bench_core.py --rows 256 --length 4096

GAE is compared with two other formulations in jax (associative scan, unrolled scan), a numpy loop
over tokens, and the masked backward loop over columns that torch codebases use (our own
transcription of the formula). The other estimators and losses are timed alone. "floor" is the time
in which this machine copies as many bytes as the function reads and writes.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from counts import positive
from jaxagentrl import advantages, losses

LAMBDA = 0.95


def associative_gae(rewards, values, discounts, mask):
    """The same recursion as two associative scans: next value, then the affine chain."""
    rewards, values, discounts = (jnp.where(mask, x, 0.0) for x in (rewards, values, discounts))

    def nearest(right, left):
        return jnp.where(left[1], left[0], right[0]), left[1] | right[1]

    def chain(right, left):
        return left[0] * right[0], left[1] + left[0] * right[1]

    following, _ = jax.lax.associative_scan(nearest, (values, mask), reverse=True, axis=1)
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)))
    delta = jnp.where(mask, rewards + discounts * following - values, 0.0)
    factor = jnp.where(mask, discounts * LAMBDA, 1.0)
    _, out = jax.lax.associative_scan(chain, (factor, delta), reverse=True, axis=1)
    return jnp.where(mask, out, 0.0)


def numpy_gae(rewards, values, discounts, mask):
    """Column by column, in float32 numpy."""
    out = np.zeros_like(rewards)
    adv, following = (np.zeros(len(rewards), np.float32) for _ in range(2))
    for t in reversed(range(rewards.shape[1])):
        r, v, d, m = rewards[:, t], values[:, t], discounts[:, t], mask[:, t]
        new = r + d * following - v + d * LAMBDA * adv
        adv, following = np.where(m, new, adv), np.where(m, v, following)
        out[:, t] = np.where(m, new, 0)
    return out


def torch_gae(torch, rewards, values, discounts, mask):
    """Column by column, with arithmetic masks, as PyTorch code writes it."""
    columns, weights = [], mask.float()
    adv = following = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        m = weights[:, t]
        delta = rewards[:, t] + discounts[:, t] * following - values[:, t]
        new = delta + discounts[:, t] * LAMBDA * adv
        adv, following = m * new + (1 - m) * adv, m * values[:, t] + (1 - m) * following
        columns.append(m * new)
    return torch.stack(columns[::-1], dim=1)


def best_ms(run, repeats: int) -> float:
    """Shortest of several runs, in milliseconds, after one to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def cases(rows: int, length: int, num_groups: int):
    """{name: (function, arguments)} for the jax functions."""
    rng = np.random.default_rng(0)
    shape = (rows, length)

    def numbers():
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    r, v, new, old, adv = (numbers() for _ in range(5))
    mask = jnp.asarray(rng.random(shape) < 0.5)
    d = jnp.full(shape, 0.99)
    turns = jnp.asarray(np.minimum(np.arange(length) // 32, 63)[None].repeat(rows, 0), jnp.int32)
    ends = jnp.asarray(rng.random(shape) < 0.03) & mask
    ids = jnp.arange(rows, dtype=jnp.int32) % num_groups
    scores = jnp.asarray(rng.random(rows), jnp.float32)
    chain, ratios = (r, v, d, mask), (new, old, adv)
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    two = {"token_discount": 1.0, "turn_discount": 0.95}
    in_group = functools.partial(
        advantages.rewards_to_go_group, num_groups=num_groups, num_turns=64
    )
    grpo = functools.partial(advantages.group_normalized, num_groups=num_groups)
    return {
        "gae": (functools.partial(advantages.gae, gae_lambda=LAMBDA), chain),
        "gae, associative scan": (associative_gae, chain),
        "turn_gae": (functools.partial(advantages.turn_gae, gae_lambda=LAMBDA), (*chain, ends)),
        "bilevel_gae": (
            functools.partial(advantages.bilevel_gae, gae_lambda=LAMBDA, **two),
            (r, v, mask, ends),
        ),
        "rewards_to_go_group": (in_group, (r, d, mask, turns, ids)),
        "group_normalized": (grpo, (scores, ids)),
        "whiten": (advantages.whiten, (adv, mask)),
        "clipped_surrogate": (functools.partial(losses.clipped_surrogate, **clips), ratios),
        "sequence_surrogate": (
            functools.partial(losses.sequence_surrogate, **clips),
            (*ratios, mask),
        ),
        "aggregate": (functools.partial(losses.aggregate, mode="token_mean"), (adv, mask)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=256)
    parser.add_argument("--length", type=positive, default=4096)
    parser.add_argument("--groups", type=positive, default=32)
    parser.add_argument("--repeats", type=positive, default=10)
    args = parser.parse_args()

    block = np.ones(args.rows * args.length, np.float32)
    copied = np.empty_like(block)
    copy_ms = best_ms(lambda: np.copyto(copied, block), args.repeats)  # 2 · 4 bytes per entry
    per_byte = copy_ms / (2 * block.nbytes)

    print(f"[{args.rows}, {args.length}] on {jax.devices()[0].device_kind}, best of {args.repeats}")
    print(f"{'':28} {'ms':>9} {'floor':>9}")
    table = cases(args.rows, args.length, args.groups)
    for name, (function, inputs) in table.items():
        run = jax.jit(function)
        out = run(*inputs)
        ms = best_ms(lambda: jax.block_until_ready(run(*inputs)), args.repeats)
        moved = sum(x.nbytes for x in inputs) + out.nbytes
        print(f"{name:28} {ms:9.3f} {moved * per_byte:9.3f}", flush=True)

    chain = table["gae"][1]
    wanted = advantages.gae(*chain, gae_lambda=LAMBDA)
    host = [np.asarray(x) for x in chain]
    ms = best_ms(lambda: numpy_gae(*host), 3)
    print(f"{'gae, numpy columns':28} {ms:9.3f}")
    np.testing.assert_allclose(numpy_gae(*host), wanted, rtol=1e-3, atol=1e-3)
    try:
        import torch
    except ImportError:
        print("gae, torch columns: torch is not installed")
        return
    tensors = [torch.tensor(x) for x in host]
    ms = best_ms(lambda: torch_gae(torch, *tensors), 3)
    print(f"{'gae, torch columns':28} {ms:9.3f}")
    np.testing.assert_allclose(torch_gae(torch, *tensors), wanted, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
