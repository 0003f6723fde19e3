"""Episodes: every stop reason, failed environments, refilled slots, with a scripted engine and pool."""

import types

import numpy as np
import pytest
from fake_engine import FakeEngine
from records import make_task

from envs_host.types import EnvFailure, Info, ResetResult, StepResult, StopReason
from jaxagentrl import evaluate, metrics, rollout

EOT = 1


def info(**changes) -> Info:
    fields = dict(
        score=0.0,
        max_score=2.0,
        won=False,
        lost=False,
        valid_command=True,
        command="x",
        intermediate_reward=0.0,
        admissible_commands=("a", "b"),
        objective="Win.",
    )
    return Info(**fields | changes)


class ScriptedPool:
    """Wins on the command named like the task; "crash" kills the environment."""

    def __init__(self):
        self.tasks, self.ready, self.live = {}, [], set()

    def reset(self, handle, task):
        assert handle not in self.live
        self.live.add(handle)
        self.tasks[handle] = task
        self.ready.append((handle, ResetResult("start", info())))

    def step(self, handle, text):
        assert handle in self.live
        if text == "crash":
            answer = EnvFailure("crash", "segfault")
        else:
            won = text == self.tasks[handle].name
            told = info(won=won, score=2.0 * won, command=text, valid_command=text != "bad")
            answer = StepResult(f"after {text}", 2.0 * won, won, False, told)
        self.ready.append((handle, answer))

    def poll(self, limit_s=None):
        assert self.ready, "nothing will ever come"
        answers, self.ready = self.ready, []
        return answers[::-1]  # the order of answers must not matter

    def release(self, handle):
        self.live.remove(handle)


class ScriptedChat:
    end_of_turn_id = EOT

    def __init__(self, scripts):
        self.texts = sorted({text for script in scripts.values() for text in script})

    def first_prompt(self, text):
        return np.full(5, 2, np.int32)

    def next_prompt(self, text, *, ended):
        return np.array([2, 2, 2] if ended else [EOT, 2, 2, 2], np.int32)

    def decode_action(self, ids):
        return self.texts[int(ids[0]) - 10]


class ScriptedEngine(FakeEngine):
    """Samples the script of each task; the stream's task word names it."""

    def __init__(self, scripts, chat_format, *, slots=2, waves=2, max_length=60):
        super().__init__(
            slots_per_wave=slots // waves,
            num_waves=waves,
            max_turn_tokens=4,
            max_length=max_length,
            stop_ids=[EOT],
        )
        self.scripts, self.chat = scripts, chat_format

    def ids(self, request):
        script = self.scripts[request.stream[1]]
        text = script[min(request.stream[-1], len(script) - 1)]
        end = [] if text == "endless" else [EOT]
        return [10 + self.chat.texts.index(text), *end]


def play(scripts: dict[str, list[str]], *, max_turns=3, max_length=60, slots=2, **rules):
    tasks = [make_task(name, index) for index, name in enumerate(scripts)]
    by_word = dict(enumerate(scripts.values()))
    chat_format = ScriptedChat(scripts)
    to_play = [rollout.Episode(task, i, 0, (7, i)) for i, task in enumerate(tasks)]
    engine = ScriptedEngine(by_word, chat_format, slots=slots, max_length=max_length)
    pool = ScriptedPool()
    finished = []
    played = rollout.collect(
        to_play,
        pool=pool,
        engine=engine,
        params=None,
        chat_format=chat_format,
        rules=rollout.Rules(
            max_turns=max_turns,
            temperature=1.0,
            prompt_style="brief",
            show_admissible=False,
            **rules,
        ),
        advance=finished.append,
    )
    assert len(finished) == len(scripts) and not pool.live
    return played


def test_every_stop_reason():
    played = play(
        {
            "winner": ["a", "winner"],
            "slow": ["a", "bad", "a"],
            "cut": ["a", "endless"],
        }
    )
    winner, slow, cut = played.trajectories
    assert winner.stop_reason is StopReason.DONE and winner.won and winner.num_turns == 2
    assert winner.score == 2.0 and winner.turns[1].reward == 2.0
    assert slow.stop_reason is StopReason.TURN_LIMIT and slow.num_turns == 3
    assert [turn.valid_command for turn in slow.turns] == [True, False, True]
    assert cut.stop_reason is StopReason.NO_END_OF_TURN and cut.num_turns == 2
    assert cut.turns[1].command == "" and not cut.turns[1].valid_command
    assert [turn.observation for turn in winner.turns] == ["start", "after a"]


def test_an_episode_ends_after_so_many_refusals_in_a_row():
    scripts = {
        "stuck": ["a", "bad", "bad", "bad", "a"],
        "slips": ["bad", "a", "bad", "a", "slips"],
        "winner": ["bad", "winner"],
    }
    stuck, slips, winner = play(scripts, max_turns=9, max_refusals=2).trajectories
    assert stuck.stop_reason is StopReason.REFUSALS and stuck.truncated and not stuck.won
    assert [turn.command for turn in stuck.turns] == ["a", "bad", "bad"]
    assert slips.stop_reason is StopReason.DONE and slips.num_turns == 5
    assert winner.won
    # At the turn limit that is the reason, and without a limit of refusals there is none.
    assert play(scripts, max_turns=3, max_refusals=2).trajectories[0].stop_reason is (
        StopReason.TURN_LIMIT
    )
    assert play(scripts, max_turns=4).trajectories[0].num_turns == 4


def test_a_cut_turn_can_be_sent():
    (cut,) = play({"cut": ["a", "endless", "cut"]}, cut_turns="send").trajectories
    assert cut.won and cut.num_turns == 3
    assert cut.turns[1].command == "endless"
    # The token that the turn lacks opens the next prompt.
    assert [turn.prompt_ids[0] == EOT for turn in cut.turns] == [False, False, True]


def test_the_token_limit_is_checked_before_a_turn():
    (one,) = play({"slow": ["a"]}, max_turns=9, max_length=16).trajectories
    # 5 + 2, then 3 + 2: twelve tokens; another 3 and a whole turn of 4 would not fit in 16.
    assert one.stop_reason is StopReason.TOKEN_LIMIT and one.num_turns == 2
    assert one.num_tokens <= 16


def test_a_first_prompt_that_does_not_fit_is_an_error_that_names_the_task():
    with pytest.raises(ValueError, match="task slow.*sampling.max_length"):
        play({"slow": ["a"]}, max_length=8)


def test_failed_environments_are_counted_and_in_no_rate():
    played = play({"good": ["good"], "broken": ["a", "crash"], "other": ["other"]})
    assert [t.task.name for t in played.trajectories] == ["good", "other"]
    (episode, failure), = played.failures
    assert episode.task.name == "broken" and failure.reason == "crash"
    values = evaluate.summary("eval", played)
    assert values["eval/success_rate"] == 1.0 and values["eval/episodes"] == 2
    assert values["eval/env_failures"] == 1


@pytest.mark.parametrize("slots", [2, 4, 10])
def test_order_and_content_do_not_depend_on_the_slots(slots):
    scripts = {f"game{i}": ["a"] * (i % 3) + [f"game{i}"] for i in range(9)}
    reference = play(scripts, slots=18, max_turns=4)
    other = play(scripts, slots=slots, max_turns=4)
    assert [t.to_json() for t in other.trajectories] == [t.to_json() for t in reference.trajectories]


def test_summary_counts_what_people_ask_for():
    played = play({"good": ["good"], "slow": ["bad", "a", "a"]})
    values = evaluate.summary("eval", played)
    low, high = metrics.wilson_interval(1, 2)
    assert values["eval/success_rate"] == 0.5
    assert (values["eval/success_low"], values["eval/success_high"]) == (low, high)
    assert values["eval/turns_mean"] == 2.0 and values["eval/invalid_command_rate"] == 0.25
    assert values["eval/stop_done"] == 1 and values["eval/stop_turn_limit"] == 1


def test_no_episodes_give_no_rate():
    values = evaluate.summary("eval", rollout.Rollout([], []))
    assert "eval/success_rate" not in values and values["eval/episodes"] == 0


def test_rule_agents_play_through_the_pool():
    tasks = [make_task("one", 1), make_task("two", 2)]
    rule = lambda task, turn, admissible: task.name if turn else "a"  # noqa: E731
    assert evaluate.play(tasks, ScriptedPool(), rule, max_turns=3) == (2, 2, 0)
    assert evaluate.play(tasks, ScriptedPool(), rule, max_turns=1) == (0, 2, 0)
    crash = lambda task, turn, admissible: "crash"  # noqa: E731
    assert evaluate.play(tasks, ScriptedPool(), crash, max_turns=3) == (0, 0, 2)


def test_episodes_of_a_group_share_the_task_and_not_the_stream():
    task = types.SimpleNamespace(name="t", digest="ab" * 32, params={})
    made = rollout.episodes([task], group_size=3, stream=(1, 2))
    assert len({episode.stream for episode in made}) == 3
    assert {episode.group for episode in made} == {0}
