"""What a run would take of accelerators that are not here."""

import logging
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import flops, parallel
from drl_jax.files import make_writable, write_whole
from drl_jax.modes import parts
from drl_jax.plan import batches, chips, programs, report
from drl_jax.plan.chips import GIB
from drl_jax.plan.programs import Compiled

log = logging.getLogger(__name__)


def run(config: ConfigDict, topology: str, workdir: epath.Path | None) -> None:
    """Compiles the training step and the sampler, and prints what they take.

    With a work directory, writes it too, as plan_TOPOLOGY.md and .json.

    Raises:
      UserError: if the topology is unknown or its compiler not installed, the devices cannot
        share the batch, or the work directory cannot be written to.
    """
    where = chips.parse(topology)
    mesh = programs.mesh_of(where, **config.mesh)
    B = config.train.batch_size
    parallel.require_divisible(B, mesh, "train.batch_size", config.train.parts)
    if workdir:
        make_writable(workdir)
    unit = mesh.size * config.train.parts
    seen: dict[int, Compiled] = {}

    def train_with(images: int) -> float | None:
        """Compiles the training step for so many images in each part of each device."""
        batch = images * unit
        seen[batch] = compiled(
            "training step", batch, lambda: programs.training_step(config, mesh, batch)
        )
        return seen[batch].needed

    first = train_with(B // unit)
    unknown = flops.leapfrog(config)
    drawn = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    sampler = compiled("sampler", drawn, lambda: programs.sampler(config, mesh, drawn))
    told = [
        report.Program(
            *("training step", B, seen[B], flops.training_step(config) * B / mesh.size),
            *(config.train.num_steps, unknown),
        ),
        report.Program(
            *("sampler", drawn, sampler, flops.sampling(config) * drawn / mesh.size),
            unknown_trips=unknown,
        ),
    ]
    largest = batches.largest(train_with, B // unit, first, where.chip.memory)
    plan = {
        "topology": topology,
        "chip": where.chip.title,
        "devices": mesh.size,
        "memory": where.chip.memory,
        "peak": where.chip.peak,
        "clock": where.chip.clock,
        "jax": jax.__version__,
        "programs": [report.values(each, where) for each in told],
        "largest_batch_size": largest * unit,
        "tried": [
            {"batch_size": batch, "bytes_needed": each.needed, "fits": report.fits(each, where)}
            for batch, each in seen.items()
        ],
        "config": config_lib.to_json(config),
    }
    text = report.markdown(plan)
    print(text, end="")
    if workdir:
        path = workdir / f"plan_{topology.replace(':', '_')}"
        write_whole(path.with_suffix(".md"), text.encode())
        parts.write_json(path.with_suffix(".json"), plan)
        log.info("the plan is in %s and .json", path.with_suffix(".md"))


def compiled(name: str, batch_size: int, lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    """Compiles a program and says so, before and after: it can take minutes."""
    log.info("compiling the %s, batch %d", name, batch_size)
    result = programs.compiled(lower)
    if result.memory is None:
        told = "the compiler finds no room"
    else:
        told = f"{result.memory.total / GIB:.2f} GiB a device"
    log.info("  %s, %.0f s", told, result.seconds)
    return result
