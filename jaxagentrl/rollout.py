"""Episodes: environments in worker processes × the engine's slots → trajectories.

Slots are split in waves. While the device decodes one wave, worker processes step the environments
of the others; a slot freed by a finished episode is taken at once by the next, whose environment was
reset ahead of time.

`episodes`, which says what is to be played, is re-exported.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Protocol

import numpy as np

from envs_host.types import EnvFailure, ResetResult, StepResult, StopReason, Task
from jaxagentrl import chat, contexts, expert_turns, windowed
from jaxagentrl.engine import Engine, TurnRequest, TurnSample
from jaxagentrl.episodes import Episode, branch, episodes, task_word
from jaxagentrl.rules import Rules
from jaxagentrl.trajectory import Trajectory, Turn, anchor_of

__all__ = ["Episode", "Rollout", "Rules", "branch", "collect", "episodes", "task_word"]


class Pool(Protocol):
    """What `collect` needs of `envs_host.pool.EnvPool`."""

    def reset(self, handle: Hashable, task: Task) -> None: ...
    def step(self, handle: Hashable, text: str) -> None: ...
    def poll(
        self, limit_s: float | None = None, *, until: Callable[[], object] = ...
    ) -> list[tuple[Hashable, object]]: ...
    def wake(self) -> None: ...
    def release(self, handle: Hashable) -> None: ...


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Trajectories in the order of their episodes; failed ones are in `failures` and nowhere else."""

    trajectories: list[Trajectory]
    failures: list[tuple[Episode, EnvFailure]]
    ledger: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Live:
    """An episode that holds a slot, or will hold the next that is free."""

    index: int
    episode: Episode
    since: float = 0.0  # when it got its slot
    asked: float = 0.0  # when its environment was sent what it has to answer
    head: list[Turn] = dataclasses.field(default_factory=list)  # of the walkthrough, see `Episode.head_start`
    walks_from: ResetResult | StepResult | None = None  # what the command of the walkthrough on its way answers
    turns: list[Turn] = dataclasses.field(default_factory=list)
    observation: str = ""
    anchor: str | None = None  # of the turn on its way
    prompt_ids: np.ndarray | None = None
    sample: TurnSample | None = None  # waits for the environment's answer
    action: str = ""
    fresh: bool = False  # the turn on its way opens a new context
    score: float = 0.0
    won: bool = False


def collect(
    to_play: Iterable[Episode],
    *,
    rules: Rules,
    pool: Pool,
    engine: Engine,
    params,
    chat_format: chat.ChatFormat,
    advance: Callable[..., None] = lambda count, note=None: None,
) -> Rollout:
    """Plays every episode with the policy.

    An episode ends when its task does (done), after `max_turns` (turn limit), after `max_refusals`
    refused commands in a row (refusals), when a full turn no longer fits the slot (token limit,
    checked before generating), when a turn was cut before its end (no end of turn, see
    `Rules.cut_turns`), or when its time is up (time limit: the turns so far are kept).

    Args:
        to_play: the episodes; more than there are slots is the normal case.
        engine: all slots free. They are free again afterwards, also where this raises.
        params: policy parameters.
        advance: called with 1 for every episode that ended.

    Returns:
        The trajectories, the failures of environments, and a ledger of where the seconds and the
        tokens went, see `turns.Counters.ledger`.

    Raises:
        ValueError: a first prompt does not fit a slot.
    """
    return _Player(list(to_play), rules, pool, engine, params, chat_format, advance).play()


@dataclasses.dataclass
class _Player:
    """State of one `collect` call."""

    to_play: list[Episode]
    rules: Rules
    pool: Pool
    engine: Engine
    params: object
    chat_format: chat.ChatFormat
    advance: Callable[..., None]

    def __post_init__(self) -> None:
        self.began, self.seconds_environment = time.monotonic(), 0.0
        self.counters = dataclasses.replace(self.engine.counters)
        self.queue = collections.deque(enumerate(self.to_play))
        self.ahead: collections.deque[_Live] = collections.deque()
        self.waves: list[dict[int, _Live]] = [{} for _ in range(self.engine.num_waves)]
        self.answers: dict[int, object] = {}
        self.finished: dict[int, Trajectory] = {}
        self.failures: dict[int, EnvFailure] = {}

    def play(self) -> Rollout:
        try:
            for wave in range(len(self.waves)):
                self._refill(wave)
            while any(self.waves):
                for wave in range(len(self.waves)):
                    self._receive(wave)
                    self._answer(wave)
                    self.engine.launch(self.params, wave, when_over=self.pool.wake)
                self._wait_if_idle()
        finally:
            self._leave()
        return Rollout(
            trajectories=[self.finished[index] for index in sorted(self.finished)],
            failures=[(self.to_play[i], self.failures[i]) for i in sorted(self.failures)],
            ledger=self.engine.counters.since(self.counters).ledger(
                time.monotonic() - self.began, self.seconds_environment
            ),
        )

    def _leave(self) -> None:
        """Lets go of episodes that an error, or Ctrl-C, has left in the middle."""
        left = [*self.ahead, *(item for live in self.waves for item in live.values())]
        if left:
            self.engine.clear()
        for item in left:
            self.pool.release(item.index)

    def _receive(self, wave: int) -> None:
        """Waits for the wave's turns. Those of a wave that is over earlier go to their environments, too:
        which rows share a launch does not depend on it, only when the answers come."""
        while over := self.engine.wait(wave):
            for other in over:
                self._send(other)

    def _send(self, wave: int) -> None:
        """Sends the turns that the device has finished to their environments."""
        live = self.waves[wave]
        for slot, sample in sorted(self.engine.receive(wave).items()):
            item = live[slot]
            item.sample, stopped = self._cut_at_stop_string(wave, slot, sample)
            item.action = self.chat_format.decode_action(item.sample.ids)
            stopped |= int(item.sample.ids[-1]) in self.engine.stop_ids
            if stopped or self.rules.cut_turns == "send":
                self._ask(item, self._command(item.action))
            else:
                self._keep_unanswered(item, "", valid=False)
                self._finish(wave, slot, item, StopReason.NO_END_OF_TURN)

    def _ask(self, item: _Live, command: str) -> None:
        self.pool.step(item.index, command)
        item.asked = time.monotonic()

    def _answer(self, wave: int) -> None:
        """Goes on with every episode whose environment has answered, and fills what gets free."""
        live = self.waves[wave]
        has_changed = True
        while has_changed:
            self._wait(wave)
            has_changed = False
            for slot, item in sorted(live.items()):
                if item.index in self.answers:
                    has_changed |= self._go_on(wave, slot, item, self.answers.pop(item.index))
                elif self._is_late(item) and not self.engine.is_busy(wave, slot):
                    self._give_up(wave, slot, item)
                    has_changed = True  # the others are waited for again
            has_changed |= self._refill(wave)

    def _wait(self, wave: int) -> None:
        """Until all the wave's environments have answered, or the slow ones have had their time. Turns of
        other waves that are over go to their environments meanwhile."""
        while True:
            for other in self.engine.over():
                self._send(other)
            owing = self._owing(wave)
            if not owing:
                return
            # What has been answered counts, however late it is taken in and whatever else is over.
            if self._poll(0.0, until=lambda: False):
                continue
            now, limits = time.monotonic(), self._limits(owing)
            if self.rules.straggler_s is not None:
                limits.append(max(item.asked for item in owing) + self.rules.straggler_s)
            if any(limit <= now for limit in limits):
                return
            self._poll(min(limits) - now if limits else None)

    def _wait_if_idle(self) -> None:
        """Where all that is played waits for environments that have had their time: until one answers."""
        waves = range(len(self.waves))
        owing = [item for wave in waves for item in self._owing(wave)]
        has_answered = any(item.index in self.answers for live in self.waves for item in live.values())
        if owing and not has_answered and not any(map(self.engine.is_busy, waves)):
            limits = self._limits(owing)
            self._poll(max(0.0, min(limits) - time.monotonic()) if limits else None)

    def _owing(self, wave: int) -> list[_Live]:
        """The wave's episodes whose environments have to answer."""
        return [
            item
            for slot, item in self.waves[wave].items()
            if item.index not in self.answers and not self.engine.is_busy(wave, slot)
        ]

    def _limits(self, items: Iterable[_Live]) -> list[float]:
        """When the time of the first of these episodes is up."""
        limit = self.rules.episode_limit_s
        return [] if limit is None else [min(item.since for item in items) + limit]

    def _poll(self, limit_s: float | None, until: Callable[[], object] | None = None) -> bool:
        """Collects what environments have answered, for so long or until a wave's launch is over."""
        since = time.monotonic()
        answered = self.pool.poll(limit_s, until=until or self.engine.over)
        self.answers.update(answered)
        self.seconds_environment += time.monotonic() - since
        return bool(answered)

    def _go_on(self, wave: int, slot: int, item: _Live, answer: object) -> bool:
        """Records what the environment answered; asks for the next turn, or ends the episode.

        Returns:
            Whether the environment was asked again, which walkthroughs and replayed prefixes do.
        """
        if not isinstance(answer, EnvFailure) and len(item.head) < item.episode.head_start:
            answer = self._walked(item, answer)
        if answer is None:
            return True
        if isinstance(answer, EnvFailure):
            self._fail(wave, slot, item, answer)
            return False
        is_replayed = len(item.turns) <= len(item.episode.prefix) and item.sample is None
        if is_replayed and (message := self._differs(item, answer)):
            self._fail(wave, slot, item, EnvFailure("not deterministic", message))
            return False
        if isinstance(answer, StepResult):
            item.score, item.won = answer.info.score, answer.info.won
            if item.sample is not None:
                self._keep_answered(item, answer)
            if (reason := self._why_over(item, answer)) is not None:
                self._finish(wave, slot, item, reason)
                return False
        if len(item.turns) < len(item.episode.prefix):
            turn = item.episode.prefix[len(item.turns)]
            item.turns.append(turn)
            self._ask(item, self._command(turn.action))
            return True
        return self._begin_turn(wave, slot, item, answer)

    def _walked(
        self, item: _Live, answer: ResetResult | StepResult
    ) -> StepResult | EnvFailure | None:
        """Takes in what a command of the walkthrough was answered and gives the next; returns the answer to the last."""
        commands, before = item.episode.task.walkthrough, item.walks_from
        if before is not None:
            command = commands[len(item.head)]
            item.head.append(
                expert_turns.make(self.chat_format, item.head, before, command, answer, self.rules, **self._sizes)
            )
            if answer.terminated or answer.truncated:
                at = f"task {item.episode.task.name}: after command {len(item.head)} of {len(commands)} of its walkthrough "
                return EnvFailure("not deterministic", at + f"the episode is over, saying {answer.observation!r}.")
        if len(item.head) == item.episode.head_start:
            return answer
        item.walks_from = answer
        self._ask(item, commands[len(item.head)])
        return None

    def _differs(self, item: _Live, answer: ResetResult | StepResult) -> str | None:
        """What the environment of a replayed prefix does otherwise than it did then."""
        turns, expected = item.turns, item.episode.observation(len(item.turns))
        at = f"task {item.episode.task.name}: replayed to turn {len(turns)}, "
        if isinstance(answer, StepResult) and turns:
            if answer.terminated or answer.truncated:
                return at + f"the episode is over, saying {answer.observation!r}, but then it said {expected!r}."
            if answer.info.score != turns[-1].score:
                return at + f"the score is {answer.info.score}, but then it was {turns[-1].score}."
        if expected not in (None, answer.observation):
            return at + f"the environment says {answer.observation!r}, but then it said {expected!r}."
        return None

    def _why_over(self, item: _Live, answer: StepResult) -> StopReason | None:
        """Why the episode ends with what the environment has answered; None if it goes on."""
        if answer.terminated:
            return StopReason.DONE
        if answer.truncated or len(item.turns) >= self.rules.max_turns:
            return StopReason.TURN_LIMIT
        if self._is_stuck(item):
            return StopReason.REFUSALS
        if len(item.turns) > len(item.episode.prefix) and self._is_late(item):  # one turn everybody gets
            return StopReason.TIME_LIMIT
        return None

    def _begin_turn(
        self, wave: int, slot: int, item: _Live, answer: ResetResult | StepResult
    ) -> bool:
        """Asks the model for the episode's next turn, or ends the episode where no turn fits.

        Returns:
            Whether the environment was asked again: the episode is played from the start where its head start leaves no
            room for a turn.
        """
        budget = self.engine.max_turn_tokens
        room = self.engine.max_length - budget
        prompt_ids, item.fresh = contexts.of_next_turn(
            self.chat_format, [*item.head, *item.turns], answer, self.rules, **self._sizes
        )
        if item.head and not item.turns and not item.fresh:  # what was said until here is the first prompt
            prompt_ids, item.fresh = np.concatenate([*contexts.newest(item.head), prompt_ids]), True
        new_ids = prompt_ids
        if item.fresh:  # what it begins with as before stays in the slot
            new_ids = prompt_ids[self.engine.rewind(wave, slot, prompt_ids) :]
        elif item.episode.prefix and self.engine.length(wave, slot) == 0:
            new_ids = np.concatenate([*contexts.newest(item.turns), prompt_ids])
        if self.engine.length(wave, slot) + len(new_ids) > room:
            if item.head and not item.turns:
                return self._play_from_the_start(item)
            if not item.turns:
                raise ValueError(
                    f"task {item.episode.task.name}: the first prompt has {len(prompt_ids)} tokens; "
                    f"with a turn of {budget} that exceeds sampling.max_length "
                    f"({self.engine.max_length}). Raise it, or shorten the prompt (prompt.style)."
                )
            self._finish(wave, slot, item, StopReason.TOKEN_LIMIT)
            return False
        item.observation, item.prompt_ids = answer.observation, prompt_ids
        item.anchor = anchor_of(item.turns, answer)
        rules, stream = self.rules, (*item.episode.stream, len(item.turns))
        self.engine.submit(
            wave,
            TurnRequest(
                slot,
                new_ids,
                budget,
                stream,
                temperature=rules.temperature,
                top_k=rules.top_k,
                top_p=rules.top_p,
                min_p=rules.min_p,
            ),
        )
        return False

    def _play_from_the_start(self, item: _Live) -> bool:
        item.episode = dataclasses.replace(item.episode, head_start=0)
        item.head, item.walks_from, item.score = [], None, 0.0
        self.pool.release(item.index)
        self.pool.reset(item.index, item.episode.task)
        item.asked = time.monotonic()
        return True

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(max_length=self.engine.max_length, max_turn_tokens=self.engine.max_turn_tokens)

    def _command(self, action: str) -> str:
        """What a turn gives the environment."""
        if self.rules.prompt_style == windowed.STYLE:
            return windowed.read(action).command
        return chat.command(action)

    def _cut_at_stop_string(
        self, wave: int, slot: int, sample: TurnSample
    ) -> tuple[TurnSample, bool]:
        """The turn up to the token that completes a stop string, and whether there is one."""

        def stops(count: int) -> bool:
            said = self.chat_format.decode(sample.ids[:count])
            return any(text in said for text in self.rules.stop_strings)

        if not self.rules.stop_strings or not stops(len(sample.ids)):
            return sample, False
        keep = next(count for count in range(1, len(sample.ids) + 1) if stops(count))
        return self.engine.cut(wave, slot, sample, keep), True

    def _keep_unanswered(self, item: _Live, command: str, *, valid: bool) -> None:
        self._keep_turn(item, command, reward=0.0, intermediate=0.0, valid=valid)

    def _keep_answered(self, item: _Live, answer: StepResult) -> None:
        info, valid = answer.info, answer.info.valid_command
        if self.rules.prompt_style == windowed.STYLE:
            valid = windowed.read(item.action).valid
        self._keep_turn(item, info.command, answer.reward, info.intermediate_reward, valid)

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
                anchor=item.anchor,
                fresh=item.fresh,
            )
        )
        item.sample = None

    def _is_stuck(self, item: _Live) -> bool:
        limit = self.rules.max_refusals
        if limit is None or len(item.turns) < limit:
            return False
        return not any(turn.valid_command for turn in item.turns[-limit:])

    def _is_late(self, item: _Live) -> bool:
        limit = self.rules.episode_limit_s
        return limit is not None and time.monotonic() - item.since >= limit

    def _give_up(self, wave: int, slot: int, item: _Live) -> None:
        """Ends an episode whose environment has not answered in the episode's time."""
        if item.sample is not None:
            # Nobody refused the command: the agent does not pay for a slow environment.
            self._keep_unanswered(item, self._command(item.action), valid=True)
        if len(item.turns) > len(item.episode.prefix):
            self._finish(wave, slot, item, StopReason.TIME_LIMIT)
            return
        message = f"no observation in {self.rules.episode_limit_s} s (rollout.episode_limit_s)"
        self._fail(wave, slot, item, EnvFailure("reset time limit", message))

    def _fail(self, wave: int, slot: int, item: _Live, failure: EnvFailure) -> None:
        self.failures[item.index] = failure
        self._free(wave, slot, item)

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
            head_start=len(item.head),
        )
        self._free(wave, slot, item)

    def _free(self, wave: int, slot: int, item: _Live) -> None:
        self.pool.release(item.index)
        self.engine.release(wave, slot)
        del self.waves[wave][slot]
        self.advance(1)

    def _refill(self, wave: int) -> bool:
        """Gives free slots to the next episodes; whether there were any to give."""
        taken = False
        for slot in range(self.engine.slots_per_wave):
            if slot not in self.waves[wave]:
                if not self.ahead:
                    self._reset_ahead(1)
                if not self.ahead:
                    break
                self.waves[wave][slot] = item = self.ahead.popleft()
                item.since = time.monotonic()  # its limit is not for waiting in the queue
                taken = True
        if taken:
            self._reset_ahead(max(1, self.engine.slots_per_wave // 8))
        return taken

    def _reset_ahead(self, count: int) -> None:
        """Resets environments of the next episodes, so that they are ready when a slot is."""
        while self.queue and len(self.ahead) < count:
            index, episode = self.queue.popleft()
            self.pool.reset(index, episode.task)
            self.ahead.append(_Live(index, episode, asked=time.monotonic()))
