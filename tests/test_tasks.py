"""Splits never overlap; samplers draw every task once per epoch and resume exactly."""

import dataclasses
import json

import pytest

from jaxagentrl import tasks
from records import make_task


def make_tasks(*seeds, prefix="game"):
    return [make_task(f"{prefix}-s{seed}", seed) for seed in seeds]


def names(drawn):
    return [task.name for task in drawn]


def test_seed_ranges_that_overlap_are_named():
    assert tasks.seed_ranges({"train": (50001, 1000), "test": (1, 100)}) == {
        "train": range(50001, 51001), "test": range(1, 101)
    }  # fmt: skip
    # Neighbors do not overlap.
    tasks.seed_ranges({"sft": (0, 10), "rl": (10, 10)})
    with pytest.raises(tasks.SplitError, match="'sft'.*'rl'.*share the seeds 9 to 9"):
        tasks.seed_ranges({"sft": (0, 10), "test": (50, 5), "rl": (9, 10)})
    with pytest.raises(tasks.SplitError, match="share the seeds 3 to 4"):
        tasks.seed_ranges({"outer": (0, 10), "inner": (3, 2)})
    with pytest.raises(tasks.SplitError, match="'rl' has first seed 5 and 0 seeds"):
        tasks.seed_ranges({"rl": (5, 0)})


def test_splits_share_no_seed_and_no_game():
    train, test = make_tasks(1, 2, 3), make_tasks(4, 5)
    tasks.check_splits({"train": train, "test": test})
    with pytest.raises(tasks.SplitError, match="'train' and 'test' share the seeds 3; "):
        tasks.check_splits({"train": train, "test": make_tasks(3, 4, prefix="other")})
    twin = dataclasses.replace(make_task("game-s9", 9), digest=train[0].digest)
    with pytest.raises(tasks.SplitError, match="same game .* game-s1 and game-s9"):
        tasks.check_splits({"train": train, "test": [*test, twin]})
    with pytest.raises(tasks.SplitError, match="'train' holds tasks twice: game-s1"):
        tasks.check_splits({"train": [*train, train[0]]})


def test_many_shared_seeds_are_cut_short():
    with pytest.raises(tasks.SplitError, match="0, 1, 2, 3, 4 and 5 more"):
        tasks.check_splits({"a": make_tasks(*range(10)), "b": make_tasks(*range(10), prefix="b")})


def test_without_drops_held_out_and_repeated_games():
    train = make_tasks(1, 2, 3)
    assert names(tasks.without([*train, train[2]], [train[1]])) == ["game-s1", "game-s3"]


def test_every_task_once_per_epoch_in_changing_order():
    pool = make_tasks(*range(20))
    sampler = tasks.Sampler(pool, seed=3)
    epochs = [names(sampler.take(20)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(names(pool)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.epoch == 3
    assert names(tasks.Sampler(pool, seed=3).take(20)) == epochs[0]
    assert names(tasks.Sampler(pool, seed=4).take(20)) != epochs[0]


def test_draws_do_not_depend_on_how_many_are_taken_at_once():
    one, two = (tasks.Sampler(make_tasks(*range(7)), seed=0) for _ in range(2))
    assert names(one.take(17)) == names(two.take(5)) + names(two.take(0)) + names(two.take(12))


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 23])
def test_a_sampler_resumes_exactly(taken):
    pool = make_tasks(*range(7))
    sampler = tasks.Sampler(pool, seed=5)
    sampler.take(taken)
    state = json.loads(json.dumps(sampler.state()))
    expected = names(sampler.take(30))
    restored = tasks.Sampler(pool, seed=5)
    restored.take(3)
    restored.restore(state)
    assert names(restored.take(30)) == expected


def test_a_state_of_something_else_is_refused():
    pool = make_tasks(*range(7))
    state = tasks.Sampler(pool, seed=5).state()
    for other in (
        tasks.Sampler(pool, seed=6),
        tasks.Sampler(pool[:6], seed=5),
        tasks.Sampler(pool[::-1], seed=5),
    ):
        with pytest.raises(tasks.StateError, match="another task set or seed"):
            other.restore(state)
    with pytest.raises(tasks.StateError, match="another version"):
        tasks.Sampler(pool, seed=5).restore({"epoch": 0})
    with pytest.raises(tasks.StateError, match="position 7"):
        tasks.Sampler(pool, seed=5).restore(state | {"position": 7})
    with pytest.raises(ValueError, match="no tasks"):
        tasks.Sampler([], seed=0)
