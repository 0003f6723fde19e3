"""Which rows go into which call of a program that takes few shapes only."""

from collections.abc import Sequence


def tile(
    lengths: Sequence[int],
    *,
    row_buckets: Sequence[int],
    width_buckets: Sequence[int],
    call_cost: int,
) -> list[tuple[int, int, list[int]]]:
    """Splits ragged rows into calls so that places and calls together cost least.

    Rows are taken from the longest to the shortest; every call is as wide as its first row needs and
    holds as many as its bucket has, or all that are left. Among these splits the cheapest is found
    exactly, by dynamic programming from the last row back.

    Args:
        lengths: [N] tokens of each row, none above the widest bucket.
        row_buckets, width_buckets: the shapes there are, ascending.
        call_cost: what a call costs beside its places, in places.

    Returns:
        (rows of the bucket, width of the bucket, which rows of `lengths`) for every call.

    >>> tile([90, 20, 30, 25, 31], row_buckets=[2, 4], width_buckets=[32, 96], call_cost=16)
    [(2, 96, [0, 4]), (4, 32, [2, 3, 1])]
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    widths = [next(w for w in width_buckets if w >= lengths[row]) for row in order]
    # cheapest[i]: cost of rows i and later, and the bucket of the call that row i opens.
    cheapest: list[tuple[int, int]] = [(0, 0)] * (len(order) + 1)
    for first in range(len(order) - 1, -1, -1):
        cheapest[first] = min(
            (call_cost + rows * widths[first] + cheapest[min(first + rows, len(order))][0], rows)
            for rows in row_buckets
        )
    calls, first = [], 0
    while first < len(order):
        rows = cheapest[first][1]
        calls.append((rows, widths[first], order[first : first + rows]))
        first += rows
    return calls
