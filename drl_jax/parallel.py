"""Devices: one mesh, its shardings, and the per-device map of the chains.

The mesh has two axes. A batch is split over both. Along `fsdp` what training carries of a
kernel (itself, its average, Adam's moments) is split too, and gathered when it is used; what
every device would otherwise hold whole, each holds a part of.

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
from jaxtyping import PyTree

from drl_jax.errors import UserError

AXES = DATA, FSDP = "data", "fsdp"


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int = -1, fsdp: int = 1
) -> Mesh:
    """Returns a mesh of all devices, or those given.

    Args:
      devices: of the mesh.
      data: its length along this axis; -1: as many as there are.
      fsdp: its length along that one.

    Raises:
      UserError: if the two do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if n % fsdp or data not in (-1, n // fsdp):
        shape = f"fsdp = {fsdp}" if data == -1 else f"data = {data} times fsdp = {fsdp}"
        possible = ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
        raise UserError(
            f"config.mesh is {shape}, and there are {n} devices: fsdp can be {possible}, "
            "and data -1, which is all that it leaves"
        )
    # In this order each process's share of a batch is one piece of it.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: parameters, scalars."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def fully_sharded(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of what training carries, by its shape: of kernels and their like.

    The longest axis that the `fsdp` devices can share equally is split over them. Vectors
    and numbers, which weigh nothing, stay whole, and so does what cannot be shared.
    """
    n = mesh.shape[FSDP]
    axes = [axis for axis, length in enumerate(shape) if length % n == 0]
    if n == 1 or len(shape) < 2 or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))


def gather(tree: PyTree, mesh: Mesh) -> PyTree:
    """Makes arrays whole on every device, inside a jitted function."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def compiler_options(mesh: Mesh, runs_once: bool = False) -> dict[str, str]:
    """Returns what a program for these devices asks of its compiler beyond the defaults."""
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and runs_once:  # LLVM would take longer than it could ever save
        return {"xla_backend_optimization_level": "0"}
    if platform != "tpu":
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
        return fn(_own(shared), batched)

    whole, split = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(whole, split), out_specs=split)


def mean_over_examples(fn: Callable, mesh: Mesh) -> Callable:
    """Maps fn(shared, batched) -> (mean, each) over the devices, as `over_examples` does.

    The first result, a mean over fn's examples, becomes that over all: here devices wait for
    each other, once.
    """

    def on_device(shared, batched):
        mean, each = fn(_own(shared), batched)
        return jax.lax.pmean(mean, AXES), each

    whole, split = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, split), out_specs=(whole, split)
    )


def _own(shared: PyTree) -> PyTree:
    """Makes what is equal on all devices each one's own, to `shard_map`'s types.

    Autodiff would otherwise add up gradients with respect to it wherever it is used, in a
    loop's every turn, and would need to be told so by a custom gradient.
    """
    return jax.lax.pcast(shared, AXES, to="varying")


def require_divisible(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Refuses a batch that the devices, and their parts of it, cannot share equally.

    Raises:
      UserError: with the batch, the number of devices and the nearest sizes that work.
    """
    n = mesh.size * parts
    if batch_size % n:
        lower = batch_size // n * n
        nearest = " or ".join(str(b) for b in (lower, lower + n) if b)
        told = f"{mesh.size} devices" + (f" times {parts} parts" if parts > 1 else "")
        raise UserError(
            f"config.{field} is {batch_size}, not divisible by {told}: use {nearest}"
        )
