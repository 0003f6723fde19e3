"""Repositories with Qwen3-8B: multi-turn GRPO on instances in SWE-Gym's form.

    python -m jaxagentrl.main --config=configs/swe_gym_qwen3_8b.py --workdir=runs/swe_gym \
        --config.model.directory=<Qwen3-8B> --config.tokenizer.directory=<the same>

After "A Practitioner's Guide to Multi-turn Agentic RL" (arXiv 2510.01132): no imitation, GRPO with groups of
4 on 16 tasks, a learning rate of 1e-6, KL 0.001 in the loss, 90 tasks of getmoto/moto 15 times over, 25 turns,
tested on 25 others. It reports a mean score of 0.22 from 0.04 (a test set of 25: give or take 8 points).

Otherwise here: the commands of `envs_host/swe_text.py` in the place of a shell, and no score for an empty patch
(theirs counts the tests that passed before; docs/environments.md). Instances are read from
`data/swe_gym.jsonl`, clones from `data/repositories/getmoto__moto`, and each version's tests are run by an
interpreter that you have made, `data/environments/getmoto__moto-<version>/bin/python`. Before anything else each
reference repair is played once; an instance that it does not repair here is left out and told.

Not run with these weights or this data so far; for eight accelerators of 80 GB. What is checked on a CPU is
this config with random weights of a tiny shape on a repository of the tests (tests/test_swe_recipes.py).
"""

import pathlib
import runpy

import ml_collections

from envs_host import swe_text
from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    textworld = pathlib.Path(__file__).with_name("textworld_qwen2_5_1_5b.py")
    config = runpy.run_path(str(textworld))["get_config"]()
    config.model.directory = config.tokenizer.directory = "Qwen3-8B"  # where yours is, by the flags above
    config.env = dict(
        name="swe",
        params=dict(
            family="swe-data",
            instances="data/swe_gym.jsonl",
            repositories="data/repositories",
            python="data/environments/{repo}-{version}/bin/python",
            repos=("getmoto/moto",),
        ),
        cache_dir="~/.cache/jaxagentrl/swe",
        options=dict(sandbox="bubblewrap", test_limit_s=600.0),
        num_workers=8,
    )
    config.splits = dict(demo=(0, 1), train=(1, 90), test=(91, 25))
    config.pool.update(num_workers=16, step_limit_s=660.0, reset_limit_s=120.0)
    config.prompt.update(style="brief", system=swe_text.HELP)
    config.sampling.update(
        num_slots=64,
        max_length=16_384,
        max_turn_tokens=1024,
        filled_buckets=(2048, 4096, 8192, 16_384),
        width_buckets=(256, 1024),
    )
    config.rollout.update(max_turns=25, temperature=1.0)
    config.learner.update(length_buckets=(4096, 8192, 16_384), tokens_per_part=32_768)
    config.rl.update(
        # 90 tasks in batches of 16, 15 passes.
        num_iterations=85,
        tasks_per_iteration=16,
        group_size=4,
        critic="none",
        critic_learning_rate=None,
        eval_every=10,
        save_every=5,
    )
    config.rl.advantage.update(name="group_normalized", group_scale="std", whiten=False)
    config.rl.loss.update(value_coefficient=0.0)
    config.rl.kl.update(placement="loss", estimator="k3", coefficient=0.001)
    return methods.apply(config, method)
