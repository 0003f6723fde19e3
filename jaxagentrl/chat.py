"""Conversations as token ids, append-only, and the words of the prompts.

A conversation is only ever extended: the ids of the history are never made again from text, because
encode(decode(ids)) need not give the same ids back, and then the trainer would see another
conversation than the sampler did. So there are two pieces, each encoded by itself:

    first_prompt(text)            [system message,] first user message, assistant header
    next_prompt(text, ended=...)  glue, next user message, assistant header

and an episode is first_prompt ⊕ action ⊕ next_prompt ⊕ action ⊕ … Special tokens cut the text
wherever two pieces meet, so the ids equal those of the tokenizer's own `apply_chat_template` on the
whole conversation as long as the actions are canonical encodings, and the decoded text does always.

Nothing of a template is written down here: `make` reads the glue out of the tokenizer's template
(`chat_template`). A system prompt that the template adds by itself (Qwen2.5) is found
that way. The first prompt always equals the template's. Some templates render the same history in
another way later on: Qwen3 drops `<think>` blocks of earlier turns, Llama 3 and Gemma trim what the
assistant said, Mistral moves system message and tools to the last user message. Here what was sampled
stays as it was; `ChatFormat.differences` says where that departs from the template. Any other rewriting
of the history is refused.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxagentrl import chat_template
from jaxagentrl.chat_template import THOUGHT_TAGS, TemplateError

PROMPT_STYLES = ("paper", "brief")

# Texts whose ids are kept: some 10 MB. Longer ones are whole conversations, which nobody hears again.
_MAX_KNOWN, _MAX_KNOWN_LENGTH = 8192, 2048


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Turns messages into ids. Made by `make`; the fields are text read out of the template."""

    tokenizer: Any
    family: str
    before_first: str  # everything before the first user text, the system message included
    between: str  # after an action's end-of-turn token, up to the next user text
    header: str  # after a user text, up to where the assistant starts
    action_prefix: str  # what every action starts with; the model writes it, `decode_action` drops it
    opened_thought: str  # the end of a header that opens a thought: the answer goes on from there
    strips_user_text: bool  # the template trims user messages
    control_tokens: tuple[str, ...]  # texts that would be read as special tokens, shortest first
    end_of_turn: str
    end_of_turn_id: int
    chat_template: str  # what was rendered: the tokenizer's, with a fixed day in the place of today
    template_options: Mapping[str, Any]  # variables it was rendered with
    differences: tuple[str, ...]  # from what the template makes of the history later
    keeps_plain_history: bool  # none of them concerns answers without thoughts and outer spaces

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
        ids = self._encode_after_turn(self.between + self._user(user_text) + self.header)
        if ended:
            return ids
        return np.concatenate([np.asarray([self.end_of_turn_id], np.int32), ids])

    def encode_action(self, text: str) -> np.ndarray:
        """The canonical ids of an action, end-of-turn token included: int32 [m].

        Where the header opens a thought, a text without one closes it first, empty.
        """
        text = self._behind_header(self._without_control_tokens(text))
        ids = self._encode_answer(self.action_prefix + text)
        return np.concatenate([ids, np.asarray([self.end_of_turn_id], np.int32)])

    def decode_action(self, ids) -> str:
        """The text of sampled ids, without the end-of-turn token or any other special token.

        A thought that the header opens is part of it, from its beginning.
        """
        text = self.tokenizer.decode(
            [id for id in np.asarray(ids).tolist() if id != self.end_of_turn_id],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return self.opened_thought + text.removeprefix(self.action_prefix)

    def decode(self, ids) -> str:
        """The text of ids with every special token shown; for people, never for training."""
        return self.tokenizer.decode(
            np.asarray(ids).tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def _behind_header(self, text: str) -> str:
        """What is left to say of an answer once the header stands there."""
        if not self.opened_thought:
            return text
        if text.startswith(THOUGHT_TAGS[0]):
            opened = self.opened_thought if text.startswith(self.opened_thought) else THOUGHT_TAGS[0]
            return text.removeprefix(opened)
        return text if THOUGHT_TAGS[1] in text else f"\n{THOUGHT_TAGS[1]}\n\n{text}"

    def _user(self, text: str) -> str:
        text = self._without_control_tokens(text)
        return text.strip() if self.strips_user_text else text

    def _without_control_tokens(self, text: str) -> str:
        # A game that echoes what the agent typed must not be able to end a turn: `<|im_end|>`
        # in a text becomes `< |im_end|>`, which is ordinary text.
        for token in self.control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text.encode(errors="replace").decode()  # halves of surrogate pairs, which JSON may hold

    def __post_init__(self):
        # Episodes of a game are told the same things again and again: of the quick start's texts seven in
        # eight were encoded before, which took a tenth of the time of its sampling.
        object.__setattr__(self, "_known", functools.lru_cache(_MAX_KNOWN)(self._encode_anew))

    def _encode(self, text: str) -> np.ndarray:
        return self._known(text) if len(text) <= _MAX_KNOWN_LENGTH else self._encode_anew(text)

    def _encode_anew(self, text: str) -> np.ndarray:
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        ids.flags.writeable = False  # all who ask have the same array
        return ids

    def _encode_answer(self, text: str) -> np.ndarray:
        """Ids of a text as they are behind the header. Where header and text would merge into one
        token, which no sampler can do, as they are behind a special token."""
        header = self._encode_after_turn(self.header)
        both = self._encode_after_turn(self.header + text)
        if np.array_equal(both[: len(header)], header):
            return both[len(header) :]
        return self._encode_after_turn(text)

    def _encode_after_turn(self, text: str) -> np.ndarray:
        """Ids of a text as they are behind a special token. Alone, many tokenizers (those made of
        SentencePiece models) would put a space before it."""
        ids = self._encode(self.end_of_turn + text)
        if ids[0] != self.end_of_turn_id:
            raise ValueError(
                f"chat: {text[:40]!r} merges with the {self.end_of_turn!r} before it, so that it "
                "cannot be appended; its beginning must be no part of a special token."
            )
        return ids[1:]


def make(
    tokenizer: Any,
    family: str | None = None,
    *,
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> ChatFormat:
    """Reads the glue out of the tokenizer's chat template and checks that it is append-only.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        family: which template to expect: "chatml" (Qwen, SmolLM2), "llama3", "gemma" or "mistral";
            None finds out by the token that ends a turn.
        system: text of a system message, or None for none of our own (a template may still add
            its default).
        template_options: variables of the template, such as {"enable_thinking": False} of Qwen3.
            Today, where the template asks for it, is a fixed day: that of `date_string`, written
            as "26 Jul 2024", which it is unless that is given.

    Raises:
        ValueError: an unknown family, an option that the template does not read, or a `date_string` that
            it cannot take its day from.
        TemplateError: the template is missing, is of another family, has no system message,
            rewrites earlier turns or changes the text of messages.
    """
    read = chat_template.read(
        tokenizer, family, system=system, template_options=dict(template_options or {})
    )
    end_of_turn = chat_template.FAMILIES[read.family].end_of_turn
    end_of_turn_ids = tokenizer.encode(end_of_turn, add_special_tokens=False)
    if len(end_of_turn_ids) != 1:
        raise TemplateError(
            f"chat.make: {end_of_turn!r} is not a token of this tokenizer, it is split into "
            f"{len(end_of_turn_ids)}, so that no sampler can end a turn with it; use the template of "
            "the instruct model of the same family, whose tokens the model knows"
        )
    control = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    control |= {end_of_turn, *chat_template.FAMILIES[read.family].structure}
    return ChatFormat(
        tokenizer=tokenizer,
        control_tokens=tuple(sorted(control, key=lambda content: (len(content), content))),
        end_of_turn=end_of_turn,
        end_of_turn_id=int(end_of_turn_ids[0]),
        **vars(read),
    )


def command(answer: str) -> str:
    """What an answer tells the environment: what follows its last thought.

    An answer that ends in a thought tells nothing, "", which environments refuse as they do any
    empty command. One without thoughts is a command as it stands.

    Args:
        answer: as `ChatFormat.decode_action` gives it.
    """
    if not any(tag in answer for tag in THOUGHT_TAGS):
        return answer
    after = answer.rpartition(THOUGHT_TAGS[1])[2]
    return "" if THOUGHT_TAGS[0] in after else after.strip()


_MAX_LISTED = 8


def check_vocabulary(made: ChatFormat, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that a text may come to and that the model has no embedding for.

    A special token that neither the prompts nor the tokenizer itself write may have any id: messages
    cannot spell it (`ChatFormat` breaks it up), and no sampler gives it. Gemma 3 of 1B and below has
    one for images, which those models do not see.

    Raises:
        ValueError: with the ids.
    """
    tokenizer = made.tokenizer
    written = made.before_first + made.between + made.header + made.action_prefix + made.end_of_turn
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    idle = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in written and token.content not in named
    }
    surplus = sorted(
        (id, token)
        for token, id in tokenizer.get_vocab().items()
        if id >= vocab_size and token not in idle
    )
    if not surplus:
        return
    shown = ", ".join(f"{id} {token!r}" for id, token in surplus[:_MAX_LISTED])
    rest = len(surplus) - _MAX_LISTED
    raise ValueError(
        f"the model knows the ids below {vocab_size}, but its tokenizer may also give {shown}"
        f"{f' and {rest} more' if rest > 0 else ''}: use the tokenizer that was published with the "
        "model (tokenizer.directory)."
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
        "You are an expert at text adventure games. Given the state of the "
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
