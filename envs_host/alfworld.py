"""ALFWorld as a text environment: official games and generated houses, stepped without its engine.

`generate` makes houses (games.py), `alfworld_data.read` finds the official games; `AlfworldEnv`
plays both. Observations are the engine's own texts, except that the opening is told without the
banner and the task, which is the `objective`. An episode ends when it is won: ALFWorld knows no
other end.
"""

import re
from typing import NamedTuple

from envs_host import alfworld_engine, alfworld_experts, textworld_text
from envs_host.alfworld_engine import REFUSED, Engine, split_opening
from envs_host.alfworld_pddl import Facts, Ground
from envs_host.games import GenerationReport, generate
from envs_host.memory import Engines, Memory, Node, verify
from envs_host.types import GameFileError, Info, ResetResult, StepResult, Task

__all__ = ["AlfworldEnv", "GenerationReport", "generate"]

# Shared by the environments of a process: a group of episodes plays the same game.
_ENGINES = Engines(max_idle=64)
_MEMORY = Memory(max_entries=20_000)  # About 6 kB each.
_PUT = re.compile(r"put (.+?) (?:in/on|in|on) (.+)")


class Moment(NamedTuple):
    """What is known of a game after some commands."""

    observation: str
    facts: Facts
    won: bool
    valid_command: bool
    intermediate_reward: float
    admissible_commands: tuple[str, ...]
    distance: int | None  # Commands to the goal when it was last in reach, if that is asked for.


class AlfworldEnv:
    """One live episode of an ALFWorld game; terminated means won.

    A limit on the turns is not the environment's business, so `truncated` is always False.
    """

    def __init__(
        self,
        *,
        intermediate_reward: bool = False,
        admissible_commands: bool = False,
        remember: bool = True,
        accept_put: bool = False,
    ):
        """Makes an environment without an episode.

        Args:
            intermediate_reward: report by how many commands each step shortens the shortest way to
                the goal; below 0 if it lengthens it.
            admissible_commands: report the commands that can be given.
            remember: answer from the memory of the process where the same commands were given to
                the same game before. The answers are the same (games are deterministic).
            accept_put: take "put mug 1 in/on desk 1", as ALFWorld said before 0.4, for
                "move mug 1 to desk 1" in games that have forgotten it.
        """
        self._extras = (intermediate_reward, admissible_commands)
        self._accept_put = accept_put
        self._memory = _MEMORY if remember else Memory(max_entries=0)
        self._task: Task | None = None
        self._path: list[Node] = []  # From the opening to where the episode is.
        self._engine: Engine | None = None
        self._goal: alfworld_experts.Goal | None = None
        self._known: tuple[Node, dict[str, Ground]] | None = None  # What can be done at a node.

    @property
    def counters(self) -> dict[str, int]:
        """Answers from memory and not, entries held, and games started, in this process."""
        return {
            "hits": self._memory.hits,
            "misses": self._memory.misses,
            "entries": self._memory.entries,
            "engines_started": _ENGINES.started,
        }

    def reset(self, task: Task) -> ResetResult:
        """Starts an episode of `task`.

        Raises:
            GameFileError: the game file is missing, damaged, not the one the task was recorded
                with, or of a task type that has no progress signal although one is asked for.
        """
        self.close()
        verify(task, alfworld_engine.digest)
        self._task = task
        node = self._memory.root(self._key())
        if node is None:
            self._memory.misses += 1
            opening = self._started().opening
            seen, _ = split_opening(opening.feedback)
            moment = Moment(seen, opening.facts, opening.won, True, 0.0, (), self._distance(opening))
            node = self._memory.add(self._key(), None, "", moment)
            node.outcome = moment._replace(admissible_commands=self._admissible(node))
        else:
            self._memory.hits += 1
        self._path = [node]
        return ResetResult(node.outcome.observation, self._info(node.outcome, "", valid=True))

    def step(self, text: str) -> StepResult:
        """Sends one command.

        Args:
            text: anything; cleaned as TextWorld's commands are (textworld_text.py), and in lower
                case, which is all the game knows.

        Raises:
            RuntimeError: there is no live episode.
        """
        before = self._path[-1].outcome if self._path else None
        if before is None or before.won:
            raise RuntimeError("step was called without a live episode: call reset first.")
        command = self._cleaned(text)
        node = self._path[-1].children.get(command)
        if node is None:
            self._memory.misses += 1
            node = self._compute(command)
        else:
            self._memory.hits += 1
        self._path.append(node)
        after: Moment = node.outcome
        info = self._info(after, command, valid=after.valid_command)
        reward = float(after.won) * self._task.max_score
        return StepResult(after.observation, reward, after.won, False, info)

    def close(self) -> None:
        """Ends the episode; a started game stays with the process for the next one."""
        if self._engine is not None:
            _ENGINES.release(self._key())
            self._engine = None
        self._path, self._known = [], None

    def _cleaned(self, text: str) -> str:
        command = textworld_text.clean_command(text)[0].lower()
        put = _PUT.fullmatch(command) if self._accept_put else None
        if put is None:
            return command
        here, moved = self._path[-1], f"move {put[1]} to {put[2]}"
        as_said = here.children.get(command)
        if as_said is not None and as_said.outcome.valid_command:
            return command
        # A game of before 0.4 knows the old word itself.
        return command if moved not in here.children and command in self._commands(here) else moved

    def _key(self) -> tuple:
        return (self._task.digest, self._extras)

    def _info(self, moment: Moment, command: str, valid: bool) -> Info:
        return Info(
            score=float(moment.won) * self._task.max_score,
            max_score=self._task.max_score,
            won=moment.won,
            lost=False,
            valid_command=valid,
            command=command,
            intermediate_reward=moment.intermediate_reward,
            admissible_commands=moment.admissible_commands,
            objective=self._task.objective,
        )

    def _started(self) -> Engine:
        if self._engine is None:
            file = self._task.file
            self._engine = _ENGINES.acquire(
                self._key(), lambda: Engine(alfworld_engine.read(file), file))
            self._goal = alfworld_experts.goal(self._engine.goal)
            if self._extras[0] and self._goal is None:
                raise GameFileError(
                    f"the goal of task {self._task.name} ({self._task.file}) is of none of "
                    "ALFWorld's six kinds, so that there is no progress signal for it: leave the "
                    "task out, or set reward.kind to 'single'."
                )
        return self._engine

    def _compute(self, command: str) -> Node:
        """Has the engine carry out a command where the episode is."""
        here = self._path[-1]
        before: Moment = here.outcome
        outcome = self._started().step(before.facts, command, self._commands(here))
        if not outcome.valid:
            moment = before._replace(
                observation=REFUSED, valid_command=False, intermediate_reward=0.0)
            return self._memory.add(self._key(), here, command, moment)
        distance, progress = self._distance(outcome), 0.0
        if distance is None:
            distance = before.distance  # What is out of reach counts as being where it was.
        elif before.distance is not None:
            # What an episode gains on the way depends on its end alone.
            progress = float(before.distance - distance)
        moment = Moment(outcome.feedback, outcome.facts, outcome.won, True, progress, (), distance)
        node = self._memory.add(self._key(), here, command, moment)
        node.outcome = moment._replace(admissible_commands=self._admissible(node))
        return node

    def _distance(self, outcome: alfworld_engine.Outcome) -> int | None:
        if not self._extras[0]:
            return None
        return alfworld_experts.distance(self._started(), outcome.facts, self._goal)

    def _commands(self, node: Node) -> dict[str, Ground]:
        if self._known is None or self._known[0] is not node:
            self._known = (node, self._started().commands(node.outcome.facts))
        return self._known[1]

    def _admissible(self, node: Node) -> tuple[str, ...]:
        return tuple(sorted(self._commands(node))) if self._extras[1] else ()
