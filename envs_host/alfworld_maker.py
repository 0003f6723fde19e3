"""The making of an ALFWorld game: furnish, find a walkthrough, play it through. See maker.py."""

import json

from envs_host import alfworld_engine, alfworld_experts, alfworld_houses
from envs_host.specs import SetAside, Spec
from envs_host.types import Task

ENV = "alfworld"


def prepare() -> None:
    """Reads the library's files."""
    alfworld_houses.library()


def build(spec: Spec, game_path: str, traj_path: str) -> Task:
    """Makes one game: a .tw-pddl file and its `traj_data`, as the official set has them.

    Raises:
        SetAside: there is no such game, or its expert does not win.
    """
    house = alfworld_houses.furnish(spec)
    content = alfworld_engine.GameFile(*house.game.values(), (), None)
    engine = alfworld_engine.Engine(content, game_path)
    goal = alfworld_experts.goal(engine.goal)
    if engine.opening.won:
        raise SetAside("the task is done at the start")
    if dict(spec.params)["expert"] == "planner":
        walkthrough = alfworld_experts.plan(engine, engine.opening.facts, goal)
    else:
        walkthrough = alfworld_experts.explore(engine, goal, spec.seed)
    if not walkthrough:
        raise SetAside("no walkthrough: the task cannot be done")
    play_through(engine, walkthrough)
    with open(game_path, "w") as game_file:
        json.dump(house.game | {"solvable": True, "walkthrough": walkthrough}, game_file)
    with open(traj_path, "w") as traj_file:
        json.dump(house.traj_data, traj_file)
    # Which room and task a seed gave is worth knowing for evaluation by type.
    params = {"family": spec.family} | dict(spec.params)
    params |= {"task_type": house.traj_data["task_type"],
               "scene": house.traj_data["scene"]["scene_num"]}
    return Task(
        env=ENV,
        name=spec.name,
        params=params,
        seed=spec.seed,
        file=game_path,
        digest=alfworld_engine.content_digest(content),
        objective=alfworld_engine.split_opening(engine.opening.feedback)[1],
        max_score=1.0,
        walkthrough=tuple(walkthrough),
    )


def play_through(engine: alfworld_engine.Engine, walkthrough: list[str]) -> None:
    """Plays a walkthrough; it must win with its last command.

    Raises:
        SetAside: it does not.
    """
    facts, won = engine.opening.facts, False
    for number, command in enumerate(walkthrough):
        outcome = engine.step(facts, command)
        facts, won = outcome.facts, outcome.won
        if not outcome.valid or (won and number < len(walkthrough) - 1):
            raise SetAside(
                f"the walkthrough goes wrong at command {number + 1} of {len(walkthrough)}, "
                f"{command!r}: {outcome.feedback!r}"
            )
    if not won:
        raise SetAside("the walkthrough does not win")
