"""Times an RL update of published model shapes on one accelerator: packed rows of 4,096 tokens.

    python tools/bench_packed.py --model 0.5B
    python tools/bench_packed.py --model 1.5B --rows 2 --remat dots
    python tools/bench_packed.py --model 0.5B --actions 0.06

Random weights of Qwen2.5's shapes, float32 masters, bfloat16 compute, AdamW. Episodes of random
length (median 900 tokens, at most 4,000) are packed by first-fit, and the step is the learner's own: one
program that works off --parts micro-batches of --rows packed rows and applies the optimizer. The loss
is the clipped surrogate.

Model FLOPs are those that the mathematics need: three times the forward products with weights, for
real tokens only and, of the unembedding, for those that are trained on, plus causal attention within
each episode. Nothing computed again counts. They are
divided by the datasheet's dense bfloat16 peak (MFU) and by what a plain 8,192³ product reaches in the
same process.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from counts import positive
import device_profile
from jaxagentrl import learner, objectives, optimizer, packing
from jaxagentrl.models import decoder
from jaxagentrl.types import TrainState, TrajectoryBatch

# The published config.json files of Qwen2.5; "tiny" is for trying this program on a CPU.
MODELS = {
    "0.5B": decoder.DecoderConfig(
        vocab_size=151936, hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64,
        intermediate_size=4864, attention_bias=True, rope_theta=1e6, norm_eps=1e-6,
    ),
    "1.5B": decoder.DecoderConfig(
        vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2,
        head_dim=128, intermediate_size=8960, attention_bias=True, rope_theta=1e6, norm_eps=1e-6,
    ),
    "tiny": decoder.DecoderConfig(
        vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=128, attention_bias=True,
    ),
}
# Dense bfloat16, from the vendor's datasheets (SXM parts).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
LONGEST = 4000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="0.5B")
    parser.add_argument("--length", type=positive, default=4096, help="of a packed row")
    parser.add_argument("--rows", type=positive, default=4, help="packed rows of a micro-batch")
    parser.add_argument("--parts", type=positive, default=4, help="micro-batches of a step")
    parser.add_argument("--actions", type=float, default=2 / 3, help="share of tokens trained on")
    parser.add_argument("--remat", choices=decoder.REMAT, default="none")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--costs", type=int, default=5, help="kernels of the profile to print")
    return parser.parse_args()


def episodes(args: argparse.Namespace) -> np.ndarray:
    """Lengths whose first-fit packing fills --parts × --rows rows."""
    rng = np.random.default_rng(0)
    longest = min(LONGEST, args.length)
    lengths: list[int] = []
    while True:
        drawn = int(np.clip(0.22 * args.length * np.exp(0.6 * rng.standard_normal()), 8, longest))
        if len(packing.first_fit([*lengths, drawn], args.length)) > args.parts * args.rows:
            return np.array(lengths)
        lengths.append(drawn)


def make_batch(config: decoder.DecoderConfig, lengths: np.ndarray, share: float):
    """Random episodes [B, L] of which this share of tokens are actions, and what the update aims at."""
    rng = np.random.default_rng(1)
    shape = (len(lengths), int(lengths.max()))
    valid = np.arange(shape[1])[None] < lengths[:, None]
    action = valid & (rng.random(shape) < share)
    action[:, 0] = False
    zeros = np.zeros(shape, np.float32)
    batch = TrajectoryBatch(
        tokens=rng.integers(0, config.vocab_size, shape).astype(np.int32),
        valid_mask=valid,
        action_mask=action,
        turn_ids=np.where(valid, 0, -1).astype(np.int32),
        turn_ends=np.zeros(shape, bool),
        sampler_logprobs=zeros,
        rewards=zeros,
        discounts=zeros,
        group_ids=np.zeros(len(lengths), np.int32),
    )
    targets = learner.Targets(
        advantages=rng.standard_normal(shape).astype(np.float32) * action,
        returns=zeros,
        old_logprobs=zeros,
        old_values=zeros,
        ref_logprobs=zeros,
        weights=(action / action.sum()).astype(np.float32),
        mean_weights=(action / action.sum()).astype(np.float32),
        value_weights=(action / action.sum()).astype(np.float32),
        observation_weights=zeros,
    )
    return jax.device_put((batch, targets))


def model_flops(config: decoder.DecoderConfig, lengths: np.ndarray, trained: int) -> float:
    """Floating-point operations of one step's mathematics, with so many tokens trained on."""
    width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    products = 2.0 * config.num_layers * layer * lengths.sum()
    products += 2.0 * config.hidden_size * config.vocab_size * trained
    # Scores and weighted sum: 2 products, 2 operations, half of them causal.
    attention = 2.0 * config.num_layers * width * (lengths.astype(float) ** 2).sum()
    return 3 * (products + attention)


def best_s(run, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        since = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - since)
    return min(seconds)


def ceiling() -> float:
    """Operations per second of a plain bfloat16 product on random data."""
    size = 8192 if jax.default_backend() == "gpu" else 512
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()

    def run() -> None:
        results = [product(a, b) for _ in range(10)]
        results[-1].block_until_ready()

    return 10 * 2 * size**3 / best_s(run, 3)


def main() -> None:
    args = arguments()
    config = MODELS[args.model]
    device = jax.devices()[0]
    reached = ceiling()
    lengths = episodes(args)
    batch, targets = make_batch(config, lengths, args.actions)
    packed = packing.pack(
        np.arange(len(lengths)), lengths, shape=batch.tokens.shape, length=args.length,
        tokens_per_part=args.rows * args.length, row_multiple=1,
    )
    packed = jax.device_put(packed)
    loss = objectives.make_rl_loss(
        config, surrogate="clipped", clip_low=0.2, clip_high=0.28, dual_clip=3.0, temperature=1.0,
        kl_coefficient=0.0, kl_estimator="k2", entropy_coefficient=0.0, value_coefficient=0.0,
        value_clip=None, importance_cap=None, old_is_current=True, remat=args.remat,
        compute_dtype=args.compute_dtype,
    )
    chain = optimizer.make(
        learning_rate=1e-6, warmup_steps=0, decay_steps=None, final_fraction=1.0, b1=0.9, b2=0.95,
        weight_decay=0.0, max_grad_norm=1.0,
    )
    params = {"policy": jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))}
    count = decoder.num_params(params)
    state = TrainState(jnp.int32(0), jnp.zeros((), jnp.int32), params, chain.init(params))
    update = learner.make_step(loss, chain)
    since = time.perf_counter()
    state, first = update(state, batch, targets, (packed,))
    jax.block_until_ready(state)
    compiling = time.perf_counter() - since

    def step() -> None:
        nonlocal state
        state, metrics = update(state, batch, targets, (packed,))
        jax.block_until_ready((state, metrics))

    seconds = best_s(step, args.repeats)
    tokens, trained = int(lengths.sum()), int(batch.action_mask.sum())
    work = model_flops(config, lengths, trained)
    rate = work / seconds
    peak = next((value for name, value in PEAKS.items() if name in device.device_kind), None)
    places = args.parts * args.rows * args.length
    print(
        f"{args.model}: {count / 1e6:.0f} M parameters, {len(lengths)} episodes in "
        f"{args.parts} x [{args.rows}, {args.length}], {tokens / places:.1%} filled, "
        f"{trained / tokens:.1%} of the tokens trained on, remat {args.remat}, "
        f"{device.device_kind}, first step {compiling:.0f} s, entropy "
        f"{float(first['policy/entropy']):.3f}"
    )
    held = (device.memory_stats() or {}).get("peak_bytes_in_use", float("nan"))
    mfu = "unknown" if peak is None else f"{rate / peak:.1%}"
    print(
        f"    {1e3 * seconds:.1f} ms a step, {tokens / seconds:,.0f} tokens/s, {rate / 1e12:.1f} "
        f"TFLOP/s: MFU {mfu}, {rate / reached:.1%} of a plain product's {reached / 1e12:.0f}; peak "
        f"memory {held / 2**30:.1f} GiB",
        flush=True,
    )
    device_profile.report(step, count=args.costs)


if __name__ == "__main__":
    main()
