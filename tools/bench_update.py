"""Times the update step on this machine, beside the same step written with transformers and torch.

    python tools/bench_update.py                      # on CPU: 1 M to 50 M parameters, both sides
    python tools/bench_update.py --actions 0.1       # as in episodes that are mostly the environment's
    python tools/bench_update.py --only=jax --sizes 20M --profile=/tmp/trace

Same model, same weights, same batch, same loss (mean cross-entropy of the action tokens), same optimizer
(AdamW with clipping by global norm), float32 unless --compute_dtype says bfloat16 (torch's autocast; weights
and optimizer stay float32); loss and gradient norm of the first step are compared before anything is timed.
Ours unembeds the action tokens alone (and, on CPU, runs the last feed-forward for them alone), theirs
computes all, as `transformers` does. Each side has a process of its own, so that peak memory is its own, and
they take turns, step by step: a machine's speed moves by more than they differ. "of ceiling" is the model's
arithmetic (three forward passes) per second over what this machine reaches in a plain float32 matrix product,
one before each step, in the same process. "by rounds" is the median of the rounds' ratios. The last three
columns say the same as "ms" by processor time, which other programs on the machine disturb less: on a busy
one, run with --threads=1 and read those.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from counts import positive
from jaxagentrl import pages

# hidden size, layers, heads, key/value heads, feed-forward, vocabulary
SIZES = {
    "1M": (128, 4, 4, 2, 384, 2048),
    "5M": (256, 6, 4, 2, 768, 4096),
    "20M": (384, 10, 6, 2, 1152, 8192),
    "50M": (512, 14, 8, 4, 1536, 16384),
}
CEILING = 1536  # rows and columns of the matrix product
OPTIMIZER = dict(
    learning_rate=1e-4, warmup_steps=0, decay_steps=None, final_fraction=1.0, b1=0.9, b2=0.95,
    weight_decay=0.1, max_grad_norm=1.0,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=256)
    parser.add_argument("--actions", type=float, default=2 / 3, help="share of tokens trained on")
    parser.add_argument("--repeats", type=positive, default=8)
    parser.add_argument("--only", choices=["jax", "torch"])
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    parser.add_argument("--remat", default="none", help="of our side")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="cores to use")
    parser.add_argument("--profile", help="folder for a trace of one of our steps")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # side, size, model folder
    return parser.parse_args()


def model_config(size: str, length: int):
    from jaxagentrl.models import decoder

    hidden, layers, heads, kv_heads, inner, vocab = SIZES[size]
    return decoder.DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_position_embeddings=length,
    )


def batch(args: argparse.Namespace, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the mask of tokens that are trained on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (args.rows, args.length)).astype(np.int32)
    action = rng.random((args.rows, args.length)) < args.actions
    action[:, 0] = False
    return tokens, action


def flops(size: str, rows: int, length: int, *, unembedded: float, finished: float) -> float:
    """Floating-point operations of one step: three forward passes, attention counted in full; logits
    and the last layer's feed-forward of these shares of the tokens."""
    hidden, layers, heads, kv_heads, inner, vocab = SIZES[size]
    projections = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * kv_heads
    inner_layers = layers - 1 + finished
    per_token = 2 * (layers * projections + inner_layers * 3 * hidden * inner + unembedded * hidden * vocab)
    attention = 4 * length * hidden * layers  # scores and weighted sum, per token
    return 3.0 * rows * length * (per_token + attention)


def timed(run) -> tuple[float, float]:
    """Wall-clock and processor time of a run."""
    start, spent = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - spent


def of_jax(args: argparse.Namespace, size: str, folder: str):
    """What the first step gave, a step, and a product of the ceiling's size."""
    import jax
    import jax.numpy as jnp

    from jaxagentrl import learner, objectives, optimizer, packing
    from jaxagentrl.models import pretrained
    from jaxagentrl.types import TrainState, TrajectoryBatch

    square = jnp.ones((CEILING, CEILING), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)

    config, policy = pretrained.load(folder)
    tokens, action = batch(args, config.vocab_size)
    zeros = np.zeros(tokens.shape, np.float32)
    whole = TrajectoryBatch(
        tokens, np.ones_like(action), action, np.zeros_like(tokens), np.zeros_like(action),
        zeros, zeros, zeros, np.zeros(args.rows, np.int32),
    )
    targets = learner.Targets(
        *[zeros] * 5,
        weights=(action / action.sum()).astype(np.float32),
        mean_weights=(action / action.sum()).astype(np.float32),
        value_weights=zeros,
        observation_weights=zeros,
    )
    whole, targets = jax.device_put((whole, targets))
    chain = optimizer.make(**OPTIMIZER)
    loss = objectives.make_sft_loss(config, remat=args.remat, compute_dtype=args.compute_dtype)
    update = learner.make_step(loss, chain)
    params = {"policy": policy}
    state = TrainState(jnp.int32(0), jnp.zeros((), jnp.int32), params, chain.init(params))
    work = (packing.Rows(np.arange(args.rows)[None].astype(np.int32), np.int32(1), args.length),)
    state, first = update(state, whole, targets, work)
    first = {"loss": float(first["loss/action"]), "norm": float(first["optimizer/grad_norm"])}

    def step() -> None:
        nonlocal state
        state, metrics = update(state, whole, targets, work)
        jax.block_until_ready((state, metrics))

    if args.profile:
        step()
        with jax.profiler.trace(args.profile):
            step()
    return first, step, lambda: product(square, square).block_until_ready()


def of_torch(args: argparse.Namespace, size: str, folder: str):
    """As `of_jax`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    square = torch.ones(CEILING, CEILING)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    tokens, action = batch(args, SIZES[size][5])
    tokens = torch.tensor(tokens).long()
    labels = torch.where(torch.tensor(action), tokens, -100)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    rule = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIMIZER["learning_rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True,
    )

    low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.compute_dtype == "bfloat16")

    def step() -> tuple[float, float]:
        with low:
            logits = model(tokens, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    loss, norm = step()
    return {"loss": loss, "norm": norm}, step, lambda: square @ square


def worker(args: argparse.Namespace) -> None:
    """One side: a line of JSON once it is ready, and one for every line that it is sent."""
    side, size, folder = args.worker
    # Both sides make as many threads as they may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    pages.keep()  # as the main job does, for both sides
    first, step, product = {"jax": of_jax, "torch": of_torch}[side](args, size, folder)
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        product()
        ceiling = timed(product)
        measured = {"step": timed(step), "ceiling": ceiling}
        measured["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(measured), flush=True)


def in_turn(sides: list[str], size: str, folder: str, repeats: int) -> dict[str, dict]:
    """What each side's first step gave, and what all of its later ones took."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with contextlib.ExitStack() as stack:
        workers, found = {}, {}
        for side in sides:
            workers[side] = stack.enter_context(
                subprocess.Popen([*command, side, size, folder], **pipes)
            )
            found[side] = answer(workers[side]) | {"steps": [], "ceilings": []}
        for repeat in range(repeats + 1):  # the first warms up
            for side, process in workers.items():
                process.stdin.write("\n")
                process.stdin.flush()
                measured = answer(process)
                found[side]["peak_mib"] = measured["peak_mib"]
                found[side]["ceilings"].append(measured["ceiling"])
                if repeat:
                    found[side]["steps"].append(measured["step"])
        for process in workers.values():
            process.stdin.close()
    return found


def answer(process: subprocess.Popen) -> dict:
    """A worker's next line; the program ends with a worker that has none, which has said why."""
    line = process.stdout.readline()
    if not line:
        sys.exit(process.wait() or 1)
    return json.loads(line)


def main() -> None:
    args = arguments()
    if args.worker:
        worker(args)
        return
    pages.use_huge_ones()  # workers inherit the setting
    import jax

    from jaxagentrl.models import decoder, pretrained

    sides = [args.only] if args.only else ["jax", "torch"]
    print(
        f"[{args.rows}, {args.length}] on {args.threads} of {os.cpu_count()} cores, {args.actions:.0%} "
        f"of the tokens trained on, load {os.getloadavg()[0]:.1f}, best of {args.repeats}"
    )
    print(f"{'':6} {'side':6} {'params':>8} {'ms':>9} {'tokens/s':>9} {'GFLOP/s':>8} "
          f"{'of ceiling':>10} {'peak MiB':>9} {'ratio':>6} {'by rounds':>9} {'cpu ms':>9} "
          f"{'of ceiling':>10} {'ratio':>6}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            config = model_config(size, args.length)
            params = decoder.init(config, jax.random.key(0))
            pretrained.save(pathlib.Path(folder), config, params)
            found = in_turn(sides, size, folder, args.repeats)
        if len(found) == 2:
            near = 1e-3 if args.compute_dtype == "float32" else 2e-2
            for key in ("loss", "norm"):
                np.testing.assert_allclose(found["jax"][key], found["torch"][key], rtol=near)
        for side, one in found.items():
            is_ours = side == "jax"
            unembedded = args.actions if is_ours else 1.0
            finished = args.actions if is_ours and decoder.finishes_apart(config) else 1.0
            work = flops(size, args.rows, args.length, unembedded=unembedded, finished=finished)
            seconds, cpu = np.min(one["steps"], axis=0)
            ceiling, ceiling_cpu = 2 * CEILING**3 / np.min(one["ceilings"], axis=0)
            mine = np.array(one["steps"])
            theirs = np.full_like(mine, np.nan)
            if len(found) == 2:
                theirs = np.array(found["torch"]["steps"])
            ratio, cpu_ratio = np.min(theirs, axis=0) / (seconds, cpu)
            by_rounds = np.median(theirs[:, 0] / mine[:, 0])
            print(
                f"{size:6} {side:6} {decoder.num_params(params) / 1e6:7.1f}M "
                f"{1e3 * seconds:9.1f} {args.rows * args.length / seconds:9.0f} "
                f"{work / seconds / 1e9:8.1f} {work / seconds / ceiling:10.0%} {one['peak_mib']:9.0f} "
                f"{ratio:6.2f} {by_rounds:9.2f} {1e3 * cpu:9.1f} {work / cpu / ceiling_cpu:10.0%} "
                f"{cpu_ratio:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
