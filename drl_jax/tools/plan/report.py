"""Formats a plan: as values for JSON, and as Markdown."""

import dataclasses
from typing import Any

from drl_jax.tools.plan import batches, hlo
from drl_jax.tools.plan.chips import GIB, Topology
from drl_jax.tools.plan.programs import Compiled

DAY = 24 * 3600.0

TPU_NOTE = (
    "The time is the sum of XLA:TPU's estimates for the individual fused operations, times the "
    "trip counts of loops. It excludes communication and waiting for HBM or the host, so an "
    "actual run is slower by an unknown factor. Use the estimate to compare two programs."
)
GPU_NOTE = (
    "XLA:GPU estimates no cycles, so the only time given is a lower bound: the FLOPs divided "
    "by the chip's peak rate in bfloat16. The memory excludes the program itself and the "
    "workspace of cuDNN's convolutions, which is chosen on the GPU, so leave some memory free."
)


@dataclasses.dataclass
class Program:
    """A program to report on.

    Attributes:
      name: name of the program.
      batch_size: number of examples on all devices together.
      compiled: result of its compilation.
      flops: FLOPs per device and execution, from `tools.flops`.
      runs: number of executions in the whole job; None if unknown.
      unknown_trips: trip count assumed for loops whose trip count depends on the data.
    """

    name: str
    batch_size: int
    compiled: Compiled
    flops: float
    runs: int | None = None
    unknown_trips: int = 1


def fits(compiled: Compiled, topology: Topology) -> bool:
    """Returns whether the program compiled and its memory does not exceed the device's."""
    memory = compiled.memory
    return memory is not None and memory.total <= topology.chip.memory


def values(program: Program, topology: Topology) -> dict[str, Any]:
    """Returns everything known about a program, as JSON values.

    Units are bytes, seconds, FLOPs and clock cycles, per device; `estimated_mfu` is a fraction.
    """
    chip, compiled = topology.chip, program.compiled
    known: dict[str, Any] = {
        "program": program.name,
        "batch_size": program.batch_size,
        "examples_per_device": program.batch_size // topology.devices,
        "fits": fits(compiled, topology),
        "bytes_needed": compiled.needed,
        "bytes_available": chip.memory,
        "compile_seconds": compiled.seconds,
        "flops_per_device": program.flops,
        "seconds_at_peak": program.flops / chip.peak,
    }
    if compiled.memory is None or compiled.module is None:
        return known
    known["bytes"] = compiled.memory._asdict()
    module, unknown_trips = compiled.module, program.unknown_trips
    cycles = hlo.cycles(module, unknown_trips) if chip.clock else None
    if cycles and chip.clock:
        seconds = cycles / chip.clock
        known |= {
            "estimated_cycles": cycles,
            "estimated_seconds": seconds,
            "estimated_mfu": program.flops / (seconds * chip.peak),
        }
        if program.runs:
            known |= {"runs": program.runs, "estimated_days": seconds * program.runs / DAY}
    known["loops"] = [loop._asdict() for loop in hlo.loops(module, unknown_trips)]
    known["collectives"] = [
        collective._asdict() for collective in hlo.collectives(module, unknown_trips)
    ]
    return known


def markdown(plan: dict[str, Any]) -> str:
    """Formats the plan of `tasks.plan` as Markdown."""
    programs = plan["programs"]
    rows = [
        ("", *(each["program"] for each in programs)),
        ("---", *("---" for _ in programs)),
        ("global batch", *(f"{each['batch_size']}" for each in programs)),
        ("examples per device", *(f"{each['examples_per_device']}" for each in programs)),
        ("verdict", *("fits" if each["fits"] else "**does not fit**" for each in programs)),
        ("memory per device", *map(_memory, programs)),
    ]
    rows += [
        (f"- {part}", *(_size(each.get("bytes", {}).get(part)) for each in programs))
        for part in ("arguments", "outputs", "aliased", "temporaries", "code")
    ]
    rows += [
        ("TFLOP per device", *(f"{each['flops_per_device'] / 1e12:.4g}" for each in programs)),
        ("seconds at peak", *(f"{each['seconds_at_peak']:.4g}" for each in programs)),
    ]
    if any("estimated_cycles" in each for each in programs):
        rows += [
            (
                "estimated cycles",
                *(_number(each, "estimated_cycles", 1e6, " M") for each in programs),
            ),
            ("estimated seconds", *(_number(each, "estimated_seconds") for each in programs)),
            (
                "estimated MFU",
                *(_number(each, "estimated_mfu", 0.01, "%") for each in programs),
            ),
            (
                "estimated days of the job",
                *(_number(each, "estimated_days") for each in programs),
            ),
        ]
    rows.append(("compiled in", *(f"{each['compile_seconds']:.0f} s" for each in programs)))
    lines = [
        f"# {plan['config']['data']['name']} on {plan['topology']}",
        "",
        f"{plan['devices']} devices: {plan['chip']}, {plan['peak'] / 1e12:.4g} TFLOP/s in "
        f"bfloat16, {plan['memory'] / GIB:.2f} GiB available to a program; JAX {plan['jax']}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        TPU_NOTE if plan["clock"] else GPU_NOTE,
        "",
    ]
    for each in programs:
        lines += [*_communication(each), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def largest_batch(plan: dict[str, Any]) -> str:
    """Describes the largest batch size that was found to fit."""
    largest = plan["largest_batch_size"]
    if not largest:
        return "No batch size was found that fits: use a device with more memory."
    needed = next(
        each["bytes_needed"] for each in plan["tried"] if each["batch_size"] == largest
    )
    text = (
        f"Largest global batch size that was compiled and fits: {largest} "
        f"({_size(needed)} per device)."
    )
    is_small = needed < (batches.TARGET - batches.TOLERANCE) * plan["memory"]
    if is_small and all(each["fits"] for each in plan["tried"]):
        text += " Larger batch sizes, which would also fit, were not tried."
    return text


def _size(amount: float | None) -> str:
    """Formats a number of bytes; unknown ones as '?'."""
    if amount is None:
        return "?"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if amount >= 0.1 * unit:
            return f"{amount / unit:.2f} {name}"
    return f"{amount / 2**10:.2f} KiB"


def _memory(program: dict[str, Any]) -> str:
    """Formats the memory that a program needs, and its share of the available memory."""
    needed = program["bytes_needed"]
    share = "" if needed is None else f" ({needed / program['bytes_available']:.0%})"
    return f"{_size(needed)}{share}"


def _number(program: dict[str, Any], name: str, unit: float = 1.0, suffix: str = "") -> str:
    """Formats a number of the plan in the given unit, or as '-' if the plan lacks it."""
    return f"{program[name] / unit:.4g}{suffix}" if name in program else "-"


def _communication(program: dict[str, Any]) -> list[str]:
    """Lists the loops and collectives of a program, as lines of Markdown."""
    if "collectives" not in program:
        return []
    lines = []
    for loop in program["loops"]:
        trips = "data-dependent" if loop["trips"] is None else loop["trips"]
        lines.append(f"- loop `{loop['name']}`: trip count {trips}{_times(loop['runs'])}")
    for each in program["collectives"]:
        where = f"in loop `{each['loop']}`" if each["loop"] else "outside loops"
        size = _size(each["size"])
        lines.append(
            f"- {each['kind']} `{each['name']}`: {size}, {where}{_times(each['runs'])}"
        )
    if not program["collectives"]:
        lines.append("- no collectives")
    return [f"Loops and collectives of the {program['program']}:", "", *lines]


def _times(runs: int) -> str:
    return f", {runs} times" if runs > 1 else ""
