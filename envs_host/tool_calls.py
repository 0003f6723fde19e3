"""Calls of tools in what an agent says, and results in what it hears.

An agent calls in the form that the templates of Qwen and Hermes write,

    <tool_call>
    {"name": "refund", "arguments": {"order": 17}}
    </tool_call>

once or several times in a message, beside other text. A message that is nothing but the JSON, or a list of such calls,
is one too, and `parameters` may stand for `arguments`: so do Llama 3's and Mistral's models call.
"""

import json
import re
from typing import Any, NamedTuple

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
FORM = f'{_OPENING}\n{{"name": ..., "arguments": {{...}}}}\n{_CLOSING}'
_ARGUMENTS = ("arguments", "parameters")
_SHOWN = 200  # characters of what a message quotes


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


class NotACall(ValueError):
    """A text is meant as a call, and cannot be read; the message is for the agent."""


def written(name: str, /, **arguments: Any) -> str:
    """What an agent says to call a tool; walkthroughs are made of it.

    Args:
        name: of the tool.
        **arguments: JSON-able.
    """
    content = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{_OPENING}\n{content}\n{_CLOSING}"


def read(text: str) -> list[Call]:
    """The calls of a message, in their order; none where it is an answer without calls.

    Raises:
        NotACall: it opens a call that does not end, or that is not of the form.
    """
    if _OPENING in text or _CLOSING in text:
        blocks = re.findall(f"{_OPENING}(.*?){_CLOSING}", text, flags=re.DOTALL)
        if not len(blocks) == text.count(_OPENING) == text.count(_CLOSING):
            raise NotACall(f"Each {_OPENING} must be closed by a {_CLOSING}: {FORM}")
        return [_call(block) for block in blocks]
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = whole if isinstance(whole, list) else [whole]
    return [_of(entry) for entry in found] if all(map(_is_call, found)) else []


def heard(results: list[str]) -> str:
    """What an agent hears of calls' results, as the templates write messages of the role `tool`."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


def _call(block: str) -> Call:
    try:
        content = json.loads(block)
    except (ValueError, RecursionError) as error:
        raise NotACall(f"{block.strip()[:_SHOWN]!r} is not JSON ({error}). Call in this form: {FORM}") from error
    if not _is_call(content):
        raise NotACall(f"{block.strip()[:_SHOWN]!r} is no call. Call in this form: {FORM}")
    return _of(content)


def _is_call(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return False
    given = [key for key in _ARGUMENTS if key in content]
    return len(given) == 1 and isinstance(content[given[0]], dict)


def _of(content: dict[str, Any]) -> Call:
    return Call(content["name"], next(content[key] for key in _ARGUMENTS if key in content))
