"""Published specifications of accelerators, and topologies by name, such as `v5e:16x16`.

TPUs: peak performance and matrix units are those of
https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and of the pages of each version
next to it. Memory is what XLA:TPU makes available to a program ("exceeds available HBM"),
slightly less than the memory of the chip. The clock rate is the peak divided by the FLOPs per
cycle of the matrix units. The result agrees with the published clock rates of v3 (0.94 GHz),
v4 (1.05 GHz) and v5p (1.75 GHz); none is published for v5e and v6e. At these rates, XLA:TPU
estimates that large matrix products reach 70% to 97% of the peak on every version.

GPUs: the peaks are those of the data sheets of the SXM boards with 80 GB (dense bfloat16). The
target descriptions that XLA requires (`stream_executor.GpuTargetConfigProto`) follow the tables
of the CUDA programming guide.
"""

import math
import re
from typing import Any, NamedTuple

from drl_jax.errors import UserError
from drl_jax.runtime import jax_setup

GIB = 2**30


class Chip(NamedTuple):
    """Specification of one JAX device. On TPU v3, a device is one of the two cores of a chip.

    Attributes:
      title: full name.
      memory: memory available to a program [bytes].
      peak: peak rate of bfloat16 matrix products [FLOP/s].
      flops_per_cycle: FLOPs per clock cycle of the matrix units; None for GPUs, because XLA:GPU
        estimates no cycles.
      dimensions: number of dimensions of a topology's shape: 2 or 3 for TPUs, 1 for GPUs.
      devices_per_chip: number of JAX devices per chip.
      megacore: whether the compiler must be asked to treat the two cores of a chip as one
        device.
      target: description of the GPU for XLA, as the text of a `GpuTargetConfigProto`; empty for
        TPUs.
    """

    title: str
    memory: float
    peak: float
    flops_per_cycle: int | None = None
    dimensions: int = 1
    devices_per_chip: int = 1
    megacore: bool = False
    target: str = ""

    @property
    def clock(self) -> float | None:
        """Clock rate [Hz]; None for GPUs."""
        return self.peak / self.flops_per_cycle if self.flops_per_cycle else None


def _target(title: str, **properties: float) -> str:
    """Returns the description of a GPU for XLA.

    Args:
      title: name of the device.
      properties: the fields of `gpu_device_info` that differ between GPUs, and `major`, the
        major compute capability.
    """
    major, dnn = properties.pop("major"), "dnn_version_info { major: 9 minor: 10 }"
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 * 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in (common | properties).items())
    return (
        f"gpu_device_info {{\n  cuda_compute_capability {{ major: {major} }}\n{lines}\n}}\n"
        f'platform_name: "CUDA"\n{dnn}\ndevice_description_str: "{title}"\n'
    )


# JAX allocates three quarters of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION).
_GPU_MEMORY = 0.75 * 79.1 * GIB

CHIPS = {
    "v3": Chip(
        "TPU v3 core",
        15.48 * GIB,
        61.5e12,
        2 * 2 * 128**2,
        dimensions=2,
        devices_per_chip=2,
    ),
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 2 * 8 * 128**2, dimensions=3, megacore=True),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 2 * 4 * 128**2, dimensions=2),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2 * 8 * 128**2, dimensions=3),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 2 * 4 * 256**2, dimensions=2),
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB",
        _GPU_MEMORY,
        312e12,
        target=_target(
            "NVIDIA A100-SXM4-80GB",
            major=8,
            core_count=108,
            fpus_per_core=64,
            shared_memory_per_core=164 * 1024,
            shared_memory_per_block_optin=163 * 1024,
            l2_cache_size=40 * 2**20,
            clock_rate_ghz=1.41,
            memory_bandwidth=2039 * 10**9,
            device_memory_size=int(79.1 * GIB),
        ),
    ),
    "h100": Chip(
        "NVIDIA H100 SXM 80 GB",
        _GPU_MEMORY,
        989e12,
        target=_target(
            "NVIDIA H100 80GB HBM3",
            major=9,
            core_count=132,
            fpus_per_core=128,
            shared_memory_per_core=228 * 1024,
            shared_memory_per_block_optin=227 * 1024,
            l2_cache_size=50 * 2**20,
            clock_rate_ghz=1.98,
            memory_bandwidth=3352 * 10**9,
            device_memory_size=int(79.1 * GIB),
        ),
    ),
}


class Topology(NamedTuple):
    """A slice of TPU chips, or a number of GPUs.

    Attributes:
      name: the name as given on the command line, such as `v5e:16x16`.
      chip: specification of its devices.
      shape: number of chips along each dimension; for GPUs, the only one.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """JAX's name for this kind of accelerator."""
        return "cuda" if self.chip.target else "tpu"

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for compiling for it, to be set before JAX is imported.

        With them, JAX does not use the accelerators of this machine.
        """
        if self.platform == "cuda":
            return {
                "JAX_PLATFORMS": "cpu,cuda",
                "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "CUDA_VISIBLE_DEVICES": "-1",
            }
        return {
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is accessed
            **jax_setup.WITHOUT_TPU,  # required, but does not affect compilation
        }

    @property
    def description(self) -> dict[str, Any]:
        """Arguments of `jax.experimental.topologies.get_topology_desc`."""
        if self.platform == "cuda":
            return {
                "platform": "cuda",
                "topology": f"1x1x{self.devices}",
                "target_config": self.chip.target,
            }
        # Hosts have 2x2 chips, except along dimensions of odd length.
        host = [*(2 - length % 2 for length in self.shape[:2]), 1]
        options: dict[str, Any] = {"chips_per_host_bounds": host}
        if self.chip.megacore:
            options["chip_config_name"] = "megacore"
        return {"platform": "tpu", "topology_name": self.name, **options}


def parse(name: str) -> Topology:
    """Parses the name of a topology, such as `v5e:16x16`, `v4:4x4x8` or `h100:8`.

    Raises:
      UserError: if the chip is unknown, or its shape has another number of dimensions.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: unknown chip {kind!r}; use one of {', '.join(CHIPS)} and a "
            "shape, for example v5e:16x16, v4:4x4x8 or h100:8"
        )
    dimensions = CHIPS[kind].dimensions
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{dimensions - 1}}}", text):
        example = "8" if dimensions == 1 else "x".join("448"[:dimensions])
        shape = "a number" if dimensions == 1 else f"a shape of {dimensions} dimensions"
        raise UserError(
            f"--topology={name}: {kind} requires {shape}, for example {kind}:{example}"
        )
    return Topology(name, CHIPS[kind], tuple(map(int, text.split("x"))))
