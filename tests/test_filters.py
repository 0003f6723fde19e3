"""What an iteration learns from: groups that filters keep, rounds until there are enough, episodes left out."""

import types

import jax
import numpy as np
import pytest
from records import make_task, make_trajectory, make_turn
from test_reinforce import make_config, make_state, make_trajectories

from envs_host.types import EnvFailure, StopReason
from jaxagentrl import curriculum, filters, playing, reinforce, rollout

SIZES = dict(num_groups=4, group_size=3, reward=dict(kind="single"), fraction=0.5)
LEDGER = {"seconds": 2.0, "decode_share": 0.5, "slot_occupancy": 1.0, "tokens_decoded": 10}


def member(group, score, won=None):
    won = score == 2.0 if won is None else won
    return make_trajectory([make_turn([1], [2])], task=make_task(f"game-{group}"), group=group, score=score, won=won)


def played():
    """Groups 5 (mixed), 2 (lost), 7 (won by two, a third failed), 4 (lost with scores that differ most)."""
    scores = {5: (2.0, 0.0, 0.0), 2: (0.0, 0.0, 0.0), 7: (2.0, 2.0), 4: (-2.0, 1.9, 1.9)}
    return [member(group, score) for group, of in scores.items() for score in of]


@pytest.mark.parametrize("name, groups", [("none", [5, 2, 7, 4]), ("dynamic_sampling", [5]), ("uncertainty", [5, 4])])
def test_what_a_filter_keeps(name, groups):
    everything = played()
    kept = filters.kept(everything, name=name, **SIZES)
    assert list(dict.fromkeys(t.group for t in kept)) == groups
    assert [id(t) for t in kept] == [id(t) for t in everything if t.group in groups]
    assert filters.kept([], name=name, **SIZES) == []


def test_mixed_is_by_what_was_won_and_uncertain_by_what_was_paid():
    """A group that is lost for different rewards is not mixed; penalties count where returns are compared."""
    refused = make_turn([1], [2], valid_command=False)
    same = [member(0, 0.0) for _ in range(2)]
    paying = [make_trajectory([refused], task=make_task("game-1"), group=1, score=0.0, won=False), member(1, 0.0)]
    reward = dict(kind="single", invalid_penalty=0.1)
    sizes = dict(num_groups=2, group_size=2, fraction=0.5, reward=reward)
    assert filters.kept(same + paying, name="dynamic_sampling", **sizes) == []
    assert {t.group for t in filters.kept(same + paying, name="uncertainty", **sizes)} == {1}


@pytest.mark.parametrize(
    "missing, kept, played, multiple, expected",
    [(8, 0, 0, 1, 32), (8, 0, 32, 1, 32), (8, 24, 32, 1, 11), (8, 24, 32, 4, 12), (30, 2, 32, 1, 32), (1, 31, 32, 1, 2)],
)
def test_how_many_games_a_round_has(missing, kept, played, multiple, expected):
    """As many as hold the missing groups if the next games are as the last: 8 × 32 / 24 = 10.7."""
    assert filters.games_to_play(missing, kept=kept, played=played, most=32, multiple=multiple) == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(name="mixed"), "rl.filter.name must be one of none, dynamic_sampling, uncertainty, got 'mixed'"),
        (dict(fraction=0.0), "rl.filter.fraction is a share of the groups, above 0 and at most 1, got 0.0"),
        (dict(max_rounds=0), "rl.filter.max_rounds must be at least 1, got 0"),
        (dict(leave_out=("timeout",)), "names why episodes ended: done, turn_limit, .*; got timeout"),
        (dict(leave_out=("env_failure",)), "got env_failure"),
        (dict(leave_out=filters.STOP_REASONS), "nothing would be learned from"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        reinforce.check(make_config(filter=changes)["rl"])


def test_a_filter_needs_groups():
    with pytest.raises(ValueError, match="rl.filter.name 'uncertainty' looks at how .* rl.group_size is 1"):
        filters.check(dict(name="uncertainty", fraction=0.5, max_rounds=1, leave_out=()), group_size=1)


# --- rounds ------------------------------------------------------------------------------------


def play_rounds(monkeypatch, wins, *, num_tasks=50, plan={}, max_turns=8, **options):
    """`playing.iteration` where the n-th game of the run is won by wins[n] of three members, with `rl.curriculum` as `plan`
    and `rl.filter` as the other options have it; episodes must be played with `max_turns`.

    Returns:
        What it returns, the episodes of each round, the sampler.
    """
    config = make_config(filter=options, curriculum=plan, tasks_per_iteration=4, group_size=3)
    rounds = []

    def play(session, params, episodes, *, changes):
        rounds.append(episodes)
        assert changes == {"max_turns": max_turns}
        won = [episode.member < wins[episode.group] for episode in episodes]
        found = [
            make_trajectory(
                [make_turn([1], [2])], task=e.task, group=e.group, member=e.member, won=w, score=2.0 * w,
                head_start=e.head_start,
            )
            for e, w in zip(episodes, won, strict=True)
        ]
        return rollout.Rollout(found, [(episodes[0], EnvFailure("crash", "gone"))], LEDGER)

    monkeypatch.setattr(playing, "play", play)
    made = [tasks_named(n) for n in range(num_tasks)]
    sampler = curriculum.make({"train": made}, config["rl"]["curriculum"], seed=0)
    session = types.SimpleNamespace(config=config)
    return playing.iteration(session, {}, sampler, number=6), rounds, sampler


def tasks_named(n):
    task = make_task(f"game-{n}", n)
    return type(task)(**vars(task) | {"digest": f"{n:08x}" + "0" * 56})


def test_games_are_played_until_the_groups_are_complete(monkeypatch):
    """Of the first four games two are mixed; of four more (2 × 4 / 2) three, one more than is missing."""
    wins = [0, 1, 3, 2, 1, 0, 2, 1]
    (everything, kept, counts), rounds, sampler = play_rounds(monkeypatch, wins, name="dynamic_sampling")
    assert [len(episodes) for episodes in rounds] == [12, 12]
    assert list(dict.fromkeys(t.group for t in kept)) == [1, 3, 4, 6] and len(kept) == 12
    assert len(everything.trajectories) == 24 and len(everything.failures) == 2
    assert {id(t) for t in kept} < {id(t) for t in everything.trajectories}
    assert counts == {"filter/rounds": 2, "filter/groups_played": 8, "filter/groups_kept": 4}
    assert everything.ledger == LEDGER | {"seconds": 4.0, "tokens_decoded": 20}
    assert sampler.state()["position"] == 8


def test_a_last_round_that_is_not_enough_leaves_a_smaller_batch(monkeypatch):
    wins = [0, 1, 3, 0] + [0] * 8
    (everything, kept, counts), rounds, _ = play_rounds(monkeypatch, wins, name="dynamic_sampling", max_rounds=3)
    assert [len(episodes) // 3 for episodes in rounds] == [4, 4, 4]
    assert {t.group for t in kept} == {1} and len(everything.trajectories) == 36
    assert counts["filter/groups_kept"] == 1 and counts["filter/rounds"] == 3


def test_a_game_that_comes_again_is_not_played_alike(monkeypatch):
    """Three games in all: the second round has them once more, with random numbers of its own."""
    _, rounds, _ = play_rounds(monkeypatch, [0] * 8, num_tasks=3, name="dynamic_sampling", max_rounds=2)
    streams = [episode.stream for episodes in rounds for episode in episodes]
    assert len(set(streams)) == len(streams) == 24
    assert len({episode.task.name for episodes in rounds for episode in episodes}) == 3


@pytest.mark.parametrize("name, kept_groups", [("none", 4), ("uncertainty", 2)])
def test_other_filters_play_one_round(monkeypatch, name, kept_groups):
    (everything, kept, counts), rounds, _ = play_rounds(monkeypatch, [0, 1, 3, 2], name=name, fraction=0.5)
    assert len(rounds) == 1 and len({t.group for t in kept}) == kept_groups
    assert everything.ledger == LEDGER
    assert counts == {} if name == "none" else counts["filter/groups_kept"] == 2


# --- episodes that are left out ----------------------------------------------------------------


def test_what_is_left_out_counts_in_its_group_and_in_no_gradient():
    """Members that ended by their limit of turns: what they said moves nothing, how they ended their group's mean."""
    config = make_config(
        filter=dict(leave_out=("turn_limit",)), advantage=dict(name="leave_one_out", whiten=False, negative_weight=1.0)
    )
    config["reward"] = dict(kind="single")
    outcomes = []
    for other in (False, True):
        made = make_trajectories()
        assert [str(t.stop_reason) for t in made] == 3 * ["turn_limit"] + ["done", "turn_limit", "done"]
        if other:  # other words, of another length
            turns = [make_turn([9, 8], [7, 6, 3], logprobs=[-1.0, -1.0, -1.0])]
            made = [
                t if t.stop_reason is StopReason.DONE else type(t)(**vars(t) | {"turns": turns}) for t in made
            ]
        state, reference, programs = make_state(config)
        state, measured, credit = reinforce.learn(state, reference, made, programs, config, iteration=0)
        assert measured["batch/rows_used_share"] == 2 / 6
        outcomes.append((jax.device_get(state.params), credit[3], credit[5], measured["loss/policy"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *outcomes)
    assert np.max(outcomes[0][1]) == pytest.approx(1.0)  # won, where the other member lost


def test_where_all_are_left_out_nothing_is_learned():
    config = make_config(filter=dict(leave_out=("turn_limit", "done")))
    state, reference, programs = make_state(config)
    before = jax.device_get(state.params)
    state, measured, _ = reinforce.learn(state, reference, make_trajectories(), programs, config, iteration=0)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    assert measured["batch/rows_used_share"] == 0 and int(state.step) == 0


def test_records_have_what_was_played_with_the_credit_of_what_was_learned_from():
    everything = make_trajectories()
    learned = everything[2:4]
    credit = [np.full(t.num_tokens, 0.5, np.float32) for t in learned]
    made = reinforce.records(everything, learned, credit, dict(kind="single"))
    assert [set(record["advantages"]) for record in made] == [{0.0}] * 2 + [{0.5}] * 2 + [{0.0}] * 2
    assert [len(record["advantages"]) for record in made] == [t.num_tokens for t in everything]
