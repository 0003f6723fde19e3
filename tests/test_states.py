"""States of a run: where the frozen reference of a KL term comes from."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest
from test_sharding import UNTIED, params

from jaxagentrl import states
from jaxagentrl.models import lora


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_that_continues_has_the_reference_that_it_began_with(tmp_path, adapters):
    folder = types.SimpleNamespace(checkpoints=tmp_path)
    made = jax.tree.map(np.copy, params(UNTIED))
    trained = made
    if adapters:
        drawn = lora.init(made["policy"], jax.random.key(2), rank=2, targets=["q"])
        trained = {"adapters": drawn, "value_head": made["value_head"]}
    state = states.fresh(jax.tree.map(jax.numpy.asarray, trained), optax.sgd(0.1))
    first = jax.device_get(states.reference(folder, state, None))
    assert set(first) == ({"adapters"} if adapters else {"policy"})  # no critic
    name = next(iter(first))
    jax.tree.map(np.testing.assert_array_equal, first[name], jax.device_get(trained[name]))
    moved = states.fresh(jax.tree.map(lambda x: x + 1.0, state.params), optax.sgd(0.1))
    again = states.reference(folder, moved, None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), first)
    # Bound to the device they would be arguments of other programs than those that were compiled.
    assert not any(leaf.committed for leaf in jax.tree.leaves(again))


def test_a_reference_that_is_gone_is_not_taken_from_what_was_trained(tmp_path):
    state = states.fresh(jax.tree.map(jax.numpy.asarray, params(UNTIED)), optax.sgd(0.1))
    later = dataclasses.replace(state, iteration=state.iteration + 3)
    with pytest.raises(ValueError, match="reference is gone: .* its 3 iterations of RL"):
        states.reference(types.SimpleNamespace(checkpoints=tmp_path), later, None)
