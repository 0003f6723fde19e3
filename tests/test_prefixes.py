"""Which rows copy what another holds, against the definition."""

import doctest

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxagentrl import prefixes
from jaxagentrl.prefixes import LEAST, Copy


def in_common(one, other) -> int:
    count = 0
    for mine, theirs in zip(one, other):
        if mine != theirs:
            break
        count += 1
    return count


rows = st.lists(st.lists(st.integers(0, 1), max_size=12), min_size=1, max_size=6)


def packed(texts, size=16):
    """What lies behind a row's end must not count: sevens, which are nobody's tokens."""
    ids = np.full((len(texts), size), 7, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    return ids, np.array([len(text) for text in texts])


def whole(held, wanted):
    """Rows that have lost nothing."""
    return prefixes.Rows(held, wanted, np.zeros_like(held))


def test_the_example_is_true():
    assert doctest.testmod(prefixes).failed == 0


@hypothesis.given(rows)
def test_common_lengths_are_those_of_each_pair(texts):
    expected = [[in_common(one, other) for other in texts] for one in texts]
    np.testing.assert_array_equal(prefixes.common_lengths(*packed(texts)), expected)


@hypothesis.given(rows, st.data(), st.booleans())
def test_what_is_copied_is_there_in_time(texts, data, partly):
    texts = [[token for token in text for _ in range(4)] for text in texts]  # longer than LEAST
    ids, wanted = packed(texts, 64)
    held = np.array([data.draw(st.integers(0, length)) for length in wanted])
    computing = [row for row in range(len(texts)) if held[row] < wanted[row]]
    copies = prefixes.find(ids, whole(held, wanted), computing, further=0 if partly else np.inf)
    done = set()
    for row in computing:
        # The longest that another row holds now, or that a row before holds when it is done; its last
        # token is a row's own, unless that of a row before is the same one.
        now, later = 0, 0
        for other, text in enumerate(texts):
            shared, but_one = in_common(texts[row], text), wanted[row] - 1
            if other != row:
                now = max(now, min(shared, held[other], but_one))
            if other in done:
                is_whole = shared == wanted[other] == wanted[row]
                later = max(later, shared if is_whole else min(shared, wanted[other], but_one))
        if row in copies:
            source, length = copies[row]
            assert length >= held[row] + LEAST and in_common(texts[row], texts[source]) >= length
            assert source != row
            assert length <= held[source] or (source in done and length <= wanted[source])
            if length > held[source]:
                assert partly or length >= wanted[row] - 1
            assert length < wanted[row] or (source in done and wanted[source] == length)
            assert length >= now
        else:
            assert now < held[row] + LEAST
            assert later < held[row] + LEAST or (not partly and later < wanted[row] - 1)
        done.add(row)


def test_a_row_waits_for_a_part_only_where_that_is_wanted():
    system, mine, yours = [1] * 20, [2] * 10, [3] * 10
    ids, wanted = packed([system + mine, system + yours, system + mine], 32)
    held = np.zeros(3, int)
    expected = {1: Copy(0, 20), 2: Copy(0, 30)}
    assert prefixes.find(ids, whole(held, wanted), [0, 1, 2], further=20) == expected
    assert prefixes.find(ids, whole(held, wanted), [0, 1, 2], further=21) == {2: Copy(0, 30)}
    # What is there already is worth no wait, unless nothing is left to compute after it.
    held[1] = 30
    assert prefixes.find(ids, whole(held, wanted), [0, 2], further=20) == {0: Copy(1, 20), 2: Copy(0, 30)}


def test_what_a_row_has_lost_is_not_copied_from_it():
    texts = [[1] * 40, [1] * 20 + [2] * 10, [1] * 30 + [3] * 10]
    ids, wanted = packed(texts, 40)
    held = np.array([40, 0, 0])
    assert prefixes.find(ids, whole(held, wanted), [1, 2], further=0) == {1: Copy(0, 20), 2: Copy(0, 30)}
    lost = prefixes.Rows(held, wanted, np.array([25, 0, 0]))
    assert prefixes.find(ids, lost, [1, 2], further=0) == {2: Copy(0, 30)}
    # But from a row that will compute it.
    lost = prefixes.Rows(held, wanted, np.array([31, 0, 0]))
    assert prefixes.find(ids, lost, [1, 2], further=0) == {2: Copy(1, 20)}


@hypothesis.given(rows, st.data())
def test_rows_copy_from_their_own_shard_what_they_would_copy_if_it_were_alone(texts, data):
    texts = [[token for token in text for _ in range(4)] for text in texts]
    ids, wanted = packed(texts, 64)
    held = np.array([data.draw(st.integers(0, length)) for length in wanted])
    computing = [row for row in range(len(texts)) if held[row] < wanted[row]]
    size = data.draw(st.integers(1, 3))
    copies = prefixes.find_within(ids, whole(held, wanted), computing, size=size, further=0)
    alone = {}
    for start in range(0, len(texts), size):
        mine = np.arange(start, min(start + size, len(texts)))
        among = [row - start for row in computing if row in mine]
        found = prefixes.find(ids[mine], whole(held, wanted).part(mine), among, further=0)
        alone |= {start + row: Copy(start + copy.source, copy.length) for row, copy in found.items()}
    assert copies == alone
    assert all(row // size == copy.source // size for row, copy in copies.items())
