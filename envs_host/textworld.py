"""TextWorld as a text environment: real games, cleaned text, remembered answers.

`generate` makes the games (see games.py); `TextWorldEnv` plays them. The form of an
observation follows the code of "A Practitioner's Guide to Multi-turn Agentic Reinforcement
Learning" (arXiv 2510.01132): the room, what the game told, what is carried.
"""

from envs_host import naming, textworld_text
from envs_host.games import GenerationReport, generate
from envs_host.memory import Engines, Memory, Node, verify
from envs_host.textworld_engine import Engine, Extras, Moment, Outcome, digest, progress
from envs_host.types import Info, ResetResult, StepResult, Task

__all__ = ["GenerationReport", "TextWorldEnv", "generate"]

# Shared by the environments of a process: a group of episodes plays the same game.
# Small games take 1.8 MB each, tracking included; to start one again and track it anew takes 12 ms.
_ENGINES = Engines(max_idle=256)
_MEMORY = Memory(max_entries=20_000)  # About 4 kB each, with the interpreter's state.


class TextWorldEnv:
    """One live episode of a TextWorld game; terminated means won or lost.

    A limit on the turns is not the environment's business, so `truncated` is always False.
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
        if intermediate_reward or admissible_commands:
            import textworld  # noqa: F401  Takes a second: not within the time limit of a reset.
        import jericho  # noqa: F401

        self._extras = Extras(intermediate_reward, admissible_commands)
        self._memory = _MEMORY if remember else Memory(max_entries=0)
        self._task: Task | None = None
        self._naming: naming.Naming | None = None
        self._path: list[Node] = []  # From the opening to where the episode is.
        self._engine: Engine | None = None

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
        self.close()
        verify(task, digest)
        self._task, self._naming = task, naming.of(task)
        node = self._memory.root(self._key())
        if node is None:
            self._memory.misses += 1
            outcome = self._started().opening
            if any(self._extras):
                track = self._engine.track(())
                moment = outcome.moment._replace(admissible_commands=track.admissible_commands)
                outcome = outcome._replace(moment=moment)
            node = self._memory.add(self._key(), None, "", outcome)
        else:
            self._memory.hits += 1
        self._path = [node]
        moment = node.outcome.moment
        return ResetResult(self._show(moment.observation), self._info(moment, "", valid=True))

    def step(self, text: str) -> StepResult:
        """Sends one command.

        Args:
            text: anything; see textworld_text.py for what becomes of it.

        Raises:
            RuntimeError: there is no live episode.
        """
        before = self._path[-1].outcome.moment if self._path else None
        if before is None or before.won or before.lost:
            raise RuntimeError("step was called without a live episode: call reset first.")
        command, refusal = textworld_text.clean_command(text)
        if refusal is not None:
            observation = textworld_text.observation(before.room, refusal, before.inventory)
            info = self._info(before._replace(intermediate_reward=0.0), command, valid=False)
            return StepResult(self._show(observation), 0.0, False, False, info)
        sent = command if self._naming is None else self._naming.read(command)
        node = self._path[-1].children.get(sent)
        if node is None:
            self._memory.misses += 1
            outcome = self._compute(sent)
            node = self._memory.add(self._key(), self._path[-1], sent, outcome)
        else:
            self._memory.hits += 1
        self._path.append(node)
        after = node.outcome.moment
        terminated = after.won or after.lost
        if terminated:
            self._release_engine()
        info = self._info(after, command, valid=after.valid_command)
        reward = after.score - before.score
        return StepResult(self._show(after.observation), reward, terminated, False, info)

    def close(self) -> None:
        """Ends the episode; a started game stays with the process for the next one."""
        self._release_engine()
        self._path = []

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
            admissible_commands=tuple(map(self._show, moment.admissible_commands)),
            objective=self._task.objective,
        )

    def _show(self, text: str) -> str:
        return text if self._naming is None else self._naming.show(text)

    def _started(self) -> Engine:
        if self._engine is None:
            self._engine = _ENGINES.acquire(
                self._key(), lambda: Engine(self._task.file, self._extras))
        return self._engine

    def _compute(self, command: str) -> Outcome:
        """Has the interpreter carry out a command where the episode is."""
        here = self._path[-1].outcome
        outcome = self._started().step(here.state, here.moment, command)
        if any(self._extras):
            before = self._engine.track(node.outcome.events for node in self._path)
            after = before.after(outcome.events)
            moment = outcome.moment._replace(admissible_commands=after.admissible_commands)
            if self._extras.intermediate_reward:
                moment = moment._replace(intermediate_reward=progress(moment, before, after))
            outcome = outcome._replace(moment=moment)
        return outcome

    def _release_engine(self) -> None:
        if self._engine is not None:
            _ENGINES.release(self._key())
            self._engine = None
