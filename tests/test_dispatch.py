"""A wave's programs are called one after the other, while the host goes on."""

import threading

import jax
import numpy as np
import pytest
from test_engine import CONFIG, conversations, make_engine

from jaxagentrl import compiles, dispatch, engine
from jaxagentrl.models import decoder, sharding


def test_calls_run_in_order_and_an_error_is_its_call_s_alone():
    queue, seen = dispatch.Queue(), []
    futures = [queue.put(lambda i=i: seen.append(i) or 10 // i) for i in (5, 0, 2)]
    assert futures[0].result() == 2
    with pytest.raises(ZeroDivisionError):
        futures[1].result()
    assert futures[2].result() == 5
    assert seen == [5, 0, 2]


def test_the_mesh_in_use_here_is_in_use_there():
    queue = dispatch.Queue()
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        inside = queue.put(sharding.row_shards_in_use)
    outside = queue.put(sharding.active)
    assert inside.result() == 4
    assert not outside.result()


def test_the_host_goes_on_while_a_call_lasts(monkeypatch):
    """As on a GPU, where the call of a decode loop returns when the loop is over."""
    params = decoder.init(CONFIG, jax.random.key(0))
    sampler = make_engine(2, num_waves=2)
    may_end = held_up(sampler, monkeypatch)
    for wave in range(2):
        sampler.submit(wave, engine.TurnRequest(0, conversations(1)[0][0], 3, (wave,)))
        sampler.launch(params, wave)  # would wait a minute, and fail
    may_end.set()
    assert all(0 in sampler.receive(wave) for wave in range(2))


def test_on_cpu_a_wave_does_not_wait_for_another(monkeypatch):
    monkeypatch.setattr(compiles, "cores", lambda: 2)
    params = decoder.init(CONFIG, jax.random.key(0))
    sampler = make_engine(2, num_waves=2)
    begun, may_end = first_held_up(sampler, monkeypatch)
    for wave in range(2):
        sampler.submit(wave, engine.TurnRequest(0, conversations(1)[0][0], 3, (wave,)))
    sampler.launch(params, 0)
    assert begun.wait(60)
    sampler.launch(params, 1)
    assert 0 in sampler.receive(1)  # would wait a minute, and fail
    may_end.set()
    assert 0 in sampler.receive(0)


def test_where_programs_cannot_run_side_by_side_waves_share_a_queue(monkeypatch):
    monkeypatch.setattr(compiles, "cores", lambda: 2)
    first, second, third = dispatch.for_waves(3)
    assert first is third is not second  # no more than there are cores
    with sharding.use(sharding.make_mesh(data=8, fsdp=1, tensor=1)):
        assert len(set(dispatch.for_waves(3))) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(set(dispatch.for_waves(3))) == 1


def test_what_a_program_raises_comes_out_of_receive_and_is_cleared_away():
    sampler = make_engine(2, num_waves=2)
    params = decoder.init(CONFIG, jax.random.key(0))
    decode = sampler._decode

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    def launch():
        for wave in range(2):
            sampler.submit(wave, engine.TurnRequest(0, np.arange(5, dtype=np.int32), 3, (0,)))
            sampler.launch(params, wave)

    sampler._decode = fails
    launch()
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.receive(0)
    sampler.clear()  # of the other wave, which failed, too
    sampler._decode = decode
    launch()
    assert all(0 in sampler.receive(wave) for wave in range(2))


def held_up(sampler, monkeypatch) -> threading.Event:
    """Decode calls of the engine last until the event that is returned is set."""
    may_end, decode = threading.Event(), sampler._decode

    def lasting(*arguments, **options):
        assert may_end.wait(60)
        return decode(*arguments, **options)

    monkeypatch.setattr(sampler, "_decode", lasting)
    return may_end


def submit_and_launch(sampler, params, wave, **options):
    sampler.submit(wave, engine.TurnRequest(0, conversations(1)[0][0], 3, (wave,)))
    sampler.launch(params, wave, **options)


def first_held_up(sampler, monkeypatch) -> tuple[threading.Event, threading.Event]:
    """The engine's first decode call lasts until the second event is set; it sets the first as it begins."""
    begun, may_end, decode = threading.Event(), threading.Event(), sampler._decode

    def first_lasts(*arguments, **options):
        is_first = not begun.is_set()
        begun.set()
        assert not is_first or may_end.wait(60)
        return decode(*arguments, **options)

    monkeypatch.setattr(sampler, "_decode", first_lasts)
    return begun, may_end


def test_an_interrupted_receive_leaves_nothing_that_a_later_episode_could_get(monkeypatch):
    params = decoder.init(CONFIG, jax.random.key(0))
    sampler = make_engine(2, num_waves=2)
    submit_and_launch(sampler, params, 0)
    expected = sampler.receive(0)[0]
    sampler.clear()
    may_end = held_up(sampler, monkeypatch)
    submit_and_launch(sampler, params, 0)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "wait", interrupted)  # Ctrl-C, while the device decodes
        with pytest.raises(KeyboardInterrupt):
            sampler.receive(0)
    with pytest.raises(RuntimeError, match="receive it first"):
        sampler.release(0, 0)
    threading.Timer(0.2, may_end.set).start()
    sampler.clear()  # waits for what goes on
    assert may_end.is_set() and not sampler.is_busy(0)
    submit_and_launch(sampler, params, 0)
    np.testing.assert_array_equal(sampler.receive(0)[0].ids, expected.ids)


def test_who_waits_for_a_wave_hears_of_another_that_is_over_earlier(monkeypatch):
    monkeypatch.setattr(compiles, "cores", lambda: 2)
    params = decoder.init(CONFIG, jax.random.key(0))
    sampler = make_engine(2, num_waves=2)
    assert sampler.wait(0) == [] == sampler.over()
    begun, may_end = first_held_up(sampler, monkeypatch)
    told = threading.Event()
    submit_and_launch(sampler, params, 0)
    assert begun.wait(60)
    submit_and_launch(sampler, params, 1, when_over=told.set)
    assert sampler.wait(0) == [1]
    assert told.wait(60) and sampler.over() == [1]
    assert 0 in sampler.receive(1) and sampler.over() == []
    may_end.set()
    assert sampler.wait(0) == [0] and 0 in sampler.receive(0)
