"""What the compiled programs must keep to, checked without the accelerators.

    python -m drl_jax.plan.bars [--small]

Compiles the paper's programs for TPU topologies, from the root of the project, and prints every
bar with what was found; the exit status is 1 if one is missed. It takes about ten minutes;
--small checks what does not depend on the size, on a small network and few chips, in one
minute.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import flops
from drl_jax.errors import UserError
from drl_jax.plan import chips

MFU = 0.75
COMPILE_SECONDS = 60  # on two cores
CODE = 120e6  # bytes
GROWTH = 1.02  # of a chip's cycles, from few chips to many

BFLOAT16 = {"energy.dtype": "bfloat16"}
SMALL = {
    "data.image_size": 8,
    "energy.ch": 16,
    "energy.mult": (1, 2),
    "energy.N": 1,
    "mcmc.K": 4,
}


class Job(NamedTuple):
    """A configuration on a topology: a file of configs/, and what is changed of it."""

    config: str
    topology: str
    changes: dict[str, Any]


class Bar(NamedTuple):
    """One line of the verdict: of what, what was found, and whether it is good enough."""

    name: str
    found: str
    holds: bool


def load(job: Job) -> ConfigDict:
    """Returns the job's configuration."""
    config = config_lib.load(f"configs/{job.config}.py")
    config.update_from_flattened_dict(job.changes)
    config_lib.validate(config)
    return config


def compiled(job: Job, *names: str) -> dict[str, dict[str, Any]]:
    """Compiles a job's programs of these names and returns `report.values` of each."""
    from drl_jax.plan import programs, report  # JAX reads the environment once

    config, topology = load(job), chips.parse(job.topology)
    mesh = programs.mesh_of(topology, **config.mesh)
    B = config.train.batch_size
    lowered = {
        "training step": lambda: programs.training_step(config, mesh, B),
        "sampler": lambda: programs.sampler(config, mesh, B),
    }
    work = {"training step": flops.training_step(config), "sampler": flops.sampling(config)}
    return {
        name: report.values(
            report.Program(
                name, B, programs.compiled(lower), work[name] * B / topology.devices
            ),
            topology,
        )
        for name, lower in lowered.items()
        if name in names
    }


def quiet(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Bars of what goes over the network.

    The gradient of all parameters, once a step and in one piece, and scalars; of sampling
    nothing.
    """
    step, sampler = (values[name]["collectives"] for name in ("training step", "sampler"))
    scalars = 1024  # bytes: the metrics of all groups of levels
    large = [each for each in step if each["size"] > scalars]
    yield Bar(
        "reductions of more than scalars in a step",
        ", ".join(f"{each['kind']} of {each['size'] / 1e6:.3g} MB" for each in large),
        [(each["kind"], each["runs"], each["loop"]) for each in large]
        == [("all-reduce", 1, "")],
    )
    inside = [each["name"] for each in step if each["loop"]]
    yield Bar("collectives in the chain", str(len(inside)), not inside)
    yield Bar("collectives in the sampler", str(len(sampler)), not sampler)


def fast(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Bars of one training step's estimated speed, its compilation and its code."""
    step = values["training step"]
    mfu, seconds, code = (
        step.get("estimated_mfu", 0.0),
        step["compile_seconds"],
        step["bytes"]["code"],
    )
    yield Bar(f"estimated MFU, at least {MFU:.0%}", f"{mfu:.1%}", mfu >= MFU)
    yield Bar(
        f"compilation in {COMPILE_SECONDS} s", f"{seconds:.0f} s", seconds <= COMPILE_SECONDS
    )
    yield Bar(f"code of {CODE / 1e6:.0f} MB", f"{code / 1e6:.0f} MB", code <= CODE)


def flat(few: dict[str, dict[str, Any]], many: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Bars of what a chip's share costs when there are more chips.

    Of the network, which the cycles leave out, it says how many bytes a chip reduces.
    """
    sizes = [
        sum(each["size"] for each in jobs["training step"]["collectives"])
        for jobs in (few, many)
    ]
    yield Bar(
        "bytes that a step reduces, on many chips and on few",
        " and ".join(map(str, sizes[::-1])),
        sizes[1] <= GROWTH * sizes[0],
    )
    cycles = [jobs["training step"]["estimated_cycles"] for jobs in (few, many)]
    growth = cycles[1] / cycles[0]
    yield Bar(
        f"cycles a chip of a step, on many chips over few, at most {GROWTH}",
        f"{growth:.4f}",
        growth <= GROWTH,
    )


def fits(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Bars of the memory that programs need."""
    for name, each in values.items():
        needed = each["bytes_needed"]
        told = "more than there is" if needed is None else f"{needed / chips.GIB:.2f} GiB"
        yield Bar(f"the {name} fits", told, each["fits"])


def check(small: bool) -> Iterator[tuple[Job, Bar]]:
    """Compiles one job after the other and yields its bars."""
    if small:
        few = Job("digits", "v5e:2x2", SMALL | {"train.batch_size": 32})
        many = Job("digits", "v5e:4x4", SMALL | {"train.batch_size": 128})
    else:
        few = Job("cifar10", "v5e:2x4", BFLOAT16)
        many = Job("cifar10", "v5e:16x16", BFLOAT16 | {"train.batch_size": 8192})
    values = compiled(few, "training step", "sampler")
    for bars in (quiet, fits) if small else (fast, quiet, fits):
        yield from ((few, bar) for bar in bars(values))
    yield from ((many, bar) for bar in flat(values, compiled(many, "training step")))
    if small:
        return
    for job in (
        Job("celeba64", "v5e:16x16", {"train.batch_size": 4096}),
        Job("lsun_church128", "v5e:2x4", {}),
        Job("lsun_bedroom128", "v5e:2x4", {}),
    ):
        yield from ((job, bar) for bar in fits(compiled(job, "training step")))


def main(argv: Sequence[str]) -> int:
    """Prints all bars and returns the exit status."""
    if set(argv[1:]) - {"--small"}:
        print(f"error: {' '.join(argv[1:])}: the one option is --small", file=sys.stderr)
        return 1
    os.environ.update(chips.parse("v5e:2x4").environment)
    missed = 0
    try:
        for job, bar in check("--small" in argv):
            verdict = "holds " if bar.holds else "MISSED"
            missed += not bar.holds
            print(f"{verdict} {job.config} {job.topology}: {bar.name}: {bar.found}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
