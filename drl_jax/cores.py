"""A processor's cores, and the devices that JAX makes of them.

XLA:CPU shares every operation among its threads, and each waits for the last. On examples of
its own, as a device, a core need not wait before the step's end.
"""

import os

from ml_collections import ConfigDict

MOST = 8  # devices of one processor: on more, each would have few examples

# At the end of a long step cores may be minutes apart, and XLA would end the process after one.
PATIENCE = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=86400"


def devices(config: ConfigDict | None = None) -> int:
    """Returns of how many devices JAX should make up the processor: one a core, or fewer.

    They are as many as can share a batch of training and make the mesh. Without a
    configuration nothing is trained, and batches are filled up.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS lacks
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    numbers = range(1, min(cores, MOST) + 1)
    if config is None:
        return numbers[-1]
    batch, (data, fsdp) = config.train.batch_size, (config.mesh.data, config.mesh.fsdp)
    return max(
        (
            n
            for n in numbers
            if not batch % (n * config.train.parts) and not n % fsdp and data in (-1, n // fsdp)
        ),
        default=1,
    )


def are_given() -> bool:
    """Whether the environment says how many devices the processor is."""
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        "JAX_NUM_CPU_DEVICES" in os.environ or "--xla_force_host_platform_device_count" in flags
    )
