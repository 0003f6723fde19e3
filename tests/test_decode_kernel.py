"""The GPU kernel of decode steps, run by Pallas's interpreter, against a float64 loop."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import sampling
from jaxagentrl.models import decode_kernel, decoder, decoding_layout, kv_cache, trial

SCALE = 0.3


def oracle(q, k, v, cache, layer, lengths, window, softcap):
    """Row by row in float64: the row's own positions, the new token last."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for row, length in enumerate(lengths):
        for head in range(q.shape[1]):
            shared = head // group
            keys = np.asarray(cache.keys[layer, row, shared, :, :length], np.float64).T
            values = np.asarray(cache.values[layer, row, shared, :length], np.float64)
            keys = np.concatenate([keys, np.asarray(k[row, shared], np.float64)[None]])
            values = np.concatenate([values, np.asarray(v[row, shared], np.float64)[None]])
            first = 0 if window is None else max(length + 1 - window, 0)
            z = SCALE * keys[first:] @ np.asarray(q[row, head], np.float64)
            z = z if softcap is None else softcap * np.tanh(z / softcap)
            p = np.exp(z - z.max())
            out[row, head] = p / p.sum() @ values[first:]
    return out


def in_rings(cache, lengths, window, size=128):
    """The same rows as those of layers with a window have them; what is lost is lost."""
    keys, values = np.zeros_like(cache.keys[..., :size]), np.zeros_like(cache.values[..., :size, :])
    for row, length in enumerate(lengths):
        for position in range(length):
            keys[:, row, ..., position % size] = cache.keys[:, row, ..., position]
            values[:, row, :, position % size] = cache.values[:, row, :, position]
    return kv_cache.KVCache(keys, values, window=window)


@pytest.mark.parametrize("programs", [1, 512], ids=["one part", "many parts"])
@pytest.mark.parametrize(
    "heads, window, softcap",
    [((6, 2), None, None), ((3, 3), 70, None), ((8, 1), 5, 2.0), ((4, 2), 1, None)],
)
def test_the_kernel_is_attention_on_the_cache(heads, window, softcap, programs, monkeypatch):
    monkeypatch.setattr(decode_kernel, "_PROGRAMS", programs)
    q, k, v, cache, layer, lengths, is_real = decode_kernel.trial_inputs(*heads, 16, *["float32"] * 2)
    given = cache if window is None else in_rings(cache, lengths, window)
    attended, written = decode_kernel.attend(
        q, k, v, jax.tree.map(jnp.asarray, given), layer, lengths, is_real,
        filled=cache.size, scale=SCALE, softcap=softcap, interpret=True,
    )
    wanted = oracle(q, k, v, cache, int(layer), lengths, window, softcap)
    np.testing.assert_allclose(attended[is_real], wanted[is_real], atol=2e-6)
    for row, (length, kept) in enumerate(zip(lengths, is_real, strict=True)):
        if kept:  # the new token's place; of idle rows nothing is written
            given.keys[layer, row, :, :, length % given.size] = k[row]
            given.values[layer, row, :, length % given.size] = v[row]
    np.testing.assert_array_equal(written.keys, given.keys)
    np.testing.assert_array_equal(written.values, given.values)


def test_which_caches_the_kernel_takes(monkeypatch):
    tried = []
    monkeypatch.setattr(decode_kernel, "_passes", lambda *x: not tried.append(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # on CPU bfloat16 is held as integers

    def takes(head_dim=64, positions=128, dtype="bfloat16", heads=8, queries="bfloat16"):
        cache = jax.eval_shape(lambda: kv_cache.init(1, 2, positions, 2, head_dim, dtype))
        return decode_kernel.takes(cache, heads, jnp.dtype(queries))

    assert takes()
    assert tried == [(8, 2, 64, "bfloat16", "bfloat16")]
    unfit_ones = ({"head_dim": 80}, {"positions": 100}, {"dtype": "int8"}, {"heads": 34})
    for unfit in (*unfit_ones, {"queries": "float32"}):
        assert not takes(**unfit), unfit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trial_passes_the_kernel_and_fails_one_that_is_wrong(dtype):
    inputs = decode_kernel.trial_inputs(4, 2, 16, dtype, dtype)
    sound = functools.partial(decode_kernel.attend_all, interpret=True)

    def agrees(kernel):
        return trial.agrees(
            "it", kernel, decode_kernel.products, inputs, tolerance=decode_kernel._TOLERANCE
        )

    @jax.jit
    def asked_while_tracing(x):
        return x + agrees(sound)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked_while_tracing(0) == 1

    def forgets_to_write(*x):
        attended, _ = sound(*x)
        return attended, x[3]

    def sees_one_too_few(q, k, v, cache, layer, lengths, is_real):
        return sound(q, k, v, cache, layer, jnp.maximum(lengths - 1, 0), is_real)

    for wrong in (forgets_to_write, sees_one_too_few):
        with pytest.warns(UserWarning, match="it is not used.*results differ"):
            assert not agrees(wrong)


def test_a_kernel_that_does_not_compile_or_gives_nan_is_not_used():
    def refused(x):
        raise NotImplementedError("sm_70 is too old\nlong story")

    for kernel, reason in ((refused, "NotImplementedError: sm_70 is too old"), (jnp.log, "inf of")):
        with pytest.warns(UserWarning, match=reason):
            assert not trial.agrees("it", kernel, jnp.abs, (np.array([-1.0]),), tolerance=1e-3)


@pytest.mark.parametrize("local", [None, (True, False)], ids=["plain", "every second has a window"])
def test_a_decode_step_by_the_kernel_and_by_products(local, monkeypatch):
    config = decoder.DecoderConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=48, attention_bias=True,
        sliding_window=None if local is None else 9, window_layers=local,
    )
    params = decoder.init(config, jax.random.key(0))
    cache = decoder.init_caches(config, 3, 64, "float32", most=20)
    tokens = np.random.default_rng(0).integers(0, 50, (3, 20)).astype(np.int32)
    counts = np.array([20, 3, 11], np.int32)
    zeros = np.zeros(3, np.int32)
    _, cache = decoder.hidden_cached(config, params, tokens, cache, None, zeros, counts, filled=64)
    new = (tokens[:, :1], cache, None, counts, np.array([1, 0, 1], np.int32))
    wanted = decoder.hidden_cached(config, params, *new, filled=64)
    # As on a GPU: the kernel, on weights laid out for it.
    monkeypatch.setattr(decode_kernel, "takes", lambda *x: True)
    kernel = functools.partial(decode_kernel.attend, interpret=True)
    monkeypatch.setattr(decode_kernel, "attend", kernel)
    laid_out = decoding_layout.unstacked(decoding_layout.joined(params))
    ours = decoder.hidden_cached(config, laid_out, *new, filled=64)
    np.testing.assert_allclose(ours[0][::2], wanted[0][::2], atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours[1], wanted[1])


def test_weights_for_decoding_are_copied_only_where_they_change(monkeypatch):
    config = decoder.DecoderConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=48,
    )
    params = decoder.init(config, jax.random.key(0))
    assert decoding_layout.for_decoding(params, "float32") is params
    halved = decoding_layout.for_decoding(params, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(halved)} == {"bfloat16"}
    assert jax.tree.structure(halved) == jax.tree.structure(params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    laid_out = decoding_layout.for_decoding(params, "float32")
    assert len(laid_out["layers"]) == 2
    assert laid_out["layers"][1]["attention"]["joined"]["kernel"].shape == (32, (4 + 2 + 2) * 16)
    adapters = dict(lora_a=jnp.zeros((2, 32, 1)), lora_b=jnp.zeros((2, 1, 64)))
    params["layers"]["attention"]["q"] |= adapters
    assert decoding_layout.joined(params) is params


def test_the_compiler_knows_the_options_of_decoding():
    """They are for GPUs, where no test runs; with a version of jax that has none, decoding there would go
    on without them, slower."""
    (options,) = sampling._DECODE_OPTIONS.values()
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such": True})(1)
