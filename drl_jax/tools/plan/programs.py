"""Compiles the training step and the sampler for devices that this machine does not have."""

import importlib.util
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from drl_jax import method as method_lib
from drl_jax.errors import UserError, not_installed
from drl_jax.model import Model
from drl_jax.runtime import sharding
from drl_jax.tools.plan import hlo
from drl_jax.tools.plan.chips import Topology
from drl_jax.tools.plan.hlo import Module
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

# Python package that contains the compiler for each platform.
COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}


class Memory(NamedTuple):
    """Memory that a program needs on each device [bytes].

    Attributes:
      arguments: size of the arguments.
      outputs: size of the outputs.
      aliased: size of the outputs that reuse the memory of arguments.
      temporaries: size of intermediate results.
      code: size of the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Total memory needed."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Compiled(NamedTuple):
    """Result of compiling a program.

    Attributes:
      seconds: time taken by tracing, lowering and compilation.
      needed: memory needed per device [bytes]; None if the compiler ran out of device memory
        and did not report how much the program needs.
      memory: what the memory is used for; None if the compiler ran out of device memory.
      module: the optimised program; None likewise.
    """

    seconds: float
    needed: float | None
    memory: Memory | None
    module: Module | None


def mesh_of(topology: Topology, data: int = -1, fsdp: int = 1) -> Mesh:
    """Returns a mesh of the devices of a topology, for compilation only.

    Args:
      topology: the devices.
      data: length of the mesh axis `data` (`sharding.make_mesh`).
      fsdp: length of the mesh axis `fsdp`.

    Raises:
      UserError: if the compiler for the topology is not installed or does not support it, or
        if its devices cannot form the mesh.
    """
    if importlib.util.find_spec(COMPILERS[topology.platform]) is None:
        package = {"tpu": "jax[tpu]", "cuda": "jax[cuda12]"}[topology.platform]
        raise not_installed(f"--topology={topology.name}", package)
    try:
        description = topologies.get_topology_desc(**topology.description)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology={topology.name} is not supported: {reason}") from error
    return sharding.make_mesh(description.devices, data, fsdp)


def training_step(config: ConfigDict, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Lowers the training step (`training.step.compile_step`).

    Args:
      config: configuration of the job.
      mesh: devices of the topology.
      batch_size: number of examples on all devices together.
    """
    method = method_lib.from_config(config)
    training = train_step.from_config(config)
    step: Any = train_step.compile_step(mesh, method, training)
    state = train_state.abstract(method.energy, training.optimiser)
    shape = (batch_size, *method.energy.shape)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if method.energy.classes:
        batch["label"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return step.lower(state, batch, _abstract_key())


def sampler(config: ConfigDict, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Lowers the program that draws samples, from white noise to level 0.

    Args:
      config: configuration of the job.
      mesh: devices of the topology.
      batch_size: number of samples on all devices together.
    """
    method = method_lib.for_generation(method_lib.from_config(config), config)
    energy = method.energy
    params = jax.eval_shape(lambda key: energy.normalise(*energy.init(key))[0], _abstract_key())
    model = Model.create(method, params, mesh, batch_size)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    shared, examples = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        model.arguments(_abstract_key(), indices),
    )
    generate: Any = model.programs.generate
    return generate.lower(shared, examples)


def _abstract_key() -> Any:
    """Returns the shape and dtype of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def compiled(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Compiles a program.

    A program that exceeds the memory of the device is not an error: `Compiled` describes it.

    Args:
      lower: lowers the program.
    """
    start = time.perf_counter()
    try:
        program: Any = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds, needed = time.perf_counter() - start, reported_memory(str(error))
        return Compiled(seconds=seconds, needed=needed, memory=None, module=None)
    seconds = time.perf_counter() - start
    stats = program.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    module = hlo.parse(program.as_text())
    return Compiled(seconds=seconds, needed=memory.total, memory=memory, module=module)


def reported_memory(message: str) -> float | None:
    """Returns the memory that a program needs according to an out-of-memory error [bytes].

    The compiler reports the total or, for programs that are far too large, the temporaries
    alone. The result is None if the message contains neither.
    """
    needs = r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGTP]?)"
    if found := re.search(needs, message):
        return float(found[1]) * 1024.0 ** " KMGTP".index(found[2] or " ")
    return None
