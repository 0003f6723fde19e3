"""Conversations as token ids, append-only, and the words of the prompts.

A conversation is only ever extended: the ids of the history are never made again from text, because
encode(decode(ids)) need not give the same ids back, and then the trainer would see another
conversation than the sampler did. So there are two pieces, each encoded by itself:

    first_prompt(text)            [system message,] first user message, assistant header
    next_prompt(text, ended=...)  glue, next user message, assistant header

and an episode is first_prompt ⊕ action ⊕ next_prompt ⊕ action ⊕ … Special tokens cut the text
wherever two pieces meet, so the ids equal those of the tokenizer's own `apply_chat_template` on the
whole conversation as long as the actions are canonical encodings, and the decoded text does always.

Nothing of a template is written down here: `make` reads the glue out of the tokenizer's template by
rendering probe conversations. A system prompt that the template adds by itself (Qwen2.5) is found
that way, and a template that rewrites earlier turns (Qwen3 drops `<think>` blocks) is refused.
"""

import dataclasses
from typing import Any

import numpy as np

# The token that ends a turn, per family of templates.
_END_OF_TURN = {"chatml": "<|im_end|>"}

PROMPT_STYLES = ("paper", "brief")


class TemplateError(ValueError):
    """The tokenizer's chat template cannot be used append-only."""


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Turns messages into ids. Made by `make`; the fields are text read out of the template."""

    tokenizer: Any
    before_first: str  # everything before the first user text, the system message included
    between: str  # after an action's end-of-turn token, up to the next user text
    header: str  # after a user text, up to where the assistant starts
    strips_user_text: bool  # the template trims user messages
    control_tokens: tuple[str, ...]  # texts that would be read as special tokens, shortest first
    end_of_turn_id: int

    def first_prompt(self, user_text: str) -> np.ndarray:
        """The ids that open an episode: int32 [n], up to and with the assistant header."""
        return self._encode(self.before_first + self._user(user_text) + self.header)

    def next_prompt(self, user_text: str, *, ended: bool) -> np.ndarray:
        """The ids that follow an action: int32 [n], up to and with the assistant header.

        Args:
            user_text: the next user message.
            ended: whether the action ended with the end-of-turn token. If it was cut without
                one, the token is put first here, where it is no action token and is not trained.
        """
        ids = self._encode(self.between + self._user(user_text) + self.header)
        if ended:
            return ids
        return np.concatenate([np.asarray([self.end_of_turn_id], np.int32), ids])

    def encode_action(self, text: str) -> np.ndarray:
        """The canonical ids of an action, end-of-turn token included: int32 [m]."""
        ids = self._encode(self._without_control_tokens(text))
        return np.concatenate([ids, np.asarray([self.end_of_turn_id], np.int32)])

    def decode_action(self, ids) -> str:
        """The text of sampled ids, without the end-of-turn token or any other special token."""
        return self.tokenizer.decode(
            np.asarray(ids).tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def decode(self, ids) -> str:
        """The text of ids with every special token shown; for people, never for training."""
        return self.tokenizer.decode(
            np.asarray(ids).tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def _user(self, text: str) -> str:
        text = self._without_control_tokens(text)
        return text.strip() if self.strips_user_text else text

    def _without_control_tokens(self, text: str) -> str:
        # A game that echoes what the agent typed must not be able to end a turn: `<|im_end|>`
        # in a text becomes `< |im_end|>`, which is ordinary text.
        for token in self.control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)


def make(tokenizer: Any, family: str = "chatml", *, system: str | None = None) -> ChatFormat:
    """Reads the glue out of the tokenizer's chat template and checks that it is append-only.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        family: which templates to expect; "chatml" ends turns with `<|im_end|>`.
        system: text of a system message, or None for none of our own (a template may still add
            its default).

    Raises:
        ValueError: an unknown family.
        TemplateError: the template is missing, is of another family, rewrites earlier turns or
            changes the text of messages.
    """
    if family not in _END_OF_TURN:
        raise ValueError(f"chat.make: family must be one of {sorted(_END_OF_TURN)}, got {family!r}")
    if tokenizer.chat_template is None:
        raise TemplateError(
            "chat.make: the tokenizer has no chat template; set tokenizer.chat_template, for "
            "instance to jaxagentrl.tokenizer.CHATML_TEMPLATE"
        )
    end_of_turn = _END_OF_TURN[family]
    before_first, header, strips = _probe_first(tokenizer, system)
    between = _probe_between(tokenizer, system, before_first, header, end_of_turn)
    _probe_append_only(tokenizer, system, before_first, header, end_of_turn + between)
    end_of_turn_ids = tokenizer.encode(end_of_turn, add_special_tokens=False)
    if len(end_of_turn_ids) != 1:
        raise TemplateError(
            f"chat.make: {end_of_turn!r} is not a token of this tokenizer, it is split into "
            f"{len(end_of_turn_ids)}; add it as a special token or choose another family"
        )
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return ChatFormat(
        tokenizer=tokenizer,
        before_first=before_first,
        between=between,
        header=header,
        strips_user_text=strips,
        control_tokens=tuple(sorted(special, key=lambda content: (len(content), content))),
        end_of_turn_id=int(end_of_turn_ids[0]),
    )


_USER = ("first user probe", "second user probe", "third user probe")
_ACTION = ("first action probe", "second action probe")
# What templates of reasoning models look for and remove from earlier turns.
_THINKING_ACTION = "<think>\nreason probe\n</think>\n\naction probe"


def _render(tokenizer, system: str | None, turns: tuple[str, ...]) -> str:
    """The template's own text of a conversation that alternates user and assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, text in enumerate(turns):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _probe_first(tokenizer, system: str | None) -> tuple[str, str, bool]:
    rendered = _render(tokenizer, system, (_USER[0],))
    if rendered.count(_USER[0]) != 1:
        raise TemplateError(
            "chat.make: the chat template does not render the user message exactly once: "
            f"{rendered!r}"
        )
    before_first, header = rendered.split(_USER[0])
    padded = f" \n{_USER[0]}\n "
    with_spaces = _render(tokenizer, system, (padded,))
    if with_spaces == before_first + padded + header:
        return before_first, header, False
    if with_spaces == rendered:
        return before_first, header, True
    raise TemplateError(
        f"chat.make: the chat template rewrites the user message: {padded!r} became {with_spaces!r}"
    )


def _probe_between(
    tokenizer, system: str | None, before_first: str, header: str, end_of_turn: str
) -> str:
    """The text between an end-of-turn token and the next user message."""
    history = before_first + _USER[0] + header + _ACTION[0]
    rendered = _render(tokenizer, system, (_USER[0], _ACTION[0], _USER[1]))
    if not rendered.startswith(history):
        raise _not_append_only(history, rendered)
    rest = rendered[len(history) :]
    if not rest.startswith(end_of_turn):
        raise TemplateError(
            f"chat.make: the chat template ends an assistant message with {rest[:20]!r}, expected "
            f"{end_of_turn!r}; the tokenizer belongs to another family"
        )
    if not rest.endswith(_USER[1] + header):
        raise TemplateError(
            f"chat.make: the chat template renders a later user message as {rest!r}, expected "
            f"it to end with {_USER[1] + header!r}"
        )
    return rest[len(end_of_turn) : -len(_USER[1] + header)]


def _probe_append_only(
    tokenizer, system: str | None, before_first: str, header: str, glue: str
) -> None:
    """Renders longer conversations, one with thinking, and compares them with the pieces."""
    for actions in (_ACTION, (_THINKING_ACTION, _ACTION[1])):
        pieces = (_USER[0], actions[0], _USER[1], actions[1], _USER[2])
        rendered = _render(tokenizer, system, pieces)
        expected = before_first + pieces[0]
        for action, user in zip(pieces[1::2], pieces[2::2], strict=True):
            expected += header + action + glue + user
        expected += header
        if rendered != expected:
            raise _not_append_only(expected, rendered)


def _not_append_only(expected: str, rendered: str) -> TemplateError:
    return TemplateError(
        "chat.make: the chat template is not append-only: a later turn changes how earlier turns "
        "are rendered (templates of reasoning models drop earlier thinking), so the model would "
        f"not see what it sampled. Rendered {rendered!r}, expected {expected!r}. Set "
        "tokenizer.chat_template to one that keeps every message as it was, for instance "
        "jaxagentrl.tokenizer.CHATML_TEMPLATE."
    )


def first_user_text(
    objective: str,
    observation: str,
    admissible: tuple[str, ...] | list[str] | None = None,
    *,
    style: str,
) -> str:
    """The first user message of an episode.

    Args:
        objective: what the game says must be done to win.
        observation: what the agent sees first.
        admissible: commands the game would accept now, to be shown; None shows none.
        style: "paper" explains the role, the form of an answer and the goal, as in arXiv
            2510.01132 ("A Practitioner's Guide to Multi-turn Agentic RL") but in words of our own;
            "brief" is the objective and the observation and nothing else, for models trained from
            scratch.
    """
    _check_style(style)
    if style == "brief":
        return _joined([objective, observation, *_admissible_lines(admissible, "Commands: ", "; ")])
    opening = (
        "You are an expert at text adventure games made with TextWorld. Given the state of the "
        "game, choose the next command that brings you closest to winning.\n"
        'Answer with one command only. It starts with a verb, for example "open box".\n\n'
        f"How to win: {objective.strip()}\n\n"
        "The game so far:\n"
    )
    return opening + later_user_text(observation, admissible, style=style)


def later_user_text(
    observation: str,
    admissible: tuple[str, ...] | list[str] | None = None,
    *,
    style: str,
) -> str:
    """A user message after the first: what the last command led to. Arguments as above."""
    _check_style(style)
    if style == "brief":
        return _joined([observation, *_admissible_lines(admissible, "Commands: ", "; ")])
    lines = [f"current state: {observation.strip()}"]
    lines += _admissible_lines(admissible, "commands the game accepts now:\n", "\n")
    return "\n".join(lines) + "\n\nyour action: "


def _admissible_lines(commands, opening: str, separator: str) -> list[str]:
    if commands is None:
        return []
    return [opening + separator.join(commands)]


def _joined(texts: list[str]) -> str:
    return "\n".join(text.strip() for text in texts if text.strip())


def _check_style(style: str) -> None:
    if style not in PROMPT_STYLES:
        raise ValueError(f"prompt style must be one of {PROMPT_STYLES}, got {style!r}")
