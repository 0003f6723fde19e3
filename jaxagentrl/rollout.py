"""Episodes: environments in worker processes × the engine's slots → trajectories.

Slots are split in waves. While the device decodes one wave, worker processes step the environments
of the others; a slot freed by a finished episode is taken by the next at once.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

import numpy as np

from envs_host.types import EnvFailure, ResetResult, StepResult, StopReason, Task
from jaxagentrl import chat
from jaxagentrl.engine import Engine, TurnRequest, TurnSample
from jaxagentrl.trajectory import Trajectory, Turn


class Pool(Protocol):
    """What `collect` needs of `envs_host.pool.EnvPool`."""

    def reset(self, handle: Hashable, task: Task) -> None: ...
    def step(self, handle: Hashable, text: str) -> None: ...
    def poll(self, limit_s: float | None = None) -> list[tuple[Hashable, object]]: ...
    def release(self, handle: Hashable) -> None: ...


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to be played. `stream` identifies its randomness, whatever slot it gets."""

    task: Task
    group: int
    member: int
    stream: tuple[int, ...]  # uint32 words: run seed, phase, iteration, ...


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Trajectories in the order of their episodes; failed ones are in `failures` and nowhere else."""

    trajectories: list[Trajectory]
    failures: list[tuple[Episode, EnvFailure]]


def episodes(
    tasks: Sequence[Task], *, group_size: int, stream: tuple[int, ...], first_group: int = 0
) -> list[Episode]:
    """`group_size` episodes of each task. Equal tasks, members and streams replay equal episodes."""
    return [
        Episode(task, first_group + group, member, (*stream, task_word(task), member))
        for group, task in enumerate(tasks)
        for member in range(group_size)
    ]


def task_word(task: Task) -> int:
    """32 bits of the game file's hash."""
    return int(task.digest[:8], 16)


@dataclasses.dataclass
class _Live:
    """An episode that holds a slot."""

    index: int
    episode: Episode
    turns: list[Turn] = dataclasses.field(default_factory=list)
    observation: str = ""
    prompt_ids: np.ndarray | None = None
    sample: TurnSample | None = None  # waits for the environment's answer
    action: str = ""
    ended: bool = True
    score: float = 0.0
    won: bool = False


def collect(
    to_play: Iterable[Episode],
    *,
    pool: Pool,
    engine: Engine,
    params,
    chat_format: chat.ChatFormat,
    prompt_style: str,
    show_admissible: bool,
    max_turns: int,
    temperature: float,
    advance: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Plays every episode with the policy.

    An episode ends when its task does (done), after `max_turns` (turn limit), when a full turn no
    longer fits the slot (token limit, checked before generating), or when a turn was cut before its
    end-of-turn token (no end of turn: the turn is kept, its command is not sent).

    Args:
        to_play: the episodes; more than there are slots is the normal case.
        engine: all slots free.
        params: policy parameters.
        temperature: 0 is greedy.
        advance: called with 1 for every episode that ended.

    Raises:
        ValueError: a first prompt does not fit a slot.
    """
    return _Player(
        list(to_play),
        pool,
        engine,
        params,
        chat_format,
        prompt_style,
        show_admissible,
        max_turns,
        temperature,
        advance,
    ).play()


@dataclasses.dataclass
class _Player:
    """State of one `collect` call."""

    to_play: list[Episode]
    pool: Pool
    engine: Engine
    params: object
    chat_format: chat.ChatFormat
    prompt_style: str
    show_admissible: bool
    max_turns: int
    temperature: float
    advance: Callable[[int], None]

    def play(self) -> Rollout:
        self.queue = collections.deque(enumerate(self.to_play))
        self.waves: list[dict[int, _Live]] = [{} for _ in range(self.engine.num_waves)]
        self.answers: dict[int, object] = {}
        self.finished: dict[int, Trajectory] = {}
        self.failures: dict[int, EnvFailure] = {}
        for wave in range(len(self.waves)):
            self._refill(wave)
        while any(self.waves):
            for wave, live in enumerate(self.waves):
                if live:
                    self._advance_wave(wave, live)
        return Rollout(
            trajectories=[self.finished[index] for index in sorted(self.finished)],
            failures=[(self.to_play[i], self.failures[i]) for i in sorted(self.failures)],
        )

    def _advance_wave(self, wave: int, live: dict[int, _Live]) -> None:
        """Takes the wave's answers, samples a turn for every episode that goes on, sends it off."""
        while any(item.index not in self.answers for item in live.values()):
            self.answers.update(self.pool.poll())
        requests = []
        for slot, item in sorted(live.items()):
            request = self._next_request(wave, slot, item, self.answers.pop(item.index))
            if request is not None:
                requests.append(request)
        self._refill(wave)
        if not requests:
            return
        samples = self.engine.act(self.params, wave, requests)
        for request in requests:
            item, sample = live[request.slot], samples[request.slot]
            item.sample = sample
            item.action = self.chat_format.decode_action(sample.ids)
            item.ended = int(sample.ids[-1]) == self.chat_format.end_of_turn_id
            if item.ended:
                self.pool.step(item.index, item.action)
            else:
                self._keep_turn(item, command="", reward=0.0, intermediate=0.0, valid=False)
                self._finish(wave, request.slot, item, StopReason.NO_END_OF_TURN)
        self._refill(wave)

    def _next_request(self, wave: int, slot: int, item: _Live, answer: object):
        """Records what the environment answered; the request for the next turn, or None at the end."""
        if isinstance(answer, EnvFailure):
            self.failures[item.index] = answer
            self._free(wave, slot, item)
            return None
        if isinstance(answer, StepResult):
            info = answer.info
            item.score, item.won = info.score, info.won
            self._keep_turn(
                item, info.command, answer.reward, info.intermediate_reward, info.valid_command
            )
            if answer.terminated:
                return self._finish(wave, slot, item, StopReason.DONE)
            if answer.truncated or len(item.turns) >= self.max_turns:
                return self._finish(wave, slot, item, StopReason.TURN_LIMIT)
        prompt_ids = self._prompt(item, answer)
        budget = self.engine.max_turn_tokens
        if self.engine.length(wave, slot) + len(prompt_ids) + budget > self.engine.max_length:
            if not item.turns:
                raise ValueError(
                    f"task {item.episode.task.name}: the first prompt has {len(prompt_ids)} tokens; "
                    f"with a turn of {budget} that exceeds sampling.max_length "
                    f"({self.engine.max_length}). Raise it, or shorten the prompt (prompt.style)."
                )
            return self._finish(wave, slot, item, StopReason.TOKEN_LIMIT)
        item.observation, item.prompt_ids = answer.observation, prompt_ids
        stream = (*item.episode.stream, len(item.turns))
        return TurnRequest(slot, prompt_ids, budget, self.temperature, stream)

    def _prompt(self, item: _Live, answer: ResetResult | StepResult) -> np.ndarray:
        admissible = answer.info.admissible_commands if self.show_admissible else None
        style = self.prompt_style
        if isinstance(answer, ResetResult):
            objective = answer.info.objective
            text = chat.first_user_text(objective, answer.observation, admissible, style=style)
            return self.chat_format.first_prompt(text)
        text = chat.later_user_text(answer.observation, admissible, style=style)
        return self.chat_format.next_prompt(text, ended=item.ended)

    def _keep_turn(
        self, item: _Live, command: str, reward: float, intermediate: float, valid: bool
    ) -> None:
        item.turns.append(
            Turn(
                prompt_ids=item.prompt_ids,
                action_ids=item.sample.ids,
                logprobs=item.sample.logprobs,
                entropies=item.sample.entropies,
                observation=item.observation,
                action=item.action,
                command=command,
                reward=reward,
                intermediate_reward=intermediate,
                valid_command=valid,
                score=item.score,
                anchor=item.observation,
            )
        )

    def _finish(self, wave: int, slot: int, item: _Live, reason: StopReason) -> None:
        task = item.episode.task
        self.finished[item.index] = Trajectory(
            task=task,
            group=item.episode.group,
            member=item.episode.member,
            turns=item.turns,
            stop_reason=reason,
            won=item.won,
            score=item.score,
            max_score=task.max_score,
        )
        self._free(wave, slot, item)

    def _free(self, wave: int, slot: int, item: _Live) -> None:
        self.pool.release(item.index)
        self.engine.release(wave, slot)
        del self.waves[wave][slot]
        self.advance(1)

    def _refill(self, wave: int) -> None:
        """Gives free slots to the next episodes; their first observations come with a later poll."""
        for slot in range(self.engine.slots_per_wave):
            if not self.queue:
                return
            if slot not in self.waves[wave]:
                index, episode = self.queue.popleft()
                self.waves[wave][slot] = _Live(index, episode)
                self.pool.reset(index, episode.task)
