"""What a run would take of accelerators' memory, and whether their compiler takes its programs: without them.

    pip install -e ".[cuda]"   # or ".[tpu]": the compiler; in an environment of its own, as it looks for devices in every run
    python tools/plan_for.py --topology=h100:8 --config=configs/textworld_qwen2_5_1_5b.py \\
        --config.model.directory=DIRECTORY --config.tokenizer.directory=DIRECTORY --config.mesh.fsdp=8

The topology is a kind of GPU and how many, h100:8, or how many of how many hosts, a100:2x8 (kinds: `absent_gpus.KINDS`);
or TPUs by a name that jax knows, v5e:2x2, v5p:2x2x1, v6e:2x4. Every program that a run's own plan measures is compiled for
them, on this machine's CPU: minutes for a model of some 10^9 parameters. Of several hosts, one host's devices sample, as in
a run. Of the model's folder config.json is read and nothing else. Demonstrations are taken as long as
`learner.length_buckets` allows. Nothing is executed; how fast it would be, it does not say.
"""

import contextlib
import os
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

# libtpu would look for a TPU's own machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import absent_gpus
import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from jaxagentrl import (
    imitate,
    learner,
    main,
    objectives,
    optimizer,
    plan,
    plan_sampling,
    prepare,
    reinforce,
    rules,
    settings,
)
from jaxagentrl.models import decoder, pretrained_config, sharding

# GiB of a device, https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. Its compiler keeps some of them.
_MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32}

# Of a GPU's memory, what jax takes unless it is told.
_GPU_SHARE = 0.75

# XLA's own kernels for products have tiles for some shapes only if they are tried, for which a GPU is needed.
_GPU_ADVICE = ". With XLA_FLAGS=--xla_gpu_enable_triton_gemm=false products are cuBLAS's."

_TOPOLOGY = flags.DEFINE_string("topology", None, "Name of the devices, such as h100:8 or v5e:2x4.")


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology, as descriptions.

    Raises:
        SystemExit: there is no compiler for them, or it knows no such topology.
    """
    gpus = absent_gpus.parse(name)
    try:
        return absent_gpus.devices(*gpus) if gpus else list(topologies.get_topology_desc(name, platform="tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(
            f"error: --topology={name}: {str(error).splitlines()[0]}. Expected GPUs such as h100:8 or a100:2x8 (kinds: "
            f"{', '.join(absent_gpus.KINDS)}) and jax's plugin for them (pip install -e '.[cuda]'), or TPUs such as v5e:2x4, "
            "v5p:2x2x1 or v6e:2x4 and libtpu (pip install -e '.[tpu]')."
        ) from error


def memory(name: str, kind: str) -> int | None:
    """Bytes of a device that a run may use; None if that is not known here."""
    gpus = absent_gpus.parse(name)
    if gpus:
        share = plan.gpu_share() or _GPU_SHARE
        try:
            return int(gpus[0].memory * float(share))
        except ValueError as error:
            raise SystemExit(f"error: of a GPU's memory jax is told to take {share!r}, expected a number such as 0.95.") from error
    return _MEMORY[kind] * 2**30 if kind in _MEMORY else None


def hosts_mesh(name: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """Where one host of several samples. Its devices as a topology of their own: the compiler has none for a part of one."""
    local = sharding.decoding_mesh(mesh)
    if local.size == len(mesh.devices.flat):
        return local
    kind, _, shape = name.partition(":")
    if absent_gpus.parse(name):
        return _of_shape(f"{kind}:{local.size}", local)
    whole = {4: "2x2", 8: "2x4"}.get(local.size, str(local.size)) + "x1" * (shape.count("x") - 1)
    return _of_shape(f"{kind}:{whole}", local)


def _of_shape(name: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.reshape(devices(name), mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


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
        loss = objectives.make_sft_loss(model, remat=options["remat"], compute_dtype=options["compute_dtype"])
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
        kind, gpus = named[0].device_kind, absent_gpus.parse(_TOPOLOGY.value)
        limit = config["memory_limit_gb"] and int(config["memory_limit_gb"] * 1e9)
        limit = limit or memory(_TOPOLOGY.value, kind)
        if limit is None:
            raise SystemExit(f"error: how much memory a {kind} has is not known here: set --config.memory_limit_gb.")
        mesh = sharding.make_mesh(**config["mesh"], devices=named) or sharding.mesh_of_one(named[0])
        directory = config["model"]["directory"]
        if directory is None:
            model = prepare.drawn(config["model"], config["tokenizer"]["vocab_size"])
        else:
            model = pretrained_config.read_config(directory)
        print(f"{mesh.size} of {len(named)} x {kind}, {dict(mesh.shape)}", flush=True)
        # What programs are made of depends on the backend, and it is this machine's that jax is on.
        jax.default_backend = lambda: "gpu" if gpus else "tpu"
        local = hosts_mesh(_TOPOLOGY.value, mesh)
        sharding.decoding_mesh = lambda mesh: local
        since = time.monotonic()
        with absent_gpus.pretended(gpus[0]) if gpus else contextlib.nullcontext(), sharding.use(mesh):
            for made in plans(config, model, mesh, limit):
                print(f"{made.text()}\n  compiled in {time.monotonic() - since:.0f} s", flush=True)
                since = time.monotonic()
    except plan.PlanError as error:
        is_share = gpus and config["memory_limit_gb"] is None and not plan.gpu_share()
        raise SystemExit(f"error: {error}" + (f" And {plan.GPU_SHARE_ADVICE}." if is_share else "")) from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        said = f"error: the compiler does not take a program: {str(error).splitlines()[0]}"
        raise SystemExit(said + (_GPU_ADVICE if gpus else "")) from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    jax.config.update("jax_platforms", "cpu")
    app.run(run, flags_parser=main.parse)
