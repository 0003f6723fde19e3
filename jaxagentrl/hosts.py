"""Several processes, usually one per host, run one program: who they are and what they share.

Every process runs the same program on the same config. A mesh spans the devices of all; each
process plays its own share of the episodes with its own environments, decodes on its own devices,
tells the others what came of it, and feeds the rows of the batch that its devices hold. Everything
else is computed alike everywhere, so that metrics are equal line by line whatever the number of
processes.
"""

import functools
import itertools
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from jaxagentrl.models import sharding


# Seconds that a process which ends waits for the others to end, too: one of them may have an error that they do not
# know of. jax's 300 would have all hosts stand still for as long.
_LEAVING_S = 30

# What is said by those who wait for others: Gloo and NCCL, jax's own service, connections.
_OF_COLLECTIVES = re.compile(
    r"Gloo|NCCL|[Bb]arrier|[Cc]oordination|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection (?:reset|closed|refused)"
)


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes; call before anything else of jax.

    Args:
        coordinator: "host:port" of process 0, reachable by all. None, together with the others:
            found out from a TPU pod's metadata, Slurm, Open MPI or Kubernetes.
        num_processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        ValueError: only some of the three are given, none where nothing says, or no "host:port".
    """
    given = (coordinator, num_processes, process_id)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together: give all three, or none "
            f"and --distributed. Got {coordinator}, {num_processes}, {process_id}."
        )
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--coordinator must be host:port of process 0, such as {coordinator.partition(':')[0] or 'host0'}:1234 "
            f"with any port that is free there, got {coordinator!r}."
        )
    # jax would catch SIGTERM for whoever asks whether there was one: nobody here does, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=_device_ids(os.environ),
            shutdown_timeout_seconds=_LEAVING_S,
        )
    except ValueError as error:
        raise ValueError(
            f"the processes cannot be joined ({error}). --distributed alone needs a TPU pod, Slurm, Open MPI or "
            "Kubernetes; elsewhere give --coordinator, --num_processes and --process_id."
        ) from error


def _device_ids(variables: Mapping[str, str]) -> list[int] | None:
    """Which devices of its host are this process's, by the environment: [] all that it can see, None
    as jax has it.

    Under Slurm and Open MPI, jax gives the n-th process of a host the n-th device and no other. Where
    several processes see the same devices that is right. A process that is alone on its host would
    leave all others idle, and one that sees a device of its own (`--gpus-per-task=1`) not find it.
    """
    if "JAX_LOCAL_DEVICE_IDS" in variables:
        return None
    nodes = variables.get("SLURM_STEP_NUM_NODES")
    is_alone = nodes is not None and variables.get("SLURM_NTASKS") == nodes
    is_alone |= variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    sees_one = len(variables.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return [] if is_alone or sees_one else None


def connect(mesh: Mesh | None) -> None:
    """Makes the devices of every axis, and of every set of axes, sum something, while processes are
    in step. Connections open with the first sum, and on CPU a process waits for the others for half
    a minute only: one that finds its programs compiled is further ahead of the others than that."""
    if mesh is None or jax.process_count() == 1:
        return
    split = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    for count in range(1, len(split) + 1):
        for axes in itertools.combinations(split, count):
            total = jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=axes),
                mesh=mesh,
                in_specs=PartitionSpec(),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
            jax.block_until_ready(jax.jit(total)(np.float32(1)))


def may_be_of_another(error: BaseException) -> bool:
    """Whether an error may be another process's, which has ended: that is what those that wait for it get.

    It is not always a `JaxRuntimeError`: jax, Orbax and TensorStore also raise plain ValueErrors with its text.
    """
    if jax.process_count() == 1:
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or _OF_COLLECTIVES.search(str(error)) is not None


def is_first() -> bool:
    """Whether this process writes what there is one of: checkpoints' records, the model, the report."""
    return jax.process_index() == 0


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process's part of items that all processes know: a contiguous slice; their lengths differ by one at most."""
    index, count = jax.process_index(), jax.process_count()
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def gather(value: Any) -> list[Any]:
    """What every process gave, in the order of processes. All of them must call this."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    with sharding.unused():
        sizes = multihost_utils.process_allgather(np.int32(mine.size))
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: mine.size] = mine
        everything = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)
    ]


def wait(name: str) -> None:
    """Until all processes have come to this point."""
    if jax.process_count() > 1:
        with sharding.unused():
            multihost_utils.sync_global_devices(f"jaxagentrl_{name}")
