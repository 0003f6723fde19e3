"""How episodes are played: what the config's `rollout` and `prompt` say, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxagentrl import windowed

CONTEXTS = ("end", "window", "last_turns")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How episodes are played; the config's `rollout` and `prompt`.

    Attributes:
        max_turns: turns until an episode is truncated.
        max_refusals: refused commands in a row (`Turn.valid_command` is False; in the style of
            `windowed`, answers of the wrong form) after which an episode is truncated; None for no
            limit. Text worlds answer a refused command and stay where they are, so a policy that
            repeats itself would fill its slot with such turns.
        temperature, top_k, top_p, min_p: of sampling; temperature 0 is greedy. Top-k, top-p and
            min-p make the sampler's distribution another than the one that training scores: leave
            them off (0, 1, 0) in training, or correct for the tokens that could be drawn
            (`rl.loss.importance_cap`).
        cut_turns: what happens to a turn whose budget ends before it does: "end" ends the episode (no
            end of turn: the turn is kept, its command is not sent); "send" sends what there is, and
            the end-of-turn token comes with the next prompt, where it is not trained.
        stop_strings: texts that end a turn like its end-of-turn token does. Looked for on the host:
            the turn is cut after the token that completes one.
        context: what happens when the next turn no longer fits the slot. "end": the episode ends,
            truncated. "window": the conversation opens anew at the oldest turn from which it fills
            at most `context_keep` of the slot. "last_turns": it always holds the objective and the
            last `history_turns` turns, so from then on every turn opens anew. Each context is a
            training sample of its own, with exactly the ids that were sampled from.
        context_keep: share of the slot, of "window".
        history_turns: of "last_turns".
        straggler_s: how long a wave whose other episodes are ready waits for an environment, from
            when it was asked; None waits for all. With a number, which rows share a launch depends on the clock, and
            results are equal only up to rounding.
        episode_limit_s: an episode older than this is ended as truncated; None for no limit.
        prompt_style, show_admissible: see `chat.first_user_text`; of the style of `windowed` every
            turn is a conversation of its own, so `context` must be "last_turns".
    """

    max_turns: int
    temperature: float
    prompt_style: str
    show_admissible: bool
    max_refusals: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    cut_turns: str = "end"
    stop_strings: tuple[str, ...] = ()
    context: str = "end"
    context_keep: float = 0.5
    history_turns: int = 2
    straggler_s: float | None = None
    episode_limit_s: float | None = None

    def __post_init__(self) -> None:
        for name, is_right, expected in (
            ("max_turns", self.max_turns >= 1, "at least 1"),
            ("max_refusals", self.max_refusals is None or self.max_refusals >= 1, "at least 1, or "
             "None"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or more, below 2**31"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1], 1 is off"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1), 0 is off"),
            ("cut_turns", self.cut_turns in ("end", "send"), "'end' or 'send'"),
            ("context", self.context in CONTEXTS, f"one of {', '.join(CONTEXTS)}"),
            ("context_keep", 0 < self.context_keep < 1, "between 0 and 1"),
            ("history_turns", self.history_turns >= 0, "0 or more"),
            ("stop_strings", not isinstance(self.stop_strings, str) and all(self.stop_strings),
             "a tuple of texts that are not empty"),
            ("straggler_s", (self.straggler_s or 0) >= 0, "seconds or None"),
            ("episode_limit_s", self.episode_limit_s is None or self.episode_limit_s > 0, "more "
             "than 0 seconds or None"),
        ):
            if not is_right:
                raise ValueError(f"rollout.{name} must be {expected}, got {getattr(self, name)!r}.")
        if self.prompt_style == windowed.STYLE and self.context != "last_turns":
            raise ValueError(
                f"prompt.style {windowed.STYLE!r} tells the last turns in every prompt: set "
                f"rollout.context to 'last_turns', got {self.context!r}."
            )


def of_config(config: Mapping[str, Any], **changes: Any) -> Rules:
    """How a run plays, by its whole config and, of its `rollout`, what is given otherwise."""
    rollout, prompt = dict(config["rollout"]) | changes, config["prompt"]
    return Rules(**rollout, prompt_style=prompt["style"], show_admissible=prompt["show_admissible"])


def is_restricted(rules: Mapping[str, Any]) -> bool:
    """Whether some tokens are never sampled, which takes programs of its own."""
    return rules["top_k"] > 0 or rules["top_p"] < 1 or rules["min_p"] > 0
