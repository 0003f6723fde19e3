"""Host side of sampling: which slot holds what, and which compiled program runs next.

An episode owns one slot of one wave for its whole life. `Engine.act` takes, for some slots of a
wave, only the ids that are new since the slot's last turn, appends them to the cache and samples the
next turn. History is never prefilled twice.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxagentrl import sampling
from jaxagentrl.models import decoder, kv_cache


@dataclasses.dataclass(frozen=True)
class TurnRequest:
    """What one slot needs for its next turn."""

    slot: int
    new_ids: np.ndarray  # int32, ids appended since the last turn (prompt or glue and observation)
    budget: int  # tokens the turn may have
    temperature: float
    stream: tuple[int, ...]  # words that identify this turn's randomness


@dataclasses.dataclass(frozen=True)
class TurnSample:
    """One sampled turn; all arrays have one entry per sampled token."""

    ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    entropies: np.ndarray  # float32


@dataclasses.dataclass
class Counters:
    """Sums over the engine's life; `tokens_reprefill` is what re-prefilling history would have cost."""

    tokens_extended: int = 0
    tokens_padded: int = 0
    tokens_decoded: int = 0
    tokens_reprefill: int = 0
    turns: int = 0
    compiles: int = 0
    seconds_extend: float = 0.0
    seconds_decode: float = 0.0


def check(
    *,
    num_slots: int,
    num_waves: int,
    max_length: int,
    max_turn_tokens: int,
    filled_buckets: Sequence[int],
    width_buckets: Sequence[int],
    row_divisors: Sequence[int],
    cache_dtype: str,
) -> None:
    """Refuses sizes that an `Engine` cannot work with. Arguments as there.

    Raises:
        ValueError: with the config key (`sampling.…`), what was got and what was expected.
    """
    if num_slots % num_waves:
        raise ValueError(
            f"sampling.num_slots ({num_slots}) must be a multiple of sampling.num_waves "
            f"({num_waves})."
        )
    if max(filled_buckets) != max_length:
        raise ValueError(
            f"sampling.filled_buckets must end at sampling.max_length ({max_length}), got "
            f"{tuple(filled_buckets)}."
        )
    if not 0 < max_turn_tokens < max_length:
        raise ValueError(
            f"sampling.max_turn_tokens must be in 1..{max_length - 1}, below sampling.max_length, "
            f"got {max_turn_tokens}."
        )
    if min(*width_buckets, *row_divisors) < 1:
        raise ValueError(
            "sampling.width_buckets and sampling.row_divisors must be positive, got "
            f"{tuple(width_buckets)} and {tuple(row_divisors)}."
        )
    if cache_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"sampling.cache_dtype must be 'float32' or 'bfloat16', got {cache_dtype!r}."
        )


class Engine:
    """Slots in waves over one model, with fixed buckets.

    Args:
        config: shape of the model.
        num_slots: slots over all waves; a multiple of num_waves.
        num_waves: each wave has its own cache, so one decodes while the environments of another step.
        max_length: positions per slot: the total token budget of an episode.
        max_turn_tokens: most tokens one turn may sample.
        stop_id: id of the end-of-turn token.
        filled_buckets: cache lengths that attention may read, ascending, the last is max_length.
        width_buckets: widths of one extend; longer texts go in several.
        row_divisors: row counts of one extend, as divisors of a wave's slots (1 is the whole wave).
        cache_dtype: dtype of keys and values.
        notice: called with a sentence before a program is compiled.
    """

    def __init__(
        self,
        config: decoder.DecoderConfig,
        *,
        num_slots: int,
        num_waves: int,
        max_length: int,
        max_turn_tokens: int,
        stop_id: int,
        filled_buckets: Sequence[int],
        width_buckets: Sequence[int],
        row_divisors: Sequence[int] = (1, 4),
        cache_dtype: str = "float32",
        notice: Callable[[str], None] = lambda text: None,
    ):
        check(
            num_slots=num_slots,
            num_waves=num_waves,
            max_length=max_length,
            max_turn_tokens=max_turn_tokens,
            filled_buckets=filled_buckets,
            width_buckets=width_buckets,
            row_divisors=row_divisors,
            cache_dtype=cache_dtype,
        )
        self.num_waves = num_waves
        self.slots_per_wave = num_slots // num_waves
        self.max_length = max_length
        self.max_turn_tokens = max_turn_tokens
        self.counters = Counters()
        self._filled_buckets = sorted(filled_buckets)
        self._width_buckets = sorted(width_buckets)
        self._row_buckets = sorted({math.ceil(self.slots_per_wave / d) for d in row_divisors})
        self._notice = notice
        self._seen: set[tuple] = set()
        self._extend = sampling.make_extend(config)
        self._decode = sampling.make_decode(
            config, stop_id=stop_id, max_turn_tokens=max_turn_tokens
        )
        self._caches = [
            kv_cache.init(
                config.num_layers,
                self.slots_per_wave,
                max_length,
                config.num_kv_heads,
                config.head_dim,
                cache_dtype,
            )
            for _ in range(num_waves)
        ]
        shape = (num_waves, self.slots_per_wave)
        self._lengths = np.zeros(shape, np.int32)
        # The last sampled token of a slot's previous turn, which no cache holds yet; −1 for none.
        self._carry = np.full(shape, -1, np.int32)

    def length(self, wave: int, slot: int) -> int:
        """Tokens of the slot's episode so far."""
        return int(self._lengths[wave, slot]) + int(self._carry[wave, slot] >= 0)

    def release(self, wave: int, slot: int) -> None:
        """Gives the slot back. What its cache row holds is junk from here on."""
        self._lengths[wave, slot] = 0
        self._carry[wave, slot] = -1

    def act(
        self, params: decoder.Params, wave: int, requests: Sequence[TurnRequest]
    ) -> Mapping[int, TurnSample]:
        """Appends every request's ids and samples its turn; returns slot → sample."""
        size = self.slots_per_wave
        pending = np.zeros(size, np.int32)
        budgets = np.zeros(size, np.int32)
        temperatures = np.ones(size, np.float32)
        words = len(requests[0].stream)
        streams = np.zeros((size, words), np.uint32)
        appended: dict[int, np.ndarray] = {}
        for request in requests:
            slot = request.slot
            new = self._new_ids(wave, request)
            appended[slot], pending[slot] = new[:-1], new[-1]
            budgets[slot] = request.budget
            temperatures[slot] = request.temperature
            streams[slot] = request.stream
            self.counters.tokens_reprefill += self.length(wave, slot) + len(request.new_ids)
        self._append(params, wave, appended)

        lengths = self._lengths[wave]
        filled = self._bucket(int((lengths + budgets)[budgets > 0].max()), self._filled_buckets)
        self._announce("decode", size, filled)
        sampled, self._caches[wave] = self._decode(
            params,
            self._caches[wave],
            pending,
            lengths,
            budgets,
            temperatures,
            streams,
            filled=filled,
        )
        sampled = jax.device_get(sampled)
        samples = {}
        for request in requests:
            slot, count = request.slot, int(sampled.counts[request.slot])
            samples[slot] = TurnSample(
                ids=sampled.tokens[slot, :count].copy(),
                logprobs=sampled.logprobs[slot, :count].copy(),
                entropies=sampled.entropies[slot, :count].copy(),
            )
            self._lengths[wave, slot] += count
            self._carry[wave, slot] = samples[slot].ids[-1]
            self.counters.tokens_decoded += count
            self.counters.turns += 1
        return samples

    def _new_ids(self, wave: int, request: TurnRequest) -> np.ndarray:
        carry = self._carry[wave, request.slot]
        new = np.asarray(request.new_ids, np.int32)
        if carry >= 0:
            new = np.concatenate([np.array([carry], np.int32), new])
        total = int(self._lengths[wave, request.slot]) + len(new) + request.budget
        if len(request.new_ids) == 0 or not 0 < request.budget <= self.max_turn_tokens:
            raise ValueError(
                f"slot {request.slot}: a turn needs at least one new id and a budget in "
                f"1..{self.max_turn_tokens}, got {len(request.new_ids)} ids, {request.budget} tokens."
            )
        if total > self.max_length + 1:  # the last sampled token needs no cache position
            raise ValueError(
                f"slot {request.slot}: {total - 1} positions needed but a slot has "
                f"{self.max_length} (sampling.max_length). Check budgets before acting."
            )
        return new

    def _append(self, params: decoder.Params, wave: int, rows: dict[int, np.ndarray]) -> None:
        """Extends the cache by each row's ids, in chunks of the widest bucket."""
        rows = {slot: ids for slot, ids in rows.items() if len(ids)}
        while rows:
            order = sorted(rows)
            for start in range(0, len(order), self._row_buckets[-1]):
                self._extend_rows(params, wave, order[start : start + self._row_buckets[-1]], rows)
            rows = {slot: ids[self._width_buckets[-1] :] for slot, ids in rows.items()}
            rows = {slot: ids for slot, ids in rows.items() if len(ids)}

    def _extend_rows(
        self, params: decoder.Params, wave: int, order: list[int], rows: dict[int, np.ndarray]
    ) -> None:
        widest = min(max(len(rows[slot]) for slot in order), self._width_buckets[-1])
        width = self._bucket(widest, self._width_buckets)
        num_rows = self._bucket(len(order), self._row_buckets)
        tokens = np.zeros((num_rows, width), np.int32)
        slots = np.full(num_rows, self.slots_per_wave, np.int32)
        lengths = np.zeros(num_rows, np.int32)
        counts = np.zeros(num_rows, np.int32)
        for row, slot in enumerate(order):
            ids = rows[slot][:width]
            tokens[row, : len(ids)] = ids
            slots[row], lengths[row], counts[row] = slot, self._lengths[wave, slot], len(ids)
        filled = self._bucket(int((lengths + counts).max()), self._filled_buckets)
        self._announce("extend", num_rows, width, filled)
        self._caches[wave] = self._extend(
            params, self._caches[wave], tokens, slots, lengths, counts, filled=filled
        )
        self._lengths[wave, slots[: len(order)]] += counts[: len(order)]
        self.counters.tokens_extended += int(counts.sum())
        self.counters.tokens_padded += num_rows * width - int(counts.sum())

    def _announce(self, program: str, *sizes: int) -> None:
        """Counts programs not seen before and says so before the compiler goes silent."""
        if (program, *sizes) not in self._seen:
            self._seen.add((program, *sizes))
            self.counters.compiles += 1
            self._notice(f"compiling {program} {' x '.join(map(str, sizes))}")

    def _bucket(self, size: int, buckets: Sequence[int]) -> int:
        return next(bucket for bucket in buckets if bucket >= size)
