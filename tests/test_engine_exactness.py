"""Any schedule of turns gives what a plain forward pass over the whole episode gives.

The oracle knows no cache, no slots, no buckets and no waves: it scores every episode's ids at once.
"""

import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxagentrl import engine, logprobs, sampling, tiling
from jaxagentrl.models import decoder, kv_cache, kv_rows

CONFIG = decoder.DecoderConfig(
    vocab_size=37,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
# Windows that are shorter than what is read at once: in every second layer, in a pattern whose last period is
# not whole, in all.
WINDOWS = [
    dataclasses.replace(CONFIG, sliding_window=9, num_layers=count, window_layers=layers)
    for count, layers in ((2, (True, False)), (5, (True, True, False, True, True)), (2, None))
]
STOP = 5
LENGTH = 96
SLOTS = 4
# Few prompts, so that several episodes often open with the same one: it is computed once and copied.
# Each is the beginning of the longest.
OPENINGS = [np.random.default_rng(0).integers(0, 37, n).astype(np.int32) for n in (2, 7, 33, 24)]


@functools.cache
def params(config: decoder.DecoderConfig = CONFIG):
    # Large embeddings make the distribution uneven, so that a wrong context is seen.
    made = decoder.init(config, jax.random.key(0))
    made["embed"]["embedding"] = made["embed"]["embedding"] * 8
    return made


# One bucket of each kind, for tests that are not about buckets.
FEW_PROGRAMS = dict(filled_buckets=(LENGTH,), width_buckets=(16,), row_divisors=(1,))


@functools.cache
def make_engine(
    cache_dtype: str = "float32",
    linger_share: float = 0.4,
    filled_buckets: tuple[int, ...] = (48, LENGTH),
    width_buckets: tuple[int, ...] = (8, 16),
    row_divisors: tuple[int, ...] = (1, 2),
    config: decoder.DecoderConfig = CONFIG,
) -> engine.Engine:
    return engine.Engine(
        config,
        num_slots=SLOTS,
        num_waves=1,
        max_length=LENGTH,
        max_turn_tokens=6,
        stop_ids=[STOP],
        filled_buckets=filled_buckets,
        width_buckets=width_buckets,
        row_divisors=row_divisors,
        cache_dtype=cache_dtype,
        linger_share=linger_share,
    )


@functools.partial(jax.jit, static_argnums=1)
def score(ids, config):
    x = decoder.hidden(config, params(config), ids)
    return logprobs.token_logprobs(x, decoder.unembedding(params(config)), ids)


@dataclasses.dataclass
class Episode:
    """What the engine consumed and produced for one episode, in order."""

    number: int
    ids: list[int] = dataclasses.field(default_factory=list)
    spans: list[tuple[int, engine.TurnSample]] = dataclasses.field(default_factory=list)
    turns: int = 0


def largest_error(episodes: list[Episode], config: decoder.DecoderConfig = CONFIG) -> float:
    """Largest distance of a reported log-prob or entropy from the oracle's."""
    ids = np.zeros((len(episodes), LENGTH), np.int32)
    for row, episode in enumerate(episodes):
        ids[row, : len(episode.ids)] = episode.ids
    worst = 0.0
    for start in range(0, len(episodes), 8):
        part = np.zeros((8, LENGTH), np.int32)
        part[: len(ids[start : start + 8])] = ids[start : start + 8]
        expected, entropies = (np.asarray(array) for array in score(part, config))
        for row, episode in enumerate(episodes[start : start + 8]):
            for first, sample in episode.spans:
                span = slice(first, first + len(sample.ids))
                np.testing.assert_array_equal(part[row, span], sample.ids)
                worst = max(worst, np.abs(sample.logprobs - expected[row, span]).max())
                worst = max(worst, np.abs(sample.entropies - entropies[row, span]).max())
    return float(worst)


def play(eng: engine.Engine, schedule, config: decoder.DecoderConfig = CONFIG) -> list[Episode]:
    """Carries the schedule out; every step says what each idle slot does, then launches."""
    done, live = [], {}
    for slot in range(SLOTS):
        eng.release(0, slot)
    for choices in schedule:
        for slot, (action, opening, new, budget) in enumerate(choices):
            if eng.is_busy(0, slot):
                continue
            if slot in live and (action == "release" or len(live[slot].ids) + new + 6 > LENGTH):
                eng.release(0, slot)
                del live[slot]
            if action == "wait":
                continue
            if slot not in live:
                live[slot] = Episode(len(done))
                done.append(live[slot])
                ids = OPENINGS[opening]
            elif action == "reopen":
                last = live[slot]
                live[slot] = Episode(last.number, turns=last.turns)
                done.append(live[slot])
                # Some of what it held, then something else.
                ids = np.array([*last.ids[: len(last.ids) // 2], *OPENINGS[opening]], np.int32)
                kept = eng.rewind(0, slot, ids)
                live[slot].ids += ids[:kept].tolist()
                ids = ids[kept:]
            else:
                # Every third one acts and is answered as another, so that they have much in common.
                rng = np.random.default_rng((live[slot].number % 3, live[slot].turns))
                ids = rng.integers(0, 37, new).astype(np.int32)
            episode = live[slot]
            stream = (episode.number % 3, episode.turns)
            eng.submit(0, engine.TurnRequest(slot, ids, budget, stream))
            episode.ids += ids.tolist()
            episode.turns += 1
        receive(eng, live, config)
    while eng.is_busy(0):
        receive(eng, live, config)
    return done


def receive(
    eng: engine.Engine, live: dict[int, Episode], config: decoder.DecoderConfig = CONFIG
) -> None:
    eng.launch(params(config), 0)
    for slot, sample in eng.receive(0).items():
        live[slot].spans.append((len(live[slot].ids), sample))
        live[slot].ids += sample.ids.tolist()


choice = st.tuples(
    st.sampled_from(["go", "go", "go", "wait", "release", "reopen"]),
    st.integers(0, len(OPENINGS) - 1),
    st.integers(1, 40),  # up to three of the widest bucket
    st.integers(1, 6),
)
schedules = st.lists(st.tuples(*[choice] * SLOTS), min_size=1, max_size=12)


# Where a call costs nothing, rows wait for a part of what another computes and append the rest after it.
@pytest.mark.parametrize("costs", [tiling.extend_costs(CONFIG), tiling.Costs(call=0, positions=1e9)])
def test_any_schedule_gives_the_log_probs_of_a_plain_forward_pass(costs):
    eng = make_engine()
    usual = eng._shapes
    eng._shapes = dataclasses.replace(usual, extend_costs=costs)
    forked = eng.counters.tokens_forked

    @hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
    @hypothesis.given(schedules)
    def check(schedule):
        assert largest_error(play(eng, schedule)) <= 1e-4

    check()
    eng._shapes = usual
    assert eng.counters.tokens_forked > forked


@pytest.fixture
def short_rings(monkeypatch):
    """Blocks of 8, so that rows of layers with a window are rings of 32 positions."""
    monkeypatch.setattr(kv_cache, "_BLOCK", 8)
    make_engine.cache_clear()
    yield
    make_engine.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("config", WINDOWS[1:], ids=["a pattern", "all layers"])
def test_layers_with_a_window_read_what_they_see(config, short_rings):
    eng = make_engine(config=config)
    assert sorted(cache.size for cache in eng._held[0].caches)[0] == 32 < LENGTH

    @hypothesis.settings(deadline=None, max_examples=12, derandomize=True)
    @hypothesis.given(schedules)
    def check(schedule):
        assert largest_error(play(eng, schedule, config), config) <= 1e-4

    check()


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, WINDOWS[1]], ids=["all alike", "a pattern"])
def test_what_tpus_take_gives_the_same(config, short_rings, monkeypatch):
    """Caches by rows, decode steps with a tail; vectors of 16 numbers, so that rings are no longer than elsewhere."""
    monkeypatch.setattr(kv_rows, "are_better", lambda: True)
    monkeypatch.setattr(kv_rows, "LANES", 16)
    monkeypatch.setattr(sampling, "decodes_some_rows", lambda: False)
    eng = make_engine(config=config)
    forked = eng.counters.tokens_forked

    @hypothesis.settings(deadline=None, max_examples=8, derandomize=True)
    @hypothesis.given(schedules)
    def check(schedule):
        assert largest_error(play(eng, schedule, config), config) <= 1e-4

    check()
    assert eng.counters.tokens_forked > forked


def test_what_a_ring_has_lost_is_computed_again(short_rings):
    config = WINDOWS[0]
    eng = make_engine(config=config)
    (episode,) = play(eng, [(("go", 2, 20, 3), *idle(1)[0][1:])] * 3, config)
    reached = len(episode.ids) - 1
    assert reached > 64
    opening = np.array(episode.ids[:25], np.int32)

    def copied(length: int) -> int:
        """Of an episode that begins with so many of its tokens."""
        before = eng.counters.tokens_forked
        again = Episode(1, ids=episode.ids[:length])
        eng.submit(0, engine.TurnRequest(1, np.array(again.ids, np.int32), 3, (1,)))
        while eng.is_busy(0):
            receive(eng, {1: again}, config)
        assert largest_error([again], config) <= 1e-4
        count = eng.counters.tokens_forked - before
        assert eng._reached[0, 1] == (reached if count else len(again.ids) - 1)  # it lacks what its source lacks
        eng.release(0, 1)
        return count

    # A token at position n sees 9: of 32 those are there for the last 24 positions.
    assert copied(reached - 24) == 0 and copied(reached - 23) == reached - 24
    assert eng.rewind(0, 0, np.array(episode.ids[: reached - 23], np.int32)) == reached - 24
    assert eng._reached[0, 0] == reached  # what is lost stays so
    assert eng.rewind(0, 0, np.array(episode.ids[: reached - 24], np.int32)) == 0 == eng.length(0, 0)
    last = Episode(2, ids=opening.tolist())
    eng.submit(0, engine.TurnRequest(0, opening, 3, (2,)))
    while eng.is_busy(0):
        receive(eng, {0: last}, config)
    assert largest_error([last], config) <= 1e-4


def test_a_ring_is_not_copied_once_it_was_written_over(short_rings):
    """The first row is copied to the second, and the third begins as the second did before that."""
    config = WINDOWS[0]
    eng = make_engine(config=config, row_divisors=(1, 4))
    eng._shapes = dataclasses.replace(eng._shapes, copy_costs=tiling.Costs(call=1, positions=1))
    ids = np.random.default_rng(1).integers(STOP + 1, 37, 80).astype(np.int32)

    def go(new: dict[int, np.ndarray]) -> float:
        """The largest error of rows that hold this now."""
        episodes = {slot: Episode(slot, ids=prompt.tolist()) for slot, prompt in new.items()}
        for slot, prompt in new.items():
            kept = eng.rewind(0, slot, prompt)
            eng.submit(0, engine.TurnRequest(slot, prompt[kept:], 3, (slot,)))
        while eng.is_busy(0):
            receive(eng, episodes, config)
        return largest_error(list(episodes.values()), config)

    assert go({0: ids[:70], 1: ids[:20]}) <= 1e-4
    before = eng.counters.tokens_forked
    assert go({1: ids[:60], 2: np.array([*ids[:19], *ids[70:]])}) <= 1e-4
    assert eng.counters.tokens_forked > before


def long_schedule(seed: int, steps: int):
    rng = np.random.default_rng(seed)
    return [
        tuple(
            ("go" if rng.random() < 0.95 else "release", int(rng.integers(3)), int(rng.integers(1, 20)), 6)
            for _ in range(SLOTS)
        )
        for _ in range(steps)
    ]


def test_lingering_rows_sample_what_they_would_have():
    schedule = long_schedule(0, 10)
    patient, hasty = make_engine(linger_share=0.0, **FEW_PROGRAMS), make_engine()
    outcomes = []
    for eng in (patient, hasty):
        before = dataclasses.replace(eng.counters)
        # Both play the same turns: nobody is told to go on before all have answered.
        episodes = play(eng, [row for choices in schedule for row in (choices, *idle(20))])
        outcomes.append((episodes, eng.counters.since(before)))
    (first, _), (second, _) = outcomes
    assert [e.ids for e in first] == [e.ids for e in second]


def test_what_a_reopened_conversation_has_in_common_stays():
    eng = make_engine()
    (episode,) = play(eng, [(("go", 2, 1, 3), *idle(1)[0][1:]), (("go", 2, 9, 3), *idle(1)[0][1:])])
    held = len(episode.ids) - 1  # the last token sampled is in no cache yet
    ids = np.array(episode.ids, np.int32)
    changed = ids.copy()
    changed[20] = (changed[20] + 1) % 37
    assert eng.rewind(0, 0, changed) == 20 == eng.length(0, 0)
    assert eng.rewind(0, 0, ids) == 20  # what was given back is gone
    assert held > 40 and eng.rewind(0, 0, ids[:15]) == 14  # one is left to go on with


def idle(times: int):
    return [tuple(("wait", 0, 1, 1) for _ in range(SLOTS))] * times


def test_equal_first_prompts_are_computed_once():
    eng = make_engine()
    before = dataclasses.replace(eng.counters)
    episodes = play(eng, [tuple(("go", 2, 1, 3) for _ in range(SLOTS))])
    used = eng.counters.since(before)
    assert used.tokens_extended == 32 and used.tokens_forked == 32 * (SLOTS - 1)
    assert len({tuple(e.ids) for e in episodes}) > 1  # copied, then each on its own
    assert largest_error(episodes) <= 1e-4


def test_what_members_that_act_alike_hear_is_computed_once():
    """Three of four are alike for three turns; then one of them hears more and another something else."""
    eng = make_engine()
    live = {slot: Episode(slot) for slot in range(SLOTS)}
    heard = {slot: [OPENINGS[2], *np.arange(42, dtype=np.int32).reshape(3, 14) % 37] for slot in live}
    heard[1][3] = np.concatenate([heard[1][3], OPENINGS[1]])
    heard[2][3] = heard[2][3][::-1]
    counted, steps = [], []
    for slot in range(SLOTS):
        eng.release(0, slot)
    for turn in range(4):
        before = dataclasses.replace(eng.counters)
        for slot, episode in live.items():
            ids = heard[slot][turn]
            eng.submit(0, engine.TurnRequest(slot, ids, 3, (slot // 3, turn)))
            episode.ids += ids.tolist()
        while eng.is_busy(0):
            receive(eng, live)
        used = eng.counters.since(before)
        counted.append((used.tokens_extended, used.tokens_forked))
        steps.append(used.decode_steps)
    # With the last token of the turn before: 15. Of the first prompts the last token comes by itself.
    assert counted == [(32, 3 * 32), (2 * 15, 2 * 15), (2 * 15, 2 * 15), (4 * 15 + 7, 0)]
    # Where it does not, copied or computed, three tokens take two steps.
    assert steps[:3] == [3, 2, 2]
    assert largest_error(list(live.values())) <= 1e-4


def test_words_that_all_begin_with_are_computed_once_where_the_wait_is_worth_it(monkeypatch):
    eng, counted = make_engine(), []
    free = dataclasses.replace(eng._shapes, extend_costs=tiling.Costs(call=0, positions=1e9))
    for shapes in (eng._shapes, free):  # a dear call and a free one
        monkeypatch.setattr(eng, "_shapes", shapes)
        live = {slot: Episode(slot) for slot in range(SLOTS)}
        before = dataclasses.replace(eng.counters)
        for slot, episode in live.items():
            eng.release(0, slot)
            ids = np.concatenate([OPENINGS[3], np.arange(slot, slot + 9, dtype=np.int32)])
            eng.submit(0, engine.TurnRequest(slot, ids, 3, (slot,)))
            episode.ids += ids.tolist()
        receive(eng, live)
        assert not eng.is_busy(0)  # nobody waits for a later launch
        used = eng.counters.since(before)
        counted.append((used.tokens_extended, used.tokens_forked))
        assert largest_error(list(live.values())) <= 1e-4
    assert counted == [(4 * 32, 0), (32 + 3 * 8, 3 * 24)]


def test_a_leader_that_is_released_in_the_middle_of_its_prompt_leaves_no_junk():
    eng = make_engine()
    for slot in range(SLOTS):
        eng.release(0, slot)
    short, long = OPENINGS[0], OPENINGS[2]
    live = {slot: Episode(slot) for slot in range(SLOTS)}
    for slot, ids in enumerate((short, long, long, long)):
        eng.submit(0, engine.TurnRequest(slot, ids, 3, (slot,)))
        live[slot].ids += ids.tolist()
    receive(eng, live)  # slot 0 decodes, slot 1 has one chunk of three
    assert eng.is_busy(0, 1) and eng.is_busy(0, 2)
    eng.release(0, 1)
    del live[1]
    while eng.is_busy(0):
        receive(eng, live)
    assert largest_error(list(live.values())) <= 1e-4


def test_a_long_prompt_does_not_hold_up_the_others():
    eng = make_engine()
    for slot in range(SLOTS):
        eng.release(0, slot)
    long = np.arange(40, dtype=np.int32) % 37
    eng.submit(0, engine.TurnRequest(0, long, 3, (0,)))
    eng.submit(0, engine.TurnRequest(1, OPENINGS[0], 3, (1,)))
    eng.launch(params(), 0)
    assert set(eng.receive(0)) == {1}
    eng.launch(params(), 0)
    assert set(eng.receive(0)) == {0}  # alone, it need not wait between its chunks


def test_a_cut_turn_goes_on_as_if_it_had_ended_there():
    eng = make_engine()
    for slot in range(SLOTS):
        eng.release(0, slot)
    episode = Episode(0, ids=OPENINGS[1].tolist())
    eng.submit(0, engine.TurnRequest(0, OPENINGS[1], 6, (0, 11)))
    while eng.is_busy(0):
        eng.launch(params(), 0)
        (sample,) = eng.receive(0).values()
    assert len(sample.ids) > 2
    sample = eng.cut(0, 0, sample, 2)
    episode.spans.append((len(episode.ids), sample))
    episode.ids += sample.ids.tolist()
    assert eng.length(0, 0) == len(episode.ids)
    eng.submit(0, engine.TurnRequest(0, np.array([1, 2, 3]), 6, (0, 12)))
    episode.ids += [1, 2, 3]
    while eng.is_busy(0):
        receive(eng, {0: episode})
    assert largest_error([episode]) <= 1e-4
    with pytest.raises(ValueError, match="cannot be cut"):
        eng.cut(0, 0, sample, 0)


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 0.02), ("int8", 0.05)])
def test_small_caches_cost_little(dtype, bound):
    """The worst log-prob or entropy of this model and schedule: bfloat16 0.006, int8 0.017 nats."""
    eng = make_engine(dtype, **FEW_PROGRAMS)
    episodes = play(eng, long_schedule(1, 12))
    assert sum(len(sample.ids) for e in episodes for _, sample in e.spans) > 100
    error = largest_error(episodes)
    assert 1e-4 < error < bound
