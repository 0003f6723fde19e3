"""The update step: memory, packing, narrow dtypes. Equality on meshes is in test_sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding import (
    LENGTH,
    OPTIMIZER,
    RL,
    ROWS,
    UNTIED,
    assert_close,
    data,
    fresh_state,
    imitation_on_one_device,
    lengths,
    packed_rows,
    params,
    rows_in_parts,
    step_for_gradients,
    whole_rows,
)

from jaxagentrl import imitate, learner, logprobs, objectives, optimizer, packing
from jaxagentrl.models import decoder

# As deep models do it.
pytestmark = pytest.mark.usefixtures("looped_layers")

BIG_VOCABULARY = 152_064  # Qwen2.5's


def head_memory(vocab_size: int, rows: int, length: int, width: int = 8) -> int:
    """Bytes of temporaries that the gradient of the log-probs needs, from the compiled program."""

    def loss(hidden, weights, tokens):
        scores, entropies = logprobs.token_logprobs(
            hidden, weights, tokens, chunk_size=logprobs.largest_chunk(vocab_size)
        )
        return jnp.sum(scores) + jnp.sum(entropies)

    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_of_a_batch_never_exist():
    """At V = 152k: a constant number of chunks of logits, however long the batch."""
    short, long = (head_memory(BIG_VOCABULARY, 4, length) for length in (1024, 4096))
    chunk = 4 * BIG_VOCABULARY * logprobs.largest_chunk(BIG_VOCABULARY)
    logits = 4 * BIG_VOCABULARY * 4 * 4096
    assert chunk <= 2**28
    assert long < 6 * chunk < logits / 6
    assert long - short < 0.05 * logits


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_change_nothing(chunk_size):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 11, 4)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((4, 13)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 13, (3, 11)), jnp.int32)

    def loss(hidden, weights, chunk_size):
        scores, entropies = logprobs.token_logprobs(
            hidden, weights, tokens, temperature=0.7, chunk_size=chunk_size
        )
        return jnp.sum(jnp.sin(scores)) + jnp.sum(entropies**2), (scores, entropies)

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    whole, parts = (both(hidden, weights, size) for size in (1000, chunk_size))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_first_fit_uses_every_item_once_and_few_bins(sizes, capacity):
    bins = packing.first_fit(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in members) <= capacity for members in bins)
    # No two bins fit into one: the mark of any fit that opens a bin only when it must.
    loads = sorted(sum(sizes[i] for i in members) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_first_fit_by_hand():
    assert packing.first_fit([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]
    assert packing.first_fit([], 10) == []
    with pytest.raises(ValueError, match="11 tokens but packed rows have 10"):
        packing.first_fit([11], 10)


def test_more_rows_than_a_step_has_places_for_are_refused():
    with pytest.raises(ValueError, match="most_rows is 2, but a step has 3 rows"):
        packing.pack(np.arange(3), np.full(3, 4), shape=(3, 4), length=4, tokens_per_part=4, row_multiple=1, most_rows=2)


def test_packed_rows_hold_every_token_once():
    packed = packed_rows()
    assert packed.places.shape == (4, 4, LENGTH)
    count = int(packed.count)
    rows_used = len(packing.first_fit(lengths().tolist(), LENGTH))
    assert count == -(-rows_used // 4) <= 4
    held = packed.places[packed.segment_ids >= 0]
    expected = np.flatnonzero(np.arange(LENGTH)[None] < lengths()[:, None])
    np.testing.assert_array_equal(np.sort(held), expected)
    np.testing.assert_array_equal(held % LENGTH, packed.positions[packed.segment_ids >= 0])
    assert np.all(packed.places[packed.segment_ids < 0] == ROWS * LENGTH)
    assert np.all(packed.segment_ids[count:] == -1)


WIDER = dict(length=2 * LENGTH + 5)  # room for several trajectories in a row


def step_with(work, **options):
    chain = optax.trace(0.0)
    state = fresh_state(UNTIED, None)
    state = learner.TrainState(state.step, state.iteration, state.params, chain.init(state.params))
    step = learner.make_step(objectives.make_sft_loss(UNTIED, **options), chain)
    return step(state, *jax.device_put(data()), work)


@pytest.mark.parametrize("surrogate", ["clipped", "gspo"])
def test_packing_changes_no_gradient_of_rl(surrogate):
    """Of GSPO, too, whose ratio is one for each text of a row."""
    loss_fn, chain, outcomes = objectives.make_rl_loss(UNTIED, **RL | {"surrogate": surrogate}), optax.trace(0.0), []
    packed = packed_rows(**WIDER, tokens_per_part=2 * WIDER["length"], row_multiple=2)
    assert packed.segment_ids.max() > 1
    for work in (whole_rows(), (packed,)):
        state = fresh_state(UNTIED, None)
        state = dataclasses.replace(state, opt_state=chain.init(state.params))
        state, metrics = learner.make_step(loss_fn, chain)(state, *jax.device_put(data()), work)
        outcomes.append(jax.device_get((metrics, state.opt_state.trace)))
    assert 0 < outcomes[0][0]["policy/clip_fraction"] < 1
    assert_close(*outcomes)


def test_packing_changes_no_gradient():
    """Accumulated over micro-batches of packed rows, with global denominators."""
    metrics, grads = imitation_on_one_device()
    packed = packed_rows(**WIDER, tokens_per_part=2 * WIDER["length"], row_multiple=2)
    assert int(packed.count) > 1 and packed.segment_ids.max() > 1
    state, measured = step_with((packed,))
    assert_close(metrics, {key: measured[key] for key in metrics})
    assert_close(grads, jax.tree.map(np.subtract, state.params, params(UNTIED)))


def test_packing_changes_no_score():
    score = learner.make_score(UNTIED, temperature=0.8)
    tokens, valid = data()[0].tokens, data()[0].valid_mask
    weights = params(UNTIED)
    whole = score(weights, tokens, valid, whole_rows())
    packed = score(weights, tokens, valid, (packed_rows(**WIDER),))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.where(valid, a, 0), b, atol=1e-5), whole, packed
    )
    assert float(np.abs(packed.values).max()) > 0


BUCKETS = (4, 8, 16, LENGTH, 2 * LENGTH)  # the last is longer than the batch is wide


def by_length(rows=range(ROWS)):
    """Rows of `data` in micro-batches by length, of at most 48 tokens."""
    return imitate.split(
        np.array(rows, np.int32),
        lengths(),
        shape=(ROWS, LENGTH),
        most_rows=ROWS,
        length_buckets=BUCKETS,
        tokens_per_part=48,
        row_multiple=2,
        packing=False,
    )


def counts(work):
    """Micro-batches by length."""
    return {stack.length: int(stack.count) for stack in work}


def test_rows_by_length_are_in_one_micro_batch_each():
    """12 rows of 4, 6 of 8, 2 of 16 or 24 are at most 48 tokens, or two rows."""
    work = by_length()
    assert [stack.shape for stack in work] == [(2, LENGTH), (2, 16), (6, 8), (12, 4)]
    assert [len(stack.rows) for stack in work] == [8, 8, 3, 2]  # 16 rows fill no more of any
    assert counts(work) == {LENGTH: 3, 16: 4, 8: 1, 4: 0}
    taken = []
    for stack in work:
        assert np.all(stack.rows[int(stack.count) :] == ROWS)
        held = stack.rows[: int(stack.count)]
        assert np.all(np.any(held < ROWS, axis=1))
        taken += held[held < ROWS].tolist()
        assert np.all(lengths()[held[held < ROWS]] <= stack.length)
    assert sorted(taken) == list(range(ROWS))
    # Rows of nothing but the smallest number still have the same shapes.
    few = by_length([int(np.argmin(lengths()))])
    assert jax.tree.structure(few) == jax.tree.structure(work)
    assert [stack.rows.shape for stack in few] == [stack.rows.shape for stack in work]
    assert sum(counts(few).values()) == 1 and counts(few)[4] == 1


def test_rows_by_length_change_no_gradient():
    """Several lengths, several micro-batches of one, and one that nothing has."""
    metrics, grads = imitation_on_one_device()
    work = by_length()
    for stack in work:
        stack.rows[int(stack.count) :] = 0  # what lies beyond the count is not read
    state, measured = step_with(work)
    assert_close(metrics, {key: measured[key] for key in metrics})
    assert_close(grads, state.opt_state.trace)


def test_rows_by_length_change_no_score():
    score = learner.make_score(UNTIED, temperature=0.8)
    batch = data()[0]
    whole = score(params(UNTIED), batch.tokens, batch.valid_mask, whole_rows())
    cut = score(params(UNTIED), batch.tokens, batch.valid_mask, by_length())
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        one, other = (np.where(batch.valid_mask, x, 0) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.all(np.any(one, axis=1))  # of every row


def test_steps_of_other_lengths_share_one_program():
    """Whatever lengths come, and however many micro-batches of each, none included."""
    chain = optax.sgd(0.1)
    step = learner.make_step(objectives.make_sft_loss(UNTIED), chain)
    score = learner.make_score(UNTIED, temperature=1.0)
    state = fresh_state(UNTIED, None)
    state = learner.TrainState(state.step, state.iteration, state.params, chain.init(state.params))
    batch, targets = jax.device_put(data())
    order = np.argsort(lengths())
    seen = []
    for rows in (order, order[:1], order[-3:], order[2:9], []):
        work = by_length(rows)
        seen.append(tuple(counts(work).values()))
        before = state
        state, _ = step(state, batch, targets, work)
        score(state.params, batch.tokens, batch.valid_mask, work)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
    assert len(set(seen)) == len(seen)
    assert step._cache_size() == score._cache_size() == 1


def test_a_step_traces_its_loss_once_for_every_length():
    """Tracing twice was most of the wait for a program that was compiled before."""
    traced = []

    def loss(params, batch, targets, **layout):
        traced.append(batch.tokens.shape)
        return objectives.make_sft_loss(UNTIED)(params, batch, targets, **layout)

    step, arguments = step_for_gradients(UNTIED, None, loss)
    work = by_length(np.argsort(lengths()))
    step.trace(*arguments, work)
    assert traced == [stack.shape for stack in work] and len(set(traced)) > 2


def test_packed_steps_of_fewer_rows_have_the_same_shapes():
    """However many rows there are, and whatever fits together: a step compiles once in a run."""
    settings = dict(
        shape=(ROWS, LENGTH), most_rows=ROWS, length_buckets=BUCKETS[:4], tokens_per_part=32,
        row_multiple=1, packing=True,
    )
    assert BUCKETS[3] == LENGTH
    full = imitate.split(np.arange(ROWS), np.full(ROWS, LENGTH), **settings)
    assert int(full[0].count) == len(full[0].places) == -(-ROWS // (32 // LENGTH))
    for rows in (range(ROWS), range(5), [int(np.argmin(lengths()))], []):
        some = imitate.split(np.array(rows, np.int32), lengths(), **settings)
        assert jax.tree.map(np.shape, some) == jax.tree.map(np.shape, full)
        held = some[0].places[some[0].places < ROWS * LENGTH]
        assert len(held) == lengths()[list(rows)].sum() and int(some[0].count) <= len(some[0].places)


def test_what_a_stack_does_not_hold_is_not_computed():
    """All that a program computes for micro-batches is in loops over them, which may be of none.

    Layers are loops, too, so one that was moved out of the loop over micro-batches would be seen.
    """
    chain = optax.sgd(0.1)
    step = learner.make_step(objectives.make_sft_loss(UNTIED), chain)
    score = learner.make_score(UNTIED, temperature=1.0)
    weights = params(UNTIED)
    zero = np.int32(0)
    state = learner.TrainState(zero, zero, weights, chain.init(weights))
    batch, targets = data()
    one = rows_in_parts([range(ROWS)]) + rows_in_parts([range(ROWS)], length=16)
    for work in (by_length(), one):
        for program, inputs in ((step, (state, batch, targets)), (score, (weights, batch.tokens, batch.valid_mask))):
            text = program.lower(*inputs, work).compile().as_text()
            assert text[text.index("\nENTRY") :].count(" while(") == len(work)


def test_packed_steps_of_other_sizes_share_one_program():
    step = learner.make_step(objectives.make_sft_loss(UNTIED), optax.sgd(0.1))
    state = fresh_state(UNTIED, None)
    state = learner.TrainState(
        state.step, state.iteration, state.params, optax.sgd(0.1).init(state.params)
    )
    for count in (3, 4):
        packed = packing.pack(
            np.arange(count * 4),
            np.full(ROWS, LENGTH),
            shape=(ROWS, LENGTH),
            length=LENGTH,
            tokens_per_part=4 * LENGTH,
            row_multiple=4,
        )
        assert int(packed.count) == count
        before = state
        state, _ = step(state, *data(), (packed,))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))  # donated
    assert step._cache_size() == 1


def test_bfloat16_computes_near_float32_on_float32_masters():
    metrics, grads = imitation_on_one_device()
    state, measured = step_with(whole_rows(), compute_dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert abs(float(metrics["loss/action"] - measured["loss/action"])) < 0.02
    norm = functools.partial(optax.tree.norm)
    change = jax.tree.map(np.subtract, state.params, params(UNTIED))
    error = norm(jax.tree.map(np.subtract, change, grads)) / norm(grads)
    assert 0 < float(error) < 0.03  # 8 bits of mantissa, and not float32 by accident


def test_bfloat16_gradients_of_many_tokens_are_near_float32():
    """A sum in bfloat16 stands still at 256 times its terms: of common tokens, of biases and scales."""
    config = dataclasses.replace(UNTIED, num_layers=1, attention_bias=True)
    policy = {"policy": decoder.init(config, jax.random.key(0))}
    odds = 1 / np.arange(1, config.vocab_size + 1)  # as words are distributed
    tokens = np.random.default_rng(0).choice(config.vocab_size, size=(64, 256), p=odds / odds.sum()).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def slope(policy, dtype):
        needed = jnp.ones(tokens.shape, bool)
        return -jnp.mean(learner.forward(config, policy, tokens, needed, temperature=1.0, compute_dtype=dtype).logprobs)

    exact, narrow = slope(policy, "float32"), slope(policy, "bfloat16")
    off = jax.tree.map(lambda x, y: jnp.linalg.norm(x - y) / jnp.linalg.norm(x), exact, narrow)
    assert max(jax.tree.leaves(off)) < 0.02, off


def test_rematerialization_saves_memory():
    model = decoder.DecoderConfig(64, 64, 8, 4, 2, 16, 256)
    weights = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32)

    def memory(remat):
        def loss(weights, tokens):
            return jnp.sum(decoder.hidden(model, weights, tokens, remat=remat) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(weights, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [memory(policy) for policy in decoder.REMAT]  # from keeping all to keeping least
    assert sizes[1] < 0.9 * sizes[0] and sizes[2] < 0.9 * sizes[1]


def test_small_moments_are_adam_on_average_and_half_the_bytes():
    options = dict(OPTIMIZER, weight_decay=0.01)
    weights = {"kernel": jnp.ones((64, 64))}
    rng = np.random.default_rng(0)
    gradients = [rng.normal(0.3, 1.0, (64, 64)).astype(np.float32) for _ in range(50)]
    ends = []
    for dtype in optimizer.MOMENT_DTYPES:
        chain = optimizer.make(**options, moment_dtype=dtype)
        moved, state = weights, chain.init(weights)
        update = jax.jit(chain.update)
        for gradient in gradients:
            updates, state = update({"kernel": jnp.asarray(gradient)}, state, moved)
            moved = optax.apply_updates(moved, updates)
        ends.append(moved["kernel"])
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 and all(x.dtype == jnp.bfloat16 for x in moments)
    exact, small = (np.asarray(end) - 1 for end in ends)
    assert np.abs(np.mean(small - exact)) < 0.002 * np.abs(np.mean(exact))
    assert np.max(np.abs(small - exact)) < 0.1 * np.max(np.abs(exact))
    with pytest.raises(ValueError, match="moment_dtype"):
        optimizer.make(**options, moment_dtype="int8")


def test_rounding_at_random_has_the_right_mean():
    """A change of 1/2048 of the value, which rounding to nearest would drop for ever."""
    x = jnp.full(200_000, 1 + 2**-11, jnp.float32)
    rounded = optimizer._round_at_random(x, jax.random.key(3)).astype(jnp.float32)
    assert set(np.unique(rounded).tolist()) == {1.0, 1 + 2**-7}
    assert abs(float(jnp.mean(rounded)) - (1 + 2**-11)) < 3 * 2**-7 * (1 / 16 / 200_000) ** 0.5
    edge = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0])
    kept = optimizer._round_at_random(edge, jax.random.key(0))
    np.testing.assert_array_equal(kept[:2], edge[:2])
    assert np.isnan(kept[2]) and not np.any(kept[3:])
