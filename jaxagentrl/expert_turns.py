"""Turns that an expert has taken, as if the policy had sampled them: what is imitated, and what an episode begins after."""

from collections.abc import Sequence

import numpy as np

from envs_host.types import ResetResult, StepResult
from jaxagentrl import chat, contexts, windowed
from jaxagentrl.rules import Rules
from jaxagentrl.trajectory import Turn, anchor_of


def make(
    chat_format: chat.ChatFormat,
    turns: Sequence[Turn],
    answer: ResetResult | StepResult,
    command: str,
    step: StepResult,
    rules: Rules,
    *,
    max_length: int,
    max_turn_tokens: int,
) -> Turn:
    """The turn after `turns` that answers what the environment said with a command, to which it said `step`.

    Log-probs and entropies are 0: nothing was sampled. Other arguments as of `contexts.of_next_turn`.
    """
    prompt_ids, is_fresh = contexts.of_next_turn(
        chat_format, turns, answer, rules, max_length=max_length, max_turn_tokens=max_turn_tokens
    )
    action_ids = chat_format.encode_action(said(command, rules.prompt_style))
    return Turn(
        prompt_ids=prompt_ids,
        action_ids=action_ids,
        logprobs=np.zeros(len(action_ids), np.float32),
        entropies=np.zeros(len(action_ids), np.float32),
        observation=answer.observation,
        action=chat_format.decode_action(action_ids),
        command=step.info.command,
        reward=step.reward,
        intermediate_reward=step.info.intermediate_reward,
        valid_command=step.info.valid_command,
        score=step.info.score,
        anchor=anchor_of(turns, answer),
        fresh=is_fresh,
    )


def said(command: str, prompt_style: str) -> str:
    """What a turn says that gives a command."""
    return windowed.action_text(command) if prompt_style == windowed.STYLE else command
