"""Tree rollouts: where episodes branch off, who fills a group, and that a run learns from such groups."""

import dataclasses
import math
import types

import numpy as np
import pytest
from records import make_task, make_trajectory, make_turn
from test_filters import LEDGER, tasks_named
from test_reinforce import make_config

from jaxagentrl import branching, curriculum, playing, reinforce, rollout

OPTIONS = dict(probability=0.5, entropy_weight=0.2, entropy_tokens=2, vocab_size=100)


def episode(entropies, group=0, member=0, task=None):
    """One turn of three tokens for each entry, whose first two have that entropy on average."""
    turns = [make_turn([1, 2], [3, 4, 5], entropies=[h - 0.1, h + 0.1, 50.0]) for h in entropies]
    return make_trajectory(turns, group=group, member=member, task=task or make_task())


class Draws:
    """Uniform numbers in the order in which they are asked for."""

    def __init__(self, *numbers):
        self.left = list(numbers)

    def random(self):
        return self.left.pop(0)


def test_a_turn_is_branched_at_by_how_much_less_sure_the_policy_is():
    """By hand, β / log |V| = 0.2 / log 100: a rise of log 100 adds 0.2 to the 0.5, a fall takes it off."""
    rise = math.log(100)
    parent = episode([1.0, 1.0 + rise, 1.0, 1.0 - rise + 0.0])
    for turn, bound in ((1, 0.7), (2, 0.5), (3, 0.3)):
        for off, is_chosen in ((-1e-6, True), (1e-6, False)):
            numbers = [0.99] * 3
            numbers[turn - 1] = bound + off
            found = branching.points([parent], members=3, rng=Draws(*numbers), **OPTIONS)
            assert found == ([(parent, turn)] if is_chosen else [])


def test_turns_are_asked_in_order_of_all_parents_until_there_are_enough():
    one, two = episode([1.0] * 3), episode([1.0] * 4, member=1)
    found = branching.points([one, two], members=3, rng=Draws(0.0, 0.9, 0.0, 0.0), **OPTIONS)
    assert found == [(one, 1), (one, 2), (two, 2)]
    found = branching.points([one, two], members=3, rng=Draws(0.9, 0.9, 0.9, 0.9, 0.0), **OPTIONS)
    assert found == [(two, 3)]  # the only one that has a fourth turn
    assert branching.points([episode([1.0])], members=3, rng=Draws(), **OPTIONS) == []
    assert branching.points([], members=3, rng=Draws(), **OPTIONS) == []


def test_a_group_is_filled_by_branches_and_by_what_is_played_from_the_start():
    drawn = [tasks_named(n) for n in range(3)]
    first = [episode([1.0] * 6, group=4, member=m, task=drawn[0]) for m in range(2)]
    first += [episode([1.0], group=5, member=1, task=drawn[1])]  # no turn to branch at; all of group 6 failed
    sizes = dict(group_size=5, stream=(7, 2, 0), first_group=4)
    made = branching.second(drawn, first, members=3, **sizes, **OPTIONS | dict(probability=1.0))
    assert [(e.group, e.member) for e in made] == [(g, m) for g in (4, 5, 6) for m in (2, 3, 4)]
    assert [len(e.prefix) for e in made] == [1, 1, 2] + [0] * 6
    assert made[0].prefix == (first[0].turns[0],) and made[1].prefix == (first[1].turns[0],)
    whole = rollout.episodes(drawn, **sizes)
    assert made[3:] == [e for e in whole if e.group > 4 and e.member >= 2]
    streams = [e.stream for e in (*made, *whole)]
    assert len(set(streams)) == 3 + len(whole)


def test_all_members_of_a_group_have_its_head_start():
    drawn = [dataclasses.replace(tasks_named(n), walkthrough=("look",) * 4) for n in range(2)]
    parent = dataclasses.replace(episode([1.0] * 6, task=drawn[0]), head_start=3)
    sizes = dict(group_size=3, stream=(7, 2, 0), first_group=0, head_starts=[3, 1])
    made = branching.second(drawn, [parent], members=2, **sizes, **OPTIONS | dict(probability=1.0))
    assert [len(e.prefix) for e in made] == [1, 2, 0, 0] and [e.head_start for e in made] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(members=2), r"rl.branching.members is 2, expected 0 to 1: some of the rl.group_size \(2\)"),
        (dict(members=-1), "rl.branching.members is -1"),
        (dict(probability=1.5), r"rl.branching.probability must be in \[0, 1\], got 1.5"),
        (dict(entropy_weight=-0.1), "rl.branching.entropy_weight must be at least 0, got -0.1"),
        (dict(entropy_tokens=0), "rl.branching.entropy_tokens must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        reinforce.check(make_config(branching=changes)["rl"])


def test_an_iteration_plays_what_branches_after_what_it_branches_off(monkeypatch):
    """With dynamic sampling in every round; all of a group, branches included, is kept or not."""
    config = make_config(
        branching=dict(members=1, probability=1.0), filter=dict(name="dynamic_sampling"),
        tasks_per_iteration=2, group_size=3,
    )
    calls = []

    def play(session, params, episodes, *, changes):
        calls.append(episodes)
        # Of an even game the branch alone is won.
        won = [e.group % 2 == 0 and len(e.prefix) > 0 for e in episodes]
        made = [
            make_trajectory(
                [*e.prefix, *[make_turn([1], [2], entropies=[0.5])] * 2], task=e.task, group=e.group, member=e.member,
                won=w, score=2.0 * w,
            )
            for e, w in zip(episodes, won, strict=True)
        ]
        return rollout.Rollout(made, [], LEDGER)

    monkeypatch.setattr(playing, "play", play)
    setup = types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=100))
    session = types.SimpleNamespace(config=config, setup=setup)
    sampler = curriculum.Uniform([tasks_named(n) for n in range(9)], seed=0)
    everything, kept, counts = playing.iteration(session, {}, sampler, number=0)
    assert [len(episodes) for episodes in calls] == [4, 2, 4, 2]  # two rounds of two games
    assert [len(e.prefix) for e in calls[1]] == [1, 1]
    assert [sorted(t.member for t in kept if t.group == group) for group in (0, 2)] == [[0, 1, 2]] * 2
    assert len(kept) == 6 and len(everything.trajectories) == 12
    assert counts["rollout/branched"] == 4 and counts["filter/rounds"] == 2
    assert everything.ledger["seconds"] == 8.0
    branched = next(t for t in kept if t.member == 2)
    assert np.array_equal(branched.turns[0].action_ids, kept[0].turns[0].action_ids)
