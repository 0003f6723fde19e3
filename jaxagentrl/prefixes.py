"""Which rows of a cache copy what another holds instead of computing it.

Episodes of a group begin alike and, while they act alike, go on alike; all episodes of a run share the
words before their task. What two rows have in common up to a position has equal keys and values there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A copy moves a row's whole bucket of positions: for fewer tokens than these, computing them is as fast.
LEAST = 8


class Copy(NamedTuple):
    """What a row takes over: the first `length` positions of row `source`, which holds or will hold them.

    That may be all that the row wants only if the source ends there, too: the next token is sampled from the
    hidden state of the last one, and only a row's own last one is kept. Otherwise the row computes its last
    token itself.
    """

    source: int
    length: int


class Rows(NamedTuple):
    """What the S rows of a cache hold."""

    held: np.ndarray  # [S], positions in the cache
    wanted: np.ndarray  # [S], the same when all is appended: more than it holds of a row that is computing
    shortest: np.ndarray  # [S], how many positions at least can be copied of those that it holds

    def part(self, where: slice) -> "Rows":
        return Rows(*(array[where] for array in self))


def common_lengths(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many tokens each two rows have in common from the first on.

    Args:
        ids: [S, M] int32.
        lengths: [S], how many of a row's tokens count.

    Returns:
        [S, S] int. With itself a row has its length in common.

    >>> common_lengths(np.array([[5, 6, 7], [5, 9, 7], [5, 6, 8]]), np.array([3, 3, 2]))
    array([[3, 1, 2],
           [1, 3, 1],
           [2, 1, 2]])
    """
    num_rows, size = len(lengths), max(1, int(lengths.max(initial=0)))
    rows = np.where(np.arange(size) < lengths[:, None], ids[:, :size], -1)
    # In the order of a dictionary two rows share what all neighbours between them share.
    order = np.array(sorted(range(num_rows), key=[row.tobytes() for row in rows].__getitem__), int)
    differs = rows[order[1:]] != rows[order[:-1]]
    shared = np.where(differs.any(1), differs.argmax(1), size)
    between = np.full((num_rows, num_rows), size)
    later = np.triu_indices(num_rows, 1)
    between[later] = shared[later[1] - 1]
    between = np.minimum.accumulate(between, 1)
    between = np.minimum(between, between.T)
    common = np.empty_like(between)
    common[np.ix_(order, order)] = between
    return np.minimum(common, np.minimum(lengths[:, None], lengths))


def find(
    ids: np.ndarray,
    rows: Rows,
    computing: Sequence[int],
    *,
    further: float,
) -> dict[int, Copy]:
    """What rows may copy, the longest prefix of each.

    Args:
        ids: [S, M] int32, what rows hold and, behind it, what they are to append.
        computing: rows that have something to append, by priority: a row may wait for what those before it
            have yet to compute, and copy it.
        further: tokens that must be saved for rows to wait for a part of what another computes and
            append the rest after it, which takes further calls of extend.

    Returns:
        Row → what it copies, for rows that save `LEAST` tokens by it.
    """
    if not computing:
        return {}
    held, wanted, _ = rows
    common = common_lengths(ids, wanted)
    np.fill_diagonal(common, 0)
    copies = _find(common, rows, computing, partly=True)
    late = [row for row, copy in copies.items() if held[copy.source] < copy.length < wanted[row] - 1]
    if late and sum(copies[row].length - held[row] for row in late) < further:
        copies = _find(common, rows, computing, partly=False)
    return copies


def find_within(
    ids: np.ndarray,
    rows: Rows,
    computing: Sequence[int],
    *,
    size: int,
    further: float,
) -> dict[int, Copy]:
    """`find` within each `size` rows, which lie on the same device: nothing is copied between devices, who
    compute what they have in common at the same time."""
    copies = {}
    for start in range(0, len(rows.held), size):
        mine = slice(start, start + size)
        found = find(
            ids[mine],
            rows.part(mine),
            [row - start for row in computing if start <= row < start + size],
            further=further,
        )
        copies |= {start + row: Copy(start + copy.source, copy.length) for row, copy in found.items()}
    return copies


def _find(common, rows: Rows, computing, *, partly: bool) -> dict[int, Copy]:
    """`find` with the tokens in common [S, S]; whether rows may wait for a part."""
    held, wanted, shortest = rows
    promised = np.zeros_like(held)
    copies = {}
    for row in computing:
        but_one = wanted[row] - 1
        now = np.minimum(np.minimum(common[row], held), but_one)
        later = np.minimum(common[row], promised)
        later = np.where(promised == wanted[row], later, np.minimum(later, but_one))
        now, later = (np.where(n < shortest, 0, n) for n in (now, later))
        best = Copy(int(now.argmax()), int(now.max()))
        waits = Copy(int(later.argmax()), int(later.max()))
        if best.length < held[row] + LEAST:
            best = Copy(row, int(held[row]))  # nothing
        is_no_call_more = waits.length >= but_one and waits.length > best.length
        if is_no_call_more or (partly and waits.length >= best.length + LEAST):
            best = waits
        if best.length >= held[row] + LEAST:
            copies[row] = best
        promised[row] = wanted[row]
    return copies
