"""Which slots of a wave lie with which devices, and where calls have their rows.

A mesh splits the slots of a wave into shards, in order. Devices know nothing of other shards' slots, so the
rows of a call are split the same way: those of a shard stand together and name slots by their places in it.

On one device there is one shard.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jaxagentrl.models import sharding


class Shards(NamedTuple):
    count: int
    size: int  # slots of each

    @property
    def num_slots(self) -> int:
        return self.count * self.size

    def of(self, slot: int) -> int:
        """The shard of a slot."""
        return slot // self.size

    def place(self, slot: int) -> int:
        """The slot's number within its shard. Padding rows name `size`, which is out of range."""
        return slot % self.size

    def rows(self, slots: Iterable[int], num_rows: int) -> list[int]:
        """The row of each slot in a call of `num_rows`, a multiple of `count`: those of a shard one after
        the other from its first row on.

        >>> Shards(count=2, size=4).rows([1, 6, 3, 5], num_rows=4)
        [0, 2, 1, 3]
        """
        following = [shard * (num_rows // self.count) for shard in range(self.count)]
        rows = []
        for slot in slots:
            rows.append(following[self.of(slot)])
            following[self.of(slot)] += 1
        return rows


def of_wave(num_slots: int) -> Shards:
    """Shards for at least so many slots by the mesh in use, all of one size. (Slots that this makes more
    than were asked for stay empty.)"""
    count = sharding.row_shards_in_use()
    return Shards(count, -(-num_slots // count))
