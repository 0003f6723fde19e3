"""GPUs that are not there, as XLA's compiler wants them described; for `plan_for.py`.

The compiler for CUDA comes with jax's plugin and needs no GPU. What it would ask one is said here: numbers of NVIDIA's
data sheets and of the CUDA programming guide's table of compute capabilities.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import topologies

from jaxagentrl.models import cudnn_packed, trial

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind; bytes and bytes a second."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    bandwidth: float
    l2: int
    clock_ghz: float
    threads: int  # of a multiprocessor, at most
    shared: int  # of a multiprocessor
    shared_of_block: int

    @property
    def target(self) -> str:
        """The compiler's target, a text protobuf (xla/stream_executor/device_description.proto)."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_of_block} shared_memory_per_core: {self.shared}
  threads_per_core_limit: {self.threads} core_count: {self.multiprocessors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.name}"
"""


_HOPPER = dict(capability=(9, 0), multiprocessors=132, l2=50 << 20, clock_ghz=1.98, threads=2048, shared=228 << 10,
               shared_of_block=227 << 10)
_AMPERE = dict(capability=(8, 0), multiprocessors=108, l2=40 << 20, clock_ghz=1.41, threads=2048, shared=164 << 10,
               shared_of_block=163 << 10)
_ADA = dict(capability=(8, 9), threads=1536, shared=100 << 10, shared_of_block=99 << 10)

KINDS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=int(79.1 * _GIB), bandwidth=3.35e12, **_HOPPER),
    "h200": Gpu("NVIDIA H200", memory=int(139.8 * _GIB), bandwidth=4.8e12, **_HOPPER),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", memory=int(79.1 * _GIB), bandwidth=2.04e12, **_AMPERE),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", memory=int(39.4 * _GIB), bandwidth=1.56e12, **_AMPERE),
    "l40s": Gpu("NVIDIA L40S", memory=int(44.4 * _GIB), bandwidth=0.864e12, multiprocessors=142, l2=96 << 20,
                clock_ghz=2.52, **_ADA),
    "l4": Gpu("NVIDIA L4", memory=int(22.0 * _GIB), bandwidth=0.3e12, multiprocessors=58, l2=48 << 20, clock_ghz=2.04,
              **_ADA),
}


def parse(topology: str) -> tuple[Gpu, int, int] | None:
    """Kind, hosts and GPUs of each, of a name such as "h100:8" or "h100:2x8" (two hosts); None if it names no GPU."""
    match = re.fullmatch(r"([a-z0-9-]+):(?:([1-9]\d*)x)?([1-9]\d*)", topology)
    if match is None or match[1] not in KINDS:
        return None
    return KINDS[match[1]], int(match[2] or 1), int(match[3])


def devices(gpu: Gpu, num_hosts: int, per_host: int) -> list[jax.Device]:
    """Descriptions of the GPUs of so many hosts.

    Raises:
        RuntimeError, ValueError: jax's plugin for CUDA is not here.
    """
    shape = f"1x{num_hosts}x{per_host}"
    options = {"target_config": gpu.target, "topology": shape}
    return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """What programs are made of where such a GPU is: jax and the kernels' trials would ask the one at hand."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with contextlib.ExitStack() as patches:
        for owner, name, answer in (
            (cudnn_packed, "generation", lambda: gpu.capability[0]),
            (trial, "agrees", lambda *_, **__: True),
            (cudnn, "check_compute_capability", lambda wanted: gpu.capability >= tuple(map(int, wanted.split(".")))),
            (cudnn, "is_cuda_compute_capability_equal", lambda one: one == ".".join(map(str, gpu.capability))),
        ):
            patches.enter_context(mock.patch.object(owner, name, answer))
        yield
