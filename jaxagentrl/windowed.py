"""Prompts with a window of memory: every turn is a conversation of its own.

The form of verl-agent's ALFWorld recipe (GiGPO, arXiv 2505.10978), in words of our own: a turn's
prompt tells the task, the last `history` observations with the actions that answered them, the
present observation and what can be done, and asks for `<think>…</think><action>…</action>`.
Contexts stay short over 50 turns, and nothing is append-only: each prompt is sampled from, and
trained, by itself.

Its rule of validity: a turn is valid if it has a think and an action part and no Chinese
character. The reward's `invalid_penalty` (0.1 there, for a win of 10) is for turns that are not.
What an invalid turn says is not sent (verl-agent sends its last 30 characters, which no game
takes): the game answers that nothing happens.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

STYLE = "think_action"

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_THINK = ("<think>", "</think>")
_CHINESE = re.compile("[\u4e00-\u9fff]")
# Always possible and never of use; verl-agent does not list it.
_UNLISTED = ("help",)


class Answer(NamedTuple):
    """What a turn says: the command to send, and whether it keeps to the form."""

    command: str
    valid: bool


def user_text(
    objective: str,
    past: Sequence[tuple[str, str]],
    observation: str,
    admissible: Sequence[str] | None,
    *,
    history: int,
) -> str:
    """The one user message of a turn.

    Args:
        objective: what is to be done.
        past: every (observation, command that answered it) so far, oldest first.
        observation: what is seen now.
        admissible: what can be done now; None shows nothing of it.
        history: how many of `past` to show, the latest.
    """
    lines = [
        "You are an expert agent who acts in a text world by commands. "
        f"Your task is: {objective.strip()}"
    ]
    shown = list(past)[len(past) - min(history, len(past)):]
    if past:
        lines.append(f"You have taken {len(past)} steps so far.")
    if shown:
        first = len(past) - len(shown) + 1
        lines.append(f"The last {len(shown)} observations, and what you did then:")
        for number, (seen, done) in enumerate(shown, first):
            lines.append(f"[Observation {number}: '{seen.strip()}', Action {number}: '{done}']")
    lines.append(f"You are at step {len(past) + 1} and observe: {observation.strip()}")
    if admissible is not None:
        listed = ", ".join(f"'{command}'" for command in admissible if command not in _UNLISTED)
        lines.append(f"The commands that can be given now: [{listed}]")
    lines.append(
        "\nFirst reason step by step about the situation, within <think> </think> tags. Then choose "
        "one command for this step and give it within <action> </action> tags."
    )
    return "\n".join(lines)


def action_text(command: str, thought: str = "") -> str:
    """A turn that gives a command, in the form that is asked for; for demonstrations."""
    return f"{_THINK[0]}{thought}{_THINK[1]}<action>{command}</action>"


def read(text: str) -> Answer:
    """Reads a turn by the rule at the top of this file; an invalid one's command is ""."""
    action = _ACTION.search(text)
    valid = action is not None and all(tag in text for tag in _THINK)
    valid = valid and _CHINESE.search(text) is None
    return Answer(action[1].strip() if valid else "", valid)
