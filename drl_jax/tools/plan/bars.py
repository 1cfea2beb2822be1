"""Checks the bars: the requirements that the compiled programs must meet.

    python -m drl_jax.tools.plan.bars [--small]

Compiles the training steps and samplers of the paper's experiments for TPU topologies,
without TPUs, and prints each bar with the value found. The exit status is 1 if any bar is
missed. Run it from the root of the repository, whose `configs/` it reads; it takes about ten
minutes. --small checks only the bars that do not depend on the size of the program, on a
small network and few chips, in one minute.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax.errors import UserError
from drl_jax.tools import flops
from drl_jax.tools.plan import chips

MIN_MFU = 0.75  # model FLOPs utilisation, estimated by XLA:TPU
MAX_COMPILE_SECONDS = 60  # on two CPU cores
MAX_CODE = 120e6  # bytes
MAX_SCALING = 1.02  # cost per chip on many chips, divided by that on few chips

BFLOAT16 = {"energy.dtype": "bfloat16", "evaluation.dtype": "bfloat16"}
SMALL = {
    "data.image_size": 8,
    "energy.ch": 16,
    "energy.mult": (1, 2),
    "energy.N": 1,
    "mcmc.K": 4,
}


class Job(NamedTuple):
    """A configuration on a topology.

    Attributes:
      config: name of a file in configs/, without `.py`.
      topology: name of the topology (`chips.parse`).
      changes: values of fields that differ from the file.
    """

    config: str
    topology: str
    changes: dict[str, Any]


class Bar(NamedTuple):
    """A requirement on the compiled programs of a job, and whether it is met.

    Attributes:
      name: the requirement.
      found: the value found.
      holds: whether the value meets the requirement.
    """

    name: str
    found: str
    holds: bool


def load(job: Job) -> ConfigDict:
    """Returns the configuration of a job."""
    config = config_lib.load(f"configs/{job.config}.py")
    config.update_from_flattened_dict(job.changes)
    config_lib.validate(config)
    return config


def compiled(job: Job, *names: str) -> dict[str, dict[str, Any]]:
    """Compiles the named programs of a job and returns the `report.values` of each."""
    # Imported only here, because JAX must be imported after `main` has set the environment.
    from drl_jax.tools.plan import programs, report

    config, topology = load(job), chips.parse(job.topology)
    mesh = programs.mesh_of(topology, **config.mesh)
    B = config.train.batch_size
    lowered = {
        "training step": lambda: programs.training_step(config, mesh, B),
        "sampler": lambda: programs.sampler(config, mesh, B),
    }
    work = {"training step": flops.training_step(config), "sampler": flops.sampling(config)}

    def values(name: str) -> dict[str, Any]:
        program = report.Program(
            name=name,
            batch_size=B,
            compiled=programs.compiled(lowered[name]),
            flops=work[name] * B / topology.devices,
        )
        return report.values(program, topology)

    return {name: values(name) for name in lowered if name in names}


def communication(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Checks the collectives.

    A training step may reduce the gradient of all parameters once, in one all-reduce, and
    scalars; the sampler must not communicate.
    """
    step, sampler = (values[name]["collectives"] for name in ("training step", "sampler"))
    scalars = 1024  # bytes; the metrics of all groups of levels are smaller
    large = [each for each in step if each["size"] > scalars]
    yield Bar(
        "reductions per training step, except of scalars",
        ", ".join(f"{each['kind']} of {each['size'] / 1e6:.3g} MB" for each in large),
        [(each["kind"], each["runs"], each["loop"]) for each in large]
        == [("all-reduce", 1, "")],
    )
    inside = [each["name"] for each in step if each["loop"]]
    yield Bar("collectives in the chain", str(len(inside)), not inside)
    yield Bar("collectives in the sampler", str(len(sampler)), not sampler)


def speed(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Checks the estimated speed of a training step, its compilation time and code size."""
    step = values["training step"]
    mfu, seconds = step.get("estimated_mfu", 0.0), step["compile_seconds"]
    code = step["bytes"]["code"]
    yield Bar(f"estimated MFU of at least {MIN_MFU:.0%}", f"{mfu:.1%}", mfu >= MIN_MFU)
    yield Bar(
        f"compilation in at most {MAX_COMPILE_SECONDS} s",
        f"{seconds:.0f} s",
        seconds <= MAX_COMPILE_SECONDS,
    )
    yield Bar(
        f"code of at most {MAX_CODE / 1e6:.0f} MB", f"{code / 1e6:.0f} MB", code <= MAX_CODE
    )


def scaling(few: dict[str, dict[str, Any]], many: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Checks that the cost of a training step per chip does not grow with the number of chips.

    The number of examples per chip must be the same in both jobs. The estimated cycles exclude
    communication, so the bytes that each chip reduces are compared separately.

    Args:
      few: programs of the job on few chips, by name (`compiled`).
      many: programs of the job on many chips.
    """
    sizes = [
        sum(each["size"] for each in values["training step"]["collectives"])
        for values in (few, many)
    ]
    yield Bar(
        "bytes reduced per training step, on few and on many chips",
        f"{sizes[0]} and {sizes[1]}",
        sizes[1] <= MAX_SCALING * sizes[0],
    )
    cycles = [values["training step"]["estimated_cycles"] for values in (few, many)]
    ratio = cycles[1] / cycles[0]
    yield Bar(
        f"cycles per chip and training step, many chips over few, at most {MAX_SCALING}",
        f"{ratio:.4f}",
        ratio <= MAX_SCALING,
    )


def memory(values: dict[str, dict[str, Any]]) -> Iterator[Bar]:
    """Checks that the programs fit into the memory of a device."""
    for name, each in values.items():
        needed = each["bytes_needed"]
        found = "more than available" if needed is None else f"{needed / chips.GIB:.2f} GiB"
        yield Bar(f"the {name} fits", found, each["fits"])


def check(small: bool) -> Iterator[tuple[Job, Bar]]:
    """Compiles the programs of each job in turn and yields its bars."""
    if small:
        few = Job("digits", "v5e:2x2", SMALL | {"train.batch_size": 32})
        many = Job("digits", "v5e:4x4", SMALL | {"train.batch_size": 128})
    else:
        few = Job("cifar10", "v5e:2x4", BFLOAT16)
        many = Job("cifar10", "v5e:16x16", BFLOAT16 | {"train.batch_size": 8192})
    values = compiled(few, "training step", "sampler")
    for bars in (communication, memory) if small else (speed, communication, memory):
        yield from ((few, bar) for bar in bars(values))
    yield from ((many, bar) for bar in scaling(values, compiled(many, "training step")))
    if small:
        return
    for job in (
        Job("celeba64", "v5e:16x16", {"train.batch_size": 4096}),
        Job("lsun_church128", "v5e:2x4", {}),
        Job("lsun_bedroom128", "v5e:2x4", {}),
    ):
        yield from ((job, bar) for bar in memory(compiled(job, "training step")))


def main(argv: Sequence[str]) -> int:
    """Prints all bars and returns the exit status."""
    if unknown := set(argv[1:]) - {"--small"}:
        print(
            f"error: unknown option {' '.join(sorted(unknown))}: the only option is --small",
            file=sys.stderr,
        )
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
