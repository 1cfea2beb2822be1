"""Devices: one mesh, its shardings, and the per-device map of the chains.

Looking for `pmap`? JAX now implements it as `jit` of `shard_map` and asks new code to use
those: `over_examples` is the per-device map (of the Langevin chains and of the loss), and the
training step around it is one `jax.jit` with shardings, which is what pjit has become.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drl_jax.errors import UserError

DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all devices (or those given) along the one axis `data`."""
    devices = jax.devices() if devices is None else devices
    # In this order each process's share of a batch is one piece of it.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: parameters, scalars."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns what a program for these devices asks of its compiler beyond the defaults."""
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {
        # One copy of the code of equal operations: a third of the program, as fast.
        "xla_tpu_enable_deduplicated_calls": "true",
        # Gradients of any number and size add up in one reduction.
        "xla_jf_crs_combiner_threshold_in_bytes": str(2**40),
        "xla_jf_crs_combiner_threshold_count": str(2**20),
    }


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts numpy arrays, which every process has whole, on the devices of all."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def fetch(tree: Any) -> Any:
    """Returns arrays on the devices of all processes as numpy arrays, whole in every one."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def over_examples(fn: Callable, mesh: Mesh) -> Callable:
    """Maps fn(shared, batched) over the devices, each on its block of examples.

    The first argument is whole on every device; every array of the second, and of the
    result, is split along its first axis. No device waits for another: fn must treat its
    examples one by one.
    """

    def on_device(shared, batched):
        # Made a device's own at once: a gradient is then summed over the devices where it
        # leaves, in one reduction, and not where each piece of it arises.
        return fn(jax.lax.pcast(shared, DATA, to="varying"), batched)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
    )


def require_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
      UserError: with the batch, the number of devices and the nearest sizes that work.
    """
    n = mesh.size
    if batch_size % n:
        lower = batch_size // n * n
        nearest = " or ".join(str(b) for b in (lower, lower + n) if b)
        raise UserError(
            f"config.{field} is {batch_size}, not divisible by {n} devices: use {nearest}"
        )
