"""The shapes that calls on a wave's slots may have, and which rows go into calls of which shape."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jaxagentrl import sampling, shards, tiling
from jaxagentrl.models.decoder_config import DecoderConfig
from jaxagentrl.shards import Shards
from jaxagentrl.tiling import Costs


@dataclasses.dataclass(frozen=True)
class Shapes:
    shards: Shards
    rows: list[int]  # of a call, over all shards; this and what follows ascending
    widths: list[int]  # of an extend
    filled: list[int]  # positions that a call reads
    extend_costs: Costs
    copy_costs: Costs
    decode_costs: Costs

    @property
    def decode_rows(self) -> list[int]:
        return self.rows if sampling.decodes_some_rows() else [self.shards.num_slots]

    @property
    def further_extend(self) -> float:
        """What the smallest extend costs, in tokens."""
        rows = self.rows[0] // self.shards.count
        return self.extend_costs.call + rows * self.widths[0]

    def extends(self) -> Iterator[tuple[int, int, int]]:
        """(rows, width, filled) of every extend that there can be, the largest last."""
        for rows in self.rows:
            for narrower, width in zip([0, *self.widths], self.widths, strict=False):
                yield from ((rows, width, filled) for filled in self.filled if filled > narrower)

    def forks(self) -> Iterator[tuple[int, int]]:
        """(rows, filled) of every fork, the largest last."""
        return ((rows, filled) for rows in self.rows for filled in self.filled)

    def decodes(self) -> Iterator[tuple[int, int]]:
        """(rows, filled) of every decode call, the largest last."""
        return ((rows, filled) for rows in self.decode_rows for filled in self.filled)

    def tile_extends(
        self, sizes: Mapping[int, tuple[int, int]]
    ) -> list[tuple[tuple[int, int, int], list[int]]]:
        """Splits slots into calls: shape and slots of each. `sizes` are slot → (new tokens, filled positions
        with them)."""
        return self._tile(sizes, self.rows, self.widths, self.extend_costs)

    def tile_forks(self, lengths: Mapping[int, int]) -> list[tuple[int, int, list[int]]]:
        """Splits slots that copy so many positions into calls: rows, filled length and slots of each."""
        sizes = {slot: (1, length) for slot, length in lengths.items()}
        tiles = self._tile(sizes, self.rows, [1], self.copy_costs)
        return [(rows, filled, slots) for (rows, _, filled), slots in tiles]

    def tile_decodes(self, lengths: Mapping[int, int]) -> list[tuple[int, int, dict[int, int]]]:
        """Splits slots that are to hold so many positions into calls: rows, filled length and row → slot of
        each."""
        if not sampling.decodes_some_rows():  # every slot has its row
            filled = tiling.bucket(max(lengths.values()), self.filled)
            return [(self.shards.num_slots, filled, {slot: slot for slot in lengths})]
        sizes = {slot: (1, length) for slot, length in lengths.items()}
        tiles = self._tile(sizes, self.rows, [1], self.decode_costs)
        return [
            (rows, filled, dict(enumerate(sorted(slots)))) for (rows, _, filled), slots in tiles
        ]

    def _tile(
        self,
        sizes: Mapping[int, tuple[int, int]],
        rows: Sequence[int],
        widths: Sequence[int],
        costs: Costs,
    ) -> list[tuple[tuple[int, int, int], list[int]]]:
        slots = list(sizes)
        tiles = tiling.tile(
            list(sizes.values()),
            row_buckets=rows,
            width_buckets=widths,
            filled_buckets=self.filled,
            costs=costs,
            shards=[self.shards.of(slot) for slot in slots],
            num_shards=self.shards.count,
        )
        return [(tuple(shape), [slots[i] for i in part]) for *shape, part in tiles]


def of_wave(
    config: DecoderConfig,
    num_slots: int,
    *,
    max_length: int,
    filled_buckets: Sequence[int],
    width_buckets: Sequence[int],
    row_divisors: Sequence[int],
) -> Shapes:
    """Shapes for calls on so many slots by the mesh in use. Buckets and divisors as of `engine.Engine`."""
    split = shards.of_wave(num_slots)
    return Shapes(
        split,
        rows=tiling.row_buckets(split, row_divisors),
        widths=sorted(min(width, max_length) for width in width_buckets),
        filled=sorted(filled_buckets),
        extend_costs=tiling.extend_costs(config),
        copy_costs=tiling.copy_costs(config),
        decode_costs=tiling.decode_costs(config),
    )
