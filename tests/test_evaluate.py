"""pass@k by its definition, and evaluations of several attempts: what of them is measured and written."""

import contextlib
import itertools
import json
import types

import numpy as np
import pytest
from records import make_trajectory, make_turn
from test_filters import tasks_named
from test_settings import changed

from envs_host.types import EnvFailure
from jaxagentrl import evaluate, metrics, playing, prepare, rollout, settings


def test_pass_at_k_by_hand():
    """Of four attempts one game wins 4, one 1, one 0. k = 2: 1, 1 − 3/6 = 1/2, 0."""
    won = {"a": [True] * 4, "b": [False, True, False, False], "c": [False] * 4}
    found = evaluate.pass_at("x", won, 4)
    assert list(found) == [f"x/pass_at_{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")]
    np.testing.assert_allclose([found[f"x/pass_at_{k}"] for k in (1, 2, 4)], [5 / 12, 1 / 2, 2 / 3], rtol=1e-12)
    assert (found["x/pass_at_4_low"], found["x/pass_at_4_high"]) == metrics.wilson_interval(2, 3)


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (3, 1), (5, 2), (6, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k(n, c):
    attempts = [index < c for index in range(n)]
    found = evaluate.pass_at("x", {"game": attempts}, n)
    assert f"x/pass_at_{n}" in found
    for k in range(1, n + 1):
        choices = [any(some) for some in itertools.combinations(attempts, k)]
        assert found.get(f"x/pass_at_{k}", np.mean(choices)) == pytest.approx(np.mean(choices))


def test_what_a_failed_environment_leaves_counts_for_as_many():
    """Two attempts of three are there: the game is in pass@1 and pass@2 alone."""
    found = evaluate.pass_at("x", {"a": [True, False], "b": [False] * 3}, 3)
    assert [found[f"x/pass_at_{k}"] for k in (1, 2, 3)] == [0.25, 0.5, 0.0]
    assert "x/pass_at_2" not in evaluate.pass_at("x", {"a": [True]}, 2) and evaluate.pass_at("x", {}, 2) == {}


def evaluated(monkeypatch, *, attempts, temperature=0.5, name="rl"):
    """Of two games: won by the second attempt alone, and by all but the first, whose environment failed.

    Returns:
        The metrics, what was written by name, the episodes that were played.
    """
    games = [tasks_named(number) for number in range(2)]
    played, written = [], {}

    def play(session, params, episodes, *, changes, advance):
        assert changes == {"temperature": temperature}
        played.extend(episodes)
        ended = [e for e in episodes if (e.group, e.member) != (1, 0)]
        made = [
            make_trajectory([make_turn([1], [2])], task=e.task, group=e.group, member=e.member, won=e.member == 1 or e.group == 1)
            for e in ended
        ]
        failed = [(e, EnvFailure("crash", "gone")) for e in episodes if e not in ended]
        return rollout.Rollout(made, failed, {"compiles": 0, "env_crashes": 1, "seconds": 1.0})

    monkeypatch.setattr(playing, "play", play)
    monkeypatch.setattr(playing, "write_episodes", lambda session, name, records: written.update({name: records}))
    session = types.SimpleNamespace(
        config={"seed": 3, "eval": {"attempts": attempts}}, setup=types.SimpleNamespace(splits={"test": games})
    )
    return playing._held_out_at(session, {}, "test", "eval", temperature, name), written, played


def test_success_is_of_the_first_attempts_and_pass_at_k_of_all(monkeypatch):
    once, records, first = evaluated(monkeypatch, attempts=1)
    values, written, played = evaluated(monkeypatch, attempts=3)
    assert {key: values[key] for key in once} == once and once["eval/episodes"] == 1 and once["eval/env_failures"] == 1
    assert values.keys() - once.keys() == {f"eval/pass_at_{k}{end}" for k in (1, 2, 3) for end in ("", "_low", "_high")}
    assert values["eval/pass_at_1"] == pytest.approx((1 / 3 + 1) / 2) and values["eval/pass_at_3"] == 1.0
    assert written["eval_rl"] == records["eval_rl"] and list(records) == ["eval_rl"]
    assert [(row["group"], row["member"]) for row in written["eval_rl_attempts"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    # The first attempts draw what they draw alone; no two attempts draw the same.
    streams = [episode.stream for episode in played]
    assert [e.stream for e in first] == [e.stream for e in played if e.member == 0] and len(set(streams)) == 6
    json.dumps(written)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"name": None}])
def test_one_attempt_where_all_would_be_alike_and_during_a_stage(monkeypatch, changes):
    values, written, played = evaluated(monkeypatch, attempts=3, **changes)
    assert len(played) == 2 and not [key for key in values if "pass_at" in key]
    assert list(written) == ([] if "name" in changes else ["eval_rl"])


def test_several_attempts_of_greedy_agents_alone_are_told():
    for temperatures, is_told in (((0.0, 1.0), False), ((), True)):
        changes = {"eval.temperature": 0.0, "eval.other_temperatures": temperatures, "eval.attempts": 4}
        assert ("eval.attempts" in settings.unused(changed("textworld_quickstart.py", **changes))) == is_told


@pytest.mark.parametrize("shown", [True, False])
def test_the_bounding_agents_play_in_the_runs_own_workers_where_those_list_commands(monkeypatch, shown):
    made, used = [], []
    monkeypatch.setattr(playing, "held_out", lambda *_: {})
    monkeypatch.setattr(prepare, "make_pool", lambda config, **options: made.append(options) or contextlib.nullcontext("another"))
    monkeypatch.setattr(evaluate, "play", lambda test, pool, agent, **_: used.append(pool) or (1, 2, 0))
    session = types.SimpleNamespace(
        config=changed("textworld_quickstart.py", **{"prompt.show_admissible": shown}),
        setup=types.SimpleNamespace(splits={"test": [tasks_named(0)]}, pool="own"),
    )
    values = playing.baselines(session, {})
    assert values["random/success_rate"] == values["walkthrough/success_rate"] == 0.5
    assert (made, used) == (([], ["own"] * 2) if shown else ([{"admissible_commands": True}], ["another"] * 2))
