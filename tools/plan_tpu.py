"""What a run would take of TPUs' memory, and whether their compiler takes its programs: without a TPU.

    pip install -e ".[tpu]"    # libtpu has the compiler; in an environment of its own: it looks for TPUs in every run
    python tools/plan_tpu.py --topology=v5e:2x4 --config=configs/textworld_qwen2_5_1_5b.py \\
        --config.model.directory=DIRECTORY --config.tokenizer.directory=DIRECTORY --config.mesh.fsdp=8

The topology is a name that jax knows, such as v5e:2x2, v5e:4x4, v5p:2x2x1, v6e:2x4 (a slice of several hosts: one
host's devices sample, as in a run). Every program that a run's own plan measures is compiled for it, on this machine's
CPU: minutes for a model of some 10^9 parameters. Of the model's folder config.json is read and nothing else.
Demonstrations are taken as long as `learner.length_buckets` allows. Nothing is executed; how fast it would be, it does not say.
"""

import os
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

# libtpu would look for a TPU's own machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from jaxagentrl import imitate, learner, main, optimizer, plan, plan_sampling, prepare, reinforce, rules, settings
from jaxagentrl.models import decoder, pretrained_config, sharding

# GiB of a device, https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Its compiler keeps some of them.
_MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32}

_TOPOLOGY = flags.DEFINE_string("topology", None, "Name of the devices, such as v5e:2x4.")


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology, as descriptions.

    Raises:
        SystemExit: there is no libtpu, or it knows no such topology.
    """
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(
            f"error: --topology={name}: {str(error).splitlines()[0]}. Expected a name such as v5e:2x4, v5p:2x2x1 or v6e:2x4, and "
            "libtpu (pip install -e '.[tpu]')."
        ) from error


def hosts_mesh(name: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Where one host of several samples. Its devices as a topology of their own: the compiler has none for a part of one."""
    local = sharding.decoding_mesh(mesh)
    if local.size == len(mesh.devices.flat):
        return local
    kind, _, shape = name.partition(":")
    whole = {4: "2x2", 8: "2x4"}.get(local.size, str(local.size)) + "x1" * (shape.count("x") - 1)
    return jax.sharding.Mesh(np.reshape(devices(f"{kind}:{whole}"), local.devices.shape), local.axis_names, local.axis_types)


def plans(
    config: Mapping[str, Any], model: decoder.DecoderConfig, mesh: jax.sharding.Mesh, limit: int
) -> Iterator[plan.Plan]:
    """The plans of a run's stages, as `train` makes them.

    Raises:
        plan.PlanError: a stage does not fit.
    """
    options, trains = config["learner"], {"imitation": config["sft"]["num_steps"], "RL": config["rl"]["num_iterations"]}
    trainable, frozen = prepare.shapes(config, model, mesh)
    at_sampling = plan_sampling.measured(
        model,
        trainable,
        frozen,
        mesh,
        options=config["sampling"],
        compute_dtype=options["compute_dtype"],
        stop_ids=(0,),
        restricted=rules.is_restricted(config["rollout"]),
        limit=limit,
    )
    shared = dict(mesh=mesh, frozen=frozen, at_sampling=at_sampling, limit=limit)
    if trains["imitation"]:
        several = config["rollout"]["context"] != "end"
        longest = types.SimpleNamespace(
            width=max(options["length_buckets"]),
            longest_context=config["sampling"]["max_length"] if several else None,
        )
        chain = optimizer.make(**config["sft"]["optimizer"])
        loss = learner.make_sft_loss(model, remat=options["remat"], compute_dtype=options["compute_dtype"])
        imitation = imitate.Imitation(longest, chain, learner.make_step(loss, chain))
        yield plan.of_imitation(config, imitation, trainable, is_executed=False, **shared)
    if trains["RL"]:
        programs, chain = reinforce.make_programs(config, model, mesh=mesh)
        yield plan.of_rl(config, programs, chain, model, trainable, is_executed=False, **shared)
    if not any(trains.values()):
        yield plan.of_evaluation(trainable, **shared)


def run(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = flags.FLAGS.config.to_dict()
    named = devices(_TOPOLOGY.value)
    jax.config.update("jax_num_cpu_devices", len(named))  # as many as the config is checked against
    try:
        settings.check(config)
        kind = named[0].device_kind
        if config["memory_limit_gb"] is None and kind not in _MEMORY:
            raise SystemExit(f"how much memory a {kind} has is not known here: set --config.memory_limit_gb.")
        limit = int((config["memory_limit_gb"] or _MEMORY[kind] * 2**30 / 1e9) * 1e9)
        mesh = sharding.make_mesh(**config["mesh"], devices=named) or sharding.mesh_of_one(named[0])
        directory = config["model"]["directory"]
        if directory is None:
            model = prepare.drawn(config["model"], config["tokenizer"]["vocab_size"])
        else:
            model = pretrained_config.read_config(directory)
        print(f"{mesh.size} of {len(named)} x {kind}, {dict(mesh.shape)}", flush=True)
        # What programs are made of depends on the backend, and it is this machine's that jax is on.
        jax.default_backend = lambda: "tpu"
        local = hosts_mesh(_TOPOLOGY.value, mesh)
        sharding.decoding_mesh = lambda mesh: local
        since = time.monotonic()
        with sharding.use(mesh):
            for made in plans(config, model, mesh, limit):
                print(f"{made.text()}\n  compiled in {time.monotonic() - since:.0f} s", flush=True)
                since = time.monotonic()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    jax.config.update("jax_platforms", "cpu")
    app.run(run, flags_parser=main.parse)
