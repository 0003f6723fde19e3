"""A published model on two CPU cores or one GPU: SmolLM2-135M-Instruct, 60 imitated walkthroughs, then RL.

    python -m jaxagentrl.main --config=configs/textworld_smollm2_135m.py --workdir=runs/smollm2 \
        --config.model.directory=<SmolLM2-135M-Instruct> --config.tokenizer.directory=<the same>

w2-o3-q4 games with names of a house, free text without a list of commands; as many walkthroughs as the
seed paper (arXiv 2510.01132) imitates before RL, GiGPO with the game's progress as the turns' reward.

On one GPU, add (docs/performance.md, "On an H200")
    --config.learner.compute_dtype=bfloat16 --config.sampling.cache_dtype=bfloat16 \
    --config.learner.packing=True --config.learner.length_buckets='(640,)' \
    --config.learner.tokens_per_part=20480 --config.pool.num_workers=12 --config.env.num_workers=12
which took 4 minutes on an H200, and 1 with programs compiled before: 66 to 96 %, 67 to 91 % and 74 to 98 %
with seeds 0, 1 and 2, by the program that summed the embedding's gradient in bfloat16, too (CHANGELOG).

Measured once on two CPU cores, seed 0, with the four-bit weights of docs/models.md, "A published model": 0 % of 100 held-out
games before training, 65 % [55, 74] after imitation, 92 % [85, 96] after RL, at temperature 0.4. On two
cores of an EPYC an iteration is about 70 s of sampling and 60 to 190 s of updating, a step of imitation
45 s; together perhaps an hour and a half (not timed in one piece); 12 GB of memory.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.model.directory = config.tokenizer.directory = "SmolLM2-135M-Instruct"  # where yours is, by the flags above
    config.env.params.update(theme="house")
    config.namings = dict(demo=1, train=1)
    config.splits = dict(demo=(40_001, 60), train=(50_001, 256), test=(1, 100))
    config.sampling.update(
        num_slots=64,
        # Two cores: two waves, which run side by side.
        num_waves=2,
        max_length=640,
        max_turn_tokens=20,
        filled_buckets=(256, 384, 512, 640),
        width_buckets=(48, 128),
        row_divisors=(1, 2, 4),
    )
    config.rollout.update(max_turns=8)
    config.learner.update(
        length_buckets=(256, 320, 384, 448, 512, 640), tokens_per_part=2560, tree_length=0
    )
    config.sft.update(
        num_steps=12, target_loss=None, batch_size=16, observation_weight=0.0, log_every=2, save_every=12
    )
    config.sft.optimizer.update(learning_rate=2e-4, warmup_steps=2, weight_decay=0.0)
    config.rl.update(
        num_iterations=16, tasks_per_iteration=16, group_size=4, eval_every=8, save_every=4
    )
    config.rl.optimizer.update(learning_rate=3e-5, warmup_steps=2, decay_steps=None)
    config.eval.update(other_temperatures=())
    return methods.apply(config, method)
