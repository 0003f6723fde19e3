"""Times decode steps of published model shapes on one accelerator against the memory they must read.

    python tools/bench_decode.py --model 0.5B --slots 64 256
    python tools/bench_decode.py --model 1.5B --slots 64 256 --filled 1024

Random bfloat16 weights of Qwen2.5's shapes, a bfloat16 cache. The program is the sampler's own: one
compiled loop of --steps steps, nobody stops. The floor of a step is its bytes (all weights once, and
every row's filled positions once) over the bandwidth of a plain copy in the same process, bytes
read and bytes written counted.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from counts import positive
import bench_packed
import device_profile
from jaxagentrl import sampling
from jaxagentrl.models import decoder, decoding_layout, kv_cache


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=bench_packed.MODELS, default="0.5B")
    parser.add_argument("--slots", type=positive, nargs="+", default=[64, 256])
    parser.add_argument("--filled", type=positive, default=1024, help="positions of a row, on average")
    parser.add_argument("--steps", type=positive, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--costs", type=int, default=5, help="kernels of the profile to print")
    return parser.parse_args()


def bandwidth() -> float:
    """Bytes per second of a copy, read and written counted."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**24
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()

    def run() -> None:
        for _ in range(5):
            result = copy(x)
        result.block_until_ready()

    return 5 * 2 * x.nbytes / bench_packed.best_s(run, 3)


def step_bytes(
    params: decoder.Params, caches: tuple[kv_cache.KVCache, ...], mean_length: float
) -> float:
    """What one step must read: weights, looked-up embeddings aside, and the filled cache."""
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    if "lm_head" in params:
        weights -= params["embed"]["embedding"].nbytes
    (cache,) = caches  # none of `bench_packed.MODELS` has windows
    held = cache.keys.nbytes + cache.values.nbytes
    return weights + held * mean_length / cache.size


def measure(args: argparse.Namespace, params: decoder.Params, slots: int, speed: float) -> None:
    config = bench_packed.MODELS[args.model]
    # The step in the middle sees --filled positions, and the bucket is the next multiple of 128.
    lengths = np.full(slots, args.filled - args.steps // 2, np.int32)
    filled = -(-(args.filled + args.steps // 2) // 128) * 128
    held = sampling.init(config, slots, filled, args.dtype, most=args.steps)
    needed = step_bytes(params, held.caches, args.filled)
    controls = sampling.Controls(
        budgets=np.full(slots, args.steps, np.int32),
        temperatures=np.ones(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        min_p=np.zeros(slots, np.float32),
        stop_ids=np.full((slots, 1), -1, np.int32),
        streams=np.arange(2 * slots, dtype=np.uint32).reshape(slots, 2),
    )
    decode = sampling.make_decode(config, max_turn_tokens=args.steps)

    def run() -> None:
        nonlocal held
        held, sampled = decode(
            params, held, None, np.zeros(slots, np.int32), lengths, np.zeros(slots, bool), controls,
            np.int32(0), filled=filled, restricted=False,
        )
        jax.block_until_ready(sampled)
        assert int(sampled.steps) == args.steps

    since = time.perf_counter()
    run()
    compiling = time.perf_counter() - since
    seconds = bench_packed.best_s(run, args.repeats) / args.steps
    floor = needed / speed
    print(
        f"{args.model}, {slots} slots, {args.filled} positions: {1e3 * seconds:.3f} ms a step, "
        f"{slots / seconds:,.0f} tokens/s; floor {1e3 * floor:.3f} ms ({needed / 1e9:.2f} GB at "
        f"{speed / 1e12:.2f} TB/s): {floor / seconds:.1%} of it; first call {compiling:.0f} s",
        flush=True,
    )
    device_profile.report(run, count=args.costs)


def main() -> None:
    args = arguments()
    config = bench_packed.MODELS[args.model]
    speed = bandwidth()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))
    params = decoding_layout.for_decoding(params, args.dtype)
    for slots in args.slots:
        measure(args, params, slots, speed)


if __name__ == "__main__":
    main()
