"""Small hand-made records for tests: tasks, turns, trajectories."""

from envs_host.types import StopReason, Task
from jaxagentrl.trajectory import Trajectory, Turn


def make_turn(prompt, action, **changes):
    fields = {
        "prompt_ids": prompt,
        "action_ids": action,
        "logprobs": [-0.1 * i for i in range(len(action))],
        "entropies": [0.3] * len(action),
        "observation": "You see a bóx.",
        "action": "open box",
        "command": "open box",
        "reward": 0.0,
        "intermediate_reward": 0.0,
        "valid_command": True,
        "score": 0.0,
    }
    return Turn(**fields | changes)


def make_task(name="game-s1", seed=1):
    return Task(
        env="textworld",
        name=name,
        params={"world_size": 2, "theme": "basic"},
        seed=seed,
        file=f"{name}.z8",
        digest=f"digest of {name}",
        objective="Open the box.",
        max_score=2.0,
        walkthrough=("open box",),
    )


def make_trajectory(turns, **changes):
    fields = {
        "task": make_task(),
        "group": 3,
        "member": 1,
        "turns": turns,
        "stop_reason": StopReason.DONE,
        "won": True,
        "score": 2.0,
        "max_score": 2.0,
    }
    return Trajectory(**fields | changes)
