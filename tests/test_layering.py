"""Imports point down the tree, the functional core stands alone, envs_host knows nothing of jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the bottom up: a module imports only what stands on an earlier line. A new module gets the
# lowest place from which it sees what it needs.
ORDER = """
envs_host.types
envs_host.tool_calls
envs_host.tools
envs_host.registry
envs_host.processes
envs_host.swe_installed
envs_host.swe_scratch
envs_host.swe_workspace
envs_host.swe_bugs
envs_host.arrival
envs_host.swe_tests
envs_host.swe_text
envs_host.swe_problem
envs_host.gymnasium_world
envs_host.specs
envs_host.textworld_text
envs_host.textworld_engine
envs_host.textworld_maker
envs_host.memory
envs_host.alfworld_pddl
envs_host.alfworld_text
envs_host.alfworld_engine
envs_host.alfworld_experts
envs_host.alfworld_houses
envs_host.alfworld_maker
envs_host.swe
envs_host.swe_maker
envs_host.gymnasium
envs_host.gymnasium_maker
envs_host.maker
envs_host.games
envs_host.alfworld_data
envs_host.swe_data
envs_host.own_tasks
envs_host.collect
envs_host.naming
envs_host.textworld
envs_host.alfworld
envs_host
envs_host.pool_worker
envs_host.pool_server
envs_host.pool
jaxagentrl
jaxagentrl.pages
jaxagentrl.interrupts
jaxagentrl.types
jaxagentrl.arguments
jaxagentrl.precision
jaxagentrl.masking
jaxagentrl.group_advantages
jaxagentrl.turn_credit
jaxagentrl.anchors
jaxagentrl.advantages
jaxagentrl.divergences
jaxagentrl.importance
jaxagentrl.preference
jaxagentrl.losses
jaxagentrl.logprobs
jaxagentrl.buffers
jaxagentrl.transforms
jaxagentrl.diagnostics
jaxagentrl.workdir
jaxagentrl.models
jaxagentrl.models.rope
jaxagentrl.models.decoder_config
jaxagentrl.models.sharding
jaxagentrl.models.by_device
jaxagentrl.models.kv_numbers
jaxagentrl.models.kv_rows
jaxagentrl.models.kv_tail
jaxagentrl.models.kv_cache
jaxagentrl.models.splash
jaxagentrl.models.trial
jaxagentrl.models.cudnn_packed
jaxagentrl.models.attention
jaxagentrl.models.decode_kernel
jaxagentrl.models.extend_kernel
jaxagentrl.models.layers
jaxagentrl.models.decoder
jaxagentrl.models.decoding_layout
jaxagentrl.models.git_lfs
jaxagentrl.models.pretrained_families
jaxagentrl.models.pretrained_config
jaxagentrl.models.lora
jaxagentrl.models.tensor_files
jaxagentrl.models.tensor_table
jaxagentrl.models.weights_out
jaxagentrl.models.tokenizer_files
jaxagentrl.models.pretrained
jaxagentrl.hosts
jaxagentrl.compiles
jaxagentrl.dispatch
jaxagentrl.shards
jaxagentrl.sampling
jaxagentrl.tiling
jaxagentrl.shapes
jaxagentrl.prefixes
jaxagentrl.turns
jaxagentrl.calls
jaxagentrl.engine
jaxagentrl.packing
jaxagentrl.trees
jaxagentrl.learner
jaxagentrl.objectives
jaxagentrl.optimizer
jaxagentrl.estimate
jaxagentrl.tokenizer
jaxagentrl.chat_template
jaxagentrl.chat
jaxagentrl.windowed
jaxagentrl.rules
jaxagentrl.trajectory
jaxagentrl.episodes
jaxagentrl.branching
jaxagentrl.rewards
jaxagentrl.contexts
jaxagentrl.expert_turns
jaxagentrl.rollout
jaxagentrl.openings
jaxagentrl.batching
jaxagentrl.filters
jaxagentrl.demos
jaxagentrl.tasks
jaxagentrl.curriculum
jaxagentrl.imitate
jaxagentrl.reinforce
jaxagentrl.plan
jaxagentrl.plan_sampling
jaxagentrl.progress
jaxagentrl.checkpoints
jaxagentrl.metrics
jaxagentrl.collapse
jaxagentrl.evaluate
jaxagentrl.report_data
jaxagentrl.report_curves
jaxagentrl.report_page
jaxagentrl.report_card
jaxagentrl.report
jaxagentrl.prepare
jaxagentrl.methods
jaxagentrl.settings
jaxagentrl.states
jaxagentrl.playing
jaxagentrl.train
jaxagentrl.main
""".split()

# Pure functions on arrays: no models, no config, no flags, no logging, nothing of the host.
CORE = ORDER[ORDER.index("jaxagentrl.types"):ORDER.index("jaxagentrl.workdir")]
CORE_LIBRARIES = {
    "chex", "collections", "dataclasses", "enum", "functools", "jax", "math", "numpy", "typing",
}

# Host records and texts, usable without an accelerator library.
WITHOUT_JAX = ("chat", "windowed", "trajectory", "episodes", "rewards", "tasks", "tokenizer", "progress", "workdir", "methods")


def sources():
    """Module name → file, for everything in the two packages."""
    found = {}
    for package in ("envs_host", "jaxagentrl"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def imported(path):
    """Dotted names a file imports anywhere, inside functions too (where cycles like to hide)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute here"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.add(deeper if deeper in SOURCES else node.module)
    return names


def ours(path):
    return {name for name in imported(path) if name.split(".")[0] in ("envs_host", "jaxagentrl")}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert module in ORDER, f"{module} is new: give it a line in ORDER of tests/test_layering.py"
    place = ORDER.index(module)
    upward = sorted(name for name in ours(SOURCES[module]) if ORDER.index(name) >= place)
    assert not upward, f"{module} imports {upward}, which stand above it"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("envs_host")])
def test_environments_know_nothing_of_training(module):
    roots = {name.split(".")[0] for name in imported(SOURCES[module])}
    assert not roots & {"jax", "jaxlib", "flax", "optax", "jaxagentrl"}


@pytest.mark.parametrize("module", [name for name in CORE if name in SOURCES])
def test_functional_core_stands_alone(module):
    names = imported(SOURCES[module])
    outside = sorted(name for name in names - set(CORE) if name.split(".")[0] not in CORE_LIBRARIES)
    assert not outside, f"{module} is of the functional core and imports {outside}"


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_host_modules_do_not_import_jax(module):
    roots = {name.split(".")[0] for name in imported(SOURCES[f"jaxagentrl.{module}"])}
    assert not roots & {"jax", "jaxlib", "flax", "optax", "chex"}


def test_config_dict_is_seen_by_main_and_configs_only():
    users = [
        module for module, path in SOURCES.items()
        if {name.split(".")[0] for name in imported(path)} & {"ml_collections", "absl"}
    ]
    assert users == ["jaxagentrl.main"]


def test_envs_host_imports_where_jax_cannot():
    """A worker process must start without an accelerator library, whatever is installed."""
    modules = [name for name in SOURCES if name.startswith("envs_host")]
    program = (
        "import sys\n"
        "for name in ('jax', 'jaxlib', 'flax', 'jaxagentrl'):\n"
        "    sys.modules[name] = None   # makes any import of it an ImportError\n"
        f"import {', '.join(modules)}\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False)
    assert result.returncode == 0, result.stderr
