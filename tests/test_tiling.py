"""Splits of ragged rows into few shapes."""

import doctest
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxagentrl import tiling

ROWS, WIDTHS = [1, 2, 4], [8, 16, 40]


def cost(calls, call_cost):
    return sum(call_cost + rows * width for rows, width, _ in calls)


def cheapest(widths, call_cost):
    """By trying every sequence of buckets on rows that are sorted already."""
    if not widths:
        return 0
    return min(call_cost + n * widths[0] + cheapest(widths[n:], call_cost) for n in ROWS)


@given(st.lists(st.integers(1, 40), max_size=9), st.sampled_from([0, 7, 100]))
@settings(max_examples=200, deadline=None)
def test_every_row_once_in_shapes_that_exist_and_nothing_cheaper(lengths, call_cost):
    calls = tiling.tile(lengths, row_buckets=ROWS, width_buckets=WIDTHS, call_cost=call_cost)
    assert sorted(itertools.chain(*(part for *_, part in calls))) == list(range(len(lengths)))
    for rows, width, part in calls:
        assert rows in ROWS and width in WIDTHS and 0 < len(part) <= rows
        assert max(lengths[row] for row in part) <= width
    widths = [min(w for w in WIDTHS if w >= n) for n in sorted(lengths, reverse=True)]
    assert cost(calls, call_cost) == cheapest(widths, call_cost)


def test_dear_calls_are_few_and_free_ones_fit():
    lengths = np.array([40, 8, 8, 8, 8, 8])
    options = dict(row_buckets=ROWS, width_buckets=WIDTHS)
    assert len(tiling.tile(lengths, **options, call_cost=1000)) == 2
    assert tiling.tile(lengths, **options, call_cost=0)[0] == (1, 40, [0])


def test_docstring():
    assert doctest.testmod(tiling).failed == 0
