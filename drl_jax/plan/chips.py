"""Accelerators: what is public of each, and slices of them by name, such as `v5e:16x16`.

TPUs: peaks and matrix units from https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
and the pages of each version beside it; memory is what XLA:TPU says a program can have
("exceeds available HBM"), a little less than the chip's. The clock is the peak over the FLOPs a
cycle of the matrix units: as published for v3 (0.94 GHz), v4 (1.05 GHz) and v5p (1.75 GHz); of
v5e and v6e nothing is published. By that, XLA:TPU's own estimates put large matrix products
at 70% to 97% of the peak on every version.

GPUs: the data sheets of the SXM boards with 80 GB (dense bfloat16), and what XLA asks of its
target (`stream_executor.GpuTargetConfigProto`) from the CUDA programming guide's tables.
"""

import math
import re
from typing import Any, NamedTuple

from drl_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A device as JAX sees it: of v3, half a chip.

    Attributes:
      title: its name.
      memory: that a program can have [bytes].
      peak: of bfloat16 matrix products [FLOP/s].
      flops_a_cycle: of its matrix units; None for GPUs, whose programs carry no cycles.
      sides: numbers that a slice's shape is made of: 2 or 3, or 1 for GPUs.
      cores: devices a chip.
      megacore: whether the two cores of a chip are one device only if asked for.
      target: what XLA wants to know of a GPU that is not there.
    """

    title: str
    memory: float
    peak: float
    flops_a_cycle: int | None = None
    sides: int = 1
    cores: int = 1
    megacore: bool = False
    target: str = ""

    @property
    def clock(self) -> float | None:
        """Cycles a second [Hz]; None for GPUs."""
        return self.peak / self.flops_a_cycle if self.flops_a_cycle else None


def _target(title: str, **facts: float) -> str:
    """Returns a GPU as XLA's text; what both of ours have in common stands here."""
    major, dnn = facts.pop("major"), "dnn_version_info { major: 9 minor: 10 }"
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
    lines = "\n".join(f"  {name}: {value}" for name, value in (common | facts).items())
    return (
        f"gpu_device_info {{\n  cuda_compute_capability {{ major: {major} }}\n{lines}\n}}\n"
        f'platform_name: "CUDA"\n{dnn}\ndevice_description_str: "{title}"\n'
    )


# Of its memory JAX takes three quarters (XLA_PYTHON_CLIENT_MEM_FRACTION).
_GPU_MEMORY = 0.75 * 79.1 * GIB

CHIPS = {
    "v3": Chip("TPU v3 core", 15.48 * GIB, 61.5e12, 2 * 2 * 128**2, sides=2, cores=2),
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 2 * 8 * 128**2, sides=3, megacore=True),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 2 * 4 * 128**2, sides=2),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2 * 8 * 128**2, sides=3),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 2 * 4 * 256**2, sides=2),
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
    """A slice of chips.

    Attributes:
      name: as given, such as `v5e:16x16`.
      chip: of which it is made.
      shape: chips along each side; of GPUs, their number.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """What JAX calls the kind of accelerator."""
        return "cuda" if self.chip.target else "tpu"

    @property
    def devices(self) -> int:
        """Devices of the slice."""
        return math.prod(self.shape) * self.chip.cores

    @property
    def environment(self) -> dict[str, str]:
        """What the compiler reads when JAX is loaded.

        The accelerators of this machine, if any, are left alone.
        """
        if self.platform == "cuda":
            return {
                "JAX_PLATFORMS": "cpu,cuda",
                "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "CUDA_VISIBLE_DEVICES": "-1",
            }
        return {
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody's chips are used
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5e-1",  # asked for, and of no effect on what is compiled
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }

    @property
    def description(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` wants to know."""
        if self.platform == "cuda":
            return {
                "platform": "cuda",
                "topology": f"1x1x{self.devices}",
                "target_config": self.chip.target,
            }
        # Four chips a host, except where a side is odd.
        host = [*(2 - side % 2 for side in self.shape[:2]), 1]
        options: dict[str, Any] = {"chips_per_host_bounds": host}
        if self.chip.megacore:
            options["chip_config_name"] = "megacore"
        return {"platform": "tpu", "topology_name": self.name, **options}


def parse(name: str) -> Topology:
    """Reads a topology such as `v5e:16x16`, `v4:4x4x8` or `h100:8`.

    Raises:
      UserError: for an unknown chip, or a shape that it does not come in.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: unknown chip {kind!r}; give {', '.join(CHIPS)} and a shape, "
            "as in v5e:16x16, v4:4x4x8 or h100:8"
        )
    sides = CHIPS[kind].sides
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{sides - 1}}}", text):
        example = "8" if sides == 1 else "x".join("448"[:sides])
        raise UserError(
            f"--topology={name}: the shape of {kind} is {sides} number"
            f"{'s' if sides > 1 else ''}, as in {kind}:{example}"
        )
    return Topology(name, CHIPS[kind], tuple(map(int, text.split("x"))))
