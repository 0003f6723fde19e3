"""What is to be played: tasks, their groups, and the streams of random numbers of each episode."""

import collections
import dataclasses
from collections.abc import Sequence

from envs_host.types import Task
from jaxagentrl.trajectory import Trajectory, Turn


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to be played.

    Attributes:
        task: the game.
        group, member: see `Trajectory`.
        stream: uint32 words (run seed, phase, iteration, ...) that identify its randomness,
            whatever slot it gets.
        prefix: turns of an earlier episode of this task to be gone through first: their commands
            are replayed in the environment, their tokens put into the slot. See `branch`.
        expected: what the environment said then, after those commands; None is not compared.
        head_start: commands of the task's walkthrough that are given before everything else, fewer than it has. What
            was said until then is context, as if the policy had given them, and no turn of the episode.
    """

    task: Task
    group: int
    member: int
    stream: tuple[int, ...]
    prefix: tuple[Turn, ...] = ()
    expected: str | None = None
    head_start: int = 0

    def __post_init__(self) -> None:
        if self.head_start and not 0 < self.head_start < len(self.task.walkthrough):
            raise ValueError(
                f"task {self.task.name}: a head start of {self.head_start} commands, expected 0 or more and fewer than its "
                f"walkthrough has ({len(self.task.walkthrough)})."
            )

    def observation(self, turn: int) -> str | None:
        """What the environment said before this turn, of the prefix or the one after it; None if that is
        not known."""
        return self.prefix[turn].observation if turn < len(self.prefix) else self.expected


def episodes(
    tasks: Sequence[Task],
    *,
    group_size: int,
    stream: tuple[int, ...],
    first_group: int = 0,
    head_starts: Sequence[int] | None = None,
) -> list[Episode]:
    """`group_size` episodes of each task. Equal tasks, members and streams replay equal episodes.

    A task that is there twice has two groups, which go on counting members in their streams: the second
    would otherwise be the first once more, token for token.

    Args:
        head_starts: of each task's episodes; None: all are played from the start.
    """
    earlier: collections.Counter[int] = collections.Counter()
    made = []
    heads = [0] * len(tasks) if head_starts is None else head_starts
    for group, (task, head_start) in enumerate(zip(tasks, heads, strict=True), first_group):
        word = task_word(task)
        for member in range(group_size):
            words = (*stream, word, group_size * earlier[word] + member)
            made.append(Episode(task, group, member, words, head_start=head_start))
        earlier[word] += 1
    return made


def branch(
    trajectory: Trajectory, turn: int, *, group: int, num_members: int, stream: tuple[int, ...]
) -> list[Episode]:
    """Episodes that share the first `turn` turns of a trajectory and go on by themselves.

    The ground of tree rollouts. Prefix tokens are computed once and copied to members of a wave. Two
    calls with one stream, for one task and turn, give the same episodes.

    Raises:
        ValueError: no such turn.
    """
    if not 0 <= turn < trajectory.num_turns:
        raise ValueError(
            f"cannot branch before turn {turn}: the trajectory's turns are 0 to "
            f"{trajectory.num_turns - 1}."
        )
    prefix = tuple(trajectory.turns[:turn])
    words = (*stream, task_word(trajectory.task), turn)
    return [
        Episode(
            trajectory.task,
            group,
            member,
            (*words, member),
            prefix,
            expected=trajectory.turns[turn].observation,
            head_start=trajectory.head_start,
        )
        for member in range(num_members)
    ]


def task_word(task: Task) -> int:
    """32 bits of the game file's hash, and of how its things are called."""
    word = int(task.digest[:8], 16) + 0x9E3779B1 * task.params.get("naming", 0)
    return word % 2**32
