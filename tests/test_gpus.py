"""What several GPUs are given. Their compiler runs without one where jax's plugin is installed (`tools/plan_for.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tpu import operations

from jaxagentrl.models import sharding


@pytest.mark.parametrize("axes", [("tensor", "fsdp"), ("fsdp", "tensor")])
def test_a_gathered_table_has_a_gradient_that_is_split(axes):
    """What gathers it is not to hold the gradient, which would be summed whole on every device."""
    table, mesh = jnp.ones((64, 32)), sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def loss(table):
        return jnp.sum(sharding.gathered(table, *axes) ** 2)

    assert sharding.gathered(table, *axes) is table  # without a mesh
    with sharding.use(mesh):
        program = jax.make_jaxpr(jax.grad(loss))(table)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(table), 2 * table)
    found = [x.params["sharding"].spec for x in operations(program.jaxpr) if x.primitive.name == "sharding_constraint"]
    gathered = [axis if axis == "tensor" else None for axis in axes]
    split, whole = (sharding.spec(x, table.shape, mesh.shape) for x in (axes, gathered))
    assert found == [split, whole, split]
