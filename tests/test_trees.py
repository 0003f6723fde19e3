"""Trees: scores, losses and gradients are those of every trajectory by itself."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharding import (
    LENGTH,
    RL,
    ROWS,
    UNTIED,
    assert_close,
    data,
    fresh_state,
    lengths,
    params,
    whole_rows,
)

from jaxagentrl import learner, objectives, trees
from jaxagentrl.models import decoder, sharding

# As deep models do it.
pytestmark = pytest.mark.usefixtures("looped_layers")

WINDOWS = dataclasses.replace(
    UNTIED, sliding_window=4, window_layers=(False, True), local_rope_theta=100.0
)
SHAPES = dict(length=2 * LENGTH, tokens_per_part=4 * LENGTH, row_multiple=1, most_rows=ROWS)


@functools.cache
def alike():
    """`data` in four groups, whose members begin alike for a while. Masks and targets are their own."""
    rng = np.random.default_rng(3)
    batch, targets = data()
    beginnings = np.repeat(rng.integers(0, 60, (4, LENGTH)), 4, axis=0)
    apart = rng.integers(2, LENGTH, ROWS)
    tokens = np.where(np.arange(LENGTH)[None] < apart[:, None], beginnings, batch.tokens)
    return dataclasses.replace(batch, tokens=tokens.astype(np.int32)), targets


def grown(rows=range(ROWS), **options):
    return trees.grow(np.array(rows, np.int32), alike()[0].tokens, lengths(), **SHAPES | options)


def test_a_tree_by_hand():
    """Row 3 begins with 7 8, as row 0 does, which ends there; 1 goes on as 3 does, and then leaves it."""
    tokens = np.array([[7, 8, 0, 0], [7, 8, 9, 6], [4, 0, 0, 0], [7, 8, 9, 5]], np.int32)
    grown = trees.grow(
        np.array([3, 0, 1, 2], np.int32), tokens, np.array([2, 4, 1, 4]),
        length=7, tokens_per_part=7, row_multiple=1, most_rows=4,
    )
    assert (int(grown.count), grown.shape, grown.num_nodes()) == (1, (1, 7), 6)
    # Depth first, the longest tree first: 7 8 9 5 6, then the 4 of another tree.
    assert grown.rows.tolist() == [[0, 3, 1, 2]] + 3 * [[4, 4, 4, 4]]
    assert grown.nodes.tolist() == [[0, 1, 7, 7], [0, 1, 2, 4], [5, 7, 7, 7], [0, 1, 2, 3]]
    nothing = 4 * 4
    assert grown.places[0, 0].tolist() == [0, 1, 4 + 2, 4 + 3, 2 * 4 + 3, 3 * 4 + 0, nothing]
    assert grown.parents[0, 0, :6].tolist() == [0, 0, 1, 2, 2, 5]
    assert grown.ends[0, 0].tolist() == [5, 5, 5, 4, 5, 6, 7]
    assert np.all(grown.places[1:] == nothing)


@st.composite
def batches(draw):
    """(tokens [B, W], lengths, rows of the step): three tokens, so that many begin alike."""
    count, width = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    tokens = draw(st.lists(st.integers(0, 2), min_size=count * width, max_size=count * width))
    sizes = draw(st.lists(st.integers(1, width), min_size=count, max_size=count))
    rows = draw(st.permutations(range(count)))[: draw(st.integers(0, count))]
    return np.array(tokens, np.int32).reshape(count, width), np.array(sizes), np.array(rows, np.int32)


@settings(max_examples=200, deadline=None)
@given(batches(), st.integers(0, 9), st.integers(1, 3))
def test_every_trajectory_finds_its_tokens_and_sees_its_past(batch, room, per_part):
    tokens, sizes, rows = batch
    count, width = tokens.shape
    length = width + room
    grown = trees.grow(
        rows, tokens, sizes,
        length=length, tokens_per_part=per_part * length, row_multiple=1, most_rows=count,
    )
    held = grown.rows[grown.rows < count]
    assert sorted(held) == sorted(rows) and np.all(grown.rows[int(grown.count) :] == count)
    assert grown.num_nodes() <= sizes[rows].sum()
    for part, members in enumerate(grown.rows):
        # What the places say must be what the nodes of every member say.
        texts = np.append(tokens, np.full((1, width), -1), axis=0)[members].reshape(-1)
        found = np.append(texts, -1)[np.minimum(grown.places[part], texts.size)]
        for row in members[members < count]:
            path = grown.nodes[row, : sizes[row]]
            np.testing.assert_array_equal(found.reshape(-1)[path], tokens[row, : sizes[row]])
            assert np.all(grown.nodes[row, sizes[row] :] == per_part * length)
            (line,), path = np.unique(path // length), path % length
            np.testing.assert_array_equal(grown.places[part, line, path] % width, np.arange(len(path)))
            np.testing.assert_array_equal(grown.parents[part, line, path[1:]], path[:-1])
            # Of all nodes of the row, a token sees those of its own past and no others.
            place = np.arange(length)
            seen = (place[None] <= path[:, None]) & (path[:, None] < grown.ends[part, line][None])
            assert [np.flatnonzero(one).tolist() for one in seen] == [
                path[: index + 1].tolist() for index in range(len(path))
            ]
    assert np.all(np.delete(grown.nodes, rows, axis=0) == per_part * length)


def test_shapes_are_those_of_the_batch_whatever_the_rows():
    shapes = [jax.tree.map(np.shape, grown(rows)) for rows in (range(ROWS), [3], [])]
    assert shapes[0] == shapes[1] == shapes[2]
    assert [int(grown(rows).count) for rows in ([3], [])] == [1, 0]


def test_what_only_begins_with_the_same_few_tokens_is_not_kept_together():
    """A token of sixteen and more is worth it: with less, smaller trees fill rows better."""
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    sizes = np.array([16, 16])
    nodes = []
    for shared in (1, 2, 16):
        tokens[1, :shared] = tokens[0, :shared]
        made = trees.grow(
            np.arange(2), tokens, sizes, length=32, tokens_per_part=32, row_multiple=1, most_rows=2
        )
        nodes.append(made.num_nodes())
    assert nodes == [32, 30, 16]


def test_a_trajectory_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=f"learner.tree_length is 10, but .* {lengths().max()} tokens"):
        grown(length=10)


def test_more_trajectories_than_there_are_places_are_refused():
    with pytest.raises(ValueError, match=f"most_rows is {ROWS - 1}, but a step has {ROWS} rows"):
        grown(most_rows=ROWS - 1)


def learned(model, work, loss_fn, mesh=None, critic="head", reads_all=True):
    """(metrics, gradient) of a loss on `alike`; of action tokens alone, which members differ in, if not
    `reads_all`."""
    chain = optax.trace(0.0)  # what it keeps is the gradient
    with sharding.use(mesh):
        state = fresh_state(model, mesh)
        weights = state.params
        if critic == "separate":
            weights = weights | {"critic": jax.tree.map(lambda x: 1.1 * x, weights["policy"])}
        state = dataclasses.replace(state, params=weights, opt_state=chain.init(weights))
        batch, targets = sharding.place_rows(alike(), mesh)
        if not reads_all:
            targets = dataclasses.replace(targets, observation_weights=0 * targets.weights)
        state, metrics = learner.make_step(loss_fn, chain)(
            sharding.place(state, mesh), batch, targets, work
        )
    return jax.device_get((metrics, state.opt_state.trace))


@pytest.mark.parametrize("model", [UNTIED, WINDOWS], ids=["plain", "windows and two rotations"])
def test_trees_change_no_score(model):
    score = learner.make_score(model, temperature=0.8)
    tokens, valid = alike()[0].tokens, alike()[0].valid_mask
    work = grown()
    assert int(work.count) > 1 and work.num_nodes() < 0.8 * valid.sum()
    whole = score(params(model), tokens, valid, whole_rows())
    shared = score(params(model), tokens, valid, (work,))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.where(valid, a, 0), b, atol=1e-5), whole, shared
    )
    assert float(np.abs(shared.values).max()) > 0


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {}),
        ({"surrogate": "gspo"}, {"reads_all": False}),
        ({"importance_cap": 1.5}, {"critic": "separate"}),
    ],
    ids=["clipped", "gspo", "a separate critic"],
)
def test_trees_change_no_gradient(changed, options):
    """Members weigh the token that they share as differently as they like."""
    loss_fn = objectives.make_rl_loss(UNTIED, **RL | changed)
    one, other = (
        learned(UNTIED, work, loss_fn, **options) for work in (whole_rows(), (grown(),))
    )
    assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 1), (4, 1, 2)], ids=str)
def test_trees_on_a_mesh_change_no_gradient(shape):
    loss_fn = objectives.make_rl_loss(UNTIED, **RL)
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    work = grown(tokens_per_part=8 * LENGTH, row_multiple=4)
    assert len({node // work.shape[1] for node in work.nodes[:, 0].tolist()}) == 4  # rows of several devices
    one = learned(UNTIED, whole_rows(), loss_fn)
    assert_close(one, learned(UNTIED, (work,), loss_fn, mesh))


def test_a_step_computes_what_is_shared_once():
    """Four members that are all alike cost what one costs: by the count of the program's work."""
    batch = alike()[0]
    same = np.repeat(batch.tokens[::4], 4, axis=0)
    sizes = np.full(ROWS, LENGTH)
    work = trees.grow(np.arange(ROWS), same, sizes, **SHAPES | {"length": LENGTH})
    assert work.num_nodes() == 4 * LENGTH and int(work.count) == 1


def test_no_kernel_that_knows_segments_only_is_asked_for_trees(monkeypatch):
    asked = []
    monkeypatch.setattr(
        decoder.attention, "kernel_for", lambda *_, is_tree, **__: asked.append(is_tree) or "products"
    )
    row = np.zeros((1, 4), np.int32)
    for ends in (row + 4, None):
        hidden = functools.partial(decoder.hidden, UNTIED, params(UNTIED)["policy"], row)
        jax.eval_shape(lambda ends=ends, hidden=hidden: hidden(positions=row, ends=ends))
    assert asked == [True, False]
