"""Which rows go into which call of a program that takes few shapes only, and what calls cost.

Costs are of two cores of an AMD EPYC (products at 100 to 230 GFLOP/s in float32, memory at 20 to 25
GB/s) and of an H100; that they are rough only makes some splits less than the best.
"""

import bisect
import collections
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxagentrl.models.decoder_config import DecoderConfig
from jaxagentrl.shards import Shards


class Costs(NamedTuple):
    """What calls of a program cost, in tokens: what one token's products with the weights take.

    A call of R rows, W tokens wide, that reads S positions of the cache takes
    `call` + R · W · (1 + S / `positions`). On a mesh R is the rows of one shard.
    """

    call: float
    positions: float


def extend_costs(config: DecoderConfig) -> Costs:
    """Of `extend`, which is bound by arithmetic."""
    queries, _, layer = _sizes(config)
    is_cpu = jax.default_backend() == "cpu"
    # A call reads all weights once: the ratio of arithmetic to memory bandwidth, in bfloat16 on an H100
    # 1,000 TFLOP/s to 3.4 TB/s. And it is a call, which is what counts for small models.
    reading, flops, seconds = (16, 230e9, 1e-3) if is_cpu else (256, 500e12, 2e-4)
    call = reading + seconds * flops / (2 * config.num_layers * layer)
    # How fast attention's arithmetic over the cache is, beside that of products with weights: on CPU
    # as measured, on accelerators a guess.
    speed = 0.45 if is_cpu else 0.18
    return Costs(call, speed * layer / (2 * queries))


def decode_costs(config: DecoderConfig) -> Costs:
    """Of `decode` on CPU, which reads the weights once a step and every row's part of the cache."""
    _, held, layer = _sizes(config)
    weights = config.num_layers * layer + config.hidden_size * config.vocab_size
    seconds, seconds_of_position = 2 * weights / 100e9, 8 * config.num_layers * held / 25e9
    # Beside its rows, a call reads the weights and makes mirrors of its part of the cache.
    return Costs(call=12, positions=seconds / seconds_of_position)


def copy_costs(config: DecoderConfig) -> Costs:
    """Of `fork`, in positions that are copied."""
    _, held, _ = _sizes(config)
    is_cpu = jax.default_backend() == "cpu"
    seconds, bandwidth = (1e-3, 20e9) if is_cpu else (2e-4, 3e12)
    return Costs(call=seconds * bandwidth / (16 * config.num_layers * held), positions=1)


def _sizes(config: DecoderConfig) -> tuple[int, int, int]:
    """Width of all queries, width of all keys, and weights of a layer."""
    queries, held = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    layer = config.hidden_size * (2 * queries + 2 * held + 3 * config.intermediate_size)
    return queries, held, layer


def tile(
    rows: Sequence[tuple[int, int]],
    *,
    row_buckets: Sequence[int],
    width_buckets: Sequence[int],
    filled_buckets: Sequence[int],
    costs: Costs,
    shards: Sequence[int] | None = None,
    num_shards: int = 1,
) -> list[tuple[int, int, int, list[int]]]:
    """Splits ragged rows into calls that together cost least.

    Rows are taken from the widest bucket to the narrowest, and within one from the fullest to the
    emptiest; every call is as wide and reads as far as its rows need. Among the ways to cut this line
    of rows the cheapest is found exactly, by dynamic programming from the last row back.

    Args:
        rows: [N] (new tokens, filled positions with them) of each row, none above the last bucket.
        row_buckets, width_buckets, filled_buckets: the shapes there are, ascending.
        costs: of a call.
        shards: [N] the shard of each row, 0 to `num_shards` − 1. A call has an equal share of its rows for
            each; rows of different shards take turns in the line.

    Returns:
        (rows, width and filled length of the shape, which of `rows`) for every call.

    >>> buckets = dict(row_buckets=[2, 4], width_buckets=[32, 96], filled_buckets=[128, 512])
    >>> rows = [(90, 100), (20, 60), (30, 500), (25, 90), (31, 70)]
    >>> tile(rows, **buckets, costs=Costs(call=16, positions=400))
    [(2, 96, 128, [0]), (2, 32, 512, [2, 1]), (2, 32, 128, [3, 4])]
    """
    shards = [0] * len(rows) if shards is None else shards
    shapes = [(bucket(w, width_buckets), bucket(length, filled_buckets)) for w, length in rows]
    order = _line(shapes, shards)
    shapes, shards = [shapes[row] for row in order], [shards[row] for row in order]
    # Calls end where they are full or where the shape changes: any other could take one more row for nothing.
    changes = [i for i in range(1, len(order)) if shapes[i] != shapes[i - 1]]
    # Of each shard, where in the line its rows from the current one on are, the next one last.
    places: list[list[int]] = [[] for _ in range(num_shards)]
    # cheapest[i]: cost of rows i and later, and the call that row i opens: rows, filled length, its end.
    cheapest: list[tuple[float, int, int, int]] = [(0.0, 0, 0, 0)] * (len(order) + 1)
    for first in range(len(order) - 1, -1, -1):
        places[shards[first]].append(first)
        # A call of so many rows ends, at the latest, before the row that finds its shard's share taken.
        limits = [
            min((of[-1 - share] for of in places if share < len(of)), default=len(order))
            for share in (size // num_shards for size in row_buckets)
        ]
        ends = {*limits, *(end for end in changes if first < end <= limits[-1])}
        choices, reach = [], 0
        for begin, end in itertools.pairwise([first, *sorted(ends)]):
            reach = max(reach, shapes[begin][1])
            size = row_buckets[bisect.bisect_left(limits, end)]
            cost = size // num_shards * shapes[first][0] * (1 + reach / costs.positions)
            choices.append((costs.call + cost + cheapest[end][0], size, reach, end))
        cheapest[first] = min(choices)
    calls, first = [], 0
    while first < len(order):
        _, size, reach, end = cheapest[first]
        calls.append((size, shapes[first][0], reach, order[first:end]))
        first = end
    return calls


def _line(shapes: Sequence[tuple[int, int]], shards: Sequence[int]) -> list[int]:
    """The order of rows in `tile`."""
    turns: collections.Counter[tuple] = collections.Counter()
    keys = []
    for row, (width, filled) in enumerate(shapes):
        mine = (width, filled, shards[row])
        keys.append((-width, -filled, turns[mine], row))
        turns[mine] += 1
    return sorted(range(len(shapes)), key=keys.__getitem__)


def row_buckets(shards: Shards, divisors: Sequence[int]) -> list[int]:
    """Row counts of calls on a wave's slots, ascending; multiples of the number of shards."""
    return sorted({shards.count * math.ceil(shards.size / divisor) for divisor in divisors})


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The first of the ascending sizes that holds `size`."""
    return next(held for held in buckets if held >= size)
