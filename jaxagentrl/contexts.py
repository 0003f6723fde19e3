"""What the model is shown of an episode: the prompt of the next turn, and conversations that slid.

A conversation grows by appending and is never rendered again, so its ids are those that were
sampled and trained on. Only when it must lose its oldest turns does it open anew; even then the
actions that are kept are kept as ids.
"""

from collections.abc import Sequence

import numpy as np

from envs_host.types import ResetResult, StepResult
from jaxagentrl import chat, windowed
from jaxagentrl.rules import Rules
from jaxagentrl.trajectory import Turn


def of_next_turn(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: ResetResult | StepResult,
    rules: Rules,
    *,
    max_length: int,
    max_turn_tokens: int,
) -> tuple[np.ndarray, bool]:
    """The prompt of the next turn by `rules.context`: int32 [n], and whether the conversation opens anew with it.

    Args:
        turns, answer: as of `next_prompt`.
        max_length, max_turn_tokens: tokens that a conversation may have, and of these the next turn, by which
            a window slides. A prompt may leave no room for a turn all the same.
    """
    shown = {"style": rules.prompt_style, "show_admissible": rules.show_admissible}
    if rules.prompt_style == windowed.STYLE:
        is_fresh = bool(turns)
    else:
        is_fresh = rules.context == "last_turns" and len(turns) > rules.history_turns
    if is_fresh:
        return conversation(chat_format, turns, answer, keep=rules.history_turns, **shown), True
    prompt_ids = next_prompt(chat_format, turns, answer, **shown)
    room = max_length - max_turn_tokens
    is_full = sum(map(len, newest(turns))) + len(prompt_ids) > room
    if not (is_full and turns and rules.context == "window"):
        return prompt_ids, False
    room = int(min(room, rules.context_keep * max_length))
    return longest_conversation(chat_format, turns, answer, room=room, **shown), True


def next_prompt(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: ResetResult | StepResult,
    *,
    style: str,
    show_admissible: bool,
) -> np.ndarray:
    """The ids that follow the last turn: int32 [n], up to where the model speaks.

    Args:
        turns: of the episode so far; none for its opening.
        answer: what the environment said last.
        style, show_admissible: see `chat.first_user_text` and `windowed`.
    """
    if style == windowed.STYLE:
        return _own_prompt(chat_format, turns, answer, show_admissible, history=0)
    admissible = answer.info.admissible_commands if show_admissible else None
    if not turns:
        text = chat.first_user_text(
            answer.info.objective, answer.observation, admissible, style=style
        )
        return chat_format.first_prompt(text)
    return _later(chat_format, turns[-1], answer.observation, admissible, style)


def conversation(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: StepResult,
    *,
    keep: int,
    style: str,
    show_admissible: bool,
) -> np.ndarray:
    """Objective, the last `keep` turns and the answer, as if the episode had begun there: int32 [n].

    Commands that were admissible in a kept turn are no longer told; those that are now, are.
    """
    if style == windowed.STYLE:
        return _own_prompt(chat_format, turns, answer, show_admissible, history=keep)
    told = _told(turns, answer, show_admissible)[len(turns) - keep :]
    opening = _opening(chat_format, answer, *told[0], style)
    followed = _followed(chat_format, turns[len(turns) - keep :], told, style)
    return np.concatenate([opening, *(ids for piece in followed for ids in piece)])


def longest_conversation(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: StepResult,
    *,
    room: int,
    style: str,
    show_admissible: bool,
) -> np.ndarray:
    """`conversation` with as many of the last turns as fit `room` tokens, but not with all of them; where
    no turn fits, with none: int32 [n]."""
    told = _told(turns, answer, show_admissible)
    followed = _followed(chat_format, turns, told, style)
    # [keep]: tokens behind the opening of a conversation with so many turns.
    sizes = np.cumsum([0, *(sum(map(len, piece)) for piece in reversed(followed))])
    for keep in range(len(turns) - 1, -1, -1):
        opening = _opening(chat_format, answer, *told[len(turns) - keep], style)
        if len(opening) + sizes[keep] <= room:
            break
    pieces = followed[len(turns) - keep :]
    return np.concatenate([opening, *(ids for piece in pieces for ids in piece)])


def _told(
    turns: Sequence[Turn], answer: StepResult, show_admissible: bool
) -> list[tuple[str, Sequence[str] | None]]:
    """What the environment said before each turn and now, with what can be done now."""
    now = answer.info.admissible_commands if show_admissible else None
    return [*((turn.observation, None) for turn in turns), (answer.observation, now)]


def _opening(
    chat_format: chat.ChatFormat,
    answer: StepResult,
    observation: str,
    admissible: Sequence[str] | None,
    style: str,
) -> np.ndarray:
    text = chat.first_user_text(answer.info.objective, observation, admissible, style=style)
    return chat_format.first_prompt(text)


def _followed(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    told: Sequence[tuple[str, Sequence[str] | None]],
    style: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each turn's action, and what is told after it."""
    return [
        (turn.action_ids, _later(chat_format, turn, observation, admissible, style))
        for turn, (observation, admissible) in zip(turns, told[1:], strict=True)
    ]


def _own_prompt(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: ResetResult | StepResult,
    show_admissible: bool,
    *,
    history: int,
) -> np.ndarray:
    """The one message of a turn that is a conversation of its own."""
    text = windowed.user_text(
        answer.info.objective,
        [(turn.observation, turn.command) for turn in turns],
        answer.observation,
        answer.info.admissible_commands if show_admissible else None,
        history=history,
    )
    return chat_format.first_prompt(text)


def newest(turns: Sequence[Turn]) -> list[np.ndarray]:
    """The ids since the conversation last opened, in pieces."""
    start = max((index for index, turn in enumerate(turns) if turn.fresh), default=0)
    return [ids for turn in turns[start:] for ids in (turn.prompt_ids, turn.action_ids)]


def _later(
    chat_format: chat.ChatFormat,
    last: Turn,
    observation: str,
    admissible: Sequence[str] | None,
    style: str,
) -> np.ndarray:
    text = chat.later_user_text(observation, admissible, style=style)
    ended = int(last.action_ids[-1]) == chat_format.end_of_turn_id
    return chat_format.next_prompt(text, ended=ended)
