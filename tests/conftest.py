"""Suite-wide settings: eight fake CPU devices and no silent rank promotion."""

import os

# Read by XLA when its backend starts, hence before any import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smoke_games(tmp_path_factory):
    """Cache of the smoke config's games, made by whichever run comes first."""
    return tmp_path_factory.mktemp("games")


@pytest.fixture(scope="module")
def looped_layers():
    """Small models pass through their layers in a loop, as deep ones do."""
    from jaxagentrl.models import decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_UNROLLED_LAYERS", 0)
        yield
