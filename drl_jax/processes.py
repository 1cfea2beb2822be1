"""The processes of one job: how they find each other, agree, and end together.

Every process runs the same program on its own share of the devices, as a TPU pod and a cluster
of GPU machines have them. JAX's distributed runtime joins them; what it does not do is here.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from drl_jax import config as config_lib
from drl_jax.errors import UserError

ALL_WELL = b"\0"  # ends what the watcher of `_last_word` is told

BOARD = epath.Path("/sys/class/dmi/id/product_name")  # Linux's name of the machine


class Job(NamedTuple):
    """How this process finds the others; None is what the cluster says.

    Attributes:
      distributed: whether there are others; None: if there is a sign of them.
      coordinator_address: HOST:PORT at which the first process can be reached.
      num_processes: of the job.
      process_id: of this one, from 0.
      timeout: how long the others may be silent, at the start or later [seconds].
    """

    distributed: bool | None
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    timeout: int

    @property
    def has_others(self) -> bool:
        """Whether the flags, Slurm or a TPU pod say that this process is one of several."""
        if self.distributed is not None:
            return self.distributed
        given = self.coordinator_address, self.num_processes, self.process_id
        in_slurm = "SLURM_STEP_NODELIST" in os.environ
        return (
            any(value is not None for value in given)
            or (in_slurm and os.environ.get("SLURM_NTASKS", "1") != "1")
            or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
            or "," in _hosts_of_cloud_tpu()
        )


def _hosts_of_cloud_tpu() -> str:
    """Returns what the metadata server of a Cloud TPU lists, elsewhere nothing.

    Nobody is asked where there cannot be one.
    """
    server = os.environ.get("GCE_METADATA_HOST")
    if not server and (BOARD.exists() and "Google" in BOARD.read_text()):
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
    except OSError:  # a machine that is no TPU's has no such entry
        return ""


def require_possible(job: Job) -> None:
    """Refuses flags that do not go together.

    Raises:
      UserError: naming them.
    """
    address, number, place = job.coordinator_address, job.num_processes, job.process_id
    given = {
        "coordinator_address": address,
        "num_processes": number,
        "process_id": place,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"{' and '.join(missing)} missing: give --coordinator_address, --num_processes and "
            "--process_id together, or none of them where the cluster knows"
        )
    if job.distributed is False and not missing:
        raise UserError("--nodistributed is for one process: leave out --coordinator_address")
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator_address is {address!r}: give HOST:PORT")
    if number is not None and place is not None and place >= number:
        raise UserError(
            f"--process_id is {place}: of --num_processes={number} the last is {number - 1}"
        )


@contextlib.contextmanager
def joined(job: Job) -> Iterator[None]:
    """Joins this process with the others, if it has any, before JAX looks for devices.

    The runtime ends a process when another one dies or falls silent, without unwinding it:
    a last word is kept ready for that.

    Raises:
      UserError: if the coordinator does not answer in time, or the cluster does not say who
        and where it is.
    """
    if not job.has_others:
        yield
        return
    with _last_word(
        "the other processes of the job are lost, or never came: one has died or was silent "
        f"for {job.timeout} seconds, its own log says why. Start all of them again, with the "
        "same command, and a run goes on from its newest checkpoint"
    ) as say_before:
        import jax  # not before the fork that `_last_word` makes

        if job.process_id and job.coordinator_address:
            _await_coordinator(job.coordinator_address, job.timeout)
        try:
            jax.distributed.initialize(
                *(job.coordinator_address, job.num_processes, job.process_id),
                initialization_timeout=job.timeout,
                heartbeat_timeout_seconds=job.timeout,
                shutdown_timeout_seconds=job.timeout,
            )
        except ValueError as error:
            raise UserError(
                "this is one of several processes, and the cluster does not say which: give "
                "--coordinator_address=HOST:PORT, --num_processes and --process_id, or "
                "--nodistributed"
            ) from error
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            # Of a collective that the lost one was in: to shut down would be to wait for it.
            say_before(str(error).partition("\n")[0])
            os._exit(1)
        except UserError as error:
            say_before(f"error: {error}")
            raise
        finally:  # here it aborts if one was lost
            jax.distributed.shutdown()


def _await_coordinator(address: str, timeout: float) -> None:
    """Waits until somebody listens there: the runtime, where nobody does, would abort."""
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
                    f"--coordinator_address is {address!r}, and nobody answers there after "
                    f"{timeout} seconds ({reason}): is the process of --process_id=0 running?"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def _last_word(text: str) -> Iterator[Callable[[str], None]]:
    """Has `text` said on stderr if this process dies inside, killed or aborted.

    Gives a function that adds a line to be said before it.
    """
    listening, speaking = os.pipe()
    watcher = os.fork()
    if not watcher:
        for signum in (signal.SIGINT, signal.SIGTERM):  # they mean the one that is watched
            signal.signal(signum, signal.SIG_IGN)
        os.close(speaking)
        lines = b"".join(iter(lambda: os.read(listening, 4096), b""))
        if not lines.endswith(ALL_WELL):
            os.write(2, lines + f"error: {text}\n".encode())
        os._exit(0)
    os.close(listening)

    def say_before(line: str) -> None:
        os.write(speaking, f"{line}\n".encode())

    try:
        yield say_before
    finally:
        os.write(speaking, ALL_WELL)
        os.close(speaking)
        os.waitpid(watcher, 0)


def require_same(settings: dict[str, Any]) -> bool:
    """Refuses to go on in a job whose processes were started to do different things.

    Args:
      settings: by name, what must be equal; of plain values.

    Returns:
      whether this process is the first one.

    Raises:
      UserError: in every process; in those that differ from the first, with the differences.
    """
    import jax
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(encoded))).max())
    padded = np.pad(encoded, (0, longest - len(encoded)), constant_values=ord(" "))
    everyone = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
    first = everyone[0]
    others = [i for i, found in enumerate(everyone) if found != first]
    if jax.process_index() in others:
        told = "; ".join(config_lib.differences(first, everyone[jax.process_index()]))
        raise UserError(
            f"process {jax.process_index()} was started with other flags than process 0 "
            f"(where {told.replace(' was ', ' is ').replace(', now ', ', here ')}): give all "
            "the same"
        )
    if others:
        raise UserError(
            f"process{'es' * (len(others) > 1)} {', '.join(map(str, others))} of "
            f"{len(everyone)} {'were' if len(others) > 1 else 'was'} started with other flags: "
            "give all the same"
        )
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """Returns the plain value that the first process passes, in all of them."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(encoded))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(encoded))] = encoded[:length]
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
