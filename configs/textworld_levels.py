"""From simple to complex worlds while training: two rooms first, then four, too.

    python -m jaxagentrl.main --config=configs/textworld_levels.py --workdir=runs/levels

Walkthroughs of both worlds are imitated, 150 games of each. RL plays w2-o3-q4 games alone until two fifths of the episodes
of eight iterations are won; from then on half of an iteration's games are of four rooms (w4-o3-q4). Held-out games are
those of `textworld_transfer.py`, on which this is built. `--config.rl.curriculum.order=uniform` trains on both from the
start. What came out, on two CPU cores, is in docs/study.md.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    transfer = pathlib.Path(__file__).with_name("textworld_transfer.py")
    config = runpy.run_path(str(transfer))["get_config"]()
    rooms = dict(world_size=4, nb_objects=3, quest_length=4)
    # Levels are in the order of the names of the splits: train, then train_rooms.
    config.splits.update(
        demo=(40001, 150), demo_rooms=(45001, 150, rooms), train=(50001, 250), train_rooms=(60001, 250, rooms)
    )
    config.rl.curriculum.update(order="levels", threshold=0.4)
    return methods.apply(config, method)
