"""Episodes: every stop reason, failed environments, refilled slots, with a scripted engine and pool."""

import dataclasses
import types

import numpy as np
import pytest
from fake_engine import FakeEngine
from records import make_task

from envs_host.types import EnvFailure, Info, ResetResult, StepResult, StopReason
from jaxagentrl import evaluate, metrics, rewards, rollout, windowed

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

    def poll(self, limit_s=None, until=None):
        assert self.ready, "nothing will ever come"
        answers, self.ready = self.ready, []
        return answers[::-1]  # the order of answers must not matter

    def wake(self):
        pass

    def release(self, handle):
        self.live.remove(handle)


class Clock:
    """Stands in for `time`: it goes on when somebody sleeps, and a little whenever somebody asks a pool."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(rollout, "time", made)
    return made


class SlowPool(ScriptedPool):
    """Takes `delays[task]` seconds for each answer of a task's environment."""

    def __init__(self, clock, delays):
        super().__init__()
        self.clock, self.delays, self.due = clock, delays, {}

    def poll(self, limit_s=None, until=None):
        end = None if limit_s is None else self.clock.monotonic() + limit_s
        while True:
            self.clock.sleep(0.001)
            now = self.clock.monotonic()
            for handle, _ in self.ready:
                self.due.setdefault(handle, now + self.delays.get(self.tasks[handle].name, 0.0))
            answers = [answer for answer in self.ready if self.due[answer[0]] <= now]
            if answers or (end is not None and now >= end):
                self.ready = [answer for answer in self.ready if answer not in answers]
                for handle, _ in answers:
                    del self.due[handle]
                return answers

    def release(self, handle):
        super().release(handle)
        self.ready = [answer for answer in self.ready if answer[0] != handle]
        self.due.pop(handle, None)


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


def play(
    scripts: dict[str, list[str]], *, max_turns=3, max_length=60, slots=2, pool=None, engine=None,
    prompt_style="brief", **rules
):
    tasks = [make_task(name, index) for index, name in enumerate(scripts)]
    by_word = dict(enumerate(scripts.values()))
    chat_format = ScriptedChat(scripts)
    to_play = [rollout.Episode(task, i, 0, (7, i)) for i, task in enumerate(tasks)]
    engine = engine or ScriptedEngine(by_word, chat_format, slots=slots, max_length=max_length)
    pool = pool or ScriptedPool()
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
            prompt_style=prompt_style,
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


def test_what_was_thought_is_no_part_of_the_command():
    scripts = {"winner": ["<think>\nwinner?\n</think>\n\na", "<think>\na?", "<think></think>winner"]}
    (winner,) = play(scripts).trajectories
    assert [turn.command for turn in winner.turns] == ["a", "", "winner"] and winner.won
    assert winner.turns[0].action == scripts["winner"][0]


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


def test_refused_commands_leave_a_turn_in_the_state_of_the_turn_before():
    """GiGPO compares what was done in equal states: worlds answer every refused command alike."""
    scripts = {"one": ["bad", "a", "bad", "bad", "one"], "two": ["a", "bad", "two"]}
    one, two = play(scripts, max_turns=5).trajectories
    # Also where a turn's validity is that of its form.
    in_form = {
        name: [f"<think>so</think><action>{said}</action>" for said in script] for name, script in scripts.items()
    }
    rules = {"prompt_style": windowed.STYLE, "context": "last_turns", "history_turns": 2}
    thinking = play(in_form, max_turns=5, **rules).trajectories
    for plain, formed in zip((one, two), thinking, strict=True):
        assert [turn.anchor for turn in formed.turns] == [turn.anchor for turn in plain.turns]
        assert all(turn.valid_command for turn in formed.turns)
    assert [turn.observation for turn in one.turns] == [
        "start", "after bad", "after a", "after bad", "after bad",
    ]
    assert [turn.anchor for turn in one.turns] == ["start", "start"] + 3 * ["after a"]
    assert [turn.anchor for turn in two.turns] == ["start", "after a", "after a"]


def test_time_in_the_queue_is_not_an_episodes_own(clock):
    scripts = {name: ["a", "a", name] for name in ("one", "two", "three", "four", "five")}
    # Four answers each, while those of the other wave are waited for, too: 0.64 s in a slot. The later
    # ones are reset when those before them get their slots, so that they are twice as old in the end.
    pool = SlowPool(clock, dict.fromkeys(scripts, 0.08))
    played = play(scripts, pool=pool, slots=2, episode_limit_s=1.1)
    assert not played.failures
    assert [t.stop_reason for t in played.trajectories] == [StopReason.DONE] * 5


def test_an_episode_that_never_began_in_time_is_a_failure_and_no_trajectory(clock):
    pool = SlowPool(clock, {"slow": 0.3})
    played = play({"slow": ["slow"], "quick": ["quick"]}, pool=pool, episode_limit_s=0.1)
    assert [t.task.name for t in played.trajectories] == ["quick"]
    (failed,) = played.failures
    assert failed[0].task.name == "slow" and failed[1].reason == "reset time limit"
    assert "rollout.episode_limit_s" in failed[1].message


def test_a_turn_that_nobody_answered_in_time_is_no_refused_one(clock):
    pool = SlowPool(clock, {})
    pool.delays = _Later({"slow": 5.0})
    (slow,) = play({"slow": ["a", "a", "a"]}, pool=pool, episode_limit_s=0.2).trajectories
    assert slow.stop_reason is StopReason.TIME_LIMIT and slow.truncated
    assert slow.turns[-1].command == "a" and slow.turns[-1].valid_command  # it was sent
    paid = rewards.turn_rewards(slow, kind="single", invalid_penalty=0.1)
    np.testing.assert_array_equal(paid, 0.0)


class _Later(dict):
    """Delays that begin with an environment's second answer."""

    def get(self, key, default):
        known = key in self and self.pop(f"met {key}", False)
        self[f"met {key}"] = True
        return self[key] if known else default


def test_what_was_answered_counts_however_late_it_is_read(clock):
    class Sleepy(ScriptedEngine):
        def receive(self, wave):
            clock.sleep(0.15)  # the device takes longer than the episode may
            return super().receive(wave)

    scripts = {"winner": ["winner"]}
    chat_format = ScriptedChat(scripts)
    engine = Sleepy({0: scripts["winner"]}, chat_format)
    (won,) = play(scripts, engine=engine, episode_limit_s=0.1).trajectories
    assert won.won and won.stop_reason is StopReason.DONE


def test_nobody_waits_for_stragglers_and_all_is_played(clock):
    scripts = {name: ["a", name] for name in ("one", "two", "three")}
    played = play(scripts, pool=SlowPool(clock, {"two": 0.05}), slots=4, straggler_s=0.0)
    assert [t.won for t in played.trajectories] == [True] * 3


def test_a_straggler_is_waited_for_once(clock):
    """Not anew in every pass of its wave, while the others play many turns."""
    scripts = {"slow": ["slow"], "long": ["a"] * 9 + ["long"]}
    pool, ended = SlowPool(clock, {"slow": 5.0}), {}
    release = pool.release
    pool.release = lambda handle: ended.update({handle: clock.now}) or release(handle)
    slow, long = play(scripts, pool=pool, slots=4, max_turns=10, straggler_s=0.5).trajectories
    assert slow.won and long.won and long.num_turns == 10
    assert 0.5 <= ended[1] < 1.0  # and not after ten times half a second


def test_where_nobody_has_answered_the_host_sleeps(clock):
    """Nor is it kept awake by an episode that waits for a slot, whose first words are there."""
    names = ("one", "two", "three")
    pool, asked = SlowPool(clock, dict.fromkeys(names[:2], 2.0)), []
    poll = pool.poll
    pool.poll = lambda limit_s=None, until=None: asked.append(limit_s) or poll(limit_s)
    played = play({name: [name] for name in names}, pool=pool, slots=2, straggler_s=0.0)
    assert [t.won for t in played.trajectories] == [True] * 3
    assert len(asked) < 30  # and not every millisecond


def test_one_that_is_late_costs_the_others_no_launch(clock):
    class Counting(ScriptedEngine):
        launched = ()

        def launch(self, params, wave, when_over=None):
            self.launched += (len(self._waiting),)
            super().launch(params, wave, when_over)

    scripts = {"late": ["a", "hang"], "quick": ["quick"], "next": ["next"]}
    engine = Counting(dict(enumerate(scripts.values())), ScriptedChat(scripts), slots=2, waves=1)
    pool = SlowPool(clock, {})
    step = pool.step

    def slow_step(handle, text):
        pool.delays[pool.tasks[handle].name] = 5.0 if text == "hang" else 0.1
        step(handle, text)

    # When the first's time is up, the third, which has the second's slot, is to answer a little later.
    pool.step = slow_step
    late, quick, following = play(scripts, engine=engine, pool=pool, episode_limit_s=0.15).trajectories
    assert late.stop_reason is StopReason.TIME_LIMIT and quick.won and following.won
    assert 0 not in engine.launched[:-1]


def test_turns_of_a_wave_that_is_over_go_to_their_environments_while_another_is_waited_for():
    class Hasty(ScriptedEngine):
        """The device is always faster than the environments."""

        def over(self):
            return sorted(self._launched)

    scripts = {"one": ["a", "one"], "two": ["a", "two"]}
    engine = Hasty(dict(enumerate(scripts.values())), ScriptedChat(scripts), slots=2, waves=2)

    class Watching(ScriptedPool):
        most = 0  # commands whose answers nobody has had yet

        def poll(self, limit_s=None, until=None):
            self.most = max(self.most, sum(isinstance(answer, StepResult) for _, answer in self.ready))
            return super().poll(limit_s)

    pool = Watching()
    played = play(scripts, engine=engine, pool=pool)
    assert [t.won for t in played.trajectories] == [True] * 2
    assert pool.most == 2


def test_who_waits_is_woken_by_a_launch_that_is_over_and_who_does_not_gets_what_is_there():
    """Between a look at the launches and a look at the answers another launch may have ended."""
    wakes, polls = [], []

    class Sudden(ScriptedEngine):
        def over(self):
            return [0] if polls and polls[-1] == "asked" else []

        def launch(self, params, wave, when_over=None):
            wakes.append(when_over)
            super().launch(params, wave, when_over)

    class Strict(ScriptedPool):
        def poll(self, limit_s=None, until=None):
            polls.append("asked")
            assert bool(until()) == (limit_s != 0.0)
            polls[-1] = limit_s
            return [] if limit_s == 0.0 else super().poll(limit_s)

    scripts, pool = {"one": ["a", "one"], "two": ["a", "two"]}, Strict()
    engine = Sudden(dict(enumerate(scripts.values())), ScriptedChat(scripts), slots=2, waves=2)
    played = play(scripts, engine=engine, pool=pool)
    assert [t.won for t in played.trajectories] == [True] * 2
    assert 0.0 in polls and set(polls) != {0.0}
    assert wakes and all(wake == pool.wake for wake in wakes)


def test_a_freed_slot_is_taken_before_the_next_launch_and_its_environment_was_reset_before():
    events = []

    class Telling(ScriptedEngine):
        def submit(self, wave, request):
            events.append(("turn", request.stream[1], request.stream[-1]))
            super().submit(wave, request)

        def launch(self, params, wave, when_over=None):
            events.append(("launch", wave))
            super().launch(params, wave, when_over)

    class TellingPool(ScriptedPool):
        def reset(self, handle, task):
            events.append(("reset", handle))
            super().reset(handle, task)

        def release(self, handle):
            events.append(("free", handle))
            super().release(handle)

    scripts = {"short": ["short"], "long": ["a", "a", "long"], "next": ["next"]}
    engine = Telling(dict(enumerate(scripts.values())), ScriptedChat(scripts), slots=2, waves=1)
    play(scripts, engine=engine, pool=TellingPool())
    assert events.index(("reset", 2)) < events.index(("free", 0))
    second = [i for i, event in enumerate(events) if event == ("launch", 0)][1]
    assert events.index(("turn", 2, 0)) < second and events.index(("turn", 1, 1)) < second


def test_both_waves_are_on_the_device_before_either_is_waited_for():
    events = []

    class Telling(ScriptedEngine):
        def launch(self, params, wave, when_over=None):
            events.append(("launch", wave))
            super().launch(params, wave, when_over)

        def wait(self, wave):
            if wave in self._launched:
                events.append(("wait", wave))
            return super().wait(wave)

    scripts = {"one": ["a", "one"], "two": ["a", "two"]}
    play(scripts, engine=Telling(dict(enumerate(scripts.values())), ScriptedChat(scripts)))
    assert events[:4] == [("launch", 0), ("launch", 1), ("wait", 0), ("launch", 0)]


def test_an_error_in_the_middle_leaves_engine_and_environments_free():
    class Failing(ScriptedPool):
        def poll(self, limit_s=None, until=None):
            if any(isinstance(answer, StepResult) for _, answer in self.ready):
                raise KeyboardInterrupt
            return super().poll(limit_s)

    scripts = {"one": ["a", "one"], "two": ["a", "two"], "three": ["three"]}
    chat_format, pool = ScriptedChat(scripts), Failing()
    engine = ScriptedEngine(dict(enumerate(scripts.values())), chat_format)
    with pytest.raises(KeyboardInterrupt):
        play(scripts, engine=engine, pool=pool)
    assert not pool.live
    again = play(scripts, engine=engine)
    assert [t.won for t in again.trajectories] == [True] * 3


def test_a_task_that_is_drawn_twice_is_played_by_other_streams():
    one, two = (
        dataclasses.replace(make_task(name, 0), digest=f"{number:064x}")
        for number, name in enumerate(("one", "two"))
    )
    made = rollout.episodes([one, two, one], group_size=2, stream=(3,))
    assert [(e.group, e.member) for e in made] == [(g, m) for g in range(3) for m in range(2)]
    assert len({e.stream for e in made}) == 6
    assert [e.stream for e in made[:4]] == [
        e.stream for e in rollout.episodes([one, two], group_size=2, stream=(3,))
    ]


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


def test_summary_counts_what_comes_again():
    """The same command in the same state, by its anchor; in another, or of another episode, it is none."""
    played = play({"good": ["good"], "slow": ["bad", "a", "a"]})

    def episode(*turns):
        made = [
            dataclasses.replace(played.trajectories[1].turns[0], anchor=anchor, observation=seen, command=command)
            for anchor, seen, command in turns
        ]
        return dataclasses.replace(played.trajectories[1], turns=made)

    episodes = [
        # look, look again after a refusal (its anchor stays), open, open of another room, look.
        episode(("hall", "o", "look"), ("hall", "no", "look"), ("hall", "o", "open"), ("attic", "o", "open"),
                ("hall", "o", "look")),
        episode((None, "o", "look"), (None, "o", "look"), (None, "p", "look")),
    ]
    values = evaluate.summary("eval", dataclasses.replace(played, trajectories=episodes))
    assert values["eval/repeat_rate"] == 3 / 8 and values["eval/distinct_commands"] == 2 / 8


def test_a_command_that_was_not_sent_was_not_refused():
    """Of an episode that a turn without end cuts, the turns before it count."""
    played = play({"good": ["good"], "cut": ["bad", "a", "a"]})
    cut = dataclasses.replace(played.trajectories[1], stop_reason=StopReason.NO_END_OF_TURN)
    assert len(cut.sent_turns) == len(cut.turns) - 1
    played = dataclasses.replace(played, trajectories=[played.trajectories[0], cut])
    assert evaluate.summary("eval", played)["eval/invalid_command_rate"] == 1 / 3
    only = dataclasses.replace(cut, turns=cut.turns[:1])
    played = dataclasses.replace(played, trajectories=[only])
    assert "eval/invalid_command_rate" not in evaluate.summary("eval", played)


def test_no_episodes_give_no_rate():
    values = evaluate.summary("eval", rollout.Rollout([], []))
    assert "eval/success_rate" not in values and values["eval/episodes"] == 0


def test_rule_agents_play_through_the_pool():
    tasks = [make_task("one", 1), make_task("two", 2)]
    rule = lambda task, turn, admissible: task.name if turn else "a"  # noqa: E731
    ended = []
    assert evaluate.play(tasks, ScriptedPool(), rule, max_turns=3, advance=ended.append) == (2, 2, 0)
    assert ended == [1, 1]
    assert evaluate.play(tasks, ScriptedPool(), rule, max_turns=1) == (0, 2, 0)
    pool, most = ScriptedPool(), []
    pool.reset = lambda *given, reset=pool.reset: (reset(*given), most.append(len(pool.live)))
    assert evaluate.play(tasks, pool, rule, max_turns=3, max_in_flight=1) == (2, 2, 0) and most == [1, 1]
    crash = lambda task, turn, admissible: "crash"  # noqa: E731
    assert evaluate.play(tasks, ScriptedPool(), crash, max_turns=3) == (0, 0, 2)


def test_episodes_of_a_group_share_the_task_and_not_the_stream():
    task = types.SimpleNamespace(name="t", digest="ab" * 32, params={})
    made = rollout.episodes([task], group_size=3, stream=(1, 2))
    assert len({episode.stream for episode in made}) == 3
    assert {episode.group for episode in made} == {0}


@pytest.mark.parametrize("head_start", [-1, 1, 5])
def test_a_head_start_leaves_a_command_of_the_walkthrough(head_start):
    task = make_task("game", 0)
    with pytest.raises(ValueError, match=rf"task game: a head start of {head_start} commands, expected 0 or more and fewer"):
        rollout.Episode(task, 0, 0, (1,), head_start=head_start)
