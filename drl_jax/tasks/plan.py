"""Plans a job: compiles its programs for accelerators that this machine does not have."""

import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.runtime import sharding
from drl_jax.storage.atomic import make_writable, write_atomically, write_json
from drl_jax.tools import flops
from drl_jax.tools.plan import batches, chips, programs, report
from drl_jax.tools.plan.chips import GIB
from drl_jax.tools.plan.programs import Compiled

log = logging.getLogger(__name__)


def run(
    *, config: ConfigDict, workdir: epath.Path | None, topology: str, find_largest_batch: bool
) -> None:
    """Compiles the training step and the sampler for a topology and prints the plan.

    The plan contains their memory, their estimated time and their communication. With a work
    directory, it is also written there, as plan_TOPOLOGY.md and plan_TOPOLOGY.json.

    Args:
      config: configuration of the job.
      workdir: directory to write the plan to, or None.
      topology: name of the topology, such as `v5e:2x4` (`chips.parse`).
      find_largest_batch: whether to add the largest batch size with which the training step
        fits. Each batch size that is tried is compiled.

    Raises:
      UserError: if the topology is unknown, its compiler is not installed, the batch size is
        not divisible by the number of devices, or the work directory is not writable.
    """
    target = chips.parse(topology)
    mesh = programs.mesh_of(target, **config.mesh)
    B, accumulate = config.train.batch_size, config.train.accumulate
    sharding.require_divisible(B, mesh, "train.batch_size", accumulate)
    if workdir:
        make_writable(workdir)
    unit = mesh.size * accumulate  # every batch size must be a multiple of it
    steps: dict[int, Compiled] = {}  # training steps by batch size

    def compile_step(multiple: int) -> float | None:
        """Compiles the training step for a multiple of the unit; returns the bytes needed."""
        batch = multiple * unit
        steps[batch] = compiled(
            "training step", batch, lambda: programs.training_step(config, mesh, batch)
        )
        return steps[batch].needed

    needed = compile_step(B // unit)
    samples = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    sampler = compiled("sampler", samples, lambda: programs.sampler(config, mesh, samples))
    # The only loops whose trip count is computed at run time are those of the leapfrog steps.
    unknown_trips = flops.leapfrog(config)
    reported = [
        report.Program(
            name="training step",
            batch_size=B,
            compiled=steps[B],
            flops=flops.training_step(config) * B / mesh.size,
            runs=config.train.num_steps,
            unknown_trips=unknown_trips,
        ),
        report.Program(
            name="sampler",
            batch_size=samples,
            compiled=sampler,
            flops=flops.sampling(config) * samples / mesh.size,
            unknown_trips=unknown_trips,
        ),
    ]
    plan: dict[str, Any] = {
        "topology": topology,
        "chip": target.chip.title,
        "devices": mesh.size,
        "memory": target.chip.memory,
        "peak": target.chip.peak,
        "clock": target.chip.clock,
        "jax": jax.__version__,
        "programs": [report.values(each, target) for each in reported],
        "config": config_lib.to_json(config),
    }
    text = report.markdown(plan)
    print(text, end="", flush=True)
    _write(plan, text, workdir)
    if find_largest_batch:
        largest = batches.largest(compile_step, B // unit, needed, target.chip.memory)
        plan |= {
            "largest_batch_size": largest * unit,
            "tried": [
                {
                    "batch_size": batch,
                    "bytes_needed": step.needed,
                    "fits": report.fits(step, target),
                }
                for batch, step in steps.items()
            ],
        }
        addition = f"\n{report.largest_batch(plan)}\n"
        print(addition, end="")
        _write(plan, text + addition, workdir)


def compiled(name: str, batch_size: int, lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Compiles a program, which can take minutes, and logs its memory and the time taken.

    Args:
      name: name of the program in the log.
      batch_size: global batch size, for the log.
      lower: lowers the program.
    """
    log.info("compiling the %s for batch size %d", name, batch_size)
    result = programs.compiled(lower)
    if result.memory is None:
        memory = "the compiler ran out of device memory"
    else:
        memory = f"{result.memory.total / GIB:.2f} GiB per device"
    log.info("  %s; compiled in %.0f s", memory, result.seconds)
    return result


def _write(plan: dict[str, Any], text: str, workdir: epath.Path | None) -> None:
    """Writes a plan, as JSON and as Markdown, to the work directory, if there is one."""
    if workdir:
        path = workdir / f"plan_{plan['topology'].replace(':', '_')}"
        write_atomically(path.with_suffix(".md"), text.encode())
        write_json(path.with_suffix(".json"), plan)
        log.info("wrote %s and .json", path.with_suffix(".md"))
