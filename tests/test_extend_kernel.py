"""The GPU kernel of extends, run by Pallas's interpreter, against a float64 loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl.models import decoder, extend_kernel, kv_cache, sharding, trial

SCALE = 0.3


def oracle(q, cache, layer, slots, lengths, softcap):
    """Query by query in float64, on the positions up to its own."""
    out = np.zeros(q.shape)
    group = q.shape[2] // cache.keys.shape[2]
    for row, offset, head in np.ndindex(q.shape[:3]):
        slot, end = min(slots[row], cache.keys.shape[1] - 1), lengths[row] + offset + 1
        keys = np.asarray(cache.keys[layer, slot, head // group, :, :end], np.float64).T
        z = SCALE * keys @ np.asarray(q[row, offset, head], np.float64)
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        p = np.exp(z - z.max())
        out[row, offset, head] = p / p.sum() @ np.asarray(cache.values[layer, slot, head // group, :end], np.float64)
    return out


@pytest.mark.parametrize("width", [1, 3, 16, 128, 144])
@pytest.mark.parametrize("heads, softcap", [((6, 2), None), ((3, 3), None), ((8, 1), 2.0)])
def test_the_kernel_is_attention_on_the_cache(heads, softcap, width):
    q, cache, layer, slots, lengths = extend_kernel.trial_inputs(*heads, 16, *["float32"] * 2)
    q = q[:, :width]
    attended = extend_kernel.attend(
        q, jax.tree.map(jnp.asarray, cache), layer, slots, lengths,
        filled=cache.size, scale=SCALE, softcap=softcap, interpret=True,
    )
    np.testing.assert_allclose(attended, oracle(q, cache, int(layer), slots, lengths, softcap), atol=2e-6)


def test_what_is_beyond_the_bound_is_not_read():
    """Padding beyond a row's real tokens would see it; real ones give the same."""
    q, cache, layer, slots, lengths = extend_kernel.trial_inputs(4, 2, 16, "float32", "float32")
    filled = 256
    keys, values = (np.array(x) for x in (cache.keys, cache.values))
    keys[..., filled:], values[:, :, :, filled:] = np.nan, np.nan
    spoiled = kv_cache.KVCache(jnp.asarray(keys), jnp.asarray(values))
    lengths = np.minimum(lengths, filled - 100)
    attended = extend_kernel.attend(q, spoiled, layer, slots, lengths, filled=filled, scale=SCALE, interpret=True)
    wanted = oracle(q, cache, int(layer), slots, lengths, None)
    np.testing.assert_allclose(attended[:, :100], wanted[:, :100], atol=2e-6)
    assert np.isfinite(attended).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trial_passes_the_kernel_and_fails_one_that_is_wrong(dtype):
    inputs = extend_kernel.trial_inputs(4, 2, 16, dtype, dtype)
    sound = functools.partial(extend_kernel.attend_all, interpret=True)

    def agrees(kernel):
        return trial.agrees("it", kernel, extend_kernel.products, inputs, tolerance=extend_kernel._TOLERANCE)

    assert agrees(sound)
    for wrong in (
        lambda q, cache, layer, slots, lengths: sound(q, cache, layer, slots, lengths + 1),
        lambda q, cache, layer, slots, lengths: sound(q, cache, layer, jnp.arange(4), lengths),
        lambda q, cache, layer, slots, lengths: sound(q, cache, 0, slots, lengths),
    ):
        with pytest.warns(UserWarning, match="it is not used.*results differ"):
            assert not agrees(wrong)


def test_which_extends_the_kernel_takes(monkeypatch):
    tried = []
    monkeypatch.setattr(extend_kernel, "_passes", lambda *x: not tried.append(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # on CPU bfloat16 is held as integers

    def takes(head_dim=64, dtype="bfloat16", queries="bfloat16", window=None, num_rows=32, width=512, filled=3072):
        cache = jax.eval_shape(lambda: kv_cache.init(1, 2, 3072, 2, head_dim, dtype))
        cache = dataclasses.replace(cache, window=window)
        shape = dict(num_rows=num_rows, width=width, filled=filled)
        return extend_kernel.takes(cache, 14, jnp.dtype(queries), **shape)

    assert takes()
    assert tried == [(14, 2, 64, "bfloat16", "bfloat16")]
    for unfit in ({"head_dim": 80}, {"dtype": "int8"}, {"queries": "float32"}, {"window": 512}, {"num_rows": 2, "width": 64}):
        assert not takes(**unfit), unfit
    with sharding.use(sharding.make_mesh(data=1, fsdp=1, tensor=2)):
        assert takes() and tried[-1] == (7, 1, 64, "bfloat16", "bfloat16")
    for sizes in (dict(data=2, fsdp=1, tensor=1), dict(data=1, fsdp=1, tensor=4)):
        with sharding.use(sharding.make_mesh(**sizes)):
            assert not takes()


@pytest.mark.parametrize("only_last", [False, True])
def test_an_extend_by_the_kernel_and_by_products(only_last, monkeypatch):
    config = decoder.DecoderConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=48, attention_bias=True,
    )
    params = decoder.init(config, jax.random.key(0))
    cache = decoder.init_caches(config, 5, 64, "float32", most=20)
    tokens = np.random.default_rng(0).integers(0, 50, (3, 20)).astype(np.int32)
    slots, counts = np.array([4, 0, 5], np.int32), np.array([20, 3, 0], np.int32)  # the last is padding
    zeros = np.zeros(3, np.int32)
    _, cache = decoder.hidden_cached(config, params, tokens, cache, slots, zeros, counts, filled=64)
    again = (tokens[:, ::-1], cache, slots, counts, np.array([7, 20, 0], np.int32))
    wanted = decoder.hidden_cached(config, params, *again, filled=64, only_last=only_last)
    monkeypatch.setattr(extend_kernel, "takes", lambda *x, **y: True)
    asked, kernel = [], functools.partial(extend_kernel.attend, interpret=True)
    monkeypatch.setattr(extend_kernel, "attend", lambda *x, **y: asked.append(x[0].shape) or kernel(*x, **y))
    ours = decoder.hidden_cached(config, params, *again, filled=64, only_last=only_last)
    assert asked
    for row, count in ((0, 7), (1, 20)):
        real = slice(0, 1 if only_last else count)
        np.testing.assert_allclose(ours[0][row, real], wanted[0][row, real], atol=1e-5)
    for slot, end in ((4, 27), (0, 23)):  # what real tokens wrote
        np.testing.assert_allclose(ours[1][0].keys[:, slot, ..., :end], wanted[1][0].keys[:, slot, ..., :end], atol=1e-5)
