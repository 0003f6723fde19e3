"""An engine whose policy is a function, with the interface that `rollout` uses."""

import collections

import numpy as np

from jaxagentrl.engine import Counters, TurnRequest, TurnSample


class FakeEngine:
    """Answers every request at the next `receive`; subclasses say with which ids."""

    def __init__(self, *, slots_per_wave=2, num_waves=2, max_turn_tokens=32, max_length=1000, stop_ids=()):
        self.slots_per_wave, self.num_waves = slots_per_wave, num_waves
        self.max_turn_tokens, self.max_length = max_turn_tokens, max_length
        self.stop_ids = frozenset(stop_ids)
        self.counters = Counters()
        self.requests: list[TurnRequest] = []
        self._lengths = collections.Counter()
        self._waiting: dict[tuple[int, int], TurnRequest] = {}
        self._launched: set[int] = set()

    def ids(self, request: TurnRequest) -> list[int]:
        raise NotImplementedError

    def length(self, wave, slot):
        return self._lengths[wave, slot]

    def is_busy(self, wave, slot=None):
        return any(w == wave and slot in (None, s) for w, s in self._waiting)

    def release(self, wave, slot):
        self._lengths[wave, slot] = 0

    def rewind(self, wave, slot, ids):
        self.release(wave, slot)
        return 0

    def clear(self):
        self._lengths.clear()
        self._waiting.clear()
        self._launched.clear()

    def submit(self, wave, request):
        assert not self.is_busy(wave, request.slot)
        self.requests.append(request)
        self._waiting[wave, request.slot] = request

    def launch(self, params, wave, when_over=None):
        if self.is_busy(wave):
            self._launched.add(wave)

    def over(self):
        """A launch takes as long as it takes somebody to wait for it."""
        return []

    def wait(self, wave):
        return [wave] if wave in self._launched else []

    def receive(self, wave):
        self._launched.discard(wave)
        samples = {}
        for slot in [slot for w, slot in self._waiting if w == wave]:
            request = self._waiting.pop((wave, slot))
            ids = np.array(self.ids(request), np.int32)
            self._lengths[wave, slot] += len(request.new_ids) + len(ids)
            zeros = np.zeros(len(ids), np.float32)
            samples[slot] = TurnSample(ids, zeros, zeros)
        return samples

    def cut(self, wave, slot, sample, keep):
        self._lengths[wave, slot] -= len(sample.ids) - keep
        return TurnSample(*(array[:keep] for array in (sample.ids, sample.logprobs, sample.entropies)))
