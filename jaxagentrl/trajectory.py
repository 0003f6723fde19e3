"""The host's record of one episode: what was consumed, what was sampled, what came of it.

Numpy and the standard library only. Ids, log-probs and rewards are kept exactly; `to_json` and
`from_json` are inverse to the last bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs_host.types import ResetResult, StepResult, StopReason, Task


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """One observation and the action that answered it.

    Attributes:
        prompt_ids: int32 [n], everything appended before the action: the first prompt, or glue,
            observation and assistant header.
        action_ids: int32 [m], m ≥ 1, as sampled, with the end-of-turn token if it came.
        logprobs: float32 [m], of the distribution that was sampled from.
        entropies: float32 [m], of the same distribution.
        observation: what the environment said before the action.
        action: the text of `action_ids`, without special tokens.
        command: what was sent to the environment after cleaning.
        reward: increase of the environment's score that the action brought.
        intermediate_reward: the environment's own progress signal for this step, 0 if it has none.
        valid_command: False if the environment's parser refused the command, in style "think_action"
            if the answer has another form, and where the action was cut and not sent.
        score: the environment's score after the action.
        anchor: key of the state the action was taken in, equal for equal states, see `anchor_of`;
            None if unknown.
        fresh: before this turn the context slid: the model saw nothing of the episode but what
            `prompt_ids` holds. Of an episode's first turn it says that there was something before it
            (`Trajectory.head_start`).
    """

    prompt_ids: np.ndarray
    action_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    observation: str
    action: str
    command: str
    reward: float
    intermediate_reward: float
    valid_command: bool
    score: float
    anchor: str | None = None
    fresh: bool = False

    def __post_init__(self):
        for name, dtype in _TURN_ARRAYS.items():
            array = np.asarray(vars(self)[name])
            if array.ndim != 1:
                raise ValueError(f"Turn.{name} must be a vector, got shape {array.shape}")
            object.__setattr__(self, name, array.astype(dtype))
        sizes = {name: len(vars(self)[name]) for name in _TURN_ARRAYS if name != "prompt_ids"}
        if len(set(sizes.values())) != 1 or not sizes["action_ids"]:
            raise ValueError(
                "Turn needs at least one action token and one log-prob and entropy for each, got "
                f"sizes {sizes}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens the turn adds to the episode."""
        return len(self.prompt_ids) + len(self.action_ids)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` turns back into the same turn."""
        # float32 → Python float is exact, and JSON writes the shortest text that reads back.
        arrays = {name: vars(self)[name].tolist() for name in _TURN_ARRAYS}
        return arrays | {
            "observation": self.observation,
            "action": self.action,
            "command": self.command,
            "reward": float(self.reward),
            "intermediate_reward": float(self.intermediate_reward),
            "valid_command": bool(self.valid_command),
            "score": float(self.score),
            "anchor": self.anchor,
            "fresh": bool(self.fresh),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Turn":
        """The inverse of `to_json`."""
        _check_keys(cls, record)
        return cls(**record)


def anchor_of(turns: Sequence[Turn], answer: ResetResult | StepResult) -> str | None:
    """The key of the state that an episode of these turns is in after the world's answer to the last.

    Text worlds are told apart by what they say, as in GiGPO (Feng et al. 2025). A refused
    command leaves the world where it was, and so does the key: worlds answer all of them alike
    ("Nothing happens."), and by that answer turns in quite different places would be compared. Whether it
    refused it says itself: `Turn.valid_command` may be of a turn's form alone (`windowed`).
    """
    return answer.observation if not turns or answer.info.valid_command else turns[-1].anchor


_TURN_ARRAYS = {
    "prompt_ids": np.int32,
    "action_ids": np.int32,
    "logprobs": np.float32,
    "entropies": np.float32,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of one task.

    Attributes:
        task: what was played.
        group: number of the group (same task, several members) in its batch.
        member: number inside the group.
        turns: in order; may be empty only if the episode could not begin.
        stop_reason: why it ended.
        won: whether the task was solved.
        score: final score of the environment.
        max_score: the best possible score.
        tail_ids: int32 [k], tokens after the last action that belong to the record; normally none.
        head_start: commands of the task's walkthrough that were given before the first turn, in whose prompt they
            are: nothing of them was sampled.
    """

    task: Task
    group: int
    member: int
    turns: list[Turn]
    stop_reason: StopReason
    won: bool
    score: float
    max_score: float
    tail_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    head_start: int = 0

    def __post_init__(self):
        object.__setattr__(self, "tail_ids", np.asarray(self.tail_ids, np.int32).reshape(-1))
        object.__setattr__(self, "stop_reason", StopReason(self.stop_reason))

    @property
    def tokens(self) -> np.ndarray:
        """int32 [num_tokens], exactly the ids the sampler consumed and produced, in order.

        After a slide of the context, what was kept of it is consumed, and here, again.
        """
        pieces = [ids for turn in self.turns for ids in (turn.prompt_ids, turn.action_ids)]
        return np.concatenate([*pieces, self.tail_ids]).astype(np.int32)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole episode."""
        return sum(turn.num_tokens for turn in self.turns) + len(self.tail_ids)

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """(start, size) in `tokens` of every piece that the model saw as one text.

        One piece unless the context slid. Each is a training sample of its own.
        """
        starts, position = [0], 0
        for index, turn in enumerate(self.turns):
            if turn.fresh and index:
                starts.append(position)
            position += turn.num_tokens
        ends = [*starts[1:], self.num_tokens]
        return [(start, end - start) for start, end in zip(starts, ends, strict=True)]

    @property
    def num_action_tokens(self) -> int:
        """Tokens the policy sampled."""
        return sum(len(turn.action_ids) for turn in self.turns)

    @property
    def num_turns(self) -> int:
        """Actions taken."""
        return len(self.turns)

    @property
    def sent_turns(self) -> list[Turn]:
        """The turns whose command was sent: not the last one of an episode that was cut in the middle of it."""
        return self.turns[:-1] if self.stop_reason is StopReason.NO_END_OF_TURN else self.turns

    @property
    def terminated(self) -> bool:
        """Whether the task itself ended, won or lost."""
        return self.stop_reason is StopReason.DONE

    @property
    def truncated(self) -> bool:
        """Whether a limit ended the episode. False for an environment failure, which is neither."""
        return self.stop_reason not in (StopReason.DONE, StopReason.ENV_FAILURE)

    def token_fields(self) -> dict[str, np.ndarray]:
        """The per-token fields of `TrajectoryBatch` that need nothing but the record, unpadded.

        Returns:
            tokens, action_mask, turn_ids, turn_ends, sampler_logprobs: each [num_tokens]. A
            turn's prompt tokens carry the turn's id; tail tokens that of the last turn.
        """
        length = self.num_tokens
        fields = {
            "tokens": self.tokens,
            "action_mask": np.zeros(length, bool),
            "turn_ids": np.zeros(length, np.int32),
            "turn_ends": np.zeros(length, bool),
            "sampler_logprobs": np.zeros(length, np.float32),
        }
        start = 0
        for index, turn in enumerate(self.turns):
            first = start + len(turn.prompt_ids)
            end = start + turn.num_tokens
            fields["action_mask"][first:end] = True
            fields["sampler_logprobs"][first:end] = turn.logprobs
            fields["turn_ends"][end - 1] = True
            fields["turn_ids"][start:] = index
            start = end
        return fields

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` turns back into the same trajectory."""
        return {
            "task": self.task.to_json(),
            "group": int(self.group),
            "member": int(self.member),
            "turns": [turn.to_json() for turn in self.turns],
            "stop_reason": str(self.stop_reason),
            "won": bool(self.won),
            "score": float(self.score),
            "max_score": float(self.max_score),
            "tail_ids": self.tail_ids.tolist(),
            "head_start": int(self.head_start),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Trajectory":
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        record = {"head_start": 0} | record  # records of before there was any lack it
        _check_keys(cls, record)
        parts = {
            "task": Task.from_json(record["task"]),
            "turns": [Turn.from_json(turn) for turn in record["turns"]],
        }
        return cls(**record | parts)


def _check_keys(cls: type, record: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    if set(record) != fields:
        raise ValueError(
            f"a {cls.__name__} record needs the fields {sorted(fields)}: missing "
            f"{sorted(fields - set(record))}, unknown {sorted(set(record) - fields)}; it was "
            "written by another version"
        )
