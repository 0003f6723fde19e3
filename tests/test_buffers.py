"""Rollout buffers: wrap-around, ages, exact minibatch coverage, donation and sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxagentrl import buffers

few = settings(max_examples=25, deadline=None)


def rows(start, count):
    """Rows that say which they are, in two leaves of different rank and dtype."""
    n = np.arange(start, start + count)
    return {"n": jnp.asarray(n, jnp.int32), "x": jnp.asarray(n[:, None] + [0.0, 0.5], jnp.float32)}


def empty(capacity):
    return buffers.init(capacity, jax.tree.map(lambda leaf: leaf[0], rows(0, 1)))


def held(buffer):
    return sorted(np.asarray(buffer.rows["n"])[np.asarray(buffer.stamps) >= 0].tolist())


def test_init_takes_shapes_from_one_row():
    buffer = empty(4)
    chex.assert_shape(buffer.rows["x"], (4, 2))
    assert buffer.rows["n"].dtype == jnp.int32
    assert int(buffers.num_rows(buffer)) == 0
    np.testing.assert_array_equal(buffers.ages(buffer), [-1] * 4)
    with pytest.raises(ValueError, match="capacity"):
        buffers.init(0, {"x": jnp.zeros(2)})


def test_wrap_around_and_ages():
    buffer = buffers.add(empty(5), rows(0, 3))
    np.testing.assert_array_equal(buffers.ages(buffer), [1, 1, 1, -1, -1])
    buffer = buffers.add(buffer, rows(3, 3))  # places 3, 4 and, over row 0, place 0
    np.testing.assert_array_equal(buffer.rows["n"], [5, 1, 2, 3, 4])
    np.testing.assert_allclose(buffer.rows["x"][:, 1], [5.5, 1.5, 2.5, 3.5, 4.5])
    np.testing.assert_array_equal(buffers.ages(buffer), [1, 2, 2, 1, 1])
    assert int(buffers.num_rows(buffer)) == 5
    assert int(buffer.head) == 1


def test_a_full_batch_replaces_everything():
    buffer = buffers.add(buffers.add(empty(3), rows(0, 2)), rows(2, 3))
    assert held(buffer) == [2, 3, 4]
    np.testing.assert_array_equal(buffer.rows["n"], [3, 4, 2])


def test_a_buffer_of_one_row_holds_the_newest():
    assert held(buffers.add(buffers.add(empty(1), rows(0, 1)), rows(1, 1))) == [1]


def test_invalid_rows_take_no_space():
    valid = jnp.array([True, False, True, False])
    buffer = buffers.add(empty(4), rows(0, 4), valid=valid)
    assert held(buffer) == [0, 2]
    assert int(buffer.head) == 2
    buffer = buffers.add(buffer, rows(4, 4), valid=jnp.zeros(4, bool))
    assert held(buffer) == [0, 2]
    np.testing.assert_array_equal(buffers.ages(buffer), [2, 2, -1, -1])


def test_stamps_may_be_iterations():
    buffer = buffers.add(empty(4), rows(0, 2), clock=7)
    buffer = buffers.add(buffer, rows(2, 1), clock=10)
    np.testing.assert_array_equal(buffers.ages(buffer), [4, 4, 1, -1])
    assert int(buffer.clock) == 11


@functools.cache
def jitted_add():
    return jax.jit(buffers.add)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=8))
@few
def test_a_buffer_is_a_queue_that_forgets_its_oldest(pattern):
    """Against a plain Python list."""
    buffer, kept = empty(5), []
    for call, valid in enumerate(pattern):
        buffer = jitted_add()(buffer, rows(3 * call, 3), valid=jnp.array(valid))
        kept = (kept + [(3 * call + i, call) for i in range(3) if valid[i]])[-5:]
    assert held(buffer) == sorted(n for n, _ in kept)
    ages = np.asarray(buffers.ages(buffer))
    for n, age in zip(np.asarray(buffer.rows["n"]).tolist(), ages.tolist()):
        assert age == (len(pattern) - dict(kept)[n] if age >= 0 else -1)


def test_sampling_without_replacement():
    buffer = buffers.add(empty(8), rows(10, 5))
    drawn = buffers.sample(buffer, jax.random.key(0), 5)
    assert sorted(drawn.rows["n"].tolist()) == [10, 11, 12, 13, 14]
    assert bool(jnp.all(drawn.valid))
    np.testing.assert_array_equal(drawn.ages, [1] * 5)
    np.testing.assert_array_equal(buffer.rows["n"][drawn.indices], drawn.rows["n"])
    more = buffers.sample(buffer, jax.random.key(0), 8)
    np.testing.assert_array_equal(more.valid, [True] * 5 + [False] * 3)
    assert not bool(jnp.any(buffers.sample(empty(4), jax.random.key(0), 2).valid))
    with pytest.raises(ValueError, match="replace"):
        buffers.sample(buffer, jax.random.key(0), 9)


@pytest.mark.parametrize("replace", [True, False])
def test_sampling_is_uniform_over_what_is_held(replace):
    buffer = buffers.add(empty(8), rows(0, 5))
    draw = jax.jit(
        jax.vmap(lambda key: buffers.sample(buffer, key, 2, replace=replace).rows["n"])
    )
    counts = np.bincount(np.ravel(draw(jax.random.split(jax.random.key(1), 2000))), minlength=8)
    np.testing.assert_array_equal(counts[5:], 0)
    # 4,000 draws, 800 each, standard deviation about 25.
    assert np.all(np.abs(counts[:5] - 800) < 120)


def test_sampling_with_replacement_goes_beyond_the_capacity():
    buffer = buffers.add(empty(2), rows(0, 1))
    drawn = buffers.sample(buffer, jax.random.key(0), 6, replace=True)
    np.testing.assert_array_equal(drawn.rows["n"], [0] * 6)
    assert bool(jnp.all(drawn.valid))
    nothing = buffers.sample(empty(2), jax.random.key(0), 3, replace=True)
    assert not bool(jnp.any(nothing.valid))


@pytest.mark.parametrize("num_rows, size", [(12, 4), (12, 12), (12, 1)])
def test_minibatches_cover_every_row_exactly_once(num_rows, size):
    order = buffers.minibatches(jax.random.key(3), num_rows, size)
    chex.assert_shape(order, (num_rows // size, size))
    assert order.dtype == jnp.int32
    assert sorted(np.ravel(order).tolist()) == list(range(num_rows))


def test_minibatches_differ_by_key_and_refuse_short_ones():
    first, again, other = (
        buffers.minibatches(jax.random.key(k), 64, 8).tolist() for k in (0, 0, 1)
    )
    assert first == again != other
    for size in (5, 0, 24):
        with pytest.raises(ValueError, match="divisor"):
            buffers.minibatches(jax.random.key(0), 12, size)


def test_wrong_rows_are_refused():
    buffer = empty(2)
    with pytest.raises(ValueError, match="3 rows.*holds 2"):
        buffers.add(buffer, rows(0, 3))
    with pytest.raises(ValueError, match="shape"):
        buffers.add(buffer, {**rows(0, 2), "x": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match="dtype"):
        buffers.add(buffer, {**rows(0, 2), "n": jnp.zeros(2)})
    with pytest.raises(ValueError, match="expected"):
        buffers.add(buffer, {**rows(0, 2), "x": jnp.zeros((1, 2))})
    with pytest.raises(AssertionError):
        buffers.add(buffer, {"n": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="example: got {}, expected at least one array"):
        buffers.init(2, {})
    with pytest.raises(ValueError, match="leaf without a leading axis"):
        buffers.add(buffers.init(2, {"n": jnp.zeros(())}), {"n": jnp.float32(0)})
    with pytest.raises(ValueError, match=r"valid is bool \[1\], expected bool \[2\]"):
        buffers.add(buffer, rows(0, 2), valid=jnp.ones(1, bool))


def test_donated_storage_is_updated_in_place():
    add = jax.jit(buffers.add, donate_argnums=0)
    buffer = empty(4)
    before = buffer.rows["x"].unsafe_buffer_pointer()
    after = add(buffer, rows(0, 2))
    assert buffer.rows["x"].is_deleted()
    assert after.rows["x"].unsafe_buffer_pointer() == before


def test_one_trace_over_many_calls():
    add = jax.jit(chex.assert_max_traces(buffers.add, 1))
    buffer = empty(5)
    for call in range(7):
        buffer = add(buffer, rows(call, 2))
    assert held(buffer) == [5, 5, 6, 6, 7]


def test_a_sharded_buffer_gives_the_same_rows_and_stays_sharded():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    along_rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    plain = empty(8)
    places = jax.tree.map(lambda leaf: along_rows if leaf.ndim else whole, plain)
    add = jax.jit(buffers.add, donate_argnums=0, out_shardings=places)
    sharded = jax.device_put(plain, places)
    for call in range(3):
        plain = buffers.add(plain, rows(4 * call, 4))
        sharded = add(sharded, jax.device_put(rows(4 * call, 4), along_rows))
    chex.assert_trees_all_equal(sharded, plain)
    assert sharded.rows["x"].sharding.is_equivalent_to(along_rows, 2)
    assert {shard.data.shape for shard in sharded.rows["x"].addressable_shards} == {(2, 2)}
    drawn = jax.jit(functools.partial(buffers.sample, num=4))(sharded, jax.random.key(5))
    chex.assert_trees_all_equal(drawn, buffers.sample(plain, jax.random.key(5), 4))


def test_a_buffer_passes_through_scan():
    """As a carry, it must come back with the types it went in with."""

    def step(buffer, start):
        batch = {"n": start + jnp.arange(2), "x": jnp.zeros((2, 2))}
        return buffers.add(buffer, batch), buffers.num_rows(buffer)

    buffer, counts = jax.lax.scan(step, empty(5), 2 * jnp.arange(4, dtype=jnp.int32))
    np.testing.assert_array_equal(counts, [0, 2, 4, 5])
    assert held(buffer) == [3, 4, 5, 6, 7]


def test_a_leaf_without_rows_and_a_negative_number_are_refused():
    held = buffers.init(4, {"x": jnp.zeros(())})
    with pytest.raises(ValueError, match="without a leading axis"):
        buffers.add(held, {"x": 1.0})
    with pytest.raises(ValueError, match="num: got -1"):
        buffers.sample(held, jax.random.key(0), -1)


def test_an_examples_own_dtype_is_taken():
    """numpy's float64 and int64 became jax's 32 bits."""
    row = {"x": np.zeros(2), "n": np.arange(3)}
    buffer = buffers.add(buffers.init(4, row), {"x": np.ones((2, 2)), "n": np.ones((2, 3), int)})
    assert buffer.rows["x"].dtype == jnp.float32 and float(buffer.rows["x"].sum()) == 4
    with pytest.raises(ValueError, match="dtype int64, expected .* float32"):
        buffers.add(buffer, {"x": np.ones((2, 2), int), "n": np.ones((2, 3), int)})
