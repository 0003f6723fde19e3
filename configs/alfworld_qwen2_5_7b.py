"""ALFWorld with Qwen2.5-7B-Instruct: imitation, then multi-turn PPO, on the official games.

    alfworld-download
    python -m jaxagentrl.main --config=configs/alfworld_qwen2_5_7b.py --workdir=runs/alfworld_7b \
        --config.model.directory=<Qwen2.5-7B-Instruct> --config.tokenizer.directory=<the same>

The recipe of "A Practitioner's Guide to Multi-turn Agentic RL" (arXiv 2510.01132): free text without a list of
commands, one conversation, 300 demonstrations once, then token-level PPO (gamma and lambda 1, KL 0.01 in
the reward, a critic of its own) on 1,000 training games, 90 passes over them, at most 24 turns, tested on
100 games of valid_unseen. It reports 0.74 for all six types there, from about 0.47 after imitation.
Ours beside it: valid_seen is evaluated, too.

Not run with these weights so far; for eight accelerators of 80 GB. What is checked on a CPU is this
config with random weights of a tiny shape (tests/test_alfworld_recipes.py).
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    # The paper trains both worlds alike.
    textworld = pathlib.Path(__file__).with_name("textworld_qwen2_5_1_5b.py")
    config = runpy.run_path(str(textworld))["get_config"]()
    config.model.directory = config.tokenizer.directory = "Qwen2.5-7B-Instruct"  # where yours is, by the flags above
    config.env = dict(
        name="alfworld",
        params=dict(family="alfworld-data", split="train"),
        cache_dir="~/.cache/jaxagentrl/alfworld",
        options=dict(accept_put=False),
        num_workers=8,
    )
    config.splits = dict(
        demo=(0, 300),
        train=(300, 1000),
        test=(10_000, 100, {"split": "valid_unseen"}),
        test_seen=(20_000, 100, {"split": "valid_seen"}),
    )
    config.sampling.update(
        num_slots=128, max_length=4096, filled_buckets=(512, 1024, 2048, 4096)
    )
    config.rollout.update(max_turns=24)
    config.learner.update(length_buckets=(1024, 2048, 4096), tokens_per_part=32_768)
    config.sft.update(num_steps=18)
    # 1,000 games in batches of 256, 90 passes.
    config.rl.update(num_iterations=352, eval_every=20, save_every=20)
    return methods.apply(config, method)
