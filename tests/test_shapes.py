"""Shards of slots, and the shapes that calls on them may have."""

import doctest

import pytest
from test_engine import CONFIG

from jaxagentrl import shapes, shards
from jaxagentrl.models import sharding
from jaxagentrl.shards import Shards

OPTIONS = dict(max_length=96, filled_buckets=(96, 32), width_buckets=(16, 128, 40), row_divisors=(1, 3))


def test_docstring():
    assert doctest.testmod(shards).failed == 0


def test_slots_are_split_in_order_and_rows_of_a_shard_stand_together():
    split = Shards(count=3, size=4)
    assert split.num_slots == 12
    assert [split.of(slot) for slot in (0, 3, 4, 11)] == [0, 0, 1, 2]
    assert [split.place(slot) for slot in (0, 3, 4, 11)] == [0, 3, 0, 3]
    rows = split.rows([2, 9, 8, 0, 5], num_rows=6)
    assert rows == [0, 4, 5, 1, 2]
    assert Shards(1, 12).rows([7, 2, 5], num_rows=4) == [0, 1, 2]


@pytest.mark.parametrize(
    "data, num_slots, split, rows",
    [(None, 10, (1, 10), [4, 10]), (4, 10, (4, 3), [4, 12]), (8, 3, (8, 1), [8])],
)
def test_every_shard_has_as_many_slots_and_rows(data, num_slots, split, rows):
    mesh = data and sharding.make_mesh(data=data, fsdp=1, tensor=1)
    with sharding.use(mesh):
        found = shapes.of_wave(CONFIG, num_slots, **OPTIONS)
        assert found.decode_rows == (rows if mesh is None else [found.shards.num_slots])
    assert found.shards == split
    assert found.rows == rows and found.widths == [16, 40, 96] and found.filled == [32, 96]
    # A width that the next narrower one's rows fill needs no call that reads less.
    assert list(found.extends())[-5:] == [
        (rows[-1], 16, 32), (rows[-1], 16, 96), (rows[-1], 40, 32), (rows[-1], 40, 96), (rows[-1], 96, 96)
    ]
    assert list(found.forks())[-1] == (rows[-1], 96)


def test_calls_name_every_slot_once():
    found = shapes.of_wave(CONFIG, 10, **OPTIONS)
    sizes = {slot: (1 + 3 * slot, 5 + 9 * slot) for slot in range(10)}
    tiles = found.tile_extends(sizes)
    assert sorted(slot for _, slots in tiles for slot in slots) == list(range(10))
    for (rows, width, filled), slots in tiles:
        assert len(slots) <= rows and all(sizes[s][0] <= width and sizes[s][1] <= filled for s in slots)
    for tiles in (found.tile_forks, found.tile_decodes):
        lengths = {slot: 5 + 9 * slot for slot in range(10)}
        calls = [
            (rows, filled, list(slots.values()) if isinstance(slots, dict) else slots)
            for rows, filled, slots in tiles(lengths)
        ]
        assert sorted(slot for *_, slots in calls for slot in slots) == list(range(10))
        for rows, filled, slots in calls:
            assert len(slots) <= rows and max(lengths[slot] for slot in slots) <= filled
