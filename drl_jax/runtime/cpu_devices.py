"""Chooses the number of devices into which JAX divides the CPU.

XLA:CPU splits every operation of a device over several threads, and each operation takes as
long as the slowest thread. With one device per core, each core computes its own examples and
waits for the others only at the end of a training step (`networks/cpu_step.md`).
"""

import os

from ml_collections import ConfigDict

MAX_DEVICES = 8  # with more, each device would have few examples


def count(config: ConfigDict | None = None) -> int:
    """Returns the number of CPU devices to request: at most one per core.

    This is the largest number, up to `MAX_DEVICES`, that `config.mesh` permits and that divides
    the training batch equally, and 1 if there is none. Without a configuration, only cores and
    `MAX_DEVICES` limit the number: nothing is trained, and other batches are padded.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    numbers = range(1, min(cores, MAX_DEVICES) + 1)
    if config is None:
        return numbers[-1]
    data, fsdp = config.mesh.data, config.mesh.fsdp
    return max(
        (
            n
            for n in numbers
            if config.train.batch_size % (n * config.train.accumulate) == 0
            and n % fsdp == 0
            and data in (-1, n // fsdp)
        ),
        default=1,
    )


def set_by_user() -> bool:
    """Returns whether the environment variables set the number of CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        "JAX_NUM_CPU_DEVICES" in os.environ or "--xla_force_host_platform_device_count" in flags
    )
