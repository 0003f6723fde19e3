"""Splits of ragged rows into few shapes."""

import doctest
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxagentrl import tiling
from jaxagentrl.tiling import Costs

ROWS, WIDTHS, FILLED = [1, 2, 4], [8, 16, 40], [64, 128]
BUCKETS = dict(row_buckets=ROWS, width_buckets=WIDTHS, filled_buckets=FILLED)


def bucket(size, buckets):
    return min(b for b in buckets if b >= size)


def cost(num_rows, width, filled, costs):
    return costs.call + num_rows * width * (1 + filled / costs.positions)


def cheapest(rows, costs):
    """By trying every cut of the line of rows that `tile` describes."""

    def call(part):
        width, filled = (max(sizes) for sizes in zip(*part))
        return cost(bucket(len(part), ROWS), width, filled, costs)

    def rest(line):
        if not line:
            return 0
        return min(call(line[:n]) + rest(line[n:]) for n in range(1, min(4, len(line)) + 1))

    shapes = [(bucket(width, WIDTHS), bucket(filled, FILLED)) for width, filled in rows]
    return rest(sorted(shapes, reverse=True))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 128)), max_size=9),
    st.sampled_from([0, 7, 100]),
    st.sampled_from([20, 200]),
)
@settings(max_examples=200, deadline=None)
def test_every_row_once_in_shapes_that_exist_and_nothing_cheaper(rows, call, positions):
    costs = Costs(call, positions)
    calls = tiling.tile(rows, **BUCKETS, costs=costs)
    assert sorted(itertools.chain(*(part for *_, part in calls))) == list(range(len(rows)))
    for num_rows, width, filled, part in calls:
        assert num_rows in ROWS and width in WIDTHS and filled in FILLED
        assert 0 < len(part) <= num_rows
        assert max(rows[row][0] for row in part) <= width
        assert max(rows[row][1] for row in part) <= filled
    total = sum(cost(*shape, costs) for *shape, _ in calls)
    assert total == pytest.approx(cheapest(rows, costs))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 128), st.integers(0, 2)), max_size=9),
    st.sampled_from([0, 7, 100]),
)
@settings(max_examples=200, deadline=None)
def test_every_shard_has_its_share_of_a_call(rows, call):
    costs, num_shards, shards = Costs(call, 200), 3, [shard for *_, shard in rows]
    buckets = BUCKETS | {"row_buckets": [3, 6]}
    sizes = [tuple(size) for *size, _ in rows]
    calls = tiling.tile(sizes, **buckets, costs=costs, shards=shards, num_shards=num_shards)
    line = list(itertools.chain(*(part for *_, part in calls)))
    assert sorted(line) == list(range(len(rows)))
    shapes = [(bucket(width, WIDTHS), bucket(filled, FILLED)) for width, filled in sizes]
    assert all(shapes[one] >= shapes[two] for one, two in itertools.pairwise(line))

    def needed(part):
        return num_shards * max([shards[row] for row in part].count(shard) for shard in range(3))

    for num_rows, width, filled, part in calls:
        assert needed(part) <= num_rows in (3, 6)
        assert (width, filled) == tuple(max(found) for found in zip(*(shapes[row] for row in part)))

    def cheapest(line):
        if not line:
            return 0
        costs_of = []
        for end in range(1, len(line) + 1):
            part = line[:end]
            if needed(part) <= 6:
                width, filled = (max(found) for found in zip(*(shapes[row] for row in part)))
                places = bucket(needed(part), [3, 6]) // num_shards
                costs_of.append(cost(places, width, filled, costs) + cheapest(line[end:]))
        return min(costs_of)

    total = sum(cost(rows // num_shards, *shape, costs) for rows, *shape, _ in calls)
    assert total == pytest.approx(cheapest(line))


def test_dear_calls_are_few_and_free_ones_fit():
    rows = [(40, 50)] + 5 * [(8, 50)]
    assert len(tiling.tile(rows, **BUCKETS, costs=Costs(1000, 100))) == 2
    assert tiling.tile(rows, **BUCKETS, costs=Costs(0, 100))[0] == (1, 40, 64, [0])


def test_short_rows_do_not_read_as_far_as_long_ones_where_that_costs():
    rows = [(8, 60), (8, 128), (8, 60), (8, 60)]
    together = tiling.tile(rows, **BUCKETS, costs=Costs(7, 1000))
    assert together == [(4, 8, 128, [1, 0, 2, 3])]
    apart = tiling.tile(rows, **BUCKETS, costs=Costs(7, 20))
    assert apart == [(1, 8, 128, [1]), (1, 8, 64, [0]), (2, 8, 64, [2, 3])]


def test_rows_of_a_full_shard_do_not_make_calls_of_their_own():
    """Eight rows alike, four of each of two shards: calls of four have two of each."""
    buckets = BUCKETS | {"row_buckets": [4]}
    options = dict(costs=Costs(7, 100), shards=[0, 0, 0, 0, 1, 1, 1, 1], num_shards=2)
    calls = tiling.tile([(8, 60)] * 8, **buckets, **options)
    assert calls == [(4, 8, 64, [0, 4, 1, 5]), (4, 8, 64, [2, 6, 3, 7])]


def test_docstring():
    assert doctest.testmod(tiling).failed == 0
