"""Joins the processes of a distributed job and keeps their settings consistent.

Every process runs the same program on its own share of the devices: one per host of a TPU pod,
one per GPU of a Slurm job. JAX's distributed runtime connects them, and ends all of them if one
is lost. This module detects whether there are several, checks the user's settings, and checks
that all processes were started with the same ones.
"""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from drl_jax.errors import Interrupted, UserError

# On Linux, the name of the machine's manufacturer and model.
PRODUCT_NAME = epath.Path("/sys/class/dmi/id/product_name")

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """How this process finds the others. A field that is None is set by Slurm or the TPU pod.

    Attributes:
      distributed: whether there are other processes; None: detect it.
      coordinator_address: HOST:PORT of the first process.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      timeout: longest silence of another process, at the start and later [seconds].
    """

    distributed: bool | None
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    timeout: int

    @property
    def has_others(self) -> bool:
        """Whether the flags, Slurm or a TPU pod say that this is one of several processes."""
        if self.distributed is not None:
            return self.distributed
        flags = self.coordinator_address, self.num_processes, self.process_id
        return (
            any(value is not None for value in flags)
            or (_slurm_tasks() or 1) > 1
            or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
            or "," in _cloud_tpu_workers()
        )


def _slurm_tasks() -> int | None:
    """Returns the number of tasks of this Slurm step; None outside a step.

    SLURM_NTASKS is that of the job, which is larger in an interactive step, for example. JAX
    would wait for that many processes.
    """
    if "SLURM_STEP_NODELIST" not in os.environ:
        return None
    names = "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def _cloud_tpu_workers() -> str:
    """Returns the addresses of this Cloud TPU's hosts, separated by commas; '' elsewhere.

    Queries the metadata server only on Google's machines and where libtpu is installed, because
    elsewhere the request would time out.
    """
    server = os.environ.get("GCE_METADATA_HOST")
    if not server and (PRODUCT_NAME.exists() and "Google" in PRODUCT_NAME.read_text()):
        server = "metadata.google.internal"
    if not server or importlib.util.find_spec("libtpu") is None:
        return ""
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # the server of a machine without a TPU has no such attribute
        return ""


def require_possible(job: Job) -> None:
    """Raises if the flags of a job contradict each other.

    Raises:
      UserError: with the flags and their values.
    """
    address, number, index = job.coordinator_address, job.num_processes, job.process_id
    flags = {"--coordinator_address": address, "--num_processes": number, "--process_id": index}
    missing = [name for name, value in flags.items() if value is None]
    if 0 < len(missing) < len(flags):
        raise UserError(
            f"{' and '.join(missing)} missing: give {', '.join(flags)} together, or none of "
            "them under Slurm and on TPU pods"
        )
    if address is None or number is None or index is None:
        return
    if job.distributed is False:
        raise UserError(
            f"--nodistributed contradicts --coordinator_address={address}: omit one of them"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator_address={address} has no port: give HOST:PORT")
    if index >= number:
        raise UserError(
            f"--process_id={index} is out of range: with --num_processes={number}, give 0 to "
            f"{number - 1}"
        )


@contextlib.contextmanager
def connected(job: Job) -> Iterator[None]:
    """Connects this process to the others, if there are any.

    Enter it before JAX initialises its devices. JAX disconnects when Python exits, after
    waiting for the others; or here, if SIGTERM has stopped all of them, because Python's
    shutdown is then skipped (`preemption.leave`). If a process dies, or is silent for longer
    than the timeout, JAX's runtime aborts the others with a message of its own; a collective
    operation in progress may fail in Python first.

    Raises:
      UserError: if the coordinator does not answer in time, the cluster does not say which
        process this is, there is no device, or JAX fails, as it does when a collective
        operation loses a process.
    """
    if not job.has_others:
        require_devices()
        yield
        return
    import jax

    num_processes = job.num_processes or _slurm_tasks()
    log.info(
        "waiting up to --timeout=%d seconds for all %sprocesses to start; to run a single one, "
        "use --nodistributed",
        job.timeout,
        f"{num_processes} " if num_processes else "",
    )
    if job.process_id and job.coordinator_address:
        _await_coordinator(job.coordinator_address, job.timeout)
    try:
        jax.distributed.initialize(
            coordinator_address=job.coordinator_address,
            num_processes=num_processes,
            process_id=job.process_id,
            initialization_timeout=job.timeout,
            heartbeat_timeout_seconds=job.timeout,
            shutdown_timeout_seconds=job.timeout,
        )
    except ValueError as error:
        raise UserError(
            "this is one of several processes, but the cluster does not say which: give "
            "--coordinator_address=HOST:PORT, --num_processes and --process_id, or "
            "--nodistributed"
        ) from error
    try:
        require_devices()
        log.info(
            "connected as process %d of %d: if one is lost, the others end within about "
            "--timeout=%d seconds, and the same command resumes from the newest checkpoint",
            jax.process_index(),
            jax.process_count(),
            job.timeout,
        )
        yield
    except Interrupted as interrupted:
        if interrupted.signum == signal.SIGTERM:  # not Ctrl-C, which stops only this process
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # if another is lost just now
                jax.distributed.shutdown()
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # On CPUs, some failures of collective operations are ValueErrors that name Gloo.
        if isinstance(error, ValueError) and "Gloo" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"JAX failed ({reason}): if another process was lost, see its log for the cause; "
            "the same command resumes from the newest checkpoint"
        ) from error


def _await_coordinator(address: str, timeout: float) -> None:
    """Waits until the coordinator accepts connections.

    JAX's runtime aborts a process that cannot connect in time, without a Python exception.

    Args:
      address: HOST:PORT.
      timeout: longest time to wait [seconds].

    Raises:
      UserError: after `timeout` seconds.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or str(error)
                raise UserError(
                    f"--coordinator_address={address} did not answer within {timeout} seconds "
                    f"({reason}): check that the process with --process_id=0 is running, or "
                    "run a single process (--nodistributed)"
                ) from error
            time.sleep(0.2)


def require_devices() -> None:
    """Initialises JAX's devices.

    Raises:
      UserError: if JAX has no device of the kind that JAX_PLATFORMS names.
    """
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms is None or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        reason = str(error).partition("\n")[0] or "JAX's plugin for it is not installed"
        raise UserError(
            f"JAX_PLATFORMS={platforms} cannot be used ({reason}): install what it needs, or "
            "unset the variable"
        ) from error


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and logs. Initialises JAX."""
    import jax

    return jax.process_index() == 0


def require_same(settings: dict[str, Any]) -> None:
    """Raises unless all processes of the job were started with the same settings.

    Args:
      settings: JSON-serialisable values by name.

    Raises:
      UserError: in every process, if the settings of any differ from those of process 0. The
        message lists the differences of this process or, if it has none, which others differ.
    """
    import jax
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(encoded))).max())
    padded = np.pad(encoded, (0, longest - len(encoded)), constant_values=ord(" "))
    everyone = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
    first, this = everyone[0], jax.process_index()
    different = [i for i, found in enumerate(everyone) if found != first]
    if this in different:
        differences = ", ".join(
            f"{name} is {everyone[this].get(name)!r} instead of {first.get(name)!r}"
            for name in sorted(first.keys() | everyone[this].keys())
            if everyone[this].get(name) != first.get(name)
        )
        raise UserError(
            f"process {this} has other settings than process 0: {differences}; start all "
            "processes with the same flags"
        )
    if different:
        raise UserError(
            f"{len(different)} of {len(everyone)} processes have other settings than process 0 "
            f"(--process_id {', '.join(map(str, different))}): start all processes with the "
            "same flags"
        )


def broadcast_from_first(value: Any) -> Any:
    """Returns the `value` of process 0 in every process; it must be JSON-serialisable."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(encoded))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(encoded))] = encoded[:length]
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
