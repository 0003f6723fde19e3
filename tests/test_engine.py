"""The engine: decode = teacher forcing, slots do not matter, buckets do not recompile."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxagentrl import engine, logprobs, sampling, tiling
from jaxagentrl.models import decoder, sharding

CONFIG = decoder.DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
STOP = 5
NUM_TURNS = 3


@pytest.fixture(scope="module")
def params():
    # Large embeddings make the distribution uneven, so that a wrong context is seen.
    params = decoder.init(CONFIG, jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 20
    return params


def make_engine(num_slots: int, num_waves: int = 1, **options) -> engine.Engine:
    defaults = dict(
        max_length=96,
        max_turn_tokens=6,
        stop_ids=[STOP],
        filled_buckets=(32, 64, 96),
        width_buckets=(8, 16),
    )
    return engine.Engine(CONFIG, num_slots=num_slots, num_waves=num_waves, **defaults | options)


def act(eng: engine.Engine, params, wave: int, requests) -> dict[int, engine.TurnSample]:
    """Submits the requests and waits for all of them."""
    for request in requests:
        eng.submit(wave, request)
    samples = {}
    while eng.is_busy(wave):
        eng.launch(params, wave)
        samples |= eng.receive(wave)
    return samples


def conversations(count: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        [rng.integers(0, 61, rng.integers(1, 24)).astype(np.int32) for _ in range(NUM_TURNS)]
        for _ in range(count)
    ]


def play(eng: engine.Engine, params, talks, temperature=1.0):
    """Every conversation to its end, rows of one wave acting in two halves, slots re-used."""
    results = {index: [] for index in range(len(talks))}
    queue = list(range(len(talks)))
    while queue:
        waves = []
        for _ in range(eng.num_waves):
            waves.append(queue[: eng.slots_per_wave])
            queue = queue[eng.slots_per_wave :]
        for turn in range(NUM_TURNS):
            for wave, members in enumerate(waves):
                for half in (members[::2], members[1::2]):
                    requests = [
                        engine.TurnRequest(
                            slot=members.index(i),
                            new_ids=talks[i][turn],
                            budget=1 + (i + turn) % 6,
                            temperature=temperature,
                            stream=(3, i, turn),
                        )
                        for i in half
                    ]
                    if requests:
                        samples = act(eng, params, wave, requests)
                        for i, request in zip(half, requests, strict=True):
                            results[i].append(samples[request.slot])
        for wave in range(eng.num_waves):
            for slot in range(eng.slots_per_wave):
                eng.release(wave, slot)
    return results


def test_a_later_member_copies_the_prompt_of_one_that_is_in_the_middle_of_its_episode(params):
    eng, prompt = make_engine(2), np.arange(10, 30, dtype=np.int32)

    def request(slot, member, turn, ids):
        return engine.TurnRequest(slot, ids, 4, (member, turn))

    (first,) = act(eng, params, 0, [request(0, 0, 0, prompt)]).values()
    act(eng, params, 0, [request(0, 0, 1, prompt[:3])])
    before = dataclasses.replace(eng.counters)
    (copied,) = act(eng, params, 0, [request(1, 1, 0, prompt)]).values()
    used = eng.counters.since(before)
    assert used.tokens_extended == 0 and used.tokens_forked == len(prompt) - 1
    # What a fork may not do: take in what the other has said since.
    (alone,) = act(make_engine(2), params, 0, [request(1, 1, 0, prompt)]).values()
    np.testing.assert_array_equal(copied.ids, alone.ids)
    np.testing.assert_allclose(copied.logprobs, alone.logprobs, atol=1e-5)
    # Another prompt is no copy, nor one whose slot was given back.
    before = dataclasses.replace(eng.counters)
    eng.release(0, 1)
    act(eng, params, 0, [request(1, 2, 0, prompt[1:])])
    eng.release(0, 0)
    act(eng, params, 0, [request(0, 3, 0, prompt)])
    assert eng.counters.since(before).tokens_forked == 0
    (again,) = act(make_engine(2), params, 0, [request(0, 0, 0, prompt)]).values()
    np.testing.assert_array_equal(first.ids, again.ids)


def test_decode_equals_teacher_forcing(params):
    talks = conversations(10)
    results = play(make_engine(4, 2), params, talks)
    ids = np.zeros((len(talks), 96), np.int32)
    for index, talk in enumerate(talks):
        samples = (sample.ids for sample in results[index])
        whole = np.concatenate([part for pair in zip(talk, samples) for part in pair])
        ids[index, : len(whole)] = whole

    @jax.jit
    def score(params, ids):
        x = decoder.hidden(CONFIG, params, ids)
        return logprobs.token_logprobs(x, decoder.unembedding(params), ids)

    scores, entropies = score(params, ids)
    for index, talk in enumerate(talks):
        start = 0
        for prompt, sample in zip(talk, results[index], strict=True):
            start += len(prompt)
            end = start + len(sample.ids)
            np.testing.assert_allclose(sample.logprobs, scores[index, start:end], atol=1e-4)
            np.testing.assert_allclose(sample.entropies, entropies[index, start:end], atol=1e-4)
            start = end


def test_slots_waves_and_refills_do_not_change_what_is_sampled(params):
    talks = conversations(9)
    reference = play(make_engine(9), params, talks)
    for slots, waves in ((2, 1), (4, 2), (6, 3)):
        other = play(make_engine(slots, waves), params, talks)
        for index in reference:
            for a, b in zip(reference[index], other[index], strict=True):
                np.testing.assert_array_equal(a.ids, b.ids)
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_turns_stop_at_the_end_of_turn_token_or_the_budget(params):
    talks = conversations(30)
    results = play(make_engine(6), params, talks)
    ended = 0
    for index, samples in results.items():
        for turn, sample in enumerate(samples):
            budget = 1 + (index + turn) % 6
            assert 1 <= len(sample.ids) <= budget
            assert STOP not in sample.ids[:-1]
            assert len(sample.ids) == budget or sample.ids[-1] == STOP
            ended += sample.ids[-1] == STOP
    assert ended > 0


def test_a_turn_begins_with_what_extend_computed(params):
    """Of n tokens it takes n − 1 steps; n after a single new token, for which no extend is called."""
    taken, prompt = [], np.arange(10, 14, dtype=np.int32)
    for new in (prompt, prompt[:1]):
        eng = make_engine(2, stop_ids=[60])
        before = dataclasses.replace(eng.counters)
        request = engine.TurnRequest(0, new, 4, (0,), temperature=0.0)
        act(eng, params, 0, [request])
        used = eng.counters.since(before)
        taken.append((used.tokens_extended, used.decode_steps, used.tokens_decoded))
        assert eng.length(0, 0) == len(new) + 4
    assert taken == [(4, 3, 4), (0, 4, 4)]


def test_what_parameters_of_another_type_compile_is_counted(params):
    eng = make_engine(2)
    request = engine.TurnRequest(0, np.arange(10, 14, dtype=np.int32), 4, (0,))
    act(eng, params, 0, [request])
    eng.release(0, 0)
    before = dataclasses.replace(eng.counters)
    act(eng, params, 0, [request])
    assert eng.counters.since(before).compiles == 0
    eng.release(0, 0)
    act(eng, jax.tree.map(lambda x: x.astype(np.float16), params), 0, [request])
    used = eng.counters.since(before)
    assert used.compiles > 0 and used.seconds_compile > 0


def test_warm_up_compiles_everything_and_changes_nothing(params):
    said = []
    eng = make_engine(4, 2, notice=said.append)
    eng.warm_up(params)
    programs = eng.counters.compiles
    assert len(said) == programs and len(set(said)) == programs
    with jax.log_compiles(False):
        before = compiled(eng)
        results = play(eng, params, conversations(40))
    assert eng.counters.compiles == programs == sum(before)
    assert compiled(eng) == before
    cold = play(make_engine(4, 2), params, conversations(40))
    for index in cold:
        for a, b in zip(cold[index], results[index], strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.slow
def test_programs_of_a_mesh_are_compiled_once(params):
    """What is compiled ahead is what is called: parameters and caches lie on four devices."""
    said = []
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2)
    with sharding.use(mesh):
        eng = make_engine(4, width_buckets=(8,), filled_buckets=(96,), notice=said.append)
        placed = sharding.place(params, mesh)
        eng.warm_up(placed)
        results = play(eng, placed, conversations(9))
    assert eng.counters.compiles == len(said) == sum(compiled(eng))
    alone = play(make_engine(4), params, conversations(9))
    for index in alone:
        for a, b in zip(alone[index], results[index], strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)


def compiled(eng: engine.Engine) -> list[int]:
    """Programs that jax holds for the engine."""
    return [program._cache_size() for program in (eng._extend, eng._fork, eng._decode)]


def test_rows_share_calls_with_rows_of_their_length(params, monkeypatch):
    """Two long rows do not make short ones read as far as they do, nor, on CPU, pay for empty slots."""
    said, long = [], (3, 11)

    def turn(slots, eng):
        requests = [
            engine.TurnRequest(
                slot=slot,
                new_ids=np.random.default_rng(slot).integers(0, 61, 70 if slot in long else 9),
                budget=6,
                temperature=1.0,
                stream=(0, slot, 0),
            )
            for slot in slots
        ]
        return act(eng, params, 0, requests)

    def played():
        said.clear()
        eng = make_engine(16, row_divisors=(1, 8), width_buckets=(80,), notice=said.append)
        short = [slot for slot in range(16) if slot not in long]
        return turn(long, eng) | turn(short, eng), eng

    ours, eng = played()
    assert {text for text in said if "decode" in text} == {
        "compiling decode 2 x 96",
        "compiling decode 16 x 32",
    }
    assert eng.counters.decode_places < 16 * eng.counters.decode_steps
    # Of so small a model calls are dear; as of a larger one:
    monkeypatch.setattr(tiling, "extend_costs", lambda config: tiling.Costs(16, 22))
    mixed = make_engine(16, row_divisors=(1, 8), width_buckets=(80,), notice=said.append)
    said.clear()
    together = turn(range(16), mixed)
    assert len([text for text in said if "decode" in text]) == 2
    assert {text for text in said if "extend" in text} == {
        "compiling extend 2 x 80 x 96",
        "compiling extend 2 x 80 x 32",
    }
    monkeypatch.setattr(sampling, "decodes_some_rows", lambda: False)
    whole, eng = played()
    assert eng.counters.decode_places == 16 * (eng.counters.decode_steps + 1)  # first tokens take none
    for slot in range(16):
        np.testing.assert_array_equal(ours[slot].ids, whole[slot].ids)
        np.testing.assert_array_equal(ours[slot].ids, together[slot].ids)
        np.testing.assert_allclose(ours[slot].logprobs, whole[slot].logprobs, atol=1e-4)


@pytest.mark.parametrize("linger_share", [0.0, 0.3])
def test_turns_go_on_in_calls_of_fewer_rows_once_others_have_ended(params, linger_share, monkeypatch):
    """Two calls of eight, of short and of long episodes: the one row that is left of each goes on with
    the other's, at once or, where rows may linger, with the next launch."""
    monkeypatch.setattr(tiling, "decode_costs", lambda config: tiling.Costs(1, 8))
    budgets = [6 if slot in (3, 12) else 1 + slot % 3 for slot in range(16)]

    def played(row_divisors):
        eng = make_engine(
            16, row_divisors=row_divisors, width_buckets=(40,), stop_ids=[], linger_share=linger_share
        )
        requests = [
            engine.TurnRequest(slot, np.full(9 if slot < 8 else 40, slot, np.int32), budget, (slot,))
            for slot, budget in enumerate(budgets)
        ]
        calls, decode = [], eng._decode

        def noted(**arguments):
            held, sampled = decode(**arguments)
            calls.append((len(arguments["slots"]), int(sampled.steps), int(sum(sampled.unfinished))))
            return held, sampled

        eng._decode = noted
        return act(eng, params, 0, requests), calls, eng.counters

    whole, calls, counters = played((1,))
    assert calls == ([(16, 2, 2), (16, 3, 0)] if linger_share else [(16, 5, 0)])
    assert counters.decode_places == 16 * 6  # the first tokens take no step
    samples, calls, counters = played((1, 2, 8))
    assert calls == [(8, 2, 1), (8, 2, 1), (2, 3, 0)]
    assert counters.decode_places == 8 * 3 + 8 * 3 + 2 * 3
    assert counters.tokens_decoded == sum(budgets)
    for slot in range(16):
        np.testing.assert_array_equal(samples[slot].ids, whole[slot].ids)
        np.testing.assert_allclose(samples[slot].logprobs, whole[slot].logprobs, atol=1e-4)


def test_history_is_never_prefilled_again(params):
    talks = conversations(20)
    eng = make_engine(6)
    results = play(eng, params, talks)
    # Every token enters the cache once: the prompts' here, but a last one that fits no call of 8 or 16.
    fed = sum(len(ids) for talk in talks for ids in talk)
    carried = sum(NUM_TURNS - 1 for _ in talks)
    sizes = [len(ids) + (turn > 0) for talk in talks for turn, ids in enumerate(talk)]
    alone = sum((size - 1) % 16 + 1 in (1, 9) for size in sizes)
    assert 0 < alone < len(sizes) / 2
    assert eng.counters.tokens_extended == fed + carried - alone
    assert eng.counters.tokens_decoded == sum(len(s.ids) for r in results.values() for s in r)
    assert eng.counters.tokens_reprefill > fed


def test_greedy_is_the_argmax(params):
    talks = conversations(3)
    results = play(make_engine(3), params, talks, temperature=0.0)
    for index, talk in enumerate(talks):
        ids = np.concatenate([talk[0], results[index][0].ids])
        logits = np.asarray(decoder.logits(CONFIG, params, ids[None]))[0]
        for t in range(len(talk[0]), len(ids)):
            assert ids[t] == np.argmax(logits[t - 1])


def test_requests_that_cannot_be_served_are_refused(params):
    eng = make_engine(2)
    too_long = engine.TurnRequest(0, np.zeros(95, np.int32), 6, (0,))
    with pytest.raises(ValueError, match="max_length"):
        eng.submit(0, too_long)
    with pytest.raises(ValueError, match="at least one new id"):
        eng.submit(0, engine.TurnRequest(0, np.zeros(0, np.int32), 6, (0,)))
    with pytest.raises(ValueError, match="num_waves"):
        make_engine(3, 2)
    with pytest.raises(ValueError, match="filled_buckets"):
        make_engine(2, filled_buckets=(32, 64))
    with pytest.raises(ValueError, match="linger_share"):
        make_engine(2, linger_share=1.0)
    eng.submit(0, engine.TurnRequest(0, np.zeros(3, np.int32), 6, (0,)))
    with pytest.raises(ValueError, match="middle of a turn"):
        eng.submit(0, engine.TurnRequest(0, np.zeros(3, np.int32), 6, (0,)))
    eng.launch(params, 0)
    with pytest.raises(RuntimeError, match="receive it first"):
        eng.release(0, 0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"slot": -1}, "slots 0 to 1"),
        ({"new_ids": np.array([1, 61])}, "integers from 0 to 60"),
        ({"new_ids": np.array([1, -1])}, "integers from 0 to 60"),
        ({"new_ids": np.array([1.0, 2.0])}, "integers from 0 to 60.*float64"),
        ({"temperature": np.nan}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1e-30}, "temperature is 1e-30"),
        ({"top_p": np.nan}, "top_p nan"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 2.0}, "min_p 2.0"),
        ({"stream": (-1,)}, "stream is"),
        ({"stream": (0.5,)}, "stream is"),
        ({"stream": (2**32,)}, "stream is"),
    ],
)
def test_requests_that_would_be_served_wrongly_are_refused(changes, words):
    request = engine.TurnRequest(0, np.array([1, 2]), 6, (0,))
    eng = make_engine(2)
    with pytest.raises(ValueError, match=words):
        eng.submit(0, dataclasses.replace(request, **changes))
    eng.submit(0, request)  # nothing of the other is left


def test_only_the_last_turn_is_cut_and_once(params):
    eng = make_engine(2, stop_ids=[])
    request = engine.TurnRequest(0, np.array([1, 2]), 6, (0,))
    sample = act(eng, params, 0, [request])[0]
    with pytest.raises(ValueError, match="a turn of 6 tokens cannot be cut to 7"):
        eng.cut(0, 0, sample, 7)
    with pytest.raises(ValueError, match="not what slot 1 of wave 0 sampled last"):
        eng.cut(0, 1, sample, 3)
    kept = eng.cut(0, 0, sample, 4)
    assert eng.length(0, 0) == 2 + 4
    with pytest.raises(ValueError, match="not what slot 0"):
        eng.cut(0, 0, sample, 2)  # the original again
    assert eng.length(0, 0) == 2 + 4
    assert len(eng.cut(0, 0, kept, 3).ids) == 3
    eng.submit(0, request)
    with pytest.raises(ValueError, match="not what slot 0"):
        eng.cut(0, 0, kept, 2)
    eng.release(0, 0)
    with pytest.raises(ValueError, match="not what slot 0"):
        eng.cut(0, 0, kept, 2)
    assert eng.length(0, 0) == 0
