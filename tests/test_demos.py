"""Walkthroughs become the trajectories that a rollout with the same commands would record."""

import dataclasses
import json

import pytest
from fake_engine import FakeEngine

from envs_host import textworld
from envs_host.types import EnvFailure, Info, ResetResult, StepResult, StopReason, Task
from jaxagentrl import batching, chat, demos, rewards, rollout, tokenizer, windowed

COMMANDS = ("go east", "open box7", "take F-key from box7")


def make_task(seed, walkthrough=COMMANDS):
    return Task(
        env="scripted",
        name=f"game-s{seed}",
        params={},
        seed=seed,
        file="",
        digest=f"{seed:08x}",
        objective="Take it.",
        max_score=2.0,
        walkthrough=walkthrough,
    )


class ScriptedPool:
    """Plays one game: the three commands, in order, win it with 2 points. Answers out of order."""

    def __init__(self, failing=()):
        self.failing = failing
        self.answers = []
        self.done = {}
        self.tasks = {}
        self.most_live = 0

    def reset(self, handle, task):
        assert handle not in self.tasks
        self.tasks[handle] = task
        self.done[handle] = []
        self.most_live = max(self.most_live, len(self.tasks))
        if task.seed in self.failing:
            self.answers.append((handle, EnvFailure("crash", "scripted")))
        else:
            self.answers.append((handle, ResetResult(self.look(handle), self.info(handle, ""))))

    def step(self, handle, text):
        before = self.info(handle, "").score
        if text == COMMANDS[len(self.done[handle])]:
            self.done[handle].append(text)
        info = self.info(handle, text)
        result = StepResult(self.look(handle), info.score - before, info.won, False, info)
        self.answers.append((handle, result))

    def look(self, handle):
        return f"Game {self.tasks[handle].seed}. Done: {len(self.done[handle])} of 3."

    def info(self, handle, command):
        done = len(self.done[handle])
        score = float(done == 3) + float(done >= 1)
        admissible = ("wait", *COMMANDS)
        return Info(score, 2.0, done == 3, False, True, command, 1.0, admissible, "Take it.")

    def poll(self, limit_s=None, until=None):
        assert self.answers, "nothing was asked"
        # Half of what is ready, latest first.
        ready = len(self.answers) // 2 + 1
        answers, self.answers = self.answers[-ready:][::-1], self.answers[:-ready]
        return answers

    def wake(self):
        pass

    def release(self, handle):
        del self.tasks[handle]


class WalkthroughEngine(FakeEngine):
    """Says the walkthrough."""

    def __init__(self, chat_format, **sizes):
        super().__init__(stop_ids=[chat_format.end_of_turn_id], **sizes)
        self.chat_format = chat_format

    def ids(self, request):
        return self.chat_format.encode_action(COMMANDS[request.stream[-1]])


@pytest.fixture
def chat_format(tmp_path):
    texts = ["Game 1. Done: 0 of 3.", "Take it.", *COMMANDS]
    return chat.make(tokenizer.train(texts * 3, vocab_size=400, directory=tmp_path))


BRIEF = rollout.Rules(max_turns=8, temperature=1.0, prompt_style="brief", show_admissible=False)


@pytest.mark.parametrize(
    "options, max_length, opens_anew",
    [
        ({}, 1000, 0),
        ({"prompt_style": "paper", "show_admissible": True}, 1000, 0),
        ({"context": "last_turns", "history_turns": 1}, 1000, 1),
        ({"context": "last_turns", "history_turns": 0}, 1000, 2),
        ({"context": "window", "show_admissible": True}, 1000, 0),
        ({"context": "window", "show_admissible": True}, 200, 1),
        ({"prompt_style": "think_action", "context": "last_turns", "show_admissible": True}, 2000, 2),
    ],
)
def test_a_demonstration_is_what_the_rollout_would_record(chat_format, options, max_length, opens_anew):
    tasks, rules = [make_task(seed) for seed in range(5)], dataclasses.replace(BRIEF, **options)
    sizes = {"max_length": max_length, "max_turn_tokens": 100}
    recorded = demos.record(tasks, ScriptedPool(), chat_format, rules, **sizes)
    engine = WalkthroughEngine(chat_format, **sizes)
    if rules.prompt_style == "think_action":
        engine.ids = lambda request: chat_format.encode_action(windowed.action_text(COMMANDS[request.stream[-1]]))
    played = rollout.collect(
        rollout.episodes(tasks, group_size=1, stream=(0,)),
        pool=ScriptedPool(),
        engine=engine,
        params=None,
        chat_format=chat_format,
        rules=rules,
    )
    assert len(recorded) == 5 and not played.failures
    for one, two in zip(recorded, played.trajectories, strict=True):
        assert json.dumps(one.to_json(), sort_keys=True) == json.dumps(two.to_json(), sort_keys=True)
        assert len(one.contexts) == 1 + opens_anew


def test_a_demonstration_by_hand(chat_format):
    (made,) = demos.record([make_task(7)], ScriptedPool(), chat_format, BRIEF)
    assert (made.won, made.score, made.stop_reason) == (True, 2.0, StopReason.DONE)
    assert [turn.action for turn in made.turns] == list(COMMANDS)
    assert [turn.reward for turn in made.turns] == [1.0, 0.0, 1.0]
    assert chat_format.decode(made.tokens) == (
        "<|im_start|>user\nTake it.\nGame 7. Done: 0 of 3.<|im_end|>\n"
        "<|im_start|>assistant\ngo east<|im_end|>\n"
        "<|im_start|>user\nGame 7. Done: 1 of 3.<|im_end|>\n"
        "<|im_start|>assistant\nopen box7<|im_end|>\n"
        "<|im_start|>user\nGame 7. Done: 2 of 3.<|im_end|>\n"
        "<|im_start|>assistant\ntake F-key from box7<|im_end|>"
    )
    batch = batching.to_batch([made], None, discount=1.0, length_buckets=[128], row_multiple=1)
    trained = batch.tokens[batch.action_mask].tolist()
    assert trained == [i for command in COMMANDS for i in chat_format.encode_action(command)]
    assert not batch.rewards.any() and not batch.sampler_logprobs.any()


def test_the_tokenizer_learns_from_the_same_replay():
    replays = demos.replay([make_task(1), make_task(2)], ScriptedPool())
    got = list(demos.texts(replays, prompt_style="brief"))
    assert len(got) == 12
    assert got[:3] == [
        "Take it.\nGame 1. Done: 0 of 3.", "Game 1. Done: 1 of 3.", "Game 1. Done: 2 of 3."
    ]  # fmt: skip
    assert got[3:6] == list(COMMANDS)


def test_limits_and_progress():
    pool, ended = ScriptedPool(), []
    replays = demos.replay(
        [make_task(seed) for seed in range(10)], pool, max_in_flight=3, advance=ended.append
    )
    assert pool.most_live == 3 and not pool.tasks
    assert ended == [1] * 10
    assert [replay.task.seed for replay in replays] == list(range(10))
    assert demos.replay([], pool) == []


@pytest.mark.parametrize(
    "walkthrough, message",
    [
        (COMMANDS[:2], "game-s1 does not win: after 2 of 2 commands .* the score is 1.0 of 2.0"),
        (("go east", "dance", *COMMANDS[1:2]), "game-s1 does not win: after 3 of 3"),
        ((), "game-s1 has no walkthrough"),
    ],
)
def test_a_walkthrough_that_does_not_win_is_an_error(walkthrough, message):
    pool = ScriptedPool()
    with pytest.raises(demos.DemonstrationError, match=message):
        demos.replay([make_task(0), make_task(1, walkthrough), make_task(2)], pool)
    assert not pool.tasks  # the pool can be used on


def test_a_walkthrough_may_win_early():
    (replay,) = demos.replay([make_task(0, (*COMMANDS, "dance"))], ScriptedPool())
    assert replay.commands == COMMANDS


def test_an_environment_failure_is_named():
    pool = ScriptedPool(failing=(2,))
    with pytest.raises(demos.DemonstrationError, match="game-s2 .crash: scripted"):
        demos.replay([make_task(seed) for seed in range(4)], pool)
    assert not pool.tasks


class LocalPool:
    """The real environment in this process: what is under test is not the worker pool."""

    def __init__(self):
        self.envs = {}
        self.answers = []

    def reset(self, handle, task):
        self.envs[handle] = textworld.TextWorldEnv(intermediate_reward=True)
        self.answers.append((handle, self.envs[handle].reset(task)))

    def step(self, handle, text):
        self.answers.append((handle, self.envs[handle].step(text)))

    def poll(self, limit_s=None):
        answers, self.answers = self.answers, []
        return answers

    def release(self, handle):
        self.envs.pop(handle).close()


def test_real_games_from_walkthrough_to_batch(tmp_path):
    """TextWorld → texts → tokenizer → trajectories → rewards → batch; ids as the template's own."""
    base = {
        "family": "custom", "world_size": 2, "nb_objects": 3, "quest_length": 3, "theme": "basic"
    }  # fmt: skip
    report = textworld.generate(
        [base | {"seed": seed} for seed in (1, 2)],
        cache_dir=str(tmp_path / "games"),
        num_workers=1,
        progress=False,
    )
    replays = demos.replay(report.tasks, LocalPool())
    numbers = [str(number) for number in range(100)]
    trained = tokenizer.train(
        demos.texts(replays, prompt_style="brief"),
        vocab_size=600,
        directory=tmp_path / "tokenizer",
        names="parts",
        phrases=True,
        lexicon=numbers,
    )
    chat_format = chat.make(trained)
    recorded = demos.encode(replays, chat_format, BRIEF)
    for played, made in zip(replays, recorded, strict=True):
        messages = []
        texts = played.user_texts(prompt_style="brief")
        for text, turn in zip(texts, made.turns, strict=True):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": turn.action})
        expected = trained.apply_chat_template(messages, tokenize=True)["input_ids"]
        # The template ends the last message with a newline, which nothing follows here.
        assert [*made.tokens.tolist(), *trained.encode("\n")] == list(expected)
        for kind in ("single", "dense"):
            assert rewards.turn_rewards(made, kind=kind).sum() == pytest.approx(1.0)
        progress = rewards.turn_rewards(made, kind="intermediate", intermediate_scale=0.1)
        assert progress.sum() == pytest.approx(1.0 + 0.1 * made.num_turns)
    batch = batching.to_batch(
        recorded, None, discount=1.0, length_buckets=[128, 256], row_multiple=2
    )
    assert batch.action_mask.sum() == sum(made.num_action_tokens for made in recorded)
