"""First prompts are read before training: those that leave no room for a turn are refused by name."""

import numpy as np
import pytest
from records import make_task
from test_rollout import ScriptedPool, info

from envs_host.types import EnvFailure, ResetResult
from jaxagentrl import openings


class Chat:
    """As many tokens as the opening has words."""

    def first_prompt(self, text):
        return np.zeros(len(text.split()), np.int32)


class WordyPool(ScriptedPool):
    """The environment of task "7" opens with seven words; that of "broken" does not open."""

    most = 0

    def reset(self, handle, task):
        super().reset(handle, task)
        self.most = max(self.most, len(self.live))
        answer = EnvFailure("crash", "no game")
        if task.name != "broken":
            answer = ResetResult(" ".join(["word"] * int(task.name)), info(objective=""))
        self.ready[-1] = (handle, answer)


def read(names, **options):
    pool, ended = WordyPool(), []
    tasks = [make_task(name, index) for index, name in enumerate(names)]
    found = openings.lengths(
        tasks, pool, Chat(), prompt_style="brief", show_admissible=False, advance=ended.append, **options
    )
    assert not pool.live and ended == [1] * len(names)
    return tasks, found, pool


def test_lengths_are_in_the_order_of_tasks_however_they_come():
    names = ["3", "12", "broken", "5", "9"]
    for many in (1, 2, 64):
        _, found, pool = read(names, max_in_flight=many)
        base = found[0] - 3
        assert [n - base for n in found if isinstance(n, int)] == [3, 12, 5, 9]
        assert found[2] == EnvFailure("crash", "no game") and pool.most == min(many, len(names))


def test_environments_are_given_back_when_something_breaks():
    pool = WordyPool()
    pool.poll = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        openings.lengths(
            [make_task("1", 0), make_task("2", 1)], pool, Chat(), prompt_style="brief", show_admissible=False
        )
    assert not pool.live


def test_a_prompt_that_leaves_no_room_is_refused_by_name():
    tasks, _, _ = read(["3", "12", "broken", "5", "11"])
    lengths = [3, 12, EnvFailure("crash", "no game"), 5, 11]
    told = openings.check(tasks, lengths, max_length=20, max_turn_tokens=8)
    assert told == "first prompts: 3 to 12 tokens; 1 environments could not be reset"
    with pytest.raises(ValueError, match=r"is 18.* 2 of 4 tasks.*that of 12 has 12 tokens.*at least 20,"):
        openings.check(tasks, lengths, max_length=18, max_turn_tokens=8)
    with pytest.raises(ValueError, match=r" 1 of 4 tasks"):
        openings.check(tasks, lengths, max_length=19, max_turn_tokens=8)
    assert openings.check(tasks[:1], lengths[2:3], max_length=1, max_turn_tokens=1) == (
        "first prompts: none; 1 environments could not be reset"
    )
