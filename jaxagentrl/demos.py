"""Demonstrations: walkthroughs replayed in the real environment, as the rollout would record them.

`replay` plays, `texts` gives what a tokenizer is trained on, `encode` makes trajectories with the
very prompts of the rollout; `record` is `replay` and `encode`. Imitation batches then come from
`batching.to_batch(trajectories, None, ...)`, like any others.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

from envs_host.types import EnvFailure, ResetResult, StepResult, StopReason, Task
from jaxagentrl import chat, expert_turns, windowed
from jaxagentrl.rollout import Pool
from jaxagentrl.rules import Rules
from jaxagentrl.trajectory import Trajectory, Turn


class DemonstrationError(RuntimeError):
    """A walkthrough could not be replayed to a win."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """A walkthrough as it went; step t answers command t, T steps in all."""

    task: Task
    reset: ResetResult
    steps: tuple[StepResult, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """[T], as the walkthrough has them."""
        return self.task.walkthrough[: len(self.steps)]

    def user_texts(
        self, *, prompt_style: str, show_admissible: bool = False, history_turns: int = 0
    ) -> list[str]:
        """The T user messages that the commands answer, in a conversation that never slides."""
        before = [self.reset, *self.steps[:-1]]  # what was seen before each command
        shown = [r.info.admissible_commands if show_admissible else None for r in before]
        if prompt_style == windowed.STYLE:
            past = [
                (result.observation, command)
                for result, command in zip(before, self.commands, strict=True)
            ]
            return [
                windowed.user_text(
                    self.reset.info.objective,
                    past[:turn],
                    before[turn].observation,
                    shown[turn],
                    history=history_turns,
                )
                for turn in range(len(before))
            ]
        first = chat.first_user_text(
            self.reset.info.objective, before[0].observation, shown[0], style=prompt_style
        )
        later = [
            chat.later_user_text(result.observation, commands, style=prompt_style)
            for result, commands in zip(before[1:], shown[1:], strict=True)
        ]
        return [first, *later]


def record(
    tasks: Sequence[Task],
    pool: Pool,
    chat_format: chat.ChatFormat,
    rules: Rules,
    *,
    max_length: int = sys.maxsize,
    max_turn_tokens: int = 0,
    max_in_flight: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Trajectory]:
    """Replays the tasks' walkthroughs and records them as trajectories, in the order of tasks.

    Args:
        tasks: what to play; every walkthrough must win.
        pool: where to play it.
        chat_format: from `chat.make`, the same as the rollout's.
        rules: the rollout's, whose prompts and contexts these are; where they show the admissible commands the
            pool's environments must have been asked for them. Nothing is sampled, and walkthroughs are played
            to their end.
        max_length, max_turn_tokens: the engine's, by which `rules.context` "window" slides; by default never.
        max_in_flight: episodes that are live at the same time.
        advance: called with 1 for every episode that ended.

    Raises:
        DemonstrationError: a walkthrough that does not win, or an environment that fails.
    """
    replays = replay(tasks, pool, max_in_flight=max_in_flight, advance=advance)
    return encode(
        replays, chat_format, rules, max_length=max_length, max_turn_tokens=max_turn_tokens
    )


def replay(
    tasks: Sequence[Task],
    pool: Pool,
    *,
    max_in_flight: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Replay]:
    """Plays each task's walkthrough; results in the order of tasks. Arguments as in `record`."""
    waiting = collections.deque(range(len(tasks)))
    live: dict[int, list[ResetResult | StepResult]] = {}
    replays: dict[int, Replay] = {}
    try:
        while waiting or live:
            while waiting and len(live) < max_in_flight:
                index = waiting.popleft()
                if not tasks[index].walkthrough:
                    raise DemonstrationError(
                        f"task {tasks[index].name} has no walkthrough, which imitation and a tokenizer that is trained "
                        "need: set sft.num_steps to 0 and give model.directory and tokenizer.directory."
                    )
                live[index] = []
                pool.reset(_handle(index), tasks[index])
            for (_, index), result in pool.poll():
                finished = _advance(tasks[index], live[index], result)
                if finished is None:
                    pool.step(_handle(index), tasks[index].walkthrough[len(live[index]) - 1])
                    continue
                replays[index] = finished
                del live[index]
                pool.release(_handle(index))
                advance(1)
    finally:
        for index in live:
            pool.release(_handle(index))
    return [replays[index] for index in range(len(tasks))]


def encode(
    replays: Sequence[Replay],
    chat_format: chat.ChatFormat,
    rules: Rules,
    *,
    max_length: int = sys.maxsize,
    max_turn_tokens: int = 0,
) -> list[Trajectory]:
    """Makes the trajectories that a rollout sampling exactly these commands would have recorded.

    Log-probs and entropies are 0: nothing was sampled. Each trajectory is its own group. Arguments as in
    `record`.
    """
    sizes = {"max_length": max_length, "max_turn_tokens": max_turn_tokens}
    trajectories = []
    for group, played in enumerate(replays):
        seen = [played.reset, *played.steps[:-1]]
        turns: list[Turn] = []
        for command, answer, step in zip(played.commands, seen, played.steps, strict=True):
            turns.append(expert_turns.make(chat_format, turns, answer, command, step, rules, **sizes))
        last = played.steps[-1].info
        trajectories.append(
            Trajectory(
                task=played.task,
                group=group,
                member=0,
                turns=turns,
                stop_reason=StopReason.DONE,
                won=last.won,
                score=last.score,
                max_score=played.task.max_score,
            )
        )
    return trajectories


def texts(
    replays: Sequence[Replay],
    *,
    prompt_style: str,
    show_admissible: bool = False,
    history_turns: int = 0,
) -> Iterator[str]:
    """Every user message and every command of the replays: what `tokenizer.train` wants."""
    for played in replays:
        yield from played.user_texts(
            prompt_style=prompt_style, show_admissible=show_admissible, history_turns=history_turns
        )
        yield from (expert_turns.said(command, prompt_style) for command in played.commands)


def _handle(index: int) -> tuple[str, int]:
    # Apart from the handles of a rollout that shares the pool.
    return ("demonstration", index)


def _advance(
    task: Task,
    results: list[ResetResult | StepResult],
    result: ResetResult | StepResult | EnvFailure,
) -> Replay | None:
    """Adds one answer; returns the replay when it is complete, None when another step is due."""
    if isinstance(result, EnvFailure):
        raise DemonstrationError(
            f"the environment failed while replaying the walkthrough of task {task.name} "
            f"({result.reason}: {result.message})"
        )
    results.append(result)
    ended = isinstance(result, StepResult) and (result.terminated or result.truncated)
    if not ended and len(results) <= len(task.walkthrough):
        return None
    if not result.info.won:
        raise DemonstrationError(
            f"the walkthrough of task {task.name} does not win: after {len(results) - 1} of "
            f"{len(task.walkthrough)} commands ({', '.join(task.walkthrough)}) the score is "
            f"{result.info.score} of {result.info.max_score} and the game says: "
            f"{result.observation!r}. Leave this task out."
        )
    return Replay(task, results[0], tuple(results[1:]))
