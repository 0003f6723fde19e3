"""What goes into the engine and what comes out of it: requests, samples, counters. Numpy."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxagentrl.prefixes import Copy

COLDEST = 1e-6  # lowest temperature but 0: logits divided by less leave float32

@dataclasses.dataclass(frozen=True)
class TurnRequest:
    """What one slot needs for its next turn."""

    slot: int
    new_ids: np.ndarray  # int32, ids appended since the last turn (prompt or glue and observation)
    budget: int  # tokens the turn may have
    stream: tuple[int, ...]  # words that identify this turn's randomness
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_restricted(self) -> bool:
        """Whether not every token may be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def check(request: TurnRequest, *, num_slots: int, most: int, vocab_size: int) -> None:
    """Refuses what would be computed without an error, and wrongly.

    Args:
        num_slots: of a wave.
        most: tokens of a turn.

    Raises:
        ValueError: with what is wrong.
    """
    slot, new = request.slot, np.asarray(request.new_ids)
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot {slot}: a wave has slots 0 to {num_slots - 1}.")
    if len(new) == 0 or not 0 < request.budget <= most:
        raise ValueError(
            f"slot {slot}: a turn needs at least one new id and a budget in 1..{most}, got {len(new)} ids, "
            f"{request.budget} tokens."
        )
    if new.dtype.kind not in "iu" or new.min() < 0 or new.max() >= vocab_size:
        raise ValueError(f"slot {slot}: ids must be integers from 0 to {vocab_size - 1}, got {new[:20]} ({new.dtype}).")
    if not (request.temperature == 0 or COLDEST <= request.temperature < np.inf):
        raise ValueError(f"slot {slot}: temperature is {request.temperature}, expected 0 (greedy) or {COLDEST} and more.")
    if not (request.top_k >= 0 and 0 <= request.top_p <= 1 and 0 <= request.min_p <= 1):
        raise ValueError(
            f"slot {slot}: top_k is {request.top_k}, top_p {request.top_p}, min_p {request.min_p}, expected top_k from 0 "
            "on and the others in [0, 1]."
        )
    stream_words(request.stream)


@dataclasses.dataclass(frozen=True)
class TurnSample:
    """One sampled turn; all arrays have one entry per sampled token."""

    ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    entropies: np.ndarray  # float32


@dataclasses.dataclass
class Counters:
    """Sums over the engine's life."""

    tokens_extended: int = 0  # appended to caches by `extend`
    tokens_padded: int = 0  # places of `extend` calls that held nothing
    tokens_forked: int = 0  # copied from another slot instead of computed
    tokens_decoded: int = 0
    tokens_reprefill: int = 0  # what prefilling every turn's history again would have computed
    turns: int = 0
    turns_launched: int = 0  # slots with a turn on its way, summed over launches
    slots_launched: int = 0  # slots of the wave, summed over launches
    decode_steps: int = 0
    decode_places: int = 0  # rows of all decode steps, and turns whose first token took none
    compiles: int = 0  # by jax's account, whatever asked for them
    seconds_extend: float = 0.0  # the host waited for extend and fork
    seconds_decode: float = 0.0  # the host waited for decode
    seconds_transfer: float = 0.0  # samples came from the device
    seconds_compile: float = 0.0  # calls in which something was compiled

    def __add__(self, other: "Counters") -> "Counters":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Counters(**{key: mine[key] + theirs[key] for key in mine})

    def since(self, earlier: "Counters") -> "Counters":
        """What was added since a copy was taken."""
        mine, before = dataclasses.asdict(self), dataclasses.asdict(earlier)
        return Counters(**{key: mine[key] - before[key] for key in mine})

    def ledger(self, seconds: float, seconds_environment: float) -> dict[str, float]:
        """Where the seconds and the tokens of a rollout went, of which these are the counts.

        Seconds are the host's: waiting for extend, for decode, for transfers, for environments,
        compiling; what is left is its own work. Work that overlaps another's shows in neither.
        `slot_occupancy` is the share of slots that had a turn on its way when their wave was launched,
        `decode_occupancy` that of the places of decode steps which sampled a token.

        Args:
            seconds: that the rollout took.
            seconds_environment: of these, that it waited for environments.
        """
        parts = {
            "extend": self.seconds_extend,
            "decode": self.seconds_decode,
            "transfer": self.seconds_transfer,
            "compile": self.seconds_compile,
            "environment": seconds_environment,
        }
        parts["host"] = max(0.0, seconds - sum(parts.values()))
        placed = self.tokens_extended + self.tokens_padded
        return {
            "seconds": seconds,
            **{f"{name}_share": part / seconds for name, part in parts.items()},
            "tokens_decoded": self.tokens_decoded,
            "tokens_prefilled": self.tokens_extended,
            "tokens_forked": self.tokens_forked,
            "tokens_reprefill": self.tokens_reprefill,
            "slot_occupancy": self.turns_launched / max(1, self.slots_launched),
            "decode_occupancy": self.tokens_decoded / max(1, self.decode_places),
            "padding_share": self.tokens_padded / max(1, placed),
            "compiles": self.compiles,
        }


def stream_words(stream: Sequence[int]) -> np.ndarray:
    """[2] uint32, a key for the turn that the words (run seed, task, member, turn, ...) name.

    Raises:
        ValueError: a word that is no integer of 32 bits.
    """
    if not all(isinstance(word, int | np.integer) and 0 <= word < 2**32 for word in stream):
        raise ValueError(f"stream is {tuple(stream)}, expected integers from 0 to 2**32 - 1.")
    digest = hashlib.blake2b(np.array(stream, np.uint32).tobytes(), digest_size=8)
    return np.frombuffer(digest.digest(), np.uint32)


@dataclasses.dataclass
class Waiting:
    """A turn on its way: prompt ids that the cache does not hold yet, and what was sampled so far."""

    request: TurnRequest
    ids: np.ndarray
    pieces: list[TurnSample] = dataclasses.field(default_factory=list)
    leader: Copy | None = None  # what is to be copied from another slot, once that holds it

    @property
    def is_ready(self) -> bool:
        """Whether the cache holds all, and the device what comes after it is sampled from."""
        return len(self.ids) == 0

    @property
    def budget(self) -> int:
        return self.request.budget - sum(len(piece.ids) for piece in self.pieces)


def join(pieces: Sequence[TurnSample]) -> TurnSample:
    """One turn that was sampled in several pieces."""
    if len(pieces) == 1:
        return pieces[0]
    return TurnSample(
        ids=np.concatenate([piece.ids for piece in pieces]),
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        entropies=np.concatenate([piece.entropies for piece in pieces]),
    )
