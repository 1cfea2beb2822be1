"""Device mesh, shardings, and functions mapped over the devices.

The mesh has two axes, `data` and `fsdp`; a batch is split over both. The training state of each
kernel (parameter, exponential moving average, Adam's moments) is also split, along `fsdp` only,
and gathered where it is used (fully sharded data parallelism).

`over_examples` takes the place of `jax.pmap`, which JAX now implements as `jax.jit` of
`jax.shard_map`: it maps the Langevin chains and the loss over the devices. The training step
around it is one `jax.jit` with shardings, which has replaced `pjit`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from drl_jax.errors import UserError

AXES = DATA, FSDP = "data", "fsdp"


def make_mesh(
    devices: Sequence[jax.Device] | None = None, data: int = -1, fsdp: int = 1
) -> Mesh:
    """Returns the mesh of the devices.

    Args:
      devices: devices of the mesh; by default all devices of all processes.
      data: number of devices along `data`; -1 for the number of all devices divided by `fsdp`.
      fsdp: number of devices along `fsdp`.

    Raises:
      UserError: if data times fsdp is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if n % fsdp or data not in (-1, n // fsdp):
        shape = f"fsdp = {fsdp}" if data == -1 else f"data = {data} times fsdp = {fsdp}"
        possible = ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
        raise UserError(
            f"config.mesh is {shape}, but there are {n} devices: set fsdp to one of {possible} "
            "and leave data at -1"
        )
    # Sorted, so that the examples of each process are contiguous in a batch.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=types)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds in full, such as parameters."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: the first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def fully_sharded(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array of the training state, given its shape.

    The longest axis whose length is divisible by the number of `fsdp` devices is split over
    them. Arrays without such an axis are replicated, and so are scalars and vectors,
    because they are small.
    """
    n = mesh.shape[FSDP]
    axes = [axis for axis, length in enumerate(shape) if length % n == 0]
    if n == 1 or len(shape) < 2 or not axes:
        return replicated(mesh)
    axis = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))


def gather(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates sharded arrays on every device, inside a jitted function."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def compiler_options(mesh: Mesh, runs_once: bool = False) -> dict[str, str]:
    """Returns XLA's compiler options for a program (for TPUs, see `tools/plan/tpu_step.md`).

    Args:
      mesh: devices that run the program.
      runs_once: whether the program runs only once; on CPUs, it is then compiled faster and
        optimised less.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and runs_once:  # LLVM's optimisation would take longer than it saves
        return {"xla_backend_optimization_level": "0"}
    if platform != "tpu":
        return {}
    return {
        # Shares the code of equal operations, which makes programs smaller at the same speed.
        "xla_tpu_enable_deduplicated_calls": "true",
        # Combines the reductions of all gradients into one.
        "xla_jf_crs_combiner_threshold_in_bytes": str(2**40),
        "xla_jf_crs_combiner_threshold_count": str(2**20),
    }


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Places numpy arrays on the devices of all processes.

    Args:
      tree: pytree of arrays, which must be equal in all processes.
      sharding: sharding of every array.
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def fetch(tree: Any) -> Any:
    """Copies arrays from the devices of all processes to numpy arrays in every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def over_examples(fn: Callable, mesh: Mesh) -> Callable:
    """Maps fn(shared, examples) over the devices, each of which has its share of the examples.

    `shared` is replicated on every device. The arrays of `examples` and of the result are split
    along their first axis. The devices do not communicate, so the result for an example must
    not depend on other examples.
    """

    def on_device(shared, examples):
        return fn(_device_varying(shared), examples)

    replicated, split = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(replicated, split), out_specs=split)


def gather_examples(x: jax.Array) -> jax.Array:
    """Returns the examples of all devices, given those of one, within `over_examples`."""
    return jax.lax.all_gather(x, AXES, tiled=True)


def own_examples(x: jax.Array) -> jax.Array:
    """Returns the examples of this device, given those of all: undoes `gather_examples`."""
    n = len(x) // jax.lax.axis_size(AXES)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXES) * n, n)


def mean_over_examples(fn: Callable, mesh: Mesh) -> Callable:
    """Maps fn(shared, examples) -> (mean, per_example) over the devices.

    This is `over_examples` for functions that also return a mean over their examples. It is
    averaged over the devices, which do not communicate otherwise.
    """

    def on_device(shared, examples):
        mean, per_example = fn(_device_varying(shared), examples)
        return jax.lax.pmean(mean, AXES), per_example

    replicated, split = PartitionSpec(), PartitionSpec(AXES)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(replicated, split), out_specs=(replicated, split)
    )


def _device_varying(shared: PyTree) -> PyTree:
    """Casts replicated values to device-varying ones, so that gradients are reduced once.

    Otherwise, automatic differentiation would sum gradients over the devices wherever a value
    is used, in every iteration of a loop, and functions with custom gradients would have to do
    the same.
    """
    return jax.lax.pcast(shared, AXES, to="varying")


def require_divisible(
    batch_size: int, mesh: Mesh | AbstractMesh, field: str, accumulate: int = 1
) -> None:
    """Raises unless a batch can be split equally over the devices.

    Args:
      batch_size: number of examples on all devices together.
      mesh: the devices.
      field: field of the configuration that sets the batch size, such as train.batch_size.
      accumulate: number of equal parts into which each device's share is split (gradient
        accumulation).

    Raises:
      UserError: with the nearest batch sizes that work.
    """
    n = mesh.size * accumulate
    if batch_size % n:
        lower = batch_size // n * n
        nearest = " or ".join(str(size) for size in (lower, lower + n) if size)
        times = f" times config.train.accumulate = {accumulate}" if accumulate > 1 else ""
        raise UserError(
            f"config.{field} is {batch_size}, not divisible by {mesh.size} devices{times}: use "
            f"{nearest}"
        )
