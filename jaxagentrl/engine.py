"""Host side of sampling: which slot holds what, and which compiled program runs next.

An episode owns one slot of one wave for its whole life. `submit` queues, for a slot, only the ids
that are new since its last turn; `launch` sends the wave's work to the device and returns at once;
`receive` waits for it and returns the turns that ended. History is never prefilled twice.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import jax
import numpy as np

from jaxagentrl import calls, compiles, dispatch, prefixes, sampling, shapes, turns
from jaxagentrl.models import decoder, kv_cache
from jaxagentrl.turns import Counters, TurnRequest, TurnSample, Waiting


@dataclasses.dataclass
class _Launched:
    """What the device is doing for a wave."""

    markers: list[Future[jax.Array]]  # ready when extend and fork are
    decoding: Future[tuple[dict[int, TurnSample], float, float]]  # of `_decode_turns`


class Engine:
    """Slots in waves over one model, with fixed buckets.

    Args:
        config: shape of the model.
        num_slots: slots over all waves; a multiple of num_waves.
        num_waves: each wave has its own cache, so one decodes while the environments of another step;
            on CPU they run side by side (`dispatch.side_by_side`).
        max_length: positions per slot: the total token budget of an episode.
        max_turn_tokens: most tokens one turn may sample.
        stop_ids: ids that end a turn, the end-of-turn token among them.
        filled_buckets: cache lengths that attention may read, ascending, the last is max_length.
        width_buckets: widths of one extend; longer texts go in several.
        row_divisors: row counts of one extend, and on CPU of one decode call, as divisors of a wave's
            slots (1 is the whole wave).
        cache_dtype: dtype of keys and values: "float32", "bfloat16", or "int8" with a scale per
            head and position.
        linger_share: a launch ends once at most this share of the rows that decode is still in its
            turn; those go on with the wave's next. 0 waits for all.
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
        stop_ids: Sequence[int],
        filled_buckets: Sequence[int],
        width_buckets: Sequence[int],
        row_divisors: Sequence[int] = (1, 4),
        cache_dtype: str = "float32",
        linger_share: float = 0.0,
        notice: Callable[[str], None] = lambda text: None,
    ):
        sampling.check(
            num_slots=num_slots,
            num_waves=num_waves,
            max_length=max_length,
            max_turn_tokens=max_turn_tokens,
            filled_buckets=filled_buckets,
            width_buckets=width_buckets,
            row_divisors=row_divisors,
            cache_dtype=cache_dtype,
            linger_share=linger_share,
        )
        self.num_waves = num_waves
        self.slots_per_wave = num_slots // num_waves
        self.max_length = max_length
        self.max_turn_tokens = max_turn_tokens
        self._vocab_size = config.vocab_size
        self.stop_ids = frozenset(int(token) for token in stop_ids)
        self._counters = [Counters() for _ in range(num_waves)]  # also the wave's thread adds to these, while it is launched
        self._compiled = compiles.Account()
        self._queues = dispatch.for_waves(num_waves)
        self._shapes = shapes.of_wave(
            config,
            self.slots_per_wave,
            max_length=max_length,
            filled_buckets=filled_buckets,
            width_buckets=width_buckets,
            row_divisors=row_divisors,
        )
        self._linger_share = linger_share
        self._notice = notice
        self._seen: set[tuple] = set()
        self._stop_ids = np.array(sorted(self.stop_ids), np.int32)
        self._extend = sampling.make_extend(config, cache_dtype)
        self._fork = sampling.make_fork()
        self._decode = sampling.make_decode(config, max_turn_tokens=max_turn_tokens)
        # Compiled: on a mesh a device makes its own part, not the whole first.
        num_rows, most = self._shapes.shards.num_slots, sampling.most(width_buckets, max_turn_tokens)
        empty = jax.jit(lambda: sampling.init(config, num_rows, max_length, cache_dtype, most=most))
        self._held = [empty() for _ in range(num_waves)]
        self._ring = kv_cache.ring(config.sliding_window, most=most, max_length=max_length)
        shape = (num_waves, self.slots_per_wave)
        self._lengths = np.zeros(shape, np.int32)
        # How far a slot's row was ever written: of rows that are rings, what lies too far behind is gone.
        self._reached = np.zeros(shape, np.int32)
        # The last sampled token of a slot's previous turn, which no cache holds yet; −1 for none.
        self._carry = np.full(shape, -1, np.int32)
        self._waiting: list[dict[int, Waiting]] = [{} for _ in range(num_waves)]
        # What a slot's cache row holds, behind it what it is to append and what was sampled last.
        self._ids = np.zeros((*shape, max_length + 1), np.int32)
        self._launched: list[_Launched | None] = [None] * num_waves

    @property
    def counters(self) -> Counters:
        """Sums over the engine's life until now."""
        return dataclasses.replace(
            sum(self._counters, Counters()),
            compiles=self._compiled.count,
            seconds_compile=self._compiled.seconds,
        )

    def length(self, wave: int, slot: int) -> int:
        """Tokens of the slot's episode so far."""
        return int(self._lengths[wave, slot]) + int(self._carry[wave, slot] >= 0)

    def is_busy(self, wave: int, slot: int | None = None) -> bool:
        """Whether a turn of the wave (of the slot) is on its way."""
        return bool(self._waiting[wave]) if slot is None else slot in self._waiting[wave]

    def release(self, wave: int, slot: int) -> None:
        """Gives the slot back. What its cache row holds is junk from here on."""
        self._check_settled(wave)
        self._waiting[wave].pop(slot, None)
        self._lengths[wave, slot] = self._reached[wave, slot] = 0
        self._carry[wave, slot] = -1

    def rewind(self, wave: int, slot: int, ids: np.ndarray) -> int:
        """Keeps what the slot's cache row has in common with the beginning of `ids`, but not all of them,
        and gives back the rest. Returns how many positions those are; the slot is to go on with ids[n:]. None
        where a row that is a ring has lost what the next token is to see of them."""
        self._check_settled(wave)
        held = self._ids[wave, slot, : max(0, min(len(ids) - 1, int(self._lengths[wave, slot])))]
        differs = held != ids[: len(held)]
        kept = int(differs.argmax()) if differs.any() else len(held)
        reached = self._reached[wave, slot]
        if kept < self._shortest(reached):
            kept = 0
        self.release(wave, slot)
        if kept:
            self._lengths[wave, slot], self._reached[wave, slot] = kept, reached
        return kept

    def clear(self) -> None:
        """Frees every slot. What the device is still doing is waited for and dropped, its errors too."""
        # Whatever was asked of the threads is before this in their queues, also what an interrupt has kept
        # from being noted as launched.
        wait([queue.put(lambda: None) for queue in self._queues])
        self._launched = [None] * self.num_waves
        for waiting in self._waiting:
            waiting.clear()
        self._lengths[:] = self._reached[:] = 0
        self._carry[:] = -1

    def cut(self, wave: int, slot: int, sample: TurnSample, keep: int) -> TurnSample:
        """Takes back all but the first `keep` ≥ 1 tokens of the slot's last turn.

        Raises:
            ValueError: as many tokens cannot be kept, or the slot's last turn is another one, or cut already.
        """
        self._check_settled(wave)
        if not 0 < keep <= len(sample.ids):
            raise ValueError(f"a turn of {len(sample.ids)} tokens cannot be cut to {keep}.")
        end = self.length(wave, slot)
        held = self._ids[wave, slot, max(0, end - len(sample.ids)) : end]
        if self.is_busy(wave, slot) or self._carry[wave, slot] < 0 or not np.array_equal(held, sample.ids):
            raise ValueError(f"the sample is not what slot {slot} of wave {wave} sampled last: cut it before the next turn, once.")
        self._lengths[wave, slot] -= len(sample.ids) - keep
        self._carry[wave, slot] = sample.ids[keep - 1]
        return TurnSample(sample.ids[:keep], sample.logprobs[:keep], sample.entropies[:keep])

    def submit(self, wave: int, request: TurnRequest) -> None:
        """Queues a slot's next turn for the wave's next `launch`.

        Raises:
            ValueError: the request is none, see `turns.check`, or more than the slot holds.
        """
        self._check_settled(wave)
        turns.check(request, num_slots=self.slots_per_wave, most=self.max_turn_tokens, vocab_size=self._vocab_size)
        slot, new = request.slot, np.asarray(request.new_ids, np.int32)
        if slot in self._waiting[wave]:
            raise ValueError(f"slot {slot} of wave {wave} is in the middle of a turn.")
        self._counters[wave].tokens_reprefill += self.length(wave, slot) + len(new)
        if self._carry[wave, slot] >= 0:
            new = np.concatenate([self._carry[wave, slot : slot + 1], new])
        positions = int(self._lengths[wave, slot]) + len(new) + request.budget - 1
        if positions > self.max_length:  # the last sampled token needs no cache position
            raise ValueError(
                f"slot {slot}: {positions} positions needed but a slot has {self.max_length} "
                "(sampling.max_length). Check budgets before submitting."
            )
        begin = int(self._lengths[wave, slot])
        self._ids[wave, slot, begin : begin + len(new)] = new
        self._carry[wave, slot] = -1
        self._waiting[wave][slot] = Waiting(request, new)

    def launch(
        self, params: decoder.Params, wave: int, when_over: Callable[[], None] = lambda: None
    ) -> None:
        """Sends the wave's queued work to the device; returns before it is done. Then `when_over` is
        called, by another thread; not where nothing was queued.

        A prompt longer than the widest bucket is appended one bucket a launch while other rows have
        something to decode, so that it does not hold them up. What another slot of the wave holds, or
        is about to, after the same tokens is copied from there.
        """
        self._check_settled(wave)
        waiting = self._waiting[wave]
        if not waiting:
            return
        self._counters[wave].turns_launched += len(waiting)
        self._counters[wave].slots_launched += self.slots_per_wave
        self._find_leaders(wave)
        markers: list[Future[jax.Array]] = []
        slots: list[int] = []
        while not slots:
            had: set[int] = set()  # slots that had their bucket
            while more := self._copy_leaders(wave) + self._append(params, wave, had):
                markers += more
            slots = sorted(slot for slot, item in waiting.items() if len(item.ids) <= 1)
        decoding = self._queues[wave].put(lambda: self._decode_turns(params, wave, slots))
        self._launched[wave] = _Launched(markers, decoding)
        decoding.add_done_callback(lambda _: when_over())

    def wait(self, wave: int) -> list[int]:
        """Waits until the launch of this wave is over, or that of another; returns the waves of which it
        is, none if this one was not launched."""
        launched = self._launched[wave]
        if launched is None:
            return []
        self._wait(wave, [other.decoding for other in self._launched if other is not None])
        return self.over()

    def over(self) -> list[int]:
        """The waves whose launch is over: to receive them takes no time."""
        launched = enumerate(self._launched)
        return [wave for wave, each in launched if each is not None and each.decoding.done()]

    def receive(self, wave: int) -> Mapping[int, TurnSample]:
        """Waits for the wave's launch; returns slot → sample for every turn that ended."""
        launched = self._launched[wave]
        if launched is None:
            return {}
        self._wait(wave, [launched.decoding])
        ended, *_ = launched.decoding.result()
        for slot in ended:
            del self._waiting[wave][slot]
        self._launched[wave] = None  # not before: an interrupt leaves it to `clear`
        return ended

    def _wait(self, wave: int, decoding: Sequence[Future]) -> None:
        """Until the wave's prompts are appended, and one of these is over."""
        before = self._waited()
        jax.block_until_ready([marker.result() for marker in self._launched[wave].markers])
        extended = self._waited()
        _, decoded, fetched = wait(decoding, return_when=FIRST_COMPLETED).done.pop().result()
        counters = self._counters[wave]
        counters.seconds_extend += max(0.0, extended - before)
        counters.seconds_decode += max(0.0, decoded - extended)
        counters.seconds_transfer += max(0.0, fetched - max(extended, decoded))

    def _waited(self) -> float:
        """A clock that stands still for compiling, which is counted by itself."""
        return time.monotonic() - self._compiled.seconds

    def _decode_turns(
        self, params: decoder.Params, wave: int, slots: Sequence[int]
    ) -> tuple[dict[int, TurnSample], float, float]:
        """In the wave's thread, while the host leaves the wave's rows alone, until it receives it: samples the turns of
        these slots. Returns those that ended, when the device was done, and when its samples were here.

        Rows that are done cost nothing for long: a call ends once those that are left fit fewer rows, and
        these, of all calls, are split into calls anew.
        """
        waiting, ended = self._waiting[wave], {}
        decoded = fetched = self._waited()
        num_lingering = int(self._linger_share * len(slots))
        while len(slots) > num_lingering:
            for num_rows, filled, rows in self._tile_decodes(wave, slots):
                fewer = [size for size in self._shapes.decode_rows if size < num_rows]
                until = max([num_lingering * len(rows) // len(slots), *fewer])
                begun = {r: (s, waiting[s], int(self._lengths[wave, s])) for r, s in rows.items()}
                call = self._decode_call(params, begun, num_rows, filled, until=until)
                sampled = jax.block_until_ready(self._call(wave, call))
                decoded = self._waited()
                sampled = jax.device_get(sampled)
                fetched = self._waited()
                ended |= self._take(wave, rows, num_rows, sampled)
            slots = [slot for slot in slots if slot not in ended]
        return ended, decoded, fetched

    def _take(
        self, wave: int, rows: Mapping[int, int], num_rows: int, sampled: sampling.Sampled
    ) -> dict[int, TurnSample]:
        """Takes in what a decode call sampled for its rows; returns the turns that ended."""
        self._counters[wave].decode_steps += int(sampled.steps)
        self._counters[wave].decode_places += int(sampled.steps) * num_rows
        ended = {}
        for row, slot in rows.items():
            item, count = self._waiting[wave][slot], int(sampled.counts[row])
            arrays = (sampled.tokens, sampled.logprobs, sampled.entropies)
            item.pieces.append(TurnSample(*(array[row, :count].copy() for array in arrays)))
            begin = int(self._lengths[wave, slot]) + len(item.ids)
            self._ids[wave, slot, begin : begin + count] = item.pieces[-1].ids
            self._fill(wave, slot, begin + count - 1)  # not the last one, if there is one
            self._counters[wave].tokens_decoded += count
            self._counters[wave].decode_places += item.is_ready
            if sampled.unfinished[row]:
                if count:
                    item.ids = item.pieces[-1].ids[-1:]
                continue
            ended[slot] = turns.join(item.pieces)
            self._carry[wave, slot] = ended[slot].ids[-1]
            self._counters[wave].turns += 1
        return ended

    def warm_up(self, params: decoder.Params, *, restricted: bool = False) -> None:
        """Compiles every program that can be needed, by calls that change nothing.

        Args:
            restricted: whether turns will use top-k, top-p or min-p.
        """
        every_call = list(self._every_call(params, restricted))

        def compilation(call: calls.Call) -> Callable[[], None]:
            lowered = call.program.lower(held=self._held[0], **call.arguments)

            def compile_it() -> None:
                self._announce(call)
                lowered.compile()

            return compile_it

        with self._compiled.of(compiles.count):
            compiles.ahead(map(compilation, every_call))
        for call in every_call:
            self._run(0, call).result()
        jax.block_until_ready(self._held[0])

    def _every_call(self, params: decoder.Params, restricted: bool) -> Iterator[calls.Call]:
        """One of every program, on no rows."""
        for shape in self._shapes.extends():
            yield self._extend_call(params, {}, shape)
        for shape in self._shapes.forks():
            yield self._fork_call([], *shape)
        for shape in self._shapes.decodes():
            yield self._decode_call(params, {}, *shape, restricted=restricted)

    def _fill(self, wave: int, slot: int, length: int) -> None:
        """Notes that a slot's row was written as far as this."""
        self._lengths[wave, slot] = length
        self._reached[wave, slot] = max(self._reached[wave, slot], length)

    def _shortest(self, reached: np.ndarray) -> np.ndarray:
        """The fewest positions that rows written so far can be cut to; see `kv_cache.Ring.shortest`."""
        return np.zeros_like(reached) if self._ring is None else self._ring.shortest(reached)

    def _check_settled(self, wave: int) -> None:
        if self._launched[wave] is not None:
            raise RuntimeError(f"wave {wave} is on the device: receive it first.")

    def _find_leaders(self, wave: int) -> None:
        """Says which waiting slots will copy, and from which."""
        waiting, held = self._waiting[wave], self._lengths[wave]
        computing = sorted(slot for slot, item in waiting.items() if len(item.ids) > 1)
        wanted = held.copy()
        for slot in computing:
            wanted[slot] += len(waiting[slot].ids)
        copies = prefixes.find_within(
            self._ids[wave],
            prefixes.Rows(held, wanted, self._shortest(self._reached[wave])),
            computing,
            size=self._shapes.shards.size,
            further=self._shapes.further_extend,
        )
        for slot, item in waiting.items():
            item.leader = copies.get(slot)

    def _copy_leaders(self, wave: int) -> list[Future[jax.Array]]:
        """Copies what leaders have in their cache by now to their followers."""
        waiting, lengths, reached = self._waiting[wave], self._lengths[wave], self._reached[wave]
        shortest = self._shortest(reached)

        def length_now(copy: prefixes.Copy) -> int:
            """What can be copied, 0 before it is there."""
            source, held = waiting.get(copy.source), int(lengths[copy.source])
            # A leader's last token is left to `decode` where it comes by itself.
            is_all_but_one = held == copy.length - 1 and source is not None and len(source.ids) == 1
            return min(held, copy.length) if held >= copy.length or is_all_but_one else 0

        for item in waiting.values():
            if item.leader is not None and 0 < length_now(item.leader) < shortest[item.leader.source]:
                item.leader = None  # gone by now: the row computes it
        copies = {
            slot: length
            for slot, item in sorted(waiting.items())
            if item.leader is not None and (length := length_now(item.leader))
        }
        if self._ring is not None:  # one that is written over by this has lost what its followers need
            copies = {slot: n for slot, n in copies.items() if waiting[slot].leader.source not in copies}
        markers = []
        for num_rows, filled, slots in self._shapes.tile_forks(copies):
            pairs = [(waiting[slot].leader.source, slot) for slot in slots]
            markers.append(self._run(wave, self._fork_call(pairs, num_rows, filled)))
        marks = {slot: int(reached[waiting[slot].leader.source]) for slot in copies}
        for slot, length in copies.items():
            item, saved = waiting[slot], length - int(lengths[slot])
            lengths[slot], reached[slot] = length, marks[slot]
            self._counters[wave].tokens_forked += saved
            item.ids, item.leader = item.ids[saved:], None
        return markers

    def _append(self, params: decoder.Params, wave: int, had: set[int]) -> list[Future[jax.Array]]:
        """Appends one bucket at the most to every row that has more than one id to come, but not to
        those that had theirs, which the others join.

        A last id that a wider bucket would be needed for is left to `decode`, which takes a step for it.
        """
        rows, widths = {}, self._shapes.widths
        for slot, item in sorted(self._waiting[wave].items()):
            if len(item.ids) > 1 and item.leader is None and slot not in had:
                is_over = len(item.ids) - 1 in widths
                rows[slot] = item.ids[:-1] if is_over else item.ids[: widths[-1]]
        had.update(rows)
        sizes = {
            slot: (len(ids), int(self._lengths[wave, slot]) + len(ids)) for slot, ids in rows.items()
        }
        return [
            self._extend_rows(params, wave, shape, {slot: rows[slot] for slot in slots})
            for shape, slots in self._shapes.tile_extends(sizes)
        ]

    def _extend_rows(
        self,
        params: decoder.Params,
        wave: int,
        shape: tuple[int, int, int],
        rows: Mapping[int, np.ndarray],
    ) -> Future[jax.Array]:
        lengths = self._lengths[wave]
        new = {slot: (ids, int(lengths[slot])) for slot, ids in rows.items()}
        marker = self._run(wave, self._extend_call(params, new, shape))
        for slot, ids in rows.items():
            self._fill(wave, slot, int(lengths[slot]) + len(ids))
            self._waiting[wave][slot].ids = self._waiting[wave][slot].ids[len(ids) :]
        num_tokens = sum(map(len, rows.values()))
        self._counters[wave].tokens_extended += num_tokens
        self._counters[wave].tokens_padded += shape[0] * shape[1] - num_tokens
        return marker

    def _tile_decodes(
        self, wave: int, slots: Sequence[int]
    ) -> list[tuple[int, int, dict[int, int]]]:
        lengths, waiting = self._lengths[wave], self._waiting[wave]
        return self._shapes.tile_decodes(
            {slot: int(lengths[slot]) + len(waiting[slot].ids) + waiting[slot].budget - 1 for slot in slots}
        )

    def _extend_call(self, params, rows, shape) -> calls.Call:
        return calls.extend(self._extend, params, rows, shape, shards=self._shapes.shards)

    def _fork_call(self, pairs, num_rows, filled) -> calls.Call:
        return calls.fork(self._fork, pairs, num_rows, filled, shards=self._shapes.shards)

    def _decode_call(self, params, rows, num_rows, filled, **options) -> calls.Call:
        options |= dict(shards=self._shapes.shards, stop_ids=self._stop_ids)
        return calls.decode(self._decode, params, rows, num_rows, filled, **options)

    def _run(self, wave: int, call: calls.Call) -> Future[Any]:
        """Has the wave's thread call a program."""
        return self._queues[wave].put(lambda: self._call(wave, call))

    def _call(self, wave: int, call: calls.Call) -> Any:
        """Calls a program on what is held of the wave, which only the wave's thread touches."""
        self._announce(call)
        with self._compiled.of(compiles.count_here):
            self._held[wave], result = call.program(held=self._held[wave], **call.arguments)
        return result

    def _announce(self, call: calls.Call) -> None:
        """Says so before the compiler goes silent."""
        if call.name not in self._seen:
            self._seen.add(call.name)
            program, *sizes = call.name
            self._notice(f"compiling {program} {' x '.join(map(str, sizes))}")
