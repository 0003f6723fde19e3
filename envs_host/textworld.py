"""TextWorld as a text environment: real games, cleaned text, remembered answers.

`generate` makes the games (see textworld_games.py); `TextWorldEnv` plays them. The form of an
observation follows the code of "A Practitioner's Guide to Multi-turn Agentic Reinforcement
Learning" (arXiv 2510.01132): the room, what the game told, what is carried.
"""

import os

from envs_host import textworld_text
from envs_host.textworld_engine import Engine, Engines, Extras, Memory, Moment, Node, digest
from envs_host.textworld_games import GenerationReport, generate
from envs_host.types import GameFileError, Info, ResetResult, StepResult, Task

__all__ = ["GenerationReport", "TextWorldEnv", "generate"]

# Shared by the environments of a process: a group of episodes plays the same game.
_ENGINES = Engines(max_idle=8)
_MEMORY = Memory(max_entries=50_000)
_VERIFIED: set[tuple] = set()  # Files whose digest was checked, with their size and time.


class TextWorldEnv:
    """One live episode of a TextWorld game; terminated means won or lost.

    A limit on the number of turns is not the environment's business, so `truncated` is always False.
    """

    def __init__(
        self,
        *,
        intermediate_reward: bool = False,
        admissible_commands: bool = False,
        remember: bool = True,
    ):
        """Makes an environment without an episode.

        Args:
            intermediate_reward: report +1 or -1 for each step along or away from the game's winning
                policy (-1, too, for the step that makes the game unwinnable).
            admissible_commands: report the commands that would change the state.
            remember: answer from the memory of the process where the same commands were given to
                the same game before. The answers are the same (games are deterministic), without
                running the interpreter.
        """
        import textworld  # noqa: F401  Takes a second: here, not within the time limit of a reset.

        self._extras = Extras(intermediate_reward, admissible_commands)
        self._memory = _MEMORY if remember else Memory(max_entries=0)
        self._task: Task | None = None
        self._node: Node | None = None
        self._commands: list[str] = []  # Those sent since the reset.
        self._engine: Engine | None = None
        self._engine_steps = 0  # How many of `_commands` the engine has been given.

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
            GameFileError: the game file is missing, or not the one the task was recorded with.
        """
        self._release_engine()
        _verify(task)
        self._task = task
        self._commands = []
        node = self._memory.root(self._key())
        if node is None:
            self._memory.misses += 1
            moment = self._materialize()
            node = self._memory.add(self._key(), None, "", moment)
        else:
            self._memory.hits += 1
        self._node = node
        return ResetResult(node.moment.observation, self._info(node.moment, "", valid=True))

    def step(self, text: str) -> StepResult:
        """Sends one command.

        Args:
            text: anything; see textworld_text.py for what becomes of it.

        Raises:
            RuntimeError: there is no live episode.
        """
        if self._node is None or self._node.moment.won or self._node.moment.lost:
            raise RuntimeError("step was called without a live episode: call reset first.")
        before = self._node.moment
        command, refusal = textworld_text.clean_command(text)
        if refusal is not None:
            observation = textworld_text.observation(before.room, refusal, before.inventory)
            info = self._info(before._replace(intermediate_reward=0.0), command, valid=False)
            return StepResult(observation, 0.0, False, False, info)
        node = self._node.children.get(command)
        if node is None:
            self._memory.misses += 1
            self._materialize()
            moment = self._engine.step(command)
            self._engine_steps += 1
            node = self._memory.add(self._key(), self._node, command, moment)
        else:
            self._memory.hits += 1
        self._commands.append(command)
        self._node = node
        after = node.moment
        terminated = after.won or after.lost
        if terminated:
            self._release_engine()
        info = self._info(after, command, valid=after.valid_command)
        return StepResult(after.observation, after.score - before.score, terminated, False, info)

    def close(self) -> None:
        """Ends the episode; a started game stays with the process for the next one."""
        self._release_engine()
        self._node = None

    def _key(self) -> tuple:
        return (self._task.digest, self._extras)

    def _info(self, moment: Moment, command: str, valid: bool) -> Info:
        return Info(
            score=moment.score,
            max_score=self._task.max_score,
            won=moment.won,
            lost=moment.lost,
            valid_command=valid,
            command=command,
            intermediate_reward=moment.intermediate_reward,
            admissible_commands=moment.admissible_commands,
            objective=self._task.objective,
        )

    def _materialize(self) -> Moment | None:
        """Brings a real engine to where the episode is. Returns the opening if it was reset."""
        opening = None
        if self._engine is None:
            self._engine = _ENGINES.take(self._key(), self._task.file, self._extras)
            opening = self._engine.reset()
            self._engine_steps = 0
        for command in self._commands[self._engine_steps:]:
            self._engine.step(command)
        self._engine_steps = len(self._commands)
        return opening

    def _release_engine(self) -> None:
        if self._engine is not None:
            _ENGINES.give_back(self._key(), self._engine)
            self._engine = None


def _verify(task: Task) -> None:
    """Checks the game file against the task's digest, once per file and process.

    Raises:
        GameFileError: it is missing or differs.
    """
    try:
        status = os.stat(task.file)
    except OSError as error:
        raise GameFileError(
            f"the game file {task.file} of task {task.name} cannot be read ({error.strerror}): "
            "generate the games again."
        ) from error
    key = (task.file, task.digest, status.st_size, status.st_mtime_ns)
    if key in _VERIFIED:
        return
    found = digest(task.file)
    if found != task.digest:
        raise GameFileError(
            f"the game file {task.file} is not the one of task {task.name}: its digest is "
            f"{found[:12]}..., the task was recorded with {task.digest[:12]}.... It is damaged or "
            "was replaced: delete it and generate the games again."
        )
    _VERIFIED.add(key)
