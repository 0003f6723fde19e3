"""A large world from the end of its games back to their start: four rooms, six objects, quests of eight commands.

    python -m jaxagentrl.main --config=configs/textworld_reverse.py --workdir=runs/reverse

Walkthroughs of 300 such games (w4-o6-q8) are imitated, as in the quick start. In RL half of the games begin behind all but
the last command of their walkthrough, and ever earlier as these are won (`rl.curriculum`).
`--config.rl.curriculum.order=uniform` plays all from the start. What came out, on two CPU cores, is in docs/study.md.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    transfer = pathlib.Path(__file__).with_name("textworld_transfer.py")
    config = runpy.run_path(str(transfer))["get_config"]()
    config.env.params.update(world_size=4, nb_objects=6, quest_length=8)
    # Of the splits of `textworld_transfer.py` the held-out games of this world alone.
    config.splits = dict(demo=config.splits.demo, train=config.splits.train, test=(4001, 300))
    config.rl.curriculum.update(order="reverse", share=0.5, threshold=0.2, window=4)
    return methods.apply(config, method)
