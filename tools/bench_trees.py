"""Times the updates of a run's own trajectories: every episode by itself, and in trees (`learner.tree_length`).

    python tools/bench_trees.py runs/quickstart                       # the run's model
    python tools/bench_trees.py runs/quickstart --lengths 240 480 960
    python tools/bench_trees.py runs/quickstart --sizes 25M --groups 8   # random weights, fewer episodes

Records of RL iterations under trajectories/ are learned from once each, with everything that an
iteration does between sampling and the next (rewards, advantages, layout, transfers, the optimizer
step). All ways take turns in one process, from the same weights; policy loss and gradient norm must
agree. "computed" are the tokens that a network computes, padding included, over those of the episodes
that the step trains on; "shared" are of these the ones that another episode's stand for.
"""

import argparse
import collections
import copy
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxagentrl import learner, pages, reinforce, states
from jaxagentrl.models import decoder, pretrained
from jaxagentrl.trajectory import Trajectory

# hidden size, layers, heads, key/value heads, feed-forward; the vocabulary is the run's
SIZES = {"1M": (128, 4, 4, 2, 384), "25M": (512, 8, 8, 2, 1408), "135M": (576, 30, 9, 3, 1536)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="workdir of a run")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="instead of the run's model")
    parser.add_argument("--lengths", nargs="+", type=int, help="of rows of trees; the run's")
    parser.add_argument("--records", type=int, default=3, help="iterations, spread over the run")
    parser.add_argument("--groups", type=int, help="of each iteration; all")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def iterations(run: pathlib.Path, count: int, groups: int | None) -> list[list[Trajectory]]:
    """The trajectories of some iterations of RL, from the first record to the last."""
    files = sorted((run / "trajectories").glob("rl_*.jsonl"))
    if not files:
        raise SystemExit(f"{run}/trajectories holds no rl_*.jsonl: name the workdir of a run of RL.")
    chosen = np.unique(np.linspace(0, len(files) - 1, count).astype(int))
    found = []
    for file in (files[index] for index in chosen):
        lines = file.read_text(encoding="utf-8").splitlines()
        extra = ("turn_rewards", "advantages")
        records = [{k: v for k, v in json.loads(line).items() if k not in extra} for line in lines]
        played = [Trajectory.from_json(record) for record in records]
        kept = sorted({trajectory.group for trajectory in played})[:groups]
        found.append([trajectory for trajectory in played if trajectory.group in kept])
    return found


def models(run: pathlib.Path, sizes: list[str] | None):
    """(name, config, parameters) of what is timed."""
    config, params = pretrained.load(run / "model")
    if sizes is None:
        yield "run's", config, params
        return
    for size in sizes:
        hidden, layers, heads, kv_heads, inner = SIZES[size]
        made = decoder.DecoderConfig(
            vocab_size=config.vocab_size, hidden_size=hidden, num_layers=layers, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=hidden // heads, intermediate_size=inner,
            max_position_embeddings=config.max_position_embeddings,
        )
        yield size, made, decoder.init(made, jax.random.key(0))


def learn(config, model, params, trajectories):
    """Function to the seconds of one iteration's learning, and its metrics."""
    programs, chain = reinforce.make_programs(config, model)
    reference = {"policy": params}

    def run() -> tuple[float, dict]:
        copied = jax.tree.map(jnp.copy, reference)
        copied = learner.with_critic(copied, model, critic=config["rl"]["critic"])
        state = states.fresh(copied, chain)
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, measured, _ = reinforce.learn(
            state, reference, trajectories, programs, config, iteration=0
        )
        jax.block_until_ready(state)
        return time.perf_counter() - start, measured

    return run


def main() -> None:
    args = arguments()
    pages.use_huge_ones()
    config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))["config"]
    if config["rollout"]["context"] != "end":
        raise SystemExit("trees are of episodes that are one text: rollout.context 'end'.")
    lengths = args.lengths or [config["learner"].get("tree_length") or 2 * config["sampling"]["max_length"]]
    records = iterations(args.run, args.records, args.groups)
    print(f"{len(records)} iterations of {args.run}, best of {args.repeats}, {jax.devices()[0].device_kind}")
    print(f"{'':6} {'params':>8} {'':10} {'computed':>8} {'shared':>7} {'padding':>7} {'s':>8} {'ratio':>6}")
    for name, model, params in models(args.run, args.sizes):
        ways = {}
        for length in (0, *lengths):
            changed = copy.deepcopy(config)
            changed["learner"]["tree_length"] = length
            ways[length] = [learn(changed, model, params, trajectories) for trajectories in records]
        best = collections.defaultdict(lambda: [float("inf")] * len(records))
        measured = collections.defaultdict(lambda: [{}] * len(records))
        for _ in range(args.repeats + 1):  # the first compiles
            for length, runs in ways.items():
                for index, run in enumerate(runs):
                    seconds, measured[length][index] = run()
                    best[length][index] = min(best[length][index], seconds)
        for length in ways:
            for mine, plain in zip(measured[length], measured[0], strict=True):
                for key in ("loss/policy", "optimizer/grad_norm"):
                    np.testing.assert_allclose(mine[key], plain[key], rtol=1e-3, atol=1e-6)
            shared, padding = (
                np.mean([facts[f"batch/{key}_share"] for facts in measured[length]])
                for key in ("shared", "padding")
            )
            computed = np.mean([
                (1 - facts["batch/shared_share"]) / (1 - facts["batch/padding_share"])
                for facts in measured[length]
            ])
            print(
                f"{name:6} {decoder.num_params(params) / 1e6:7.1f}M "
                f"{f'trees {length}' if length else 'episodes':10} {computed:8.2f} {shared:7.0%} "
                f"{padding:7.0%} {sum(best[length]):8.2f} {sum(best[0]) / sum(best[length]):6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
