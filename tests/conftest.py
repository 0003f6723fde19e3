"""Suite-wide settings: eight fake CPU devices, no silent rank promotion, equal programs compiled once."""

import atexit
import os
import shutil
import tempfile

# Read by XLA when its backend starts, hence before any import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Many tests compile the same programs. This is imported by the process that starts the others, which
# inherit the folder; a developer who names one keeps it from run to run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxagentrl-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest, most of it in processes of their own.
_FIRST = ("test_processes.py", "test_train.py", "test_quickstart_notebook.py")


def pytest_collection_modifyitems(items):
    """The longest files first: what starts last is waited for with the other core idle."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="session")
def smoke_games(tmp_path_factory):
    """Cache of the smoke config's games, made by whichever run comes first, in whichever process."""
    base = tmp_path_factory.getbasetemp()
    games = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "games"
    games.mkdir(exist_ok=True)
    return games


@pytest.fixture(scope="module")
def looped_layers():
    """Small models pass through their layers in a loop, as deep ones do."""
    from jaxagentrl.models import decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_UNROLLED_LAYERS", 0)
        yield
