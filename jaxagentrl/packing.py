"""What a step works off: stacks of micro-batches, of the batch's rows or of packed ones. Numpy.

Estimators and weights are computed on the batch as it is, one trajectory per row; a stack comes
after them and moves nothing but an index. `Rows` names rows of the batch. `Packed` has several
trajectories in a row, by first-fit: `places` says for every token of a packed row which entry of the
batch's [B, L] arrays it is. Attention stays within a trajectory by its segment id, positions start at
0 in each.

How many micro-batches a stack may hold is its shape, how many it does is data: steps of different
sizes share one program.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxagentrl.models import cudnn_packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Micro-batches of rows of the batch: M of them, R rows, cut to `length` positions. int32."""

    rows: jax.Array | np.ndarray  # [M, R]; B, which is out of range, on padding
    count: jax.Array | np.ndarray  # [] micro-batches that hold anything
    length: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, length) of a micro-batch."""
        return self.rows.shape[1], self.length

    def in_parts(self, _: int) -> tuple["Rows", "Rows"]:
        """As parts of a mesh share it out, and the dimension along which they do, see `by_device.over_data`."""
        return self, Rows(1, None, self.length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Micro-batches of packed rows: M of them, R rows, L positions. int32."""

    places: jax.Array | np.ndarray  # [M, R, L] row · width + column; rows · width on padding
    positions: jax.Array | np.ndarray  # [M, R, L] from 0 in every trajectory; 0 on padding
    segment_ids: jax.Array | np.ndarray  # [M, R, L] number within the row; −1 on padding
    count: jax.Array | np.ndarray  # [] micro-batches that hold anything
    # Bound on the trajectories of a row, for kernels that want one; None where none does. Static.
    max_segments: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, length) of a micro-batch."""
        return self.places.shape[1:]

    def in_parts(self, _: int) -> tuple["Packed", "Packed"]:
        """See `Rows.in_parts`."""
        return self, Packed(1, 1, 1, None, self.max_segments)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Shares out items over bins: longest first, each into the first bin that has room.

    Uses at most 11/9 of the fewest bins possible, plus 6/9 (Dósa 2007).

    Returns:
        Indices into `lengths` by bin. Deterministic.

    Raises:
        ValueError: an item is larger than a bin.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(
            f"a trajectory has {max(lengths)} tokens but packed rows have {capacity}: raise the "
            "largest of learner.length_buckets."
        )
    bins: list[list[int]] = []
    room = np.full(len(lengths), capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = int(np.argmax(room >= lengths[index]))  # an empty bin at the latest
        if fitting == len(bins):
            bins.append([])
        bins[fitting].append(index)
        room[fitting] -= lengths[index]
    return bins


def check_most_rows(num_rows: int, most_rows: int) -> None:
    """Raises ValueError where a step has more rows than its shapes were made for."""
    if num_rows > most_rows:
        raise ValueError(f"most_rows is {most_rows}, but a step has {num_rows} rows: raise it to the most of any step.")


def rows_per_part(length: int, *, tokens_per_part: int, row_multiple: int) -> int:
    """R of micro-batches of rows of this length: about tokens_per_part / length."""
    return max(tokens_per_part // (length * row_multiple), 1) * row_multiple


def pack(
    rows: np.ndarray,
    lengths: np.ndarray,
    *,
    shape: tuple[int, int],
    length: int,
    tokens_per_part: int,
    row_multiple: int,
    most_rows: int | None = None,
    contexts: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Packed:
    """Index of the batch rows `rows` packed into micro-batches of about tokens_per_part tokens.

    Args:
        rows: [n] rows of the batch to pack.
        lengths: tokens of every row of the batch, at least those named.
        shape: (B, width) of the batch's arrays.
        length: L of packed rows.
        tokens_per_part: upper bound of R × L, as long as `row_multiple` rows fit.
        row_multiple: R is a multiple of this.
        most_rows: an upper bound of `len(rows)` over all steps; without `contexts` a packed row holds one of them
            at least, which bounds M.
        contexts: for every row of the batch the (start, size) of what the model saw as one text,
            see `Trajectory.contexts`; each is packed by itself. None: a row is one text.

    Returns:
        M is what `most_rows` can need: one program for all steps. Where that is not known, it is a power
        of two, so that the numbers that occur share few programs.

    Raises:
        ValueError: more rows than `most_rows`, or one that is longer than L.
    """
    if contexts is None:
        check_most_rows(len(rows), len(rows) if most_rows is None else most_rows)
        pieces = [(int(row), 0, int(lengths[row])) for row in rows]
    else:
        pieces = [(int(row), start, size) for row in rows for start, size in contexts[row]]
    bins = first_fit([size for _, _, size in pieces], length)
    per_part = rows_per_part(
        length, tokens_per_part=tokens_per_part, row_multiple=row_multiple
    )
    count = -(-len(bins) // per_part)
    if most_rows is None or contexts is not None:
        capacity = 1 << max(count - 1, 0).bit_length()
    else:
        capacity = -(-most_rows // per_part)
    full = (capacity * per_part, length)
    places = np.full(full, shape[0] * shape[1], np.int32)
    positions, segment_ids = np.zeros(full, np.int32), np.full(full, -1, np.int32)
    for number, members in enumerate(bins):
        start = 0
        for segment, member in enumerate(members):
            row, first, size = pieces[member]
            span = (number, slice(start, start + size))
            places[span] = row * shape[1] + first + np.arange(size)
            positions[span] = np.arange(size)
            segment_ids[span] = segment
            start += size
    parts = (capacity, per_part, length)
    return Packed(
        places.reshape(parts),
        positions.reshape(parts),
        segment_ids.reshape(parts),
        np.int32(count),
        cudnn_packed.segment_bound(max(map(len, bins), default=1)),
    )
