"""Sets the environment variables that JAX and TensorFlow read when they are imported."""

import os
from collections.abc import Mapping

from etils import epath

from drl_jax.runtime.cpu_devices import set_by_user

# Describes one chip to libtpu, which otherwise searches for a TPU and logs that it found none.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

# CPU devices can finish a long step minutes apart. XLA mistakes this for a deadlock and, by
# default, aborts the process after 60 s.
CPU_DEADLOCK_TIMEOUT = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=86400"


def prepare(cpu_devices: int = 1, environment: Mapping[str, str] | None = None) -> None:
    """Sets the environment variables of JAX and TensorFlow; call it before importing them.

    Enables the persistent compilation cache and silences TensorFlow, which clu imports.
    Variables that the user has set are kept, except for those in `environment`.

    Args:
      cpu_devices: number of devices into which the CPU is divided.
      environment: variables for compiling for a topology (`tools.plan.chips`). If there are
        any, the compilation cache is disabled, so that compilation times can be measured.
    """
    if environment:
        os.environ.update(environment)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif not has_google_hardware():
        _set_defaults(WITHOUT_TPU)
    if not set_by_user():
        os.environ["JAX_NUM_CPU_DEVICES"] = str(cpu_devices)
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_DEADLOCK_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{CPU_DEADLOCK_TIMEOUT} {flags}"
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "drl_jax"
    _set_defaults(
        {
            "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
            "TF_ENABLE_ONEDNN_OPTS": "0",  # logs a notice otherwise
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            # Small programs are cached too, because a run compiles many of them at its start.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    )


def has_google_hardware() -> bool:
    """Returns whether the PCI bus has a device made by Google, as every TPU is."""
    vendors = epath.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)


def _set_defaults(variables: Mapping[str, str]) -> None:
    """Sets the environment variables that are not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
