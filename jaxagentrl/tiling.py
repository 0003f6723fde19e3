"""Which rows go into which call of a program that takes few shapes only, and what calls cost.

Costs are of two cores of an AMD EPYC (products at 100 to 180 GFLOP/s in float32, memory at 20 to 25
GB/s) and of an H100; that they are rough only makes some splits less than the best.
"""

import math
from collections.abc import Sequence

import jax

from jaxagentrl.models.decoder_config import DecoderConfig

# What a decode call on CPU costs beside its rows, in rows: the weights read and its cache laid out.
DECODE_CALL_ROWS = 12


def extend_call_cost() -> int:
    """What a call of extend costs beside its places (tokens computed, padding or not), in places.

    It reads all weights once, so this is the ratio of arithmetic to memory bandwidth: in bfloat16 on
    an H100 1,000 TFLOP/s to 3.4 TB/s.
    """
    return 16 if jax.default_backend() == "cpu" else 256


def row_positions(config: DecoderConfig) -> int:
    """Filled positions that take a decode step on CPU as long as one row's products with the weights."""
    queries, held = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    layer = config.hidden_size * (2 * queries + 2 * held + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.hidden_size * config.vocab_size
    seconds, seconds_of_position = 2 * weights / 100e9, 8 * config.num_layers * held / 25e9
    return math.ceil(seconds / seconds_of_position)


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
