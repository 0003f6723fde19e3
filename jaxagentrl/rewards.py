"""From environment scores to one reward per turn.

The public code of "A Practitioner's Guide to Multi-turn Agentic RL" divides dense rewards by the
number of rewarded turns when the game was won and by 1 when it was lost, so that a lost game with
six sub-goals earns 6 and a won one earns 1. Here every score is divided by the game's maximum, on
wins and losses alike: with "single" and "dense" a win sums to 1 and a loss to less.
"""

import numpy as np

from envs_host.types import StopReason
from jaxagentrl.trajectory import Trajectory

KINDS = ("single", "dense", "intermediate")


def turn_rewards(
    trajectory: Trajectory,
    *,
    kind: str,
    invalid_penalty: float = 0.0,
    no_end_of_turn_penalty: float = 0.0,
    intermediate_scale: float | None = None,
    overlong_penalty: float = 0.0,
    overlong_length: int | None = None,
    overlong_margin: int | None = None,
) -> np.ndarray:
    """The reward of each turn, to be paid on the last action token of the turn.

    Args:
        trajectory: T ≥ 1 turns of an episode that the environment did not break.
        kind: what the environment's part is.
            "single": score / max_score on the last turn, 0 before.
            "dense": increase of the score / max_score on the turn that brought it.
            "intermediate": `intermediate_scale` times the environment's own progress signal
            on each turn, plus the "single" reward. ALFWorld and repositories: by how much the way to
            the goal, or what differs from the reference repair, has become shorter. That is the
            difference of a potential (Ng et al. 1999): steps away and back cancel, so wandering earns
            nothing. TextWorld: its own signal, +1 for a step along the winning policy, −1 for one away
            from it. Keep scale × first distance (length of the quest, lines of the repair) below 1, or
            progress outweighs winning.
        invalid_penalty: subtracted on each turn whose command the environment refused, or in style
            "think_action" whose answer has the wrong form (0 in the guide). GiGPO takes 0.1 off the
            latter where a win is 10, so 0.01 here; off the former it taught to win nothing
            (docs/study.md).
        no_end_of_turn_penalty: subtracted on the last turn of an episode that stopped because an
            action was cut before its end-of-turn token; it takes the place of `invalid_penalty`
            there.
        intermediate_scale: needed by "intermediate", refused by the other kinds.
        overlong_penalty, overlong_length, overlong_margin: DAPO's soft punishment of long episodes, on the last
            turn: nothing for up to length − margin sampled tokens in all, the penalty from length on, a ramp
            between (as `transforms.overlong_penalty`). There it is 1 where rewards are −1 and 1, so 0.5 here.

    Returns:
        float32 [T].

    Raises:
        ValueError: unknown kind, a negative penalty, a scale or a length that is missing or has no use, an
            episode without turns, one that the environment broke, or a game without a maximum
            score.
    """
    check(
        kind=kind,
        invalid_penalty=invalid_penalty,
        no_end_of_turn_penalty=no_end_of_turn_penalty,
        intermediate_scale=intermediate_scale,
        overlong_penalty=overlong_penalty,
        overlong_length=overlong_length,
        overlong_margin=overlong_margin,
    )
    _check_trajectory(trajectory)
    rewards = np.zeros(trajectory.num_turns, np.float64)
    if kind == "dense":
        rewards += [turn.reward / trajectory.max_score for turn in trajectory.turns]
    else:
        rewards[-1] = trajectory.score / trajectory.max_score
    if kind == "intermediate":
        rewards += [intermediate_scale * turn.intermediate_reward for turn in trajectory.turns]
    refused = [not turn.valid_command for turn in trajectory.turns]
    penalties = invalid_penalty * np.asarray(refused, np.float64)
    if trajectory.stop_reason is StopReason.NO_END_OF_TURN:
        penalties[-1] = no_end_of_turn_penalty  # nothing was sent, so nothing was refused
    rewards -= penalties
    if overlong_penalty:
        over = trajectory.num_action_tokens - (overlong_length - overlong_margin)
        rewards[-1] -= overlong_penalty * min(1.0, max(0.0, over / overlong_margin))
    return rewards.astype(np.float32)


def check(
    *,
    kind: str,
    invalid_penalty: float,
    no_end_of_turn_penalty: float,
    intermediate_scale: float | None,
    overlong_penalty: float = 0.0,
    overlong_length: int | None = None,
    overlong_margin: int | None = None,
) -> None:
    """Refuses arguments that `turn_rewards` cannot work with.

    Raises:
        ValueError: with the config key (`reward.…`), what was got and what was expected.
    """
    if kind not in KINDS:
        raise ValueError(f"reward.kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    for name, value in (
        ("invalid_penalty", invalid_penalty),
        ("no_end_of_turn_penalty", no_end_of_turn_penalty),
        ("overlong_penalty", overlong_penalty),
    ):
        if not value >= 0.0:
            raise ValueError(f"reward.{name} is subtracted and must be 0 or more, got {value}.")
    if kind == "intermediate" and intermediate_scale is None:
        raise ValueError(
            "reward.kind 'intermediate' needs reward.intermediate_scale, for instance 0.1; got None."
        )
    if kind == "intermediate" and not 0.0 < intermediate_scale < float("inf"):
        raise ValueError(
            f"reward.intermediate_scale is {intermediate_scale}, expected more than 0: progress is paid for."
        )
    if kind != "intermediate" and intermediate_scale is not None:
        raise ValueError(
            f"reward.intermediate_scale is {intermediate_scale}, which has no effect on reward.kind "
            f"{kind!r}: set it to None, or the kind to 'intermediate'."
        )
    lengths = {"overlong_length": overlong_length, "overlong_margin": overlong_margin}
    for name, value in lengths.items():
        if (value is not None) != (overlong_penalty > 0):
            raise ValueError(
                f"reward.{name} is {value} and reward.overlong_penalty {overlong_penalty}: a penalty above 0 needs both "
                "lengths, in sampled tokens of an episode, and without one they are None."
            )
    if overlong_penalty and not 0 < overlong_margin <= overlong_length:
        raise ValueError(
            f"reward.overlong_margin is {overlong_margin}, expected 1 to reward.overlong_length ({overlong_length}): "
            "from length - margin sampled tokens on an episode pays."
        )


def way_out(*, invalid_penalty: float, no_end_of_turn_penalty: float, cut_turns: str) -> str | None:
    """What to tell of rewards that pay for breaking off: with GiGPO's penalty, and none for a turn without its end,
    the quick start's model learned to end no turn, and won nothing after 16 iterations (`docs/study.md`)."""
    if cut_turns != "end" or no_end_of_turn_penalty >= invalid_penalty:
        return None
    return (
        f"reward.invalid_penalty is {invalid_penalty}, and a turn without its end, which ends the episode, costs "
        f"{no_end_of_turn_penalty} (reward.no_end_of_turn_penalty): what breaks off is refused nothing, and RL may "
        "learn to break off. rollout.cut_turns 'send' goes on with such a turn as with any other; else set the "
        "penalty to what the refused commands of an episode may cost."
    )


def _check_trajectory(trajectory: Trajectory) -> None:
    if trajectory.stop_reason is StopReason.ENV_FAILURE:
        raise ValueError(
            f"the environment failed in {_name(trajectory)}: that is no outcome of the agent's; "
            "drop the trajectory and count it"
        )
    if not trajectory.turns:
        raise ValueError(f"{_name(trajectory)} has no turns, so nothing can be rewarded")
    if not trajectory.max_score > 0.0:
        raise ValueError(
            f"{_name(trajectory)} has max_score {trajectory.max_score}; scores are divided by it, "
            "so it must be above 0"
        )


def _name(trajectory: Trajectory) -> str:
    return (
        f"trajectory of task {trajectory.task.name} (group {trajectory.group}, member "
        f"{trajectory.member})"
    )
