"""Calls of the sampling programs: which program, with which arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxagentrl import sampling, turns
from jaxagentrl.models import decoder
from jaxagentrl.shards import Shards
from jaxagentrl.turns import Waiting


@dataclasses.dataclass(frozen=True)
class Call:
    """A compiled program and all of its arguments but the wave's device state, which it is given and returns."""

    program: Any  # of jax.jit, all arguments by keyword
    arguments: dict[str, Any]  # all but `held`
    name: tuple[Any, ...]  # what it is and its static sizes; one name is one compiled program


def extend(
    program: sampling.Extend,
    params: decoder.Params,
    rows: Mapping[int, tuple[np.ndarray, int]],
    shape: tuple[int, int, int],
    *,
    shards: Shards,
) -> Call:
    """Appends ids to slots: `rows` are slot → (ids, tokens in its cache), `shape` is (rows, width, filled)."""
    num_rows, width, filled = shape
    tokens = np.zeros((num_rows, width), np.int32)
    slots, lengths, counts = _padded(num_rows, shards)
    for row, (slot, (ids, length)) in zip(shards.rows(rows, num_rows), rows.items(), strict=True):
        tokens[row, : len(ids)] = ids
        slots[row], lengths[row], counts[row] = shards.place(slot), length, len(ids)
    arguments = dict(params=params, tokens=tokens, slots=slots, lengths=lengths, counts=counts)
    return Call(program, arguments | {"filled": filled}, ("extend", *shape))


def fork(
    program: Any, pairs: Sequence[tuple[int, int]], num_rows: int, filled: int, *, shards: Shards
) -> Call:
    """Copies the first `filled` positions of each pair's first slot to its second, of the same shard."""
    targets, sources, _ = _padded(num_rows, shards)
    rows = shards.rows([target for _, target in pairs], num_rows)
    for row, (source, target) in zip(rows, pairs, strict=True):
        sources[row], targets[row] = shards.place(source), shards.place(target)
    return Call(program, dict(sources=sources, targets=targets, filled=filled), ("fork", num_rows, filled))


def decode(
    program: Any,
    params: decoder.Params,
    rows: Mapping[int, tuple[int, Waiting, int]],
    num_rows: int,
    filled: int,
    *,
    shards: Shards,
    stop_ids: np.ndarray,
    until: int = 0,
    restricted: bool = False,
) -> Call:
    """Samples turns: `rows` are row → (slot, what waits there, tokens in its cache).

    Args:
        stop_ids: [K] int32, ids that end a turn.
        until: how many rows may be left in their turn.
        restricted: takes the program with top-k, top-p and min-p even where no row uses them.
    """
    slots, pending, lengths = _padded(num_rows, shards)
    is_ready = np.zeros(num_rows, bool)
    controls = sampling.Controls(
        budgets=np.zeros(num_rows, np.int32),
        temperatures=np.ones(num_rows, np.float32),
        top_k=np.zeros(num_rows, np.int32),
        top_p=np.ones(num_rows, np.float32),
        min_p=np.zeros(num_rows, np.float32),
        stop_ids=np.tile(stop_ids, (num_rows, 1)),
        streams=np.zeros((num_rows, 2), np.uint32),
    )
    for row, (slot, item, length) in rows.items():
        slots[row], lengths[row], is_ready[row] = shards.place(slot), length, item.is_ready
        if not item.is_ready:
            (pending[row],) = item.ids
        controls.budgets[row] = item.budget
        controls.temperatures[row] = item.request.temperature
        controls.top_k[row] = item.request.top_k
        controls.top_p[row] = item.request.top_p
        controls.min_p[row] = item.request.min_p
        controls.streams[row] = turns.stream_words(item.request.stream)
        restricted |= item.request.is_restricted
    arguments = dict(
        params=params,
        slots=slots if sampling.decodes_some_rows() else None,
        pending=pending,
        lengths=lengths,
        is_ready=is_ready,
        controls=controls,
        until=np.int32(until),
        filled=filled,
        restricted=restricted,
    )
    words = ["restricted"] if restricted else []
    return Call(program, arguments, ("decode", num_rows, filled, *words))


def _padded(num_rows: int, shards: Shards) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slot out of range and two zeros for every row."""
    slots = np.full(num_rows, shards.size, np.int32)
    return slots, np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
