"""Arrays of a cache by rows, as TPUs take them, against scatters and gathers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl.models import kv_cache, kv_rows

LAYERS, SLOTS, HEADS, SIZE, LENGTH, WINDOW = 3, 5, 2, 8, 40, 9


def filled(dtype: str, window: int | None, rng: np.random.Generator) -> kv_cache.KVCache:
    cache = kv_cache.init(LAYERS, SLOTS, LENGTH, HEADS, SIZE, dtype, window=window, most=12)

    def drawn(x: jax.Array) -> jax.Array:
        numbers = rng.integers(-99, 99, x.shape) if x.dtype == jnp.int8 else rng.standard_normal(x.shape)
        return jnp.asarray(numbers, "float32").astype(x.dtype)

    return jax.tree.map(drawn, cache)


@pytest.fixture(params=[8, 16], ids=["whole vectors", "small heads"])
def by_rows(request, monkeypatch):
    """Has the same done by rows, with vectors of so many numbers."""
    monkeypatch.setattr(kv_cache, "_BLOCK", 8)
    monkeypatch.setattr(kv_rows, "LANES", request.param)

    def run(function):
        usual = function()
        with monkeypatch.context() as patched:
            patched.setattr(kv_rows, "are_better", lambda: True)
            return usual, function()

    return run


def equal(usual, found):
    for one, other in zip(jax.tree.leaves(usual), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_what_is_written_by_rows(dtype, window, by_rows):
    rng = np.random.default_rng(0)
    cache, width = filled(dtype, window, rng), 12
    slots = jnp.array([3, 0, SLOTS, 4, 1])  # the third is padding
    lengths = np.array([0, LENGTH - 5, 3, LENGTH - width, 17])  # a row's end, beyond a ring's
    counts = np.array([12, 5, 4, 12, 0])
    offsets = np.arange(width)
    positions = np.where(offsets < counts[:, None], lengths[:, None] + offsets, kv_cache.NOWHERE)
    new = jnp.asarray(rng.standard_normal((2, len(slots), width, HEADS, SIZE)), "float32")
    equal(*by_rows(lambda: kv_cache.write(cache, 1, slots, jnp.asarray(positions), *new)))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_what_is_copied_by_rows(dtype, window, by_rows):
    cache = filled(dtype, window, np.random.default_rng(1))
    # One is a source and a target; the last is padding.
    sources, targets = jnp.array([0, 3, 2]), jnp.array([3, 1, SLOTS])
    equal(*by_rows(lambda: kv_cache.copy_rows(cache, sources, targets, 24)))


@pytest.mark.parametrize("slots", [None, [4, 0, SLOTS + 2]])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_what_is_read_of_rings_by_rows(dtype, slots, by_rows):
    cache = filled(dtype, WINDOW, np.random.default_rng(2))
    lengths = jnp.array([3, 30, 39, 61, 80]) if slots is None else jnp.array([20, 47, 0])
    stretch = kv_cache.near(cache, lengths, width=2, filled=96)
    assert stretch.starts is not None
    slots = None if slots is None else jnp.array(slots)

    def read():
        keys, values = kv_cache.read(cache, 2, slots, stretch, jnp.float32)
        if keys.ndim == 5:  # in blocks
            keys = jnp.moveaxis(keys, 1, 3).reshape(*values.shape[:2], SIZE, -1)
        return keys, values

    equal(*by_rows(read))


def test_rows_have_whole_vectors_of_positions(monkeypatch):
    monkeypatch.setattr(kv_rows, "are_better", lambda: True)
    assert kv_cache.init(1, 1, 200, 1, 8, "float32").size == 256
    assert kv_cache.init(1, 1, 4096, 1, 8, "float32", window=512, most=512).size == 1152
    assert kv_cache.ring(512, most=512, max_length=4096).size == 1152
