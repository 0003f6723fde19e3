"""What a tokenizer's chat template puts around messages, found by rendering probe conversations.

`chat` writes prompts with it, append-only. A template that rewrites its history otherwise than `chat`
says is refused here.
"""

import dataclasses
import datetime
import difflib
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta


@dataclasses.dataclass(frozen=True)
class Family:
    end_of_turn: str  # the token that ends a turn
    structure: tuple[str, ...]  # what else must not be written by a user, special token or not


FAMILIES = {
    "chatml": Family("<|im_end|>", ("<|im_start|>",)),
    "llama3": Family(
        "<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    ),
    "gemma": Family("<end_of_turn>", ("<start_of_turn>", "<bos>")),
    # [INST] is ordinary text in the first versions.
    "mistral": Family("</s>", ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
}

# Templates that ask for today's date (Llama 3.2, Mistral Small, SmolLM3) get this day, which Llama 3.1
# writes: a run must see one prompt whenever it is resumed.
_DAY = "26 Jul 2024"
_DAY_FORMAT = "%d %b %Y"  # of `date_string`, as Llama's templates write it
_ASKS_FOR_TODAY = re.compile(r"\bstrftime_now\s*\(")
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")

# What a template is rendered with besides its options: the tokenizer's special tokens, and these.
_WRITTEN = ("messages", "add_generation_prompt")
_FUNCTIONS = ("raise_exception", "strftime_now")  # of transformers, beside those of jinja2

# Around what a reasoning model thinks before it answers.
THOUGHT_TAGS = ("<think>", "</think>")


class TemplateError(ValueError):
    """The tokenizer's chat template cannot be used append-only."""


@dataclasses.dataclass(frozen=True)
class Read:
    """What `read` finds; the fields are explained at `chat.ChatFormat`."""

    family: str
    before_first: str
    between: str
    header: str
    action_prefix: str
    opened_thought: str
    strips_user_text: bool
    chat_template: str
    template_options: Mapping[str, Any]
    differences: tuple[str, ...]
    keeps_plain_history: bool


def read(
    tokenizer: Any,
    family: str | None,
    *,
    system: str | None,
    template_options: Mapping[str, Any],
) -> Read:
    """Arguments and errors are those of `chat.make`."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"chat.make: family must be one of {sorted(FAMILIES)}, got {family!r}")
    if tokenizer.chat_template is None:
        raise TemplateError(
            "chat.make: the tokenizer has no chat template; copy `chat_template` from the "
            "tokenizer_config.json of the family's instruct model into that of the tokenizer's folder"
        )
    _check_options(tokenizer, template_options)
    dated = _with_fixed_day(
        tokenizer.get_chat_template(), template_options.get("date_string", _DAY)
    )
    template = _Template(tokenizer, dated, system, template_options)
    before_first, header, strips = _probe_first(template)
    glue = _probe_history(template, before_first, header, family)
    _probe_append_only(glue)
    changed = (*_probe_thinking(glue), *_probe_spaces(glue))
    return Read(
        family=glue.family,
        before_first=before_first,
        between=glue.between,
        header=header,
        action_prefix=_rest_behind(header, glue.history_header),
        opened_thought=_opened_thought(header),
        strips_user_text=strips,
        chat_template=template.text,
        template_options=template.options,
        differences=(*glue.differences, *changed),
        keeps_plain_history=not glue.differences,
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, by which transformers finds what an assistant said."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Templates are silent about variables that they do not read, misspelt ones among them."""
    if not options:
        return
    template = tokenizer.get_chat_template()
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat.make: the chat template cannot be read ({error})") from error
    written = {*_WRITTEN, *tokenizer.special_tokens_map}
    known = found - written - {*_FUNCTIONS}
    if _ASKS_FOR_TODAY.search(template):
        known.add("date_string")
    for option in options:
        if option in written:
            raise ValueError(
                f"chat.make: prompt.template_options: {option} is written by the run or the tokenizer; "
                "leave it out."
            )
        if option not in known:
            listed = f". It has: {', '.join(sorted(known))}." if known else "; it has none."
            similar = difflib.get_close_matches(str(option), known, n=1)
            raise ValueError(
                f"chat.make: prompt.template_options: the chat template has no variable {option}{listed}"
                + (f" Did you mean {similar[0]}?" if similar else "")
            )


def _with_fixed_day(template: str, date: str) -> str:
    """The template with the day's date, a string, for each call of `strftime_now`.

    A variable of that name would not do: transformers 5 gives templates nothing that can be called.
    """
    if not _ASKS_FOR_TODAY.search(template):
        return template
    try:
        day = datetime.datetime.strptime(date, _DAY_FORMAT)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"chat.make: date_string is {date!r}, but the chat template formats a day by itself: "
            f"write it as {_DAY!r} (prompt.template_options)."
        ) from error
    dated = _TODAY.sub(lambda call: call[1] + day.strftime(call[2]) + call[1], template)
    if _ASKS_FOR_TODAY.search(dated):
        raise TemplateError(
            "chat.make: the chat template calls strftime_now with something else than a text, so that "
            "prompts would change from day to day: write a format, or a date, in its place."
        )
    return dated


def _rest_behind(header: str, history_header: str) -> str:
    # A header that is longer than the history's (Qwen3's, with an empty thought) leaves nothing.
    return history_header[len(header) :] if history_header.startswith(header) else ""


def _opened_thought(header: str) -> str:
    """`<think>` and what follows it, where a header ends in a thought that it does not close."""
    before, tag, after = header.rpartition(THOUGHT_TAGS[0])
    return tag + after if tag and THOUGHT_TAGS[1] not in after else ""


_USER = ("first user probe", "second user probe", "third user probe")
_ACTION = ("first action probe", "second action probe")
# What templates of reasoning models look for and remove from earlier turns.
_THOUGHT = f"{THOUGHT_TAGS[0]}\nreason probe\n{THOUGHT_TAGS[1]}\n\n"
_THINKING_ACTION = _THOUGHT + "action probe"


@dataclasses.dataclass(frozen=True)
class _Template:
    tokenizer: Any
    text: str
    system: str | None
    options: Mapping[str, Any]

    def without(self, parts: list[str]) -> "_Template":
        """The same without a "system message" of ours or "tools", where it has them."""
        options = {key: value for key, value in self.options.items() if key not in parts}
        system = None if "system message" in parts else self.system
        return dataclasses.replace(self, system=system, options=options)

    def render(self, turns: tuple[str, ...]) -> str:
        """The template's own text of a conversation that alternates user and assistant."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for index, text in enumerate(turns):
            messages.append({"role": ("user", "assistant")[index % 2], "content": text})
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=True,
            **self.options,
        )


@dataclasses.dataclass(frozen=True)
class _Glue:
    """How the template writes a history."""

    template: _Template  # without what moves
    family: str
    before_first: str
    history_header: str  # between a user text and the action that answered it
    between: str
    header: str
    differences: tuple[str, ...]

    def history(self, turns: tuple[str, ...]) -> str:
        """What `template.render(turns)` is, if earlier turns stay as they were."""
        end = FAMILIES[self.family].end_of_turn
        text = self.before_first + turns[0]
        for action, user in zip(turns[1::2], turns[2::2], strict=True):
            text += self.history_header + action + end + self.between + user
        return text + self.header


def _probe_first(template: _Template) -> tuple[str, str, bool]:
    try:
        rendered = template.render((_USER[0],))
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"chat.make: the chat template refuses a conversation that starts with "
            f"{'a system' if template.system is not None else 'a user'} message ({error}). Gemma 2 "
            "knows no system message: leave it out, or put its text into the first user message."
        ) from error
    if rendered.count(_USER[0]) != 1:
        raise TemplateError(
            "chat.make: the chat template does not render the user message exactly once: "
            f"{rendered!r}"
        )
    before_first, header = rendered.split(_USER[0])
    padded = f" \n{_USER[0]}\n "
    with_spaces = template.render((padded,))
    if with_spaces == before_first + padded + header:
        return before_first, header, False
    if with_spaces == rendered:
        return before_first, header, True
    raise TemplateError(
        f"chat.make: the chat template rewrites the user message: {padded!r} became {with_spaces!r}"
    )


def _probe_history(
    template: _Template, before_first: str, header: str, family: str | None
) -> _Glue:
    """Reads the glue between turns; what moves later on is left out for that."""
    differences = []
    rendered = template.render((_USER[0], _ACTION[0], _USER[1]))
    for moved in (["system message"], ["tools"], ["system message", "tools"]):
        if rendered.startswith(before_first + _USER[0]):
            break
        bare = template.without(moved)
        opened, later = bare.render((_USER[0],)), bare.render((_USER[0], _ACTION[0], _USER[1]))
        opened = opened.split(_USER[0])[0]
        if bare != template and later.startswith(opened + _USER[0]):
            template, before_first, rendered = bare, opened, later
            differences.append(
                f"the template moves the {' and the '.join(moved)} to the last user message; here "
                f"{'it stays' if moved == ['system message'] else 'they stay'} at the first"
            )
    opening = before_first + _USER[0]
    rest = rendered.removeprefix(opening)
    if not rendered.startswith(opening) or rest.count(_ACTION[0]) != 1:
        raise _not_append_only(opening + header + _ACTION[0], rendered)
    history_header, rest = rest.split(_ACTION[0])
    family = _family_of(rest) if family is None else family
    end = FAMILIES[family].end_of_turn
    if not rest.startswith(end):
        raise TemplateError(
            f"chat.make: the chat template ends an assistant message with {rest[:20]!r}, expected "
            f"{end!r}; the tokenizer belongs to another family"
        )
    if not rest.endswith(_USER[1] + header):
        raise TemplateError(
            f"chat.make: the chat template renders a later user message as {rest!r}, expected "
            f"it to end with {_USER[1] + header!r}"
        )
    if not history_header.startswith(header):
        if not header.startswith(history_header):
            raise _not_append_only(opening + header + _ACTION[0], rendered)
        differences.append(
            f"the template opens an answer with {header.removeprefix(history_header)!r} and leaves "
            "that out of earlier turns; here it stays"
        )
    between = rest[len(end) : -len(_USER[1] + header)]
    return _Glue(
        template, family, before_first, history_header, between, header, tuple(differences)
    )


def _family_of(ending: str) -> str:
    for name, family in FAMILIES.items():
        if ending.startswith(family.end_of_turn):
            return name
    raise TemplateError(
        f"chat.make: the chat template ends an assistant message with {ending[:20]!r}, expected "
        f"one of {[family.end_of_turn for family in FAMILIES.values()]}; the tokenizer belongs to "
        "another family"
    )


def _probe_append_only(glue: _Glue) -> None:
    turns = (_USER[0], _ACTION[0], _USER[1], _ACTION[1], _USER[2])
    rendered, expected = glue.template.render(turns), glue.history(turns)
    if rendered != expected:
        raise _not_append_only(expected, rendered)


def _probe_thinking(glue: _Glue) -> tuple[str, ...]:
    """Whether the template keeps what an earlier turn thought; here it is always kept."""

    def turns(action: str) -> tuple[str, ...]:
        return (_USER[0], action, _USER[1], _ACTION[1], _USER[2])

    rendered = glue.template.render(turns(_THINKING_ACTION))
    if rendered == glue.history(turns(_THINKING_ACTION)):
        return ()
    if rendered == glue.history(turns(_THINKING_ACTION.removeprefix(_THOUGHT))):
        return ("the template drops the thinking of earlier turns; here it stays",)
    raise _not_append_only(glue.history(turns(_THINKING_ACTION)), rendered)


def _probe_spaces(glue: _Glue) -> tuple[str, ...]:
    """Whether the template keeps the spaces around what was said; here they are always kept."""
    padded = f" \n{_ACTION[0]}\n "
    rendered = glue.template.render((_USER[0], padded, _USER[1]))
    if rendered == glue.history((_USER[0], padded, _USER[1])):
        return ()
    if rendered.split() == glue.history((_USER[0], _ACTION[0], _USER[1])).split():
        return ("the template trims what the assistant said; here the spaces around it stay",)
    raise _not_append_only(glue.history((_USER[0], padded, _USER[1])), rendered)


def _not_append_only(expected: str, rendered: str) -> TemplateError:
    return TemplateError(
        "chat.make: the chat template is not append-only: a later turn changes how earlier turns "
        "are rendered, so the model would "
        f"not see what it sampled. Rendered {rendered!r}, expected {expected!r}. Edit "
        "the template in the tokenizer's folder (chat_template.jinja, else `chat_template` in "
        "tokenizer_config.json) so that it keeps every message as it was, as "
        "jaxagentrl.tokenizer.CHATML_TEMPLATE does."
    )
