"""Which games are drawn, by level and by learnability, how long they may take, and that it all goes on after a restart."""

import collections
import dataclasses
import json
import re

import numpy as np
import pytest
import test_filters
from records import make_trajectory, make_turn
from test_filters import play_rounds, tasks_named
from test_settings import changed

from envs_host import naming
from jaxagentrl import curriculum, rules, settings, tasks

OPTIONS = dict(order="levels", share=0.5, threshold=0.5, window=2, horizons=(), horizon_iterations=40)


def games(*numbers):
    return [tasks_named(number) for number in numbers]


def level(number, count=6):
    return games(*range(100 * number, 100 * number + count))


def names(drawn):
    return [task.name for task in drawn]


def ended(task, won, head_start=0):
    return make_trajectory([make_turn([1], [2])], task=task, won=won, head_start=head_start)


def outcomes(drawn, won_by=lambda task, member: False, group_size=4, head_starts=None):
    heads = head_starts or [0] * len(drawn)
    return [
        ended(task, won_by(task, member), head) for task, head in zip(drawn, heads) for member in range(group_size)
    ]


def with_walkthroughs(*lengths):
    return [
        dataclasses.replace(task, walkthrough=("go east",) * length)
        for task, length in zip(games(*range(len(lengths))), lengths, strict=True)
    ]


def make(order, levels=None, **changes):
    levels = levels or {"train": level(0), "train_2": level(1), "train_3": level(2)}
    return curriculum.make(levels, OPTIONS | dict(order=order) | changes, seed=3)


def by_level(drawn):
    return collections.Counter(task.seed // 100 for task in drawn)


def test_uniform_is_every_game_once_per_epoch_as_ever():
    """The same draws and the same state as before there were curricula, which checkpoints hold."""
    levels = {"train": level(0), "train_2": level(1)}
    plain = tasks.Sampler([*level(0), *level(1)], seed=3)
    sampler = make("uniform", levels)
    assert names(sampler.take(30)) == names(plain.take(30)) and sampler.tell([]) == {}
    assert sampler.state() == plain.state()


def test_the_next_level_begins_when_enough_of_the_last_is_won():
    sampler = make("levels")
    told = []
    # Won of four, by iteration: 0.5 of two iterations is reached after the third, then by the fourth and fifth.
    for wins in (1, 1, 3, 4, 0, 4, 4):
        drawn = sampler.take(5)
        latest = max(by_level(drawn))
        values = sampler.tell(outcomes(drawn, lambda task, member: task.seed // 100 == latest and member < wins))
        told.append((dict(by_level(drawn)), values["curriculum/level"], values["curriculum/success"]))
    assert told == [
        ({0: 5}, 1, 0.25),
        ({0: 5}, 1, 0.25),
        ({0: 5}, 1, 0.75),  # (1 + 3) / 8
        ({0: 2, 1: 3}, 2, 1.0),  # share: half, rounded up, of the latest
        ({0: 2, 1: 3}, 2, 0.0),  # (4 + 0) / 8
        ({0: 1, 1: 1, 2: 3}, 3, 1.0),
        ({0: 1, 1: 1, 2: 3}, 3, 1.0),  # there is none after the last
    ]


def test_earlier_levels_say_nothing_of_the_latest():
    sampler = make("levels", window=1)
    sampler.tell(outcomes(level(0), lambda *_: True))
    assert max(by_level(sampler.take(4))) == 1
    values = sampler.tell(outcomes(level(0), lambda *_: True))  # every environment of the others failed
    assert values == {"curriculum/level": 2.0}
    sampler.tell(outcomes([*level(0), *level(1)], lambda task, _: task.seed < 100))
    assert max(by_level(sampler.take(4))) == 1


def test_a_level_alone_where_the_share_is_all():
    sampler = make("levels", share=1.0, window=1)
    sampler.tell(outcomes(level(0), lambda *_: True))
    assert dict(by_level(sampler.take(4))) == {1: 4}


@pytest.mark.parametrize("share, count, expected", [(0.1, 30, 3), (0.29, 100, 29), (0.5, 32, 16)])
def test_a_share_that_comes_out_even_is_not_rounded(share, count, expected):
    sampler = make("levels", share=share, window=1)
    sampler.tell(outcomes(level(0), lambda *_: True))
    assert by_level(sampler.take(count))[1] == expected
    pool = games(*range(200))
    sampler, plain = make("learnability", {"train": pool}, share=share), tasks.Sampler(pool, seed=3)
    drawn = names(sampler.take(count))
    assert drawn[: count - expected] == names(plain.take(count - expected))
    assert drawn[count - expected] != names(plain.take(1))[0]


def test_learnability_is_the_variance_of_success_as_far_as_it_is_known():
    """E[p (1 − p)] of Beta(a, b) by hand: 1/2 · 1/2 / (1 · 2); 1/2 · 17/2 / (9 · 10); 9/2 · 9/2 / (9 · 10)."""
    new, lost, even = games(1, 2, 3)
    sampler = make("learnability", {"train": [new, lost, even]})
    values = sampler.tell(
        outcomes([lost, even], lambda task, member: task is even and member < 4, group_size=8)
    )
    expected = [1 / 8, 0.5 * 8.5 / 90, 4.5 * 4.5 / 90]
    np.testing.assert_allclose(sampler.learnability(), expected, rtol=1e-12)
    assert values == {
        "curriculum/visited": pytest.approx(2 / 3), "curriculum/learnability": pytest.approx(np.mean(expected))
    }
    # Two further episodes, both won: of the eight before, a half still counts. a = 1/2 + 4 · 1/2 + 2, b = 1/2 + 2.
    sampler.tell([ended(even, True)] * 2)
    np.testing.assert_allclose(sampler.learnability()[2], 4.5 * 2.5 / (7 * 8), rtol=1e-12)


def test_beta_variances_against_a_numerical_integral():
    p = (np.arange(100_000) + 0.5) / 100_000
    sampler = make("learnability", {"train": games(1)})
    sampler.tell([ended(games(1)[0], won) for won in (True, True, False)])
    density = p**1.5 * (1 - p) ** 0.5
    np.testing.assert_allclose(sampler.learnability(), np.sum(density * p * (1 - p)) / np.sum(density), rtol=1e-6)


def test_games_are_drawn_by_their_learnability():
    """One at a time, 3,000 times: frequencies are the weights' shares, to four standard errors."""
    pool = games(*range(5))
    sampler = make("learnability", {"train": pool}, share=1.0)
    sampler.tell(outcomes(pool, lambda task, member: member < task.seed, group_size=4))  # 0, 1, … 4 of four are won
    weights = sampler.learnability() / sampler.learnability().sum()
    assert weights.argmax() == 2 and weights[2] > 2 * weights[0]
    counts = collections.Counter(names(drawn)[0] for drawn in (sampler.take(1) for _ in range(3000)))
    found = np.array([counts[task.name] for task in pool]) / 3000
    assert np.all(np.abs(found - weights) < 4 * np.sqrt(weights / 3000))


def test_what_is_drawn_by_learnability_is_nothing_else_of_the_draw():
    pool = games(*range(8))
    sampler = make("learnability", {"train": pool}, share=0.75)
    for _ in range(20):
        first, *others = names(sampler.take(4))
        assert len({first, *others}) == 4
    sampler = make("learnability", {"train": pool}, share=1.0)
    assert sorted(names(sampler.take(8))) == sorted(names(pool))
    assert set(names(sampler.take(20))) == set(names(pool))


def test_the_rest_of_a_draw_is_from_all_alike():
    """With share 1/2 of four, two games follow the epochs, whatever is known of them."""
    pool = games(*range(8))
    sampler, plain = make("learnability", {"train": pool}), tasks.Sampler(pool, seed=3)
    for _ in range(5):
        drawn = sampler.take(4)
        assert names(drawn)[:2] == names(plain.take(2))
        sampler.tell(outcomes(drawn, lambda task, _: task.seed == 1))


def test_a_game_under_several_names_is_one():
    task = tasks_named(1)
    named = [naming.renamed(task, number) for number in range(3)]
    sampler = make("learnability", {"train": [*named, tasks_named(2)]})
    assert sampler.tell(outcomes(named[1:2], lambda *_: True))["curriculum/visited"] == 0.5
    assert len(sampler.learnability()) == 2


@pytest.mark.parametrize("order", curriculum.ORDERS)
@pytest.mark.parametrize("stopped", [0, 1, 4, 7])
def test_a_restart_changes_nothing(order, stopped):
    def play(sampler, count):
        drawn = []
        for _ in range(count):
            games_now = sampler.take(5)
            heads = sampler.head_starts(games_now)
            drawn.append((names(games_now), heads))
            sampler.tell(outcomes(games_now, lambda task, member: (task.seed + member) % 3 > 0, head_starts=heads))
        return drawn

    levels = {"train": with_walkthroughs(*range(1, 13)), "train_2": level(1), "train_3": level(2)}
    whole = make(order, levels, window=3)
    expected = play(whole, 10)
    first = make(order, levels, window=3)
    begun = play(first, stopped)
    restored = make(order, levels, window=3)
    play(restored, 2)  # whatever it had drawn
    restored.restore(json.loads(json.dumps(first.state())))
    assert begun + play(restored, 10 - stopped) == expected
    assert restored.state() == whole.state()


@pytest.mark.parametrize("order", ["levels", "learnability", "reverse"])
def test_a_state_of_something_else_is_refused(order):
    sampler = make(order)
    with pytest.raises(tasks.StateError, match=f"curriculum.{order.capitalize()}: a state needs"):
        sampler.restore(make("uniform").state())
    with pytest.raises(tasks.StateError, match="another task set or seed"):
        sampler.restore(make(order, {"train": level(0), "train_2": level(3), "train_3": level(2)}).state())


def test_fewer_levels_are_another_task_set():
    two = make("levels", {"train": level(0), "train_2": level(1)})
    with pytest.raises(tasks.StateError, match="the saved state has 3 levels, 2 are here"):
        two.restore(make("levels").state())


def test_episodes_begin_earlier_when_enough_of_the_earliest_are_won():
    """Walkthroughs of four commands; of an iteration's sixteen games twelve begin late, the earliest of these are asked."""
    sampler = make("reverse", {"train": with_walkthroughs(*[4] * 40)}, share=0.75)
    told, left = [], []
    # Won of the four members: half of two iterations is reached after the second, fourth and sixth.
    for wins in (2, 2, 1, 4, 4, 4, 4, 4):
        drawn = sampler.take(16)
        heads = sampler.head_starts(drawn)
        earliest = min(heads[:12])
        played = [
            ended(task, head > earliest or member < wins, head) for task, head in zip(drawn, heads) for member in range(4)
        ]
        values = sampler.tell(played)
        left.append({4 - head for head in heads[:12]})
        told.append((values["curriculum/commands_left"], values.get("curriculum/success")))
        assert heads[12:] == [0] * 4
    assert told == [
        (1, 0.5), (1, 0.5), (2, 0.25), (2, 1.0), (3, 1.0), (3, 1.0), (4, None), (4, None),  # the whole way, no further
    ]
    assert left == [set(range(1, int(count) + 1)) for count, _ in told]
    assert values["curriculum/success_from_start"] == 1.0
    assert "curriculum/success_from_start" not in sampler.tell(outcomes(drawn, head_starts=[1] * 16))


def test_a_walkthrough_that_is_shorter_is_played_from_the_start():
    drawn = with_walkthroughs(3, 1)
    sampler = make("reverse", {"train": drawn}, share=1.0, window=1)
    assert sampler.head_starts(drawn) == [2, 0]
    assert sampler.tell(outcomes(drawn, lambda *_: True, head_starts=[2, 0]))["curriculum/late_share"] == 0.5
    assert {tuple(sampler.head_starts(sampler.take(2))) for _ in range(20)} <= {(2, 0), (1, 0), (0, 2), (0, 1)}


def test_the_others_play_from_the_start():
    drawn = level(0)
    for order in ("uniform", "levels", "learnability"):
        assert make(order).head_starts(drawn) == [0] * 6


def test_an_iteration_begins_where_the_curriculum_says(monkeypatch):
    plan = OPTIONS | dict(order="reverse", share=0.5)
    monkeypatch.setattr(
        test_filters, "tasks_named", lambda n: dataclasses.replace(tasks_named(n), walkthrough=("go east", "take it"))
    )
    (*_, values), (episodes,), _ = play_rounds(monkeypatch, [1, 3, 0, 2], plan=plan, name="none")
    assert [(e.group, e.head_start) for e in episodes] == [(g, int(g < 2)) for g in range(4) for _ in range(3)]
    assert values == {
        "curriculum/commands_left": 1.0, "curriculum/success": 4 / 6, "curriculum/success_from_start": 2 / 6,
        "curriculum/late_share": 0.5,
    }  # fmt: skip


def test_games_without_walkthroughs_cannot_be_begun_near_their_end():
    drawn = [*with_walkthroughs(2, 2), dataclasses.replace(tasks_named(7), walkthrough=())]
    with pytest.raises(ValueError, match="which 1 of the 3 games to train on have not, such as game-7: take games"):
        curriculum.check_games(drawn, "reverse")
    curriculum.check_games(drawn[:2], "reverse")
    curriculum.check_games(drawn, "uniform")


def test_horizons_are_phases_of_equal_length():
    options = dict(horizons=(4, 8), horizon_iterations=3, longest=12)
    assert [curriculum.max_turns(n, **options) for n in range(9)] == [4, 4, 4, 8, 8, 8, 12, 12, 12]
    assert curriculum.max_turns(0, horizons=(), horizon_iterations=3, longest=12) == 12


def test_what_begins_is_told():
    names = ["train", "train_rooms"]
    lines = [
        {"step": step, "curriculum/level": level, "curriculum/max_turns": turns}
        for step, (level, turns) in enumerate([(1.0, 4.0), (1.0, 4.0), (2.0, 4.0), (2.0, 8.0)], start=1)
    ]
    told = [curriculum.told(lines[:count], names) for count in range(1, 5)]
    assert told == [
        None,
        None,
        "curriculum: from iteration 3 on games of splits.train_rooms are played",
        "curriculum: from iteration 4 on episodes may have 8 turns",
    ]
    assert curriculum.told([{"step": 1}, {"step": 2}], names) is None
    lines = [{"step": 4, "curriculum/commands_left": 2.0}, {"step": 5, "curriculum/commands_left": 3.0}]
    assert curriculum.told(lines, names) == "curriculum: from iteration 5 on late episodes begin 3 commands before the end"


def test_an_iteration_plays_by_its_horizon_and_tells_what_came_of_it(monkeypatch):
    plan = dict(order="levels", horizons=(4, 6), horizon_iterations=5)
    (*_, values), rounds, sampler = play_rounds(monkeypatch, [1, 3, 0, 2], plan=plan, max_turns=6, name="none")
    assert values == {"curriculum/level": 1.0, "curriculum/success": 0.5, "curriculum/max_turns": 6.0}
    assert [len(episodes) for episodes in rounds] == [12] and len(sampler.state()["recent"]) == 1



@pytest.mark.parametrize(
    "changes, words",
    [
        ({"order": "random"}, "rl.curriculum.order must be one of uniform, levels, learnability, reverse, got 'random'"),
        ({"order": "levels"}, "splits has no train_<name> beside train"),
        ({"share": 0.0}, "rl.curriculum.share is a share, above 0 and at most 1, got 0.0"),
        ({"threshold": 1.5}, "rl.curriculum.threshold is a share, above 0 and at most 1, got 1.5"),
        ({"window": 0}, "rl.curriculum.window must be at least 1, got 0"),
        ({"horizon_iterations": 0}, "rl.curriculum.horizon_iterations must be at least 1, got 0"),
        ({"horizons": (4, 12)}, "the last below rollout.max_turns = 12, got (4, 12)"),
        ({"horizons": (8, 4)}, "each below the next"),
        ({"horizons": (0, 4)}, "from 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        settings.check(changed("textworld_quickstart.py", **{f"rl.curriculum.{k}": v for k, v in changes.items()}))


def test_what_a_curriculum_does_not_read_is_told():
    def idle(**changes):
        config = changed("textworld_levels.py", **{f"rl.curriculum.{k}": v for k, v in changes.items()})
        settings.check(config)
        return {key.removeprefix("rl.curriculum.") for key in settings.unused(config) if "curriculum" in key}

    assert idle() == {"horizon_iterations"}
    assert idle(order="reverse") == {"horizon_iterations"}
    assert idle(order="learnability", horizons=(4,)) == {"threshold", "window"}
    assert idle(order="uniform") == {"share", "threshold", "window", "horizon_iterations"}


def test_rules_of_a_config_with_something_otherwise():
    config = changed("textworld_quickstart.py")
    assert rules.of_config(config).max_turns == 12
    assert rules.of_config(config, max_turns=5, temperature=0.5).max_turns == 5
