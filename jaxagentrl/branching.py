"""Tree rollouts: some members of a group branch off others, where the policy is less sure than it was at first.

ARPO (Dong et al. 2025, https://arxiv.org/abs/2507.19849): of a group's M episodes N are played from the start, the rest
begin at a turn of one of those. A turn t > 0 is branched at with probability

    P = α + β ΔH,   ΔH = (H(t) − H(0)) / log |V|

where H is the mean entropy of the first k tokens of a turn (the public code sums them; turns here may be shorter
than k). There branching goes on while episodes are played; a branch draws from the same distribution when it begins
after its parent has ended. Turns are asked in order, of all parents, until the M − N are chosen; if they are not, the rest are
played from the start. An episode that branched has the tokens of its parent up to there and is trained on whole: ARPO's
soft credit, in which shared tokens get the sum of what their descendants do.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs_host.types import Task
from jaxagentrl.episodes import Episode, branch, episodes, task_word
from jaxagentrl.trajectory import Trajectory, Turn


def check(members: int, *, group_size: int) -> None:
    """Refuses groups that nobody would begin.

    Raises:
        ValueError: with the key, what was got and what was expected.
    """
    if not 0 <= members < group_size:
        raise ValueError(
            f"rl.branching.members is {members}, expected 0 to {group_size - 1}: some of the rl.group_size ({group_size}) "
            "members of a group branch off others, at least one is played from the start."
        )


def points(
    parents: Sequence[Trajectory],
    *,
    members: int,
    probability: float,
    entropy_weight: float,
    entropy_tokens: int,
    vocab_size: int,
    rng: np.random.Generator,
) -> list[tuple[Trajectory, int]]:
    """Where at most `members` episodes branch off those of a group: (parent, turn), each at most once."""
    longest = max((parent.num_turns for parent in parents), default=0)
    chosen = []
    for turn in range(1, longest):
        for parent in parents:
            if turn >= parent.num_turns:
                continue
            now, first = (_entropy(parent.turns[index], entropy_tokens) for index in (turn, 0))
            rise = (now - first) / math.log(vocab_size)
            if rng.random() < probability + entropy_weight * rise:
                chosen.append((parent, turn))
                if len(chosen) == members:
                    return chosen
    return chosen


def second(
    tasks: Sequence[Task],
    first: Sequence[Trajectory],
    *,
    group_size: int,
    members: int,
    stream: tuple[int, ...],
    first_group: int,
    head_starts: Sequence[int] | None = None,
    **options: Any,
) -> list[Episode]:
    """The episodes that fill the groups of `first`, which are those played from the start: branches of these and, where
    too few were chosen, more from the start.

    Args:
        tasks: of the groups, in order; also those all of whose episodes failed.
        first: their trajectories, `group_size` − `members` of a group and less where environments failed.
        members: how many are to be added to a group.
        stream: words for the random numbers of branches; of what is played from the start they are what the
            members would have had without branching.
        first_group: of the first task.
        head_starts: as of `episodes.episodes`.
        options: the other arguments of `points`.
    """
    by_group: dict[int, list[Trajectory]] = {}
    for trajectory in first:
        by_group.setdefault(trajectory.group, []).append(trajectory)
    made = []
    fresh = episodes(
        tasks, group_size=group_size, stream=stream, first_group=first_group, head_starts=head_starts
    )
    for number, task in enumerate(tasks):
        group = first_group + number
        rng = np.random.default_rng((*stream, task_word(task), group))
        chosen = points(by_group.get(group, ()), members=members, rng=rng, **options)
        for member, (parent, turn) in enumerate(chosen, group_size - members):
            words = (*stream, group, parent.member)
            (episode,) = branch(parent, turn, group=group, num_members=1, stream=words)
            made.append(dataclasses.replace(episode, member=member))
        made += fresh[number * group_size : (number + 1) * group_size][group_size - members + len(chosen) :]
    return made


def _entropy(turn: Turn, num_tokens: int) -> float:
    return float(np.mean(turn.entropies[:num_tokens], dtype=np.float64))
