"""Times the updates of a run's own trajectories: every episode by itself, and in trees (`learner.tree_length`).

    python tools/bench_trees.py runs/quickstart                       # the run's model
    python tools/bench_trees.py runs/quickstart --lengths 240 480 960
    python tools/bench_trees.py runs/quickstart --sizes 25M --groups 8   # random weights, fewer episodes
    python tools/bench_trees.py runs/quickstart --torch               # beside transformers and torch

Records of RL iterations under trajectories/ are learned from once each, with everything that an
iteration does between sampling and the next (rewards, advantages, layout, transfers, the optimizer
step). All ways take turns in one process, from the same weights; policy loss and gradient norm must
agree. "computed" are the tokens that a network computes, padding included, over those of the episodes
that the step trains on; "shared" are of these the ones that another episode's stand for.

`--torch` is the same step of the same model and loss in eager torch: episodes by length, padded to the
longest of a micro-batch, those without advantages left out; with all logits, as `transformers` computes
them, and with those of the actions alone. It is given the advantages, and an episode's rewards, its
credit and the layout of the batch are not in its time.
"""

if __name__ == "__main__":
    from jaxagentrl import pages

    pages.use_huge_ones()  # before jax is imported: it starts this process again

import argparse
import copy
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from counts import positive
from jaxagentrl import learner, pages, reinforce, states, workdir
from jaxagentrl.models import decoder, pretrained
from jaxagentrl.trajectory import Trajectory

# hidden size, layers, heads, key/value heads, feed-forward; the vocabulary is the run's
SIZES = {"1M": (128, 4, 4, 2, 384), "25M": (512, 8, 8, 2, 1408), "135M": (576, 30, 9, 3, 1536)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="workdir of a run")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="instead of the run's model")
    parser.add_argument("--lengths", nargs="+", type=positive, help="of rows of trees; the run's")
    parser.add_argument("--records", type=positive, default=3, help="iterations, spread over the run")
    parser.add_argument("--groups", type=positive, help="of each iteration; all")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--torch", action="store_true", help="time transformers and torch, too")
    parser.add_argument("--torch_tokens", type=positive, help="of its micro-batches; as many as ours")
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
    """Function to the seconds of one iteration's learning, its metrics and the tokens' advantages."""
    programs, chain = reinforce.make_programs(config, model)
    reference = {"policy": params}

    def run() -> tuple[float, dict, list[np.ndarray]]:
        copied = jax.tree.map(jnp.copy, reference)
        copied = learner.with_critic(copied, model, critic=config["rl"]["critic"])
        state = states.fresh(copied, chain)
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, measured, credit = reinforce.learn(
            state, reference, trajectories, programs, config, iteration=0
        )
        jax.block_until_ready(state)
        return time.perf_counter() - start, measured, credit

    return run


def check_torch(config: dict) -> None:
    """Whether `learn_in_torch` is the same step as the run's."""
    rl = config["rl"]
    same = (
        rl["num_epochs"] * rl["num_minibatches"] == 1
        and rl["loss"]["surrogate"] == "clipped" and rl["loss"]["importance_cap"] is None
        and rl["aggregation"] == "token_mean" and reinforce.skips_rows(rl)
    )  # fmt: skip
    if not same:
        raise SystemExit(
            "--torch writes one step of the clipped surrogate without importance weights, with token_mean "
            "and rl.skip_zero_signal, and without KL, entropy, observations and critic: this run's "
            "config.json asks for something else."
        )


def learn_in_torch(config, folder, trajectories, credit, *, tokens_per_part, only_actions):
    """As `learn`, by transformers and eager torch, for given advantages."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    rl = config["rl"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_signal = [(t, a) for t, a in zip(trajectories, credit, strict=True) if np.any(a)]
    with_signal.sort(key=lambda pair: pair[0].num_tokens, reverse=True)
    num_actions = sum(trajectory.num_action_tokens for trajectory, _ in with_signal)

    def part(members) -> torch.Tensor:
        """The loss of one micro-batch, padded at the end."""
        shape = (len(members), members[0][0].num_tokens)
        tokens, advantages = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        action = np.zeros(shape, bool)
        for row, (trajectory, mine) in enumerate(members):
            fields = trajectory.token_fields()
            tokens[row, : len(mine)] = fields["tokens"]
            action[row, : len(mine)] = fields["action_mask"]
            advantages[row, : len(mine)] = mine
        tokens, action = torch.from_numpy(tokens), torch.from_numpy(action)[:, 1:]
        if only_actions:
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][action])
        else:
            logits = model(tokens, use_cache=False).logits[:, :-1][action]
        logprobs = -torch.nn.functional.cross_entropy(
            logits / config["rollout"]["temperature"], tokens[:, 1:][action], reduction="none"
        )
        ratio = torch.exp(logprobs - logprobs.detach())  # sampled by this policy: no clip is reached
        return -(ratio * torch.from_numpy(advantages)[:, 1:][action]).sum() / num_actions

    def run() -> tuple[float, dict, list[np.ndarray]]:
        model.load_state_dict(initial)
        rule = torch.optim.AdamW(
            model.parameters(), betas=(rl["optimizer"]["b1"], rl["optimizer"]["b2"]), fused=True
        )
        start, loss, rest = time.perf_counter(), 0.0, with_signal
        while rest:
            rows = max(1, tokens_per_part // rest[0][0].num_tokens)
            of_part = part(rest[:rows])
            of_part.backward()
            loss, rest = loss + of_part.item(), rest[rows:]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), rl["optimizer"]["max_grad_norm"])
        rule.step()
        rule.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return seconds, {"loss/policy": loss, "optimizer/grad_norm": float(norm)}, credit

    return run


def main() -> None:
    args = arguments()
    pages.keep()
    try:
        config = workdir.content(args.run)["config"]
    except workdir.WorkdirError as error:
        raise SystemExit(str(error))
    if config["rollout"]["context"] != "end":
        raise SystemExit("trees are of episodes that are one text: rollout.context 'end'.")
    if args.torch:
        check_torch(config)
    lengths = args.lengths or [config["learner"].get("tree_length") or 2 * config["sampling"]["max_length"]]
    records = iterations(args.run, args.records, args.groups)
    print(f"{len(records)} iterations of {args.run}, best of {args.repeats}, {jax.devices()[0].device_kind}")
    print(f"{'':6} {'params':>8} {'':13} {'computed':>8} {'shared':>7} {'padding':>7} {'s':>8} {'ratio':>6}")
    for name, model, params in models(args.run, args.sizes):
        ways = {}
        for length in (0, *lengths):
            changed = copy.deepcopy(config)
            changed["learner"]["tree_length"] = length
            ways[f"trees {length}" if length else "episodes"] = [
                learn(changed, model, params, trajectories) for trajectories in records
            ]
        if args.torch:
            ways |= in_torch(args, config, model, params, records, ways["episodes"])
        times, measured = in_turn(ways, args.repeats)
        for way, facts in measured.items():
            for mine, plain in zip(facts, measured["episodes"], strict=True):
                for key in ("loss/policy", "optimizer/grad_norm"):
                    np.testing.assert_allclose(mine[key], plain[key], rtol=1e-3, atol=1e-6)
            print(
                f"{name:6} {decoder.num_params(params) / 1e6:7.1f}M {way:13} {sizes_of(facts)} "
                f"{times[way]:8.2f} {times['episodes'] / times[way]:6.2f}",
                flush=True,
            )


def in_torch(args, config, model, params, records, ours) -> dict[str, list]:
    """torch's ways to learn from the records, with the advantages that ours computes."""
    credits = [run()[2] for run in ours]
    tokens = args.torch_tokens or config["learner"]["tokens_per_part"]
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(folder, model, params)
        return {
            name: [
                learn_in_torch(
                    config, folder, trajectories, credit, tokens_per_part=tokens, only_actions=only
                )
                for trajectories, credit in zip(records, credits, strict=True)
            ]
            for name, only in (("torch", False), ("torch, actions", True))
        }


def in_turn(ways: dict[str, list], repeats: int) -> tuple[dict[str, float], dict[str, list[dict]]]:
    """Seconds of each way over all records, each at its best, and what each record gave."""
    best = {way: [float("inf")] * len(runs) for way, runs in ways.items()}
    measured = {way: [{}] * len(runs) for way, runs in ways.items()}
    for repeat in range(repeats + 1):  # the first compiles
        for way, runs in ways.items():
            for index, run in enumerate(runs):
                seconds, measured[way][index], _ = run()
                if repeat:
                    best[way][index] = min(best[way][index], seconds)
    return {way: sum(seconds) for way, seconds in best.items()}, measured


def sizes_of(facts: list[dict]) -> str:
    """The columns of what was computed; empty for torch."""
    if "batch/shared_share" not in facts[0]:
        return " " * 24
    shared, padding = (
        np.array([of_record[f"batch/{key}_share"] for of_record in facts]) for key in ("shared", "padding")
    )
    computed = np.mean((1 - shared) / (1 - padding))
    return f"{computed:8.2f} {np.mean(shared):7.0%} {np.mean(padding):7.0%}"


if __name__ == "__main__":
    main()
