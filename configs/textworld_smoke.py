"""The quick start in two minutes: every stage of the main job, too short to learn to win.

    python -m jaxagentrl.main --config=configs/textworld_smoke.py --workdir=runs/smoke

Expected: under two minutes on two CPU cores with an empty cache; success stays near zero. It is what
CI runs through the real command line.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.splits = dict(demo=(40001, 16), train=(50001, 8), test=(1, 8))
    config.namings.update(demo=2, train=1)
    config.tokenizer.vocab_size = 512
    config.model.update(hidden_size=32, num_layers=2, intermediate_size=64, head_dim=8)
    config.sampling.update(
        num_slots=16, max_length=176, filled_buckets=(176,), width_buckets=(96,), row_divisors=(1, 4)
    )
    config.rollout.update(max_turns=8)
    config.learner.update(length_buckets=(176,))
    config.sft.update(num_steps=12, batch_size=8, target_loss=None, log_every=2, save_every=4)
    config.sft.optimizer.update(warmup_steps=2, decay_steps=12)
    config.rl.update(
        num_iterations=4,
        tasks_per_iteration=4,
        group_size=4,
        eval_every=2,
        save_every=2,
        skip_zero_signal=False,
    )
    # Nobody wins, but some are refused more often than others: that much there is to learn from.
    config.reward.update(invalid_penalty=0.1, no_end_of_turn_penalty=0.1)
    config.rl.optimizer.update(warmup_steps=1, decay_steps=4)
    return methods.apply(config, method)
