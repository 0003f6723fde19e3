"""Masked and grouped reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import masking
from jaxagentrl.advantages import group_normalized, whiten

X = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, 3.0]])
MASK = np.array([[1, 1, 0], [1, 0, 1]], bool)
TURNS = np.array([[0, 0, 1, 1, 2], [1, 1, 1, -1, 7]], np.int32)
ACTS = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], bool)


def test_sums_counts_and_means():
    assert masking.masked_sum(X, MASK) == 10.0
    np.testing.assert_array_equal(masking.masked_sum(X, MASK, axis=-1), [3, 7])
    assert masking.masked_count(MASK) == 4.0
    assert masking.masked_mean(X, MASK) == 2.5
    np.testing.assert_array_equal(masking.masked_mean(X, MASK, axis=-1), [1.5, 3.5])
    np.testing.assert_array_equal(masking.masked_mean(X, MASK & False, axis=-1), [0, 0])
    assert masking.masked_min(X, MASK) == 1.0
    assert masking.masked_min(X, MASK & False) == 0.0
    assert masking.masked_min(X, X == 4.0) == 4.0
    np.testing.assert_array_equal(masking.zero_off(X, MASK), [[1, 2, 0], [4, 0, 3]])


def test_mean_and_variance():
    # 1, 2, 4, 3: mean 5/2, squares 9/4 + 1/4 + 9/4 + 1/4 = 5.
    mean, var = masking.masked_mean_and_var(X, MASK)
    assert (mean, var) == (2.5, 1.25)
    _, var = masking.masked_mean_and_var(X, MASK, ddof=1)
    assert var == pytest.approx(5 / 3)
    assert masking.masked_mean_and_var(X, MASK & False, ddof=1) == (0, 0)
    one = np.array([[1, 0, 0], [0, 0, 0]], bool)
    assert masking.masked_mean_and_var(X, one, ddof=1) == (1, 0)


def test_a_device_without_entries_knows_the_others_statistics():
    x, mask = jnp.array([[1.0, 3.0], [9.0, 9.0]]), jnp.array([[True, True], [False, False]])
    mean_and_var = functools.partial(masking.masked_mean_and_var, axis_name="devices")
    mean, var = jax.vmap(mean_and_var, axis_name="devices")(x, mask)
    np.testing.assert_array_equal(mean, [2, 2])
    np.testing.assert_array_equal(var, [1, 1])


def test_variance_of_equal_entries_is_exactly_zero():
    mean, var = masking.masked_mean_and_var(jnp.full(7, 0.1), np.ones(7, bool))
    assert mean == np.float32(0.1)
    assert var == 0.0


def test_variance_keeps_its_digits_far_from_zero():
    x = jnp.array([1e4, 1e4 + 1, 1e4 + 2])
    _, var = masking.masked_mean_and_var(x, np.ones(3, bool))
    assert var == pytest.approx(2 / 3, rel=1e-5)


def test_gradients_stop_at_the_mask():
    gradient = jax.grad(lambda x: masking.masked_mean_and_var(x, MASK)[1])(X)
    # d var / dx = 2 (x − mean) / n.
    np.testing.assert_allclose(gradient, [[-0.75, -0.25, 0], [0.75, 0, 0.25]], atol=1e-6)
    gradient = jax.grad(lambda x: masking.masked_mean(x, MASK))(X)
    np.testing.assert_allclose(gradient, 0.25 * MASK)


def test_statistics_over_devices_have_gradients():
    """Minima over devices have none, and need none: shifting everything changes nothing."""
    ids = np.zeros((2, 3), np.int32)
    weights = jnp.array([[1.0, -2.0, 0.5], [3.0, 1.0, 0.0]])
    full = jnp.where(MASK, X, 5.0)

    def statistics(x, mask, ids, weights, axis_name=None):
        axis = {"axis_name": axis_name}
        grouped = group_normalized(x.reshape(-1), ids.reshape(-1), num_groups=1, **axis)
        whitened = masking.zero_off(whiten(x, mask, **axis), mask)
        total = weights * (whitened + grouped.reshape(x.shape))
        return masking.masked_sum(total, jnp.ones(x.shape, bool), **axis)

    def over_devices(x):
        one_device = functools.partial(statistics, axis_name="devices")
        mapped = jax.vmap(one_device, axis_name="devices")
        return mapped(x, MASK, ids, weights)[0]

    wanted = jax.grad(statistics)(full, MASK, ids, weights)
    np.testing.assert_allclose(jax.grad(over_devices)(full), wanted, rtol=1e-4, atol=1e-5)


def test_clean():
    rows = masking.clean(dict(a=X, b=X.astype(jnp.bfloat16)), MASK, differentiable=1)
    assert [row.dtype for row in rows] == [jnp.float32] * 2
    np.testing.assert_array_equal(rows[1], [[1, 2, 0], [4, 0, 3]])
    whole = masking.clean(dict(a=X), None, differentiable=1)[0]
    np.testing.assert_array_equal(whole, X)

    def total(x):
        return sum(jnp.sum(row) for row in masking.clean(dict(a=x, b=x), MASK, differentiable=1))

    np.testing.assert_array_equal(jax.grad(total)(X), MASK)


def test_turn_ends_are_closed_and_counted():
    acts = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    ends = np.array([[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    closed = masking.closed_turn_ends(acts, ends)
    # Ends off the mask do not count; the last action token is always one.
    np.testing.assert_array_equal(closed, [[1, 0, 0, 0, 1, 0], [0] * 6])
    np.testing.assert_array_equal(masking.count_turns(acts, ends)[0], [0, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(masking.turn_firsts(acts, ends), [[1, 1, 0, 0, 0, 0], [0] * 6])


def test_turn_sums_drop_what_belongs_to_no_turn():
    x = np.array([[1, 2, np.nan, 4, 5], [np.inf, 1, 2, 100, 200]], np.float32)
    got = masking.turn_sum(x, TURNS, ACTS, num_turns=3)
    np.testing.assert_array_equal(got, [[3, 4, 5], [0, 3, 0]])
    np.testing.assert_array_equal(masking.turn_sum(x, TURNS, ACTS, num_turns=2), got[:, :2])
    np.testing.assert_array_equal(masking.turn_sum(x[0], TURNS[0], ACTS[0], num_turns=3), got[0])
    deep = [a.reshape(1, 2, 5) for a in (x, TURNS, ACTS)]
    np.testing.assert_array_equal(masking.turn_sum(*deep, num_turns=3), got[None])


def test_first_and_last_positions_of_turns():
    last = masking.turn_last_position(TURNS, ACTS, num_turns=4)
    np.testing.assert_array_equal(last, [[1, 3, 4, -1], [-1, 2, -1, -1]])
    first = masking.turn_first_position(TURNS, ACTS, num_turns=4)
    np.testing.assert_array_equal(first, [[0, 3, 4, -1], [-1, 1, -1, -1]])
    got = masking.take_positions(np.arange(5, dtype=np.float32)[None] + 10, last[:1])
    np.testing.assert_array_equal(got, [[11, 13, 14, 0]])


def test_spreading_turns_and_sums_of_sequences():
    got = masking.spread_turns(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), TURNS, ACTS)
    np.testing.assert_array_equal(got, [[1, 1, 0, 2, 0], [0, 4, 4, 0, 0]])
    ones = np.ones((2, 5), np.float32)
    got = masking.sequence_sum(ones, ACTS)
    np.testing.assert_array_equal(got, [[4, 4, 0, 4, 4], [0, 4, 4, 4, 4]])
    got = masking.sequence_sum(ones, ACTS, turn_ids=np.where(TURNS == 7, 4, TURNS))
    np.testing.assert_array_equal(got, [[2, 2, 0, 1, 1], [0, 2, 2, 0, 1]])


def test_groups_drop_ids_out_of_range():
    ids = np.array([1, 0, 1, 2, -1, 9], np.int32)
    x = np.array([1, 2, 3, np.nan, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(masking.group_sum(x, ids, num_groups=2), [2, 4])
    np.testing.assert_array_equal(masking.group_count(ids, num_groups=2), [1, 2])
    np.testing.assert_array_equal(masking.group_min(x, ids, num_groups=2), [2, 1])
    got = masking.take_group(np.array([10.0, 20.0], np.float32), ids)
    np.testing.assert_array_equal(got, [20, 10, 20, 0, 0, 0])
    np.testing.assert_array_equal(masking.in_group(ids, num_groups=2), [1, 1, 1, 0, 0, 0])


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match="mask is bool .* as of x"):
        masking.masked_sum(X, MASK[:1])
    with pytest.raises(ValueError, match="mask is float32 .*, expected bool"):
        masking.masked_sum(X, MASK.astype(np.float32))
    with pytest.raises(ValueError, match=r"x is float32 .*, expected \[N\]"):
        masking.group_sum(X, TURNS, num_groups=2)


def test_division_by_nothing_is_zero_in_value_and_gradient():
    x, y = jnp.array([3.0, 3.0, 0.0]), jnp.array([2.0, 0.0, 0.0])
    np.testing.assert_array_equal(masking.divide(x, y), [1.5, 0, 0])
    slope = jax.grad(lambda x, y: jnp.sum(masking.divide(x, y)), (0, 1))(x, y)
    np.testing.assert_allclose(slope, [[0.5, 0, 0], [-0.75, 0, 0]])


def test_division_hides_nothing_that_is_no_number():
    x, y = jnp.array([3.0, 3.0, jnp.nan]), jnp.array([jnp.nan, 2.0, 0.0])
    np.testing.assert_array_equal(masking.divide(x, y), [np.nan, 1.5, 0])
    slope = jax.grad(lambda x: jnp.sum(masking.divide(x, y)))(x)
    np.testing.assert_array_equal(slope, [np.nan, 0.5, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_idle_is_zero_if_it_is_a_number(bad):
    x, idle = jnp.array([1.0, 2.0, bad, bad]), np.array([True, False, True, False])
    np.testing.assert_array_equal(masking.zero_idle(x, idle), [0, 2, bad, bad])
    slope = jax.grad(lambda x: jnp.sum(masking.zero_idle(x, idle)[:2]))(x)
    np.testing.assert_array_equal(slope, [0, 1, 0, 0])
