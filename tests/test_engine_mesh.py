"""Sampling on meshes: devices work on slots of their own, and what is sampled is what one device samples."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import CONFIG, act, compiled

from jaxagentrl import calls, engine, sampling, shards
from jaxagentrl.models import by_device, decode_kernel, decoder, decoding_layout, kv_cache, sharding, trial

# Large embeddings make the distribution uneven, so that a wrong context is seen.
POLICY = decoder.init(CONFIG, jax.random.key(0))
POLICY["embed"]["embedding"] *= 20

ONE_BUCKET = dict(filled_buckets=(96,), width_buckets=(16,), row_divisors=(1, 2))


def make_engine(num_slots, config=CONFIG, **options):
    defaults = dict(num_waves=1, max_length=96, max_turn_tokens=6, stop_ids=[5])
    return engine.Engine(config, num_slots=num_slots, **defaults | ONE_BUCKET | options)


def mesh_of(*sizes):
    return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


def played(eng, params, num_episodes=10):
    """Episodes in groups of two with the same beginning, three turns each, slots used again."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, 20 + 3 * (i // 2)).astype(np.int32) for i in range(num_episodes)]
    found = {}
    for first in range(0, num_episodes, eng.slots_per_wave):
        members = range(first, min(first + eng.slots_per_wave, num_episodes))
        for turn in range(3):
            requests = [
                engine.TurnRequest(i - first, prompts[i - i % 2][: 20 - 7 * turn], 2 + i % 5, (i, turn))
                for i in members
                if (i + turn) % 3  # some wait
            ]
            for slot, sample in act(eng, params, 0, requests).items():
                found[first + slot, turn] = sample
        for slot in range(eng.slots_per_wave):
            eng.release(0, slot)
    return found


WINDOWED = dataclasses.replace(CONFIG, sliding_window=9, window_layers=(True, False))


@pytest.mark.parametrize(
    "sizes, num_slots, config, options",
    [
        ((2, 1, 1), 4, CONFIG, {}),
        ((8, 1, 1), 6, CONFIG, {"linger_share": 0.4}),  # two devices have nothing to do
        ((2, 1, 2), 5, WINDOWED, {}),  # a shard has one slot more than it needs
        ((1, 1, 2), 4, CONFIG, {"cache_dtype": "int8"}),
        ((2, 2, 2), 4, CONFIG, {}),
        ((2, 1, 4), 2, CONFIG, {}),  # more devices than there are heads of keys
    ],
    ids=str,
)
def test_what_is_sampled_does_not_depend_on_the_mesh(sizes, num_slots, config, options):
    alone = played(make_engine(num_slots, config, **options), POLICY)
    mesh, said = mesh_of(*sizes), []
    decoding = sharding.decoding_mesh(mesh)
    with sharding.use(decoding):
        eng = make_engine(num_slots, config, notice=said.append, **options)
        placed = sharding.for_decoding(sharding.place(POLICY, mesh), mesh)
        eng.warm_up(placed)
        before = eng.counters.compiles
        ours = played(eng, placed)
        assert eng.counters.compiles == before == sum(compiled(eng)) == len(said)
    assert ours.keys() == alone.keys()
    for key, sample in ours.items():
        np.testing.assert_array_equal(sample.ids, alone[key].ids)
        np.testing.assert_allclose(sample.logprobs, alone[key].logprobs, atol=1e-4)
    # A group's members lie together, on one device: they copy, unless each has its own.
    assert (eng.counters.tokens_forked > 0) == (eng._shapes.shards.size > 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)], ids=str)
def test_what_gpus_take_samples_the_same(sizes, monkeypatch):
    """Their layout of the weights and their kernel, interpreted, which every device is to run by itself."""
    config = dataclasses.replace(CONFIG, head_dim=16)
    policy = decoder.init(config, jax.random.key(0))
    policy["embed"]["embedding"] *= 20
    options = dict(max_length=128, filled_buckets=(128,))
    alone = played(make_engine(4, config, **options), policy)
    shapes = []

    def attend(*given, **options):
        shapes.append(given[3].keys.shape)
        return kernel(*given, **options, interpret=True)

    kernel = decode_kernel.attend
    monkeypatch.setattr(decode_kernel, "attend", attend)
    monkeypatch.setattr(decode_kernel, "takes", lambda *_: sharding.row_shards_in_use() == 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh = mesh_of(*sizes)
    with sharding.use(mesh):
        laid_out = decoding_layout.for_decoding(sharding.place(policy, mesh), "float32")
    with sharding.use(sharding.decoding_mesh(mesh)):
        eng = make_engine(4, config, **options)
        ours = played(eng, sharding.for_decoding(laid_out, mesh))
    rows, heads = 4 // (sizes[0] * sizes[1]), config.num_kv_heads // sizes[2]
    assert {shape[1:3] for shape in shapes} == {(rows, heads)}
    for key, sample in ours.items():
        np.testing.assert_array_equal(sample.ids, alone[key].ids)
        np.testing.assert_allclose(sample.logprobs, alone[key].logprobs, atol=1e-4)


def test_no_device_holds_a_whole_cache_even_while_it_is_made(monkeypatch):
    init, whole = kv_cache.init, []

    def watched(*sizes, **options):
        made = init(*sizes, **options)
        whole.append(not isinstance(made.keys, jax.core.Tracer))
        return made

    monkeypatch.setattr(kv_cache, "init", watched)
    with sharding.use(mesh_of(4, 1, 2)):
        eng = make_engine(8)
    assert whole == [False]  # within a program
    sizes = {shard.data.shape for shard in eng._held[0].caches[0].keys.addressable_shards}
    assert sizes == {(CONFIG.num_layers, 2, 1, CONFIG.head_dim, 96)}


def programs(sizes, num_slots=16):
    """extend, fork and decode of all slots, compiled for the mesh."""
    mesh = sizes and mesh_of(*sizes)
    with sharding.use(mesh):
        split = shards.of_wave(num_slots)
        policy = sharding.for_decoding(sharding.place(POLICY, mesh), mesh)
        held = jax.jit(lambda: sampling.init(CONFIG, split.num_slots, 96, "float32", most=16))()
        decode = sampling.make_decode(CONFIG, max_turn_tokens=4)
        stop_ids = np.array([5], np.int32)
        every = [
            calls.extend(sampling.make_extend(CONFIG), policy, {}, (16, 8, 96), shards=split),
            calls.fork(sampling.make_fork(), [], 16, 96, shards=split),
            calls.decode(decode, policy, {}, 16, 96, shards=split, stop_ids=stop_ids),
        ]
        return [call.program.lower(held=held, **call.arguments).compile() for call in every]


def collectives(program):
    """(operation, first shape) of every exchange between devices."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= \(?(\w+\[[\d,]*\])\S* (?:[^(]*?)\b({names})(?:-start)?\(", program.as_text())


def flops(program):
    return program.cost_analysis()["flops"]


def test_devices_compute_their_own_rows_and_tell_the_others_nothing_but_how_many_go_on():
    one_device = programs(None)
    for shape, count in (((2, 1, 1), 2), ((8, 1, 1), 8)):
        extend, fork, decode = programs(shape)
        assert flops(extend) < 1.1 * flops(one_device[0]) / count
        assert not collectives(extend) and not collectives(fork)
        assert {found for found, _ in collectives(decode)} == {"s32[]"}


def test_a_tensor_group_exchanges_activations_and_no_cache():
    extend, fork, _ = programs((4, 1, 2))
    assert not collectives(fork)
    # The outputs of attention and feed-forward, of the loop's layer and of the last one.
    rows = f"{16 // 4},{{}},{CONFIG.hidden_size}"
    expected = [(f"f32[{rows.format(width)}]", "all-reduce") for width in (8, 8, 1, 1)]
    assert sorted(collectives(extend)) == sorted(expected)


def test_more_devices_than_heads_of_keys_exchange_no_cache():
    """They have all heads each. Split inside a head, the whole cache was gathered in every layer of every step."""
    cache = 16 // 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 96  # of a layer, on a device
    for program in programs((2, 1, 4)):
        sizes = [np.prod([int(n) for n in re.findall(r"\d+", shape)[1:]]) for shape, _ in collectives(program)]
        assert max(sizes, default=0) < cache / 2


def test_a_fork_holds_one_layer_at_a_time():
    layers = [2, 8]
    sizes = []
    for num_layers in layers:
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        held = sampling.init(config, 16, 96, "float32", most=16)
        call = calls.fork(sampling.make_fork(), [], 16, 96, shards=shards.of_wave(16))
        program = call.program.lower(held=held, **call.arguments).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    layer = 16 * CONFIG.num_kv_heads * CONFIG.head_dim * 96 * 4
    assert layer <= sizes[0] and sizes[1] <= sizes[0] + 1024 <= 4 * layer


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 1, 2)])
def test_kernels_are_tried_on_one_device_and_work_on_rows_of_their_own(sizes):
    """As decode steps of GPUs on a mesh have it; of one that splits heads only the trial."""
    q, k, v, cache, layer, _, _ = decode_kernel.trial_inputs(4, 2, 16, "float32", "float32")
    q, k, v = (np.resize(x, (8, *x.shape[1:])) for x in (q, k, v))
    cache = jax.tree.map(lambda x: np.resize(x, (2, 8, *x.shape[2:])), cache)
    lengths, is_real = np.arange(8, dtype=np.int32) * 17, np.arange(8) % 3 > 0
    options = dict(filled=cache.size, scale=0.3, interpret=True)
    sound = functools.partial(decode_kernel.attend_all, interpret=True)
    inputs = decode_kernel.trial_inputs(4, 2, 16, "float32", "float32")
    passed = []

    def attend(*given):
        passed.append(trial.agrees("it", sound, decode_kernel.products, inputs, tolerance=1e-2))
        return decode_kernel.attend(*given, **options)

    given = (q, k, v, cache, layer, lengths, is_real)
    wanted = decode_kernel.attend(*jax.tree.map(jnp.asarray, given), **options)
    with sharding.use(mesh_of(*sizes)), warnings.catch_warnings():
        warnings.simplefilter("error")
        split = by_device.over_rows(attend, (0, 0, 0, 1, None, 0, 0), (0, 1))
        if sizes[-1] > 1:
            jax.jit(split).lower(*given)
        else:
            ours = jax.jit(split)(*given)
            np.testing.assert_allclose(ours[0][is_real], wanted[0][is_real], atol=1e-6)
            jax.tree.map(np.testing.assert_array_equal, ours[1], wanted[1])
    assert passed == [True]
