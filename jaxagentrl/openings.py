"""How every task begins, read before anything is trained: a first prompt that fits no slot would end a
run in whatever iteration draws it."""

import collections
from collections.abc import Callable, Sequence

from envs_host.types import EnvFailure, ResetResult, Task
from jaxagentrl import chat, contexts
from jaxagentrl.rollout import Pool


def lengths(
    tasks: Sequence[Task],
    pool: Pool,
    chat_format: chat.ChatFormat,
    *,
    prompt_style: str,
    show_admissible: bool,
    max_in_flight: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> list[int | EnvFailure]:
    """Tokens of every task's first prompt, in the order of tasks; the failure where one cannot be reset.

    Args:
        prompt_style, show_admissible: as in `rules.Rules`.
        max_in_flight: environments that are live at the same time.
        advance: called with 1 for every task.
    """
    found: dict[int, int | EnvFailure] = {}
    waiting, live = collections.deque(enumerate(tasks)), set()
    try:
        while waiting or live:
            while waiting and len(live) < max_in_flight:
                index, task = waiting.popleft()
                live.add(index)
                pool.reset(index, task)
            for index, answer in pool.poll():
                found[index] = answer
                if isinstance(answer, ResetResult):
                    shown = {"style": prompt_style, "show_admissible": show_admissible}
                    found[index] = len(contexts.next_prompt(chat_format, (), answer, **shown))
                live.remove(index)
                pool.release(index)
                advance(1)
    finally:
        for index in live:
            pool.release(index)
    return [found[index] for index in range(len(tasks))]


def check(
    tasks: Sequence[Task], lengths: Sequence[int | EnvFailure], *, max_length: int, max_turn_tokens: int
) -> str:
    """Refuses tasks whose first prompt leaves no room for a turn.

    Args:
        tasks: as many as lengths.
        lengths: of `lengths`. Failures are told, no more: an iteration that meets one goes on without it.
        max_length, max_turn_tokens: of the config's `sampling`.

    Returns:
        What a user may want to know of them.

    Raises:
        ValueError: names the task of the longest, and says what would do.
    """
    known = [(n, task.name) for task, n in zip(tasks, lengths, strict=True) if isinstance(n, int)]
    failed = len(lengths) - len(known)
    told = f"; {failed} environments could not be reset" if failed else ""
    if not known:
        return f"first prompts: none{told}"
    longest, name = max(known)
    too_long = sum(length + max_turn_tokens > max_length for length, _ in known)
    if too_long:
        raise ValueError(
            f"sampling.max_length is {max_length}, but the first prompts of {too_long} of {len(known)} "
            f"tasks and one turn (sampling.max_turn_tokens, {max_turn_tokens}) are longer: that of {name} "
            f"has {longest} tokens. Raise sampling.max_length, and the last of sampling.filled_buckets, "
            f"to at least {longest + max_turn_tokens}, or shorten the prompt (prompt.style, "
            "prompt.show_admissible)."
        )
    return f"first prompts: {min(known)[0]} to {longest} tokens{told}"
