"""Sets up JAX: the devices of the CPU, and a cache of compiled programs.

The command line (`drl_jax.main`) and `drl_jax.load` call the same function.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from drl_jax.runtime import cpu_devices as cpu_devices_lib

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


def prepare(
    cpu_devices: int | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Sets up JAX, if possible before it initialises its devices. Imports JAX.

    Divides the CPU into devices, enables the persistent compilation cache, and silences the
    start of libtpu and TensorFlow. What the user has set is kept, whether by environment
    variables or by `jax.config`, except for the variables in `environment`. If JAX has
    initialised its devices, they stay as they are, and only the cache is enabled.

    Args:
      cpu_devices: number of devices into which the CPU is divided; None for one per core
        (`cpu_devices.count`).
      environment: variables for compiling for a topology (`tools.plan.chips`), which have an
        effect only if JAX has not been imported. If there are any, the compilation cache is
        disabled, so that compilation times can be measured.
    """
    if environment:
        os.environ.update(environment)
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    elif not has_google_hardware():
        _set_default_variables(WITHOUT_TPU)
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_DEADLOCK_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{CPU_DEADLOCK_TIMEOUT} {flags}"
    _set_default_variables(
        {
            "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
            "TF_ENABLE_ONEDNN_OPTS": "0",  # logs a notice otherwise
        }
    )
    import jax  # reads the environment

    if not (cpu_devices_lib.set_by_user() or _is_set("jax_num_cpu_devices", default=-1)):
        number = cpu_devices_lib.count() if cpu_devices is None else cpu_devices
        with contextlib.suppress(RuntimeError):  # JAX has initialised its devices
            jax.config.update("jax_num_cpu_devices", number)
    if not _is_set("jax_compilation_cache_dir", default=None) and (folder := cache_folder()):
        jax.config.update("jax_compilation_cache_dir", folder)
    # Small programs are cached too, because a run compiles many of them at its start.
    if not _is_set("jax_persistent_cache_min_compile_time_secs", default=1):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def cache_folder() -> str | None:
    """Returns the folder for compiled programs, after creating it if it does not exist.

    It is in $XDG_CACHE_HOME or, if this is not an absolute path, in ~/.cache. The result is
    None if the user has no home directory, or cannot write there.
    """
    parent = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(parent):
        parent = os.path.expanduser("~/.cache")
    folder = os.path.join(parent, "drl_jax")
    if not os.path.isabs(folder):  # without a home directory, "~" remains
        return None
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def has_google_hardware() -> bool:
    """Returns whether the PCI bus has a device made by Google, as every TPU is."""
    vendors = epath.Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)


def _set_default_variables(variables: Mapping[str, str]) -> None:
    """Sets the environment variables that are not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _is_set(name: str, default: Any) -> bool:
    """Returns whether an environment variable or the program has set an option of JAX.

    Args:
      name: name of the option in `jax.config`.
      default: JAX's own value of the option.
    """
    import jax

    return name.upper() in os.environ or getattr(jax.config, name) != default
