"""What crosses the border between a text world and the rest: tasks, answers, failures.

Standard library only, so that worker processes start fast and nothing here can pull in an
accelerator. Answers have Gymnasium's shape: `terminated` (the task ended) and `truncated` (a
limit was hit) are apart; an environment that dies answers with an `EnvFailure`, which is never
the agent's failure.
"""

import dataclasses
import enum
import math
from typing import Any, NamedTuple, Protocol


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    DONE = "done"  # The task ended: won or lost.
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    NO_END_OF_TURN = "no_end_of_turn"  # An action was cut before its end-of-turn token.
    ENV_FAILURE = "env_failure"  # Dropped: neither in a gradient nor in a success rate.
    TIME_LIMIT = "time_limit"
    REFUSALS = "refusals"  # Too many commands in a row were refused.


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem instance.

    Attributes:
        env: name of the environment, as `envs_host.make` takes it.
        name: unique among tasks, e.g. "custom-w2-o3-q4-basic-s50001".
        params: generation parameters, JSON-able, without the seed.
        seed: generation seed.
        file: path of the game file.
        digest: SHA-256 of the game file, in hexadecimal; for TextWorld without the date in it, so
            that a game has the same digest wherever and whenever it is made.
        objective: what the player is asked to do; may be empty.
        max_score: score of a perfect episode.
        walkthrough: commands that win, replayed in the real engine when the task was made.
    """

    env: str
    name: str
    params: dict[str, Any]
    seed: int
    file: str
    digest: str
    objective: str
    max_score: float
    walkthrough: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able dict that `from_json` turns back into an equal task."""
        return dataclasses.asdict(self) | {"walkthrough": list(self.walkthrough)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Task":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: a field is missing or unknown.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(data) != fields:
            raise ValueError(
                f"a task needs the fields {sorted(fields)}: missing {sorted(fields - set(data))}, "
                f"unknown {sorted(set(data) - fields)}. It was written by another version: "
                "generate the tasks again."
            )
        return cls(**data | {"walkthrough": tuple(data["walkthrough"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """What is known beside the observation, after a reset or a step.

    Attributes:
        score: score so far (cumulative).
        max_score: score of a perfect episode.
        won: the task ended in success.
        lost: the task ended in failure.
        valid_command: False when the game's parser refused the command, or it was not sent.
        command: what was sent after cleaning; what would have been sent, if it was refused.
        intermediate_reward: by how much the step has come closer to the goal, below 0 if away from
            it, in units of the environment's own; 0 unless requested.
        admissible_commands: commands that change the state; () unless requested.
        objective: what the player is asked to do; never part of the observation.
    """

    score: float
    max_score: float
    won: bool
    lost: bool
    valid_command: bool
    command: str
    intermediate_reward: float
    admissible_commands: tuple[str, ...]
    objective: str


class ResetResult(NamedTuple):
    """Answer to `reset`."""

    observation: str
    info: Info


class StepResult(NamedTuple):
    """Answer to `step`, Gymnasium's five; `reward` is the increase of the score."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Info


@dataclasses.dataclass(frozen=True)
class EnvFailure:
    """The environment failed, not the agent: the episode is to be dropped and counted.

    Attributes:
        reason: "crash", "step time limit", "reset time limit", "game file" or "not deterministic".
        message: for people.
    """

    reason: str
    message: str


class GameFileError(Exception):
    """A game file is missing, or is not the file its task was recorded with."""


def finite_reward(value: Any, source: str) -> float:
    """A reward that an environment's authors gave, as a number.

    Raises:
        ValueError: it is none, or not finite; `source` is named.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{source}: a reward must be a number, and a finite one, got {value!r}.")
    return number


class TextEnv(Protocol):
    """One live episode of a text world. Deterministic: the same commands give the same answers."""

    def reset(self, task: Task) -> ResetResult:
        """Starts an episode of `task`; whatever episode was live is dropped.

        Raises:
            GameFileError: the task's file is missing or damaged.
        """

    def step(self, text: str) -> StepResult:
        """Sends one command, cleaned first; `text` may be anything a model can write."""

    def close(self) -> None:
        """Frees what is held. Calling it twice is allowed."""
