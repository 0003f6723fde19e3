"""Suite-wide settings: eight fake CPU devices, no silent rank promotion, equal programs compiled once
and without the effort that pays for long runs only."""

import atexit
import importlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
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

# Most of the suite's time was LLVM's, for programs that run a few times. What XLA does before it (fusions,
# layouts, memory) stays. A developer who sets the variable to "0" has everything compiled as users have it.
_QUICKER = (
    " --xla_cpu_use_fusion_emitters=false"  # of two emitters of loops the one that compiles faster
    " --xla_cpu_parallel_codegen_split_count=1"  # pieces of a program for LLVM: each takes some setting up
)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags = os.environ.get("XLA_FLAGS", "") + _QUICKER
    # XLA aborts at a flag that it does not know, and the first will go with the emitter.
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(probe, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = flags

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest, most of it in processes of their own.
_FIRST = ("test_processes.py", "test_train.py", "test_quickstart_notebook.py")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the tests marked slow, too; so does naming any")


def pytest_collection_modifyitems(config, items):
    """The longest files first: what starts last is waited for with the other core idle."""
    items.sort(key=lambda item: item.path.name not in _FIRST)
    option = config.option
    if option.all or option.keyword or option.markexpr or config.args != config.getini("testpaths"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: --all runs it"))


@pytest.fixture(scope="session")
def smoke_games(tmp_path_factory):
    """Cache of the smoke config's games, made by whichever run comes first, in whichever process."""
    base = tmp_path_factory.getbasetemp()
    games = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "games"
    games.mkdir(exist_ok=True)
    return games


@pytest.fixture
def play(monkeypatch):
    """`main` of tools/play.py, in this process."""
    from jaxagentrl import progress

    monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parents[1] / "tools"), *sys.path])  # it adds to it
    # Made in a test, the process's own would keep that test's stderr.
    monkeypatch.setattr(progress, "_display", progress.LineDisplay(io.StringIO()))
    return importlib.import_module("play").main


@pytest.fixture(scope="module")
def compiled_as_users_do():
    """Processes that the module's tests start compile with full effort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "").replace(_QUICKER, ""))
        yield


@pytest.fixture(scope="module")
def looped_layers():
    """Small models pass through their layers in a loop, as deep ones do."""
    from jaxagentrl.models import decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_UNROLLED_LAYERS", 0)
        yield
