"""From simple to larger worlds: the quick start, tested on four kinds of games that it was not trained on, too.

Beside the quick start's w2-o3-q4 games (two rooms, three objects, a quest of four commands) there are held-out
games with one thing larger, and with everything larger: `test_rooms` w4-o3-q4, `test_objects` w2-o6-q4,
`test_quest` w2-o3-q6, `test_all` w4-o6-q8. Episodes may be twice as long as the quick start's.

A model that was trained before, as it is, in all five worlds:

    python -m jaxagentrl.main --config=configs/textworld_transfer.py --workdir=runs/transfer \
      --config.model.directory=runs/quickstart/model --config.tokenizer.directory=runs/quickstart/model \
      --config.sft.num_steps=0 --config.rl.num_iterations=0

Two minutes on two CPU cores, and about seven for the 1,200 games the first time.

Trained in another world, as `env.params` is what walkthroughs and training games are made with:

    python -m jaxagentrl.main --config=configs/textworld_transfer.py --workdir=runs/rooms \
      --config.env.params.world_size=4

After the question of arXiv 2510.01132, table 5; what came out is in docs/study.md.
"""

import pathlib
import runpy

import ml_collections

from jaxagentrl import methods


def get_config(method: str = "") -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("textworld_quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    world = dict(world_size=2, nb_objects=3, quest_length=4)
    config.splits.update(
        test=(1, 300, world),
        test_rooms=(1001, 300, world | dict(world_size=4)),
        test_objects=(2001, 300, world | dict(nb_objects=6)),
        test_quest=(3001, 300, world | dict(quest_length=6)),
        test_all=(4001, 300, dict(world_size=4, nb_objects=6, quest_length=8)),
    )
    config.rollout.update(max_turns=24)
    config.sampling.update(max_length=480, filled_buckets=(64, 112, 176, 240, 352, 480))
    config.learner.update(length_buckets=(80, 96, 112, 128, 144, 176, 240, 352, 480))
    return methods.apply(config, method)
