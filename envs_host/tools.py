"""A class whose methods are tools, as a text world: what TRL takes as an environment, and most agents' tasks are.

    class Desk:
        def reset(self, item, orders):      # the task's params
            self.reward, self.done = 0.0, False
            return "..."                    # what the agent hears first, or None

        def refund(self, order: int) -> str:
            \"\"\"Pays an order back.

            Args:
                order: Its number.
            \"\"\"

Public methods but `reset`, `close`, `finish` and `check_here` are the tools. `reward` is what the episode has earned so
far; `done` ends it, and so does a message that calls nothing, which `finish(text)`, if there is one, is told first.
`won`, if there is one, says whether the task was done; else it was if `reward` has reached the task's `max_score`.
"""

import functools
import inspect
import json
from typing import Any

import pydantic

from envs_host import tool_calls
from envs_host.types import Info, ResetResult, StepResult, Task, finite_reward

_OURS = ("reset", "close", "finish", "check_here")


def names(tools: type) -> tuple[str, ...]:
    """The names of a class's tools, in the order of their definitions, those of base classes first."""
    found: dict[str, None] = {}
    for base in reversed(tools.__mro__[:-1]):  # without object
        found |= dict.fromkeys(name for name in vars(base) if not name.startswith("_") and name not in _OURS)
    return tuple(name for name in found if inspect.isroutine(getattr(tools, name, None)))


def schemas(tools: type) -> list[dict[str, Any]]:
    """What models are told of a class's tools: JSON schemas, made of type hints and Google-style docstrings.

    For chat templates that read `tools` (`prompt.template_options`), as those of Qwen, Llama 3.1 and Mistral do.

    Raises:
        ValueError: a tool or an argument of one has no description, or a type is missing or not known.
    """
    # Not above: workers need none of it, and it takes half a second.
    from transformers import utils

    unmade = tools.__new__(tools)  # Of bound methods `self` is no argument, in transformers 4, too.
    try:
        return [utils.get_json_schema(getattr(unmade, name)) for name in names(tools)]
    except (utils.DocstringParsingException, utils.TypeHintParsingException) as error:
        raise ValueError(f"a tool of {tools.__name__} cannot be described: {error}") from error


def instructions(tools: type) -> str:
    """The same as a text for `prompt.system`, for templates that read no `tools`."""
    described = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas(tools))
    return f"You have these tools, one a line:\n{described}\nTo use one, answer in this form:\n{tool_calls.FORM}"


@functools.cache
def played(tools: type) -> type["ToolEnv"]:
    """The text world of a class of tools; its options are the class's arguments.

    Raises:
        ValueError: it has no tools, or one without a docstring.
    """
    silent = [name for name in names(tools) if not inspect.getdoc(getattr(tools, name))]
    if silent or not names(tools):
        wrong = f"{', '.join(silent)} of it have no docstring" if silent else "it has none"
        raise ValueError(
            f"{tools.__name__} has no `step`, so that its public methods are tools, which models are told of by their "
            f"docstrings, but {wrong}: write one, begin the names of other methods with _, or give it a `step`, as "
            "envs_host.types.TextEnv has."
        )
    members = dict(tools=tools, __signature__=inspect.signature(tools), __doc__=tools.__doc__, __module__=tools.__module__)
    if hasattr(tools, "check_here"):
        members["check_here"] = staticmethod(tools.check_here)
    return type(tools.__name__, (ToolEnv,), members)


class ToolEnv:
    """One live episode. What is none of the tools' matter is told to the agent, as a refusal: a call of another form, an
    unknown tool, arguments that are missing or of another type, and a ValueError that a tool raises. Any other exception
    is the environment's failure."""

    tools: type

    def __init__(self, **options: Any):
        self._options = options
        self._task: Task | None = None  # None where no episode is live.
        self._score = 0.0
        self._make()

    def _make(self) -> None:
        self._tools = self.tools(**self._options)
        self._callable = {name: pydantic.validate_call(getattr(self._tools, name)) for name in names(self.tools)}

    def reset(self, task: Task) -> ResetResult:
        """Starts an episode of `task`, whose `params` are the arguments of the tools' `reset`.

        Raises:
            TypeError: `reset` returned something else than a text or None.
            ValueError: the episode does not begin at a `reward` of 0, or has ended already.
        """
        self._task, self._score = task, 0.0
        if self._tools is None:
            self._make()
        said = self._tools.reset(**task.params)
        if not isinstance(said, str | None):
            raise TypeError(f"{self._name}.reset must return a text or None, got {said!r}.")
        if not hasattr(self._tools, "reward") or self._reward() != 0 or self._is_done():
            raise ValueError(
                f"{self._name}.reset must set reward to 0.0, and done, if there is one, to False; reward is "
                f"{getattr(self._tools, 'reward', 'missing')}, done {self._is_done()}."
            )
        return ResetResult(said or "", self._info("", valid=True, won=False, lost=False))

    def step(self, text: str) -> StepResult:
        """Makes the calls of a message, one after the other until the task is done; a message without calls ends it, but
        for an empty one, which is refused: that is what is left of an answer that never came to an end of its thought.

        Raises:
            RuntimeError: there is no live episode.
        """
        if self._task is None:
            raise RuntimeError("step was called without a live episode: call reset first.")
        command, before = text.strip(), self._score
        results, valid, is_over = self._take(command)
        self._score = self._reward()
        won = is_over and bool(getattr(self._tools, "won", self._score >= self._task.max_score))
        info = self._info(command, valid=valid, won=won, lost=is_over and not won)
        if is_over:
            self._task = None
        return StepResult(tool_calls.heard(results), self._score - before, is_over, False, info)

    def close(self) -> None:
        """Ends the episode. Tools that can be closed are, and made again for the next one."""
        self._task = None
        if hasattr(self._tools, "close"):  # not of None
            self._tools.close()
            self._tools = None

    def _take(self, command: str) -> tuple[list[str], bool, bool]:
        """What a message leads to: results, whether there was nothing to refuse, whether the episode is over."""
        try:
            calls = tool_calls.read(command)
        except tool_calls.NotACall as error:
            return [str(error)], False, False
        if not calls and not command:
            return [f"Call a tool, or answer. A call: {tool_calls.FORM}"], False, False
        if not calls:
            if hasattr(self._tools, "finish"):
                self._tools.finish(command)
            return [], True, True
        results, valid = [], True
        for call in calls:
            result, is_right = self._result(call)
            results.append(result)
            valid &= is_right
            if self._is_done():
                return results, valid, True
        return results, valid, False

    def _result(self, call: tool_calls.Call) -> tuple[str, bool]:
        """What a call answers, and whether it was none to refuse."""
        if call.name not in self._callable:
            return f"There is no tool {call.name!r}: call one of {', '.join(self._callable)}.", False
        try:
            result = self._callable[call.name](**call.arguments)
        except pydantic.ValidationError as error:
            # Without the values and addresses of pydantic's own text.
            wrong = [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
            return f"{call.name} cannot be called so. {'; '.join(wrong)}.", False
        except ValueError as error:
            return str(error), False
        return self._text(call.name, result), True

    def _text(self, name: str, result: Any) -> str:
        if isinstance(result, str):
            return result
        try:
            return "" if result is None else json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self._name}.{name} must return a text, or what JSON can say, got {repr(result)[:200]} ({error})."
            ) from error

    def _reward(self) -> float:
        return finite_reward(self._tools.reward, self._name)

    def _is_done(self) -> bool:
        return bool(getattr(self._tools, "done", False))

    @property
    def _name(self) -> str:
        return self.tools.__name__

    def _info(self, command: str, *, valid: bool, won: bool, lost: bool) -> Info:
        return Info(
            score=self._score,
            max_score=self._task.max_score,
            won=won,
            lost=lost,
            valid_command=valid,
            command=command,
            intermediate_reward=0.0,
            admissible_commands=(),
            objective=self._task.objective,
        )
