"""ALFWorld with Qwen2.5-1.5B-Instruct and GiGPO, in verl-agent's form, on the official games.

    alfworld-download
    python -m jaxagentrl.main --config=configs/alfworld_qwen2_5_1_5b.py --workdir=runs/alfworld_1_5b \
        --config.model.directory=<Qwen2.5-1.5B-Instruct> --config.tokenizer.directory=<the same>

The recipe of GiGPO (arXiv 2505.10978): no imitation; every turn is a conversation of its own with the last
two observations and actions and the admissible commands, and answers in think and action tags; 16 games
of 8 episodes of at most 50 turns per iteration, 150 iterations; a win is worth 1 and an invalid turn costs
0.01 (10 and 0.1 there); KL 0.01 in the loss. It reports 0.867 for all types on valid_seen, and later
work 0.824 on valid_unseen: both are evaluated here. One optimizer step an iteration; there the turns of an
iteration are cut into minibatches of 256.

Not run with these weights so far; for two to eight accelerators of 80 GB. What is checked on a CPU is
this config with random weights of a tiny shape (tests/test_alfworld_recipes.py).
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.model.directory = config.tokenizer.directory = "Qwen2.5-1.5B-Instruct"  # where yours is, by the flags above
    config.env = dict(
        name="alfworld",
        params=dict(family="alfworld-data", split="train"),
        cache_dir="~/.cache/jaxagentrl/alfworld",
        options=dict(accept_put=False),
        num_workers=8,
    )
    config.namings = dict(demo=1, train=1)
    config.splits = dict(
        demo=(0, 16),  # Nothing is imitated, but a walkthrough shows that the environment works.
        train=(16, 3500),
        test=(10_000, 134, {"split": "valid_unseen"}),
        test_seen=(20_000, 140, {"split": "valid_seen"}),
    )
    config.pool.update(num_workers=8)
    config.prompt.update(style="think_action", show_admissible=True)
    config.sampling.update(
        num_slots=128,
        max_length=2560,
        max_turn_tokens=512,
        filled_buckets=(1024, 1536, 2560),
        width_buckets=(512, 1024),
        row_divisors=(1, 4),
        cache_dtype="bfloat16",
    )
    config.rollout.update(
        max_turns=50,
        max_refusals=None,
        temperature=1.0,
        # An answer that is too long is one without its tags: an invalid turn, after which the episode goes on.
        cut_turns="send",
        context="last_turns",
        history_turns=2,
    )
    config.reward.update(kind="single", intermediate_scale=None, invalid_penalty=0.01)
    # An episode's turns lie one after the other: 50 of them, each with its own prompt.
    config.learner.update(
        length_buckets=(2560, 128_000),
        tokens_per_part=40_960,
        row_multiple=8,
        tree_length=0,
        compute_dtype="bfloat16",
        remat="full",
    )
    config.mesh.update(fsdp=-1)
    config.export_dtype = "bfloat16"
    config.sft.update(num_steps=0, target_loss=None, observation_weight=0.0)
    config.rl.update(
        num_iterations=150,
        tasks_per_iteration=16,
        group_size=8,
        num_minibatches=1,
        eval_every=5,
        save_every=10,
    )
    config.rl.advantage.update(
        name="gigpo",
        whiten=False,
        negative_weight=1.0,
        group_scale="std",
        turn_discount=0.95,
        step_weight=1.0,
    )
    config.rl.loss.update(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    config.rl.kl.update(placement="loss", estimator="k3", coefficient=0.01)
    config.rl.optimizer.update(
        learning_rate=1e-6, warmup_steps=0, decay_steps=None, b2=0.999, weight_decay=0.01
    )
    config.eval.update(temperature=0.4, other_temperatures=())
    return methods.apply(config, method)
