"""The making of a Gymnasium environment's game: begin it twice, ask its expert, play it through. See maker.py."""

import json
from typing import Any

from envs_host import arrival, gymnasium_world, registry
from envs_host.gymnasium import GymnasiumEnv
from envs_host.specs import SetAside, Spec
from envs_host.types import Task

ENV = "gymnasium"


def prepare() -> None:
    """Games share nothing."""


def build(spec: Spec, game_path: str, played_path: str) -> Task:
    """Makes one game: a file that says what it is, and another that tells how its walkthrough went.

    Raises:
        ValueError: the environment cannot be made, or does not begin alike twice.
        SetAside: its expert does not win.
    """
    params = dict(spec.params) | {"kwargs": json.loads(dict(spec.params)["kwargs"])}
    world = gymnasium_world.World(params["id"], params["kwargs"], params["actions"])
    opening, info = world.reset(spec.seed)
    again, _ = world.reset(spec.seed)
    if again != opening:
        raise ValueError(
            f"reset(seed={spec.seed}) began with {opening[:200]!r}, and then with {again[:200]!r}: what is random in "
            f"{params['id']} must follow from the seed (in Gymnasium's environments from self.np_random)."
        )
    walkthrough = [] if params["expert"] is None else _ask(params["expert"], world)
    world.close()
    identity = None if "identity" not in info else str(info["identity"])
    game = gymnasium_world.Game(params["id"], params["kwargs"], params["actions"], spec.seed, opening, identity)
    gymnasium_world.save(game, game_path)
    task = Task(
        env=ENV,
        name=spec.name,
        params={"family": spec.family} | params,
        seed=spec.seed,
        file=game_path,
        digest=gymnasium_world.digest(game_path),
        objective=params["objective"] or "",
        max_score=float(params["max_score"]),
        walkthrough=tuple(walkthrough),
    )
    arrival.write_json({"answers": play_through(task)}, played_path)
    return task


def _ask(expert: str, world: gymnasium_world.World) -> list[str]:
    """What the expert would do in the episode that has just begun."""
    try:
        find = registry.find(expert)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"env.params.expert must be 'module:function', got {expert!r}: {error}") from error
    with gymnasium_world.theirs(expert):
        said = find(world.env)
    if not isinstance(said, list | tuple) or not all(isinstance(command, str) for command in said):
        raise ValueError(f"{expert} must return a list of the texts that win, empty if there are none, got {said!r}.")
    if not said:
        raise SetAside("the expert finds no way")
    return list(said)


def play_through(task: Task) -> list[dict[str, Any]]:
    """Plays a task's walkthrough, which must win with its last command, and returns what was answered.

    Raises:
        SetAside: it does not.
    """
    env, answers = GymnasiumEnv(), []
    env.reset(task)
    for number, command in enumerate(task.walkthrough, 1):
        answer = env.step(command)
        is_over = answer.terminated or answer.truncated
        if not answer.info.valid_command or answer.info.won != (number == len(task.walkthrough)) or (
            is_over and not answer.info.won
        ):
            raise SetAside(
                f"the walkthrough goes wrong at command {number} of {len(task.walkthrough)}, {command!r}: "
                f"{answer.observation!r}"
            )
        answers.append({"command": command, "observation": answer.observation, "reward": answer.reward})
    return answers
