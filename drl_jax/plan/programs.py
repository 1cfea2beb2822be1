"""The programs of a run, compiled for devices that are not here."""

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

from drl_jax import method, model, parallel, train_state, train_step
from drl_jax.errors import UserError
from drl_jax.plan import hlo
from drl_jax.plan.chips import Topology
from drl_jax.plan.hlo import Module

COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}  # by platform, as Python finds them


class Memory(NamedTuple):
    """Of one device [bytes].

    Attributes:
      arguments, outputs: what goes in and comes out.
      aliased: of the outputs, what takes the place of arguments.
      temporaries: what lives in between.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """What is needed at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Compiled(NamedTuple):
    """What is known of a compiled program.

    Attributes:
      seconds: that its compilation took, with tracing and lowering.
      needed: bytes of one device; None if the compiler gave up without a number.
      memory: what they are; None if the compiler gave up for lack of memory.
      module: the optimised program; None likewise.
    """

    seconds: float
    needed: float | None
    memory: Memory | None
    module: Module | None


def mesh_of(topology: Topology, data: int = -1, fsdp: int = 1) -> Mesh:
    """Returns the devices of a topology, to compile for, as a mesh of this shape.

    Raises:
      UserError: if JAX's support of them is not installed, or knows no such topology; or if
        they make no such mesh.
    """
    if importlib.util.find_spec(COMPILERS[topology.platform]) is None:
        raise UserError(
            f"--topology={topology.name}: the compiler for it is not installed: "
            f"pip install 'drl_jax[{topology.platform}]'"
        )
    try:
        described = topologies.get_topology_desc(**topology.description)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {line(error)}") from error
    return parallel.make_mesh(described.devices, data, fsdp)


def training_step(config: ConfigDict, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Lowers the step that training runs."""
    learned = method.from_config(config)
    step: Any = train_step.compile_for(
        *(mesh, learned, train_state.optimiser(config)),
        *(config.optim.ema_decay, config.train.parts),
    )
    x = jax.ShapeDtypeStruct((batch_size, *learned.energy.shape), jnp.float32)
    return step.lower(model.abstract_state(config), x, _key())


def sampler(config: ConfigDict, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """Lowers the program that draws samples, from white noise to data."""
    learned = model.generating(method.from_config(config), config.mcmc)
    state = model.abstract_state(config)
    params = jax.eval_shape(
        lambda state: model.generating_params(learned.energy, state, mesh), state
    )
    drawn = model.Model(learned, params, mesh, batch_size)
    tuning = jax.eval_shape(lambda: drawn.tuning)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    generate: Any = drawn.generate
    return generate.lower(params, tuning, _key(), indices, (), {})


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def compiled(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Compiles a program; one that the device's memory is too small for is no error."""
    start = time.perf_counter()
    try:
        program: Any = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(time.perf_counter() - start, exhausted(str(error)), None, None)
    seconds = time.perf_counter() - start
    stats = program.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    return Compiled(seconds, memory.total, memory, hlo.parse(program.as_text()))


def exhausted(message: str) -> float | None:
    """Returns the bytes that a refused program needs, if the compiler says them.

    It says so of all of it, or, of one that is far too big, of its temporaries alone.
    """
    needs = r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGTP]?)"
    if found := re.search(needs, message):
        return float(found[1]) * 1024.0 ** " KMGTP".index(found[2] or " ")
    return None


def line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    return str(error).partition("\n")[0]
