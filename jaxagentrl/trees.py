"""Tree training: what trajectories begin with alike is computed once.

The members of a group begin with the same prompt, and while they act alike they read alike: in a text
world two thirds of an update's tokens may be tokens of another trajectory, in the same place after
the same past. Every layer makes the same of them. So a step lays out each group as a tree, a token per
node, and computes nodes. Log-probs, entropies and values are then copied to the trajectories; losses
never know, and the derivative of a copy is a sum, which is the gradient of all who share a node.

A row holds trees in the order of a depth-first walk. What follows a token, on whatever branch, lies
between it and its `end`: token t sees token s if s ≤ t < end[s]. Which token came before it is its
parent, the one left of it but where a branch begins.

Known as tree training (https://arxiv.org/abs/2511.00413, and AReaL).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxagentrl.models import sharding
from jaxagentrl.packing import check_most_rows, first_fit, rows_per_part
from jaxagentrl.types import Array

# Trajectories stay in one tree if they share this part of a row or more: less is not worth it to keep
# them together, since smaller trees fill rows better.
_WORTH_SHARING = 1 / 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trees:
    """Micro-batches of rows of trees: M of them, R rows, L nodes; of at most B' trajectories. int32."""

    rows: jax.Array | np.ndarray  # [M, B'] of the batch, trajectories of each; B on padding
    nodes: jax.Array | np.ndarray  # [B, W] where a token lies in its micro-batch's R · L; R · L if nowhere
    # [M, R, L] a token that a node stands for, in `rows`: row · W + column; B' · W on padding
    places: jax.Array | np.ndarray
    parents: jax.Array | np.ndarray  # [M, R, L] the node before, a number in the row; itself for a first one
    ends: jax.Array | np.ndarray  # [M, R, L] the first node of the row that is not behind this one
    count: jax.Array | np.ndarray  # [] micro-batches that hold anything

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, length) of a micro-batch."""
        return self.places.shape[1:]

    def in_parts(self, num_parts: int) -> tuple["Trees", "Trees"]:
        """Each part of the rows R as a stack of its own, with the trajectories that are there: `rows` is
        [M, num_parts · B'] then and `nodes` [num_parts · B, W], numbered within the part. See `Rows.in_parts`."""
        size = math.prod(self.shape) // num_parts

        def of_part(part: Array) -> tuple[Array, Array]:
            nodes = jnp.where(self.nodes // size == part, self.nodes - part * size, size)
            is_there = nodes[:, 0] < size  # all of it: a tree is in one row
            is_there = is_there.at[self.rows].get(mode="fill", fill_value=False)
            return jnp.where(is_there, self.rows, len(nodes)), nodes

        rows, nodes = jax.vmap(of_part, out_axes=(1, 0))(jnp.arange(num_parts, dtype=jnp.int32))
        stack = dataclasses.replace(
            self,
            rows=rows.reshape(len(rows), -1),
            nodes=nodes.reshape(-1, nodes.shape[2]),
        )
        return stack, Trees(rows=1, nodes=0, places=1, parents=1, ends=1, count=None)

    def num_nodes(self) -> int:
        return int(np.sum(self.places < self.rows.shape[1] * self.nodes.shape[1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """One micro-batch of `Trees`: B' trajectories of W tokens, in R rows of L nodes."""

    nodes: Array  # [B', W]
    places: Array  # [R, L]
    parents: Array  # [R, L]
    ends: Array  # [R, L]

    @property
    def positions(self) -> Array:
        """[R, L] of a node in its trajectories; 0 on padding."""
        return self.places % self.nodes.shape[1]

    def of_nodes(self, x: Array) -> Array:
        """[B', W] of tokens, the same for all that share a node, to [R, L]; 0 on padding."""
        return sharding.constrain(_take(x, self.places), sharding.ROWS)

    def any_of_nodes(self, x: Array) -> Array:
        """[B', W] bool to [R, L]: true for any that shares the node."""
        at = jnp.where(x, self.nodes, self.places.size)
        found = jnp.zeros(self.places.size, bool).at[at].set(True, mode="drop")
        return sharding.constrain(found.reshape(self.places.shape), sharding.ROWS)

    def before(self, x: Array) -> Array:
        """Hidden states [R, L, D], of which entry t is then that of the node before t + 1."""
        parents = jnp.roll(self.parents, -1, axis=1)
        return sharding.constrain(jax.vmap(lambda row, at: row[at])(x, parents), sharding.ROWS)

    def of_tokens(self, x: Array) -> Array:
        """[R, L] of nodes to [B', W]; 0 for what has no node."""
        return sharding.constrain(_take(x, self.nodes), sharding.ROWS)


def _take(x: Array, at: Array) -> Array:
    return x.reshape(-1).at[at].get(mode="fill", fill_value=0)


def grow(
    rows: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    length: int,
    tokens_per_part: int,
    row_multiple: int,
    most_rows: int,
) -> Trees:
    """The rows of one step as trees.

    Sorted, trajectories that begin alike are neighbours, and a tree is a run of them that fits a row.
    Trees are put into rows by first-fit, rows into micro-batches in turn.

    Args:
        rows: [n] of the batch, those of the step.
        tokens: [B, W] of the batch.
        lengths: tokens of every row of the batch, at least those named.
        length: L, of rows of trees.
        tokens_per_part: upper bound of R × L, as long as `row_multiple` rows fit.
        row_multiple: R is a multiple of this.
        most_rows: B', an upper bound of `len(rows)` over all steps, whose shapes are then the same; a row holds
            one of them at least, which bounds M.

    Raises:
        ValueError: a trajectory is longer than a row, or there are more of them than `most_rows`.
    """
    check_most_rows(len(rows), most_rows)
    if len(rows) and lengths[rows].max() > length:
        raise ValueError(
            f"learner.tree_length is {length}, but a trajectory has {lengths[rows].max()} tokens: raise it."
        )
    trees = [_plant(run, lengths) for run in _runs(rows, tokens, lengths, length)]
    bins = first_fit([len(tree.parents) for tree in trees], length)
    per_part = rows_per_part(
        length, tokens_per_part=tokens_per_part, row_multiple=row_multiple
    )
    capacity, width = -(-most_rows // per_part), tokens.shape[1]
    parts = (capacity, per_part, length)
    members = np.full((capacity, most_rows), tokens.shape[0], np.int32)
    nodes = np.full(tokens.shape, per_part * length, np.int32)
    places = np.full((capacity * per_part, length), most_rows * width, np.int32)
    parents, ends = np.zeros_like(places), np.full_like(places, length)
    num_members = [0] * capacity
    for number, held in enumerate(bins):
        (part, row), start = divmod(number, per_part), 0
        for tree in (trees[index] for index in held):
            first = num_members[part]
            num_members[part] += len(tree.rows)
            members[part, first : num_members[part]] = tree.rows
            span = (number, slice(start, start + len(tree.parents)))
            places[span] = (first + tree.owners) * width + tree.columns
            parents[span], ends[span] = start + tree.parents, start + tree.ends
            for member, path in zip(tree.rows, tree.paths, strict=True):
                nodes[member, : len(path)] = row * length + start + path
            start += len(tree.parents)
    return Trees(
        members,
        nodes,
        places.reshape(parts),
        parents.reshape(parts),
        ends.reshape(parts),
        np.int32(-(-len(bins) // per_part)),
    )


# (row of the batch, tokens that it begins with as the one before it does) of neighbours; the first has 0.
_Run = Sequence[tuple[int, int]]


def _runs(
    rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, capacity: int
) -> list[_Run]:
    """Rows of neighbours in the order of their tokens, as many as share a tree of `capacity` nodes."""
    texts = {int(row): tokens[row, : lengths[row]].astype(">i4") for row in rows}
    runs: list[list[tuple[int, int]]] = []
    size, before = 0, np.zeros(0)
    for row in sorted(texts, key=lambda row: texts[row].tobytes()):
        text = texts[row]
        shared = _num_shared(before, text)
        is_worth_it = shared >= min(_WORTH_SHARING * capacity, len(text))
        if not runs or not is_worth_it or size + len(text) - shared > capacity:
            runs.append([])
            size = shared = 0
        runs[-1].append((row, shared))
        size, before = size + len(text) - shared, text
    return runs


def _num_shared(text: np.ndarray, other: np.ndarray) -> int:
    """Tokens at the beginning of both."""
    size = min(len(text), len(other))
    differing = np.flatnonzero(text[:size] != other[:size])
    return int(differing[0]) if len(differing) else size


@dataclasses.dataclass(frozen=True)
class _Planted:
    """A tree by itself: n nodes from 0 on, in the order of a depth-first walk."""

    rows: list[int]  # of the batch, its trajectories
    paths: list[np.ndarray]  # the nodes of each
    owners: np.ndarray  # [n] a trajectory that the node is of, a number in `rows`
    columns: np.ndarray  # [n] and its place there
    parents: np.ndarray  # [n]
    ends: np.ndarray  # [n]


def _plant(run: _Run, lengths: np.ndarray) -> _Planted:
    """The tree of a run: every trajectory adds what it does not share with the one before it."""
    added = [int(lengths[row]) - shared for row, shared in run]
    owners, columns, parents, ends = (np.empty(sum(added), np.int32) for _ in range(4))
    path, paths, size = np.zeros(0, np.int32), [], 0
    for number, ((_, shared), count) in enumerate(zip(run, added, strict=True)):
        ends[path[shared:]] = size  # the branch before goes no further
        new = np.arange(size, size + count, dtype=np.int32)
        path = np.concatenate([path[:shared], new])
        paths.append(path)
        owners[new], columns[new] = number, np.arange(shared, shared + count)
        parents[new] = np.concatenate([path[:1], path])[shared : shared + count]
        size += count
    ends[path] = size
    return _Planted([row for row, _ in run], paths, owners, columns, parents, ends)
