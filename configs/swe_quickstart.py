"""Repairs in a code repository by a small transformer from scratch, in every stage of the main job.

    pip download toolz==1.0.0 --no-deps --no-binary toolz -d repositories
    tar -xzf repositories/toolz-1.0.0.tar.gz -C repositories
    apt install bubblewrap          # or --config.env.options.sandbox=none on a machine that can be thrown away
    python -m jaxagentrl.main --config=configs/swe_quickstart.py --workdir=runs/swe

Tasks: the 564 single-line mistakes that can be planted in three modules of toolz 1.0.0, of which its tests notice 500.
249 repairs are imitated, 143 others are for RL, 108 are held out. Being from scratch, the model has to know the code by
heart, from the windows that it was shown: 18.5 % of the held-out mistakes were repaired after imitation and 12.0 % after
60 iterations of RL, which doubled success on its own tasks (14.8 to 28.2 %, seed 0, README.md). With
rl.observation_weight=0.5 it was much the same (17.6 to 14.8 % held out, 8.4 to 25.3 % on its own). 29 minutes on two
CPU cores, in part beside other work.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.env = dict(
        name="swe",
        params=dict(
            family="swe-bugs",
            repository="repositories/toolz-1.0.0",
            files="toolz/[dfi]*.py",  # dicttoolz, functoolz, itertoolz
            tests="toolz/tests",
            expert="direct",
        ),
        cache_dir="~/.cache/jaxagentrl/swe",
        options=dict(sandbox="bubblewrap", window_lines=12, test_limit_s=5.0),
        num_workers=2,
    )
    config.namings = dict(demo=1, train=1)
    config.splits = dict(demo=(0, 280), train=(280, 160), test=(440, 124))
    config.tokenizer.update(vocab_size=1536, names="whole", phrases=True, lexicon=())
    config.model.update(num_layers=4)
    config.sampling.update(
        num_slots=64,
        max_length=640,
        max_turn_tokens=48,
        filled_buckets=(160, 320, 640),
        width_buckets=(48, 160),
    )
    config.rollout.update(max_turns=6, max_refusals=None)
    config.reward.update(kind="intermediate", intermediate_scale=0.25)
    config.learner.update(length_buckets=(320, 480, 640), tokens_per_part=2560, tree_length=0)
    config.sft.update(num_steps=600, target_loss=0.08, observation_weight=0.5, log_every=20, save_every=100)
    config.rl.update(num_iterations=60, tasks_per_iteration=16, group_size=8, num_minibatches=4)
    config.rl.update(eval_every=20, save_every=10)
    config.rl.optimizer.update(learning_rate=3e-4, warmup_steps=12, decay_steps=240)
    return methods.apply(config, method)
