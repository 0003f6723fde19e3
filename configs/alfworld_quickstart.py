"""The ALFWorld quick start: a small transformer learns household tasks in rooms it has never seen.

    pip install -e '.[alfworld]'
    python -m jaxagentrl.main --config=configs/alfworld_quickstart.py --workdir=runs/alfworld

Houses: generated, one room of ALFWorld's floor plans with up to 15 of its receptacles and 12
objects, all containers closed, one of the six task types. Training rooms and test rooms differ as
in the original (`valid_unseen`); `test_seen` are new houses in the training rooms. 800 searches of
the hand-coded expert are imitated, then RL follows on other houses, with the change of the distance
to the goal as the turns' reward and GiGPO's credit. Official rooms have more of both: this is not
the benchmark.

Of the sizes that were tried it is the largest that gains ten points within half an hour on two CPU
cores: whole rooms were too slow, and in smaller ones more is won (README.md has the numbers).
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods

# One token each, so that what a test room has and the demonstrations have not can be copied.
_NAMES = (
    "alarmclock apple armchair baseballbat basketball bathtubbasin bed book bowl box bread "
    "butterknife cabinet candle cart cd cellphone cloth coffeemachine coffeetable countertop "
    "creditcard cup desk desklamp diningtable dishsponge drawer dresser egg floorlamp fork fridge "
    "garbagecan glassbottle handtowel handtowelholder kettle keychain knife ladle laptop "
    "laundryhamper lettuce microwave mug newspaper ottoman pan papertowel pen pencil peppershaker "
    "pillow plate pot potato remotecontrol safe saltshaker shelf sidetable sinkbasin soapbar "
    "soapbottle sofa spatula spoon spraybottle statue stoveburner tennisracket tissuebox toaster "
    "toilet toiletpaper toiletpaperhanger toiletpaperroll tomato towelholder tvstand vase watch "
    "wateringcan winebottle"
).split()


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.env = dict(
        name="alfworld",
        params=dict(family="alfworld", num_receptacles=15, num_objects=12),
        cache_dir="~/.cache/jaxagentrl/alfworld",
        options=dict(accept_put=False),
        num_workers=2,
    )
    config.namings = dict(demo=1, train=1)
    config.splits = dict(
        demo=(400_001, 800, {"expert": "handcoded"}),
        train=(500_001, 800),
        test=(1, 300, {"split": "valid_unseen"}),
        test_seen=(100_001, 150, {"split": "valid_seen"}),
    )
    config.tokenizer.update(
        vocab_size=1024,
        phrases=False,
        lexicon=(*(f" {name}" for name in _NAMES), *(f" {number}" for number in range(1, 10))),
    )
    config.sampling.update(
        num_slots=128,
        max_length=768,
        filled_buckets=(192, 384, 768),
        width_buckets=(32, 96),
    )
    config.rollout.update(max_turns=25, max_refusals=None)
    config.reward.update(intermediate_scale=0.08)
    # The longest searches of the expert are longer than any episode of RL may be.
    config.learner.update(
        length_buckets=(192, 256, 384, 512, 768, 1024), tokens_per_part=3072, tree_length=0
    )
    config.sft.update(num_steps=400, target_loss=None, log_every=20, save_every=100)
    config.sft.optimizer.update(learning_rate=2e-3)
    config.rl.update(num_iterations=40, tasks_per_iteration=16, eval_every=10, save_every=10)
    config.rl.advantage.update(negative_weight=0.5)
    config.rl.optimizer.update(
        learning_rate=4e-4, warmup_steps=5, decay_steps=40, final_fraction=0.25
    )
    config.eval.update(temperature=0.0, other_temperatures=())
    return methods.apply(config, method)
