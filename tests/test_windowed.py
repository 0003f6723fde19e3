"""Prompts with a window of memory: words, validity, and the same ids from demonstration and
rollout."""

import numpy as np
import pytest
from records import make_turn

from envs_host.types import Info, ResetResult, StepResult, Task
from jaxagentrl import chat, contexts, demos, rollout, tokenizer, windowed

PAST = [(f"seen {number}", f"do {number}") for number in range(1, 6)]


def test_the_window_shows_the_last_turns_and_counts_all():
    text = windowed.user_text("put a mug in desk.", PAST, "a desk 1", ["look", "help"], history=2)
    assert "Your task is: put a mug in desk." in text
    assert "You have taken 5 steps" in text and "You are at step 6 and observe: a desk 1" in text
    assert "[Observation 4: 'seen 4', Action 4: 'do 4']\n[Observation 5:" in text
    assert "seen 3" not in text
    assert "['look']" in text  # help is not listed


@pytest.mark.parametrize("history, shown", [(0, 0), (1, 1), (5, 5), (50, 5)])
def test_windows_of_any_size(history, shown):
    text = windowed.user_text("x", PAST, "y", None, history=history)
    assert text.count("[Observation") == shown and "commands that can be given" not in text


def test_the_first_turn_has_no_past():
    text = windowed.user_text("x", [], "y", (), history=2)
    assert "taken" not in text and "[Observation" not in text and "step 1" in text


@pytest.mark.parametrize("text, command, valid", [
    ("<think>why</think><action>go to desk 1</action>", "go to desk 1", True),
    ("<think>\n</think>\n<action> look </action> and more", "look", True),
    ("<action>look</action><think></think>", "look", True),
    ("<think>a</think><action>one</action><action>two</action>", "one", True),
    ("<action>look</action>", "", False),
    ("<think>a<action>look</action>", "", False),
    ("<think>a</think>look", "", False),
    ("<think>a</think><action>look", "", False),
    ("<think>看</think><action>look</action>", "", False),
    ("", "", False),
    (windowed.action_text("take mug 1 from desk 2"), "take mug 1 from desk 2", True),
])
def test_the_rule_of_validity(text, command, valid):
    assert windowed.read(text) == (command, valid)


def test_the_style_needs_contexts_of_the_last_turns():
    options = dict(max_turns=2, temperature=1.0, show_admissible=True, prompt_style="think_action")
    rollout.Rules(context="last_turns", history_turns=2, **options)
    with pytest.raises(ValueError, match="rollout.context to 'last_turns'"):
        rollout.Rules(**options)


def replay():
    """Two turns of an imagined game, as `demos.replay` returns them."""
    task = Task("alfworld", "t", {}, 1, "f", "0" * 64, "put a mug in desk.", 1.0,
                ("go to desk 1", "move mug 1 to desk 1"))

    def info(won, command=""):
        return Info(float(won), 1.0, won, False, True, command, 0.0, ("look",), task.objective)

    steps = (StepResult("You arrive.", 0.0, False, False, info(False, "go to desk 1")),
             StepResult("You move it.", 1.0, True, False, info(True, "move mug 1 to desk 1")))
    return demos.Replay(task, ResetResult("You are in a room.", info(False)), steps)


def test_demonstrations_take_the_same_form(tmp_path):
    played = replay()
    options = {"prompt_style": "think_action", "show_admissible": True, "history_turns": 1}
    texts = list(demos.texts([played], **options))
    assert texts[-1] == "<think></think><action>move mug 1 to desk 1</action>"
    chat_format = chat.make(tokenizer.train(texts, vocab_size=400, directory=tmp_path / "t"))
    rules = rollout.Rules(max_turns=9, temperature=1.0, context="last_turns", **options)
    (trajectory,) = demos.encode([played], chat_format, rules)
    for turn, text in zip(trajectory.turns, texts[:2], strict=True):
        # Every prompt opens a conversation.
        np.testing.assert_array_equal(turn.prompt_ids, chat_format.first_prompt(text))
        assert windowed.read(turn.action).valid
    assert [turn.fresh for turn in trajectory.turns] == [False, True]
    answers = [played.reset, played.steps[0]]
    for number, (turn, answer) in enumerate(zip(trajectory.turns, answers, strict=True)):
        # And a rollout would have made the same.
        ids = contexts.conversation(
            chat_format, trajectory.turns[:number], answer, keep=1, style="think_action",
            show_admissible=True)
        np.testing.assert_array_equal(turn.prompt_ids, ids)
    assert "[Observation 1: 'You are in a room.', Action 1: 'go to desk 1']" in texts[1]



@pytest.mark.parametrize("show_admissible", [False, True])
def test_the_longest_conversation_that_fits_is_one_of_all(tmp_path, show_admissible):
    """Against its definition: every number of turns, the most that fits."""
    texts = ["You see a box, a key and a door. Take it, open it, go on.", "Get out of the room."]
    chat_format = chat.make(tokenizer.train(texts * 9, vocab_size=300, directory=tmp_path / "t"))
    rng, turns = np.random.default_rng(0), []
    for number in range(6):
        ids = rng.integers(5, 200, rng.integers(1, 9)).astype(np.int32)
        if number % 2:
            ids[-1] = chat_format.end_of_turn_id
        said = "A box. " * int(rng.integers(1, 5))
        turns.append(make_turn([1], ids.tolist(), observation=said))
    info = Info(0.0, 1.0, False, False, True, "x", 0.0, ("open box", "take key"), "Get out.")
    answer = StepResult("You see a key.", 0.0, False, False, info)
    told = (chat_format, turns, answer)
    options = dict(style="brief", show_admissible=show_admissible)
    every = [contexts.conversation(*told, keep=keep, **options) for keep in range(len(turns))]
    kept = set()
    for room in range(0, max(map(len, every)) + 2):
        fitting = [keep for keep, ids in enumerate(every) if len(ids) <= room]
        kept.add(max(fitting, default=0))
        ids = contexts.longest_conversation(*told, room=room, **options)
        np.testing.assert_array_equal(ids, every[max(fitting, default=0)])
    assert kept == set(range(len(turns)))
