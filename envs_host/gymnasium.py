"""Environments of Gymnasium's shape (`reset(seed=...)`, `step(action)` -> five) as text worlds.

What `info` may hold beside the observation, all of it optional: "won" or "is_success" (else a game is won that ends
with a score of `max_score`), "admissible_commands" or "action_mask", "valid_command", and, of `reset`, "identity".
"""

from typing import Any

from envs_host import gymnasium_world
from envs_host.memory import verify
from envs_host.types import GameFileError, Info, ResetResult, StepResult, Task

_WON = ("won", "is_success")


class GymnasiumEnv:
    """One live episode; the score is the sum of the rewards, `truncated` the environment's own."""

    def __init__(self, *, admissible_commands: bool = False):
        """Makes an environment without an episode.

        Args:
            admissible_commands: report the commands that make sense.
        """
        self._lists = admissible_commands
        self._made: Any = None  # What the world was made from.
        self._world: gymnasium_world.World | None = None
        self._task: Task | None = None  # None where no episode is live.
        self._score, self._offered = 0.0, ()

    def reset(self, task: Task) -> ResetResult:
        """Starts an episode of `task`. The Gymnasium environment is made where the one at hand is another.

        Raises:
            GameFileError: the game file is missing, or not the one the task was recorded with, or the game does not
                begin as it did when it was made.
        """
        self.close()
        verify(task, gymnasium_world.digest)
        game = gymnasium_world.load(task.file)
        if self._made != (game.id, game.kwargs, game.actions):
            if self._world is not None:
                self._world.close()
            self._world = gymnasium_world.World(game.id, game.kwargs, game.actions)
            self._made = (game.id, game.kwargs, game.actions)
        observation, info = self._world.reset(game.seed)
        if observation != game.opening:
            raise GameFileError(
                f"{task.name} does not begin as it did when it was made: with {observation[:200]!r} instead of "
                f"{game.opening[:200]!r}. What is random in {game.id} must follow from reset's seed alone; if its code "
                "has changed, its games must be made again (another env.cache_dir)."
            )
        self._task, self._score = task, 0.0
        return ResetResult(observation, self._info(info, "", valid=True, won=False, lost=False))

    def step(self, text: str) -> StepResult:
        """Takes one action.

        Args:
            text: anything. Of named actions one must be said, whatever its case; where actions are texts it goes to the
                environment without the spaces around it.

        Raises:
            RuntimeError: there is no live episode.
        """
        if self._task is None:
            raise RuntimeError("step was called without a live episode: call reset first.")
        command = text.strip()
        action = self._world.action(command)
        if action is None:
            said = f"Say one of: {', '.join(self._world.actions)}."
            return StepResult(said, 0.0, False, False, self._said(command, valid=False, won=False, lost=False))
        answer = self._world.step(action)
        self._score += answer.reward
        reached = answer.terminated and self._score >= self._task.max_score
        won = bool(next((answer.info[key] for key in _WON if key in answer.info), reached))
        valid = bool(answer.info.get("valid_command", True))
        info = self._info(answer.info, command, valid=valid, won=won, lost=answer.terminated and not won)
        if answer.terminated or answer.truncated:
            self._task = None
        return StepResult(answer.observation, answer.reward, answer.terminated, answer.truncated, info)

    def close(self) -> None:
        """Ends the episode; what Gymnasium made stays for the next one."""
        self._task = None

    def _info(self, info: dict[str, Any], command: str, **told: bool) -> Info:
        self._offered = self._world.admissible(info) if self._lists else ()
        return self._said(command, **told)

    def _said(self, command: str, *, valid: bool, won: bool, lost: bool) -> Info:
        return Info(
            score=self._score,
            max_score=self._task.max_score,
            won=won,
            lost=lost,
            valid_command=valid,
            command=command,
            intermediate_reward=0.0,
            admissible_commands=self._offered,
            objective=self._task.objective,
        )
