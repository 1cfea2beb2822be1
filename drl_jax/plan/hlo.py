"""What a compiled program says of itself: XLA's optimised HLO, read as text.

A module is computations, each a list of instructions; `walk` follows the calls from the entry
and multiplies loops out, so that a sum over it is one of a whole run of the program. What XLA's
text is: https://openxla.org/xla/operation_semantics.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Instructions that give what they are given.
_COPIES = ("copy", "copy-start", "copy-done", "convert", "bitcast", "opt-barrier")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in the module.
      shape: of its result, as in `f32[8,3]{1,0}`; of a tuple `(f32[8], s32[])`.
      opcode: what it does, such as `fusion`.
      operands: the names of what it is given, or a literal, or the number of a parameter.
      attributes: what else the line says.
      is_root: whether this is its computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=VALUE` (a word), if it has one."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: instructions by their names, of every computation by its name.
      entry: the name of the computation that the program is.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Visit(NamedTuple):
    """An instruction and how often a run of the program comes by.

    Attributes:
      instruction: that is run.
      computation: that it is in.
      runs: how often: the product of the trip counts of all loops around it.
      loop: name of the innermost loop around it; '' outside of loops.
      is_fused: whether it is inside a fusion, whose cycles are told of the whole.
    """

    instruction: Instruction
    computation: dict[str, Instruction]
    runs: int
    loop: str
    is_fused: bool


class Collective(NamedTuple):
    """Communication between devices.

    Attributes:
      kind: one of COLLECTIVES.
      name: of the instruction.
      size: of what each device gives or gets, whichever is more [bytes].
      runs: how often in a run of the program.
      loop: name of the innermost loop around it; '' outside of loops.
    """

    kind: str
    name: str
    size: int
    runs: int
    loop: str


class Loop(NamedTuple):
    """A while-loop.

    Attributes:
      name: of the instruction.
      trips: how often its body runs each time; None if the program's data decide.
      runs: how often in a run of the program the loop is come by.
    """

    name: str
    trips: int | None
    runs: int


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
            instructions = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = _instruction(line)
            instructions[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    """Reads `[ROOT ]%name = shape opcode(operands), attributes`."""
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    # An operand may be written with its shape: the name is its last word.
    operands = tuple(word.split()[-1].lstrip("%") for word in _split(rest[1:end]))
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"),
        shape,
        opcode,
        operands,
        rest[end + 1 :],
        left.startswith("ROOT "),
    )


def _closing(text: str) -> int:
    """Returns where the parenthesis is closed that the text starts with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no end of {text[:60]!r}")


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[{)\]},]", text):
        if match[0] == ",":
            if not depth:
                parts.append(text[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "([{" else -1
    return [part for part in (*parts, text[start:]) if part.strip()]


def walk(module: Module, unknown: int = 1) -> Iterator[Visit]:
    """Yields every instruction of a run, and those inside fusions.

    All branches of a conditional count, as if each were taken.

    Args:
      module: the program.
      unknown: trip count of the loops for which the program's data decide it.
    """

    def visit(name: str, runs: int, loop: str, is_fused: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield Visit(instruction, computation, runs, loop, is_fused)
            opcode = instruction.opcode
            if opcode == "while":
                trips = trip_count(module, instruction, computation)
                each = runs * (unknown if trips is None else trips)
                for part in ("condition", "body"):
                    called = instruction.attribute(part)
                    assert called
                    yield from visit(called, each, instruction.name, is_fused)
            elif opcode in ("fusion", "call", "async-start", "conditional"):
                for called in _called(instruction):
                    yield from visit(called, runs, loop, is_fused or opcode == "fusion")

    yield from visit(module.entry, 1, "", False)


def _called(instruction: Instruction) -> list[str]:
    """Returns the computations that a call, a fusion or a conditional runs."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
        return [name.strip().lstrip("%") for name in branches[1].split(",")]
    parts = ("calls", "to_apply", "true_computation", "false_computation")
    return [name for part in parts if (name := instruction.attribute(part))]


def trip_count(
    module: Module, loop: Instruction, computation: dict[str, Instruction]
) -> int | None:
    """Returns how often a while-loop's body runs, or None if that is not in the program.

    XLA:CPU and XLA:GPU write it down. XLA:TPU does not: there it follows from the condition,
    a counter against its bound, the counter's start and its step.

    Args:
      module: the program.
      loop: the while-instruction.
      computation: that it is in.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        module.computations[loop.attribute(part) or ""] for part in ("condition", "body")
    )
    start = _source(loop.operands[0], computation)
    state = start.operands if start and start.opcode == "tuple" else ()

    test, scope = _unfused(module, _root(condition), condition)

    def at_first(name: str) -> int | None:
        """Returns the number that an instruction of the condition is on the first trip."""
        place = _place(name, scope)
        if place is None:
            return _number(name, scope)
        return _number(state[place], computation) if state else None

    operands, direction = test.operands, test.attribute("direction")
    if direction in ("GT", "GE"):
        operands, direction = operands[::-1], {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE"):
        return None
    counter, bound = operands
    first, last, place = at_first(counter), at_first(bound), _place(counter, scope)
    step = None if place is None else _step(module, body, place)
    if first is None or last is None or not step or step < 0:
        return None
    return max(0, -(-(last - first + (direction == "LE")) // step))


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(each for each in computation.values() if each.is_root)


def _source(name: str, computation: dict[str, Instruction]) -> Instruction | None:
    """Returns the instruction that a value comes from, through copies."""
    instruction = computation.get(name)
    while instruction and instruction.opcode in _COPIES:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _number(name: str, computation: dict[str, Instruction]) -> int | None:
    """Returns the whole number that an instruction is, if it is a constant one."""
    source = _source(name, computation)
    if source is None or source.opcode != "constant":
        return None
    return int(source.operands[0]) if re.fullmatch(r"-?\d+", source.operands[0]) else None


def _place(name: str, computation: dict[str, Instruction]) -> int | None:
    """Returns which element of a loop's state an instruction is, if it is one."""
    source = _source(name, computation)
    if source is None or source.opcode != "get-tuple-element":
        return None
    return int(source.attribute("index") or 0)


def _unfused(
    module: Module, instruction: Instruction, computation: dict[str, Instruction]
) -> tuple[Instruction, dict[str, Instruction]]:
    """Returns what a fusion results in, or the instruction itself, and all that it may name."""
    if instruction.opcode != "fusion":
        return instruction, computation
    inside = module.computations[instruction.attribute("calls") or ""]
    root = _root(inside)
    operands = []
    for name in root.operands:
        source = _source(name, inside)
        if source and source.opcode == "parameter":
            name = instruction.operands[int(source.operands[0])]
        operands.append(name)
    return root._replace(operands=tuple(operands)), computation | inside


def _step(module: Module, body: dict[str, Instruction], place: int) -> int | None:
    """Returns what a trip adds to the counter at this place of the loop's state."""
    root = _root(body)
    update = _source(root.operands[place], body) if root.opcode == "tuple" else None
    if update is None:
        return None
    update, scope = _unfused(module, update, body)
    numbers = [_number(name, scope) for name in update.operands]
    steps = [number for number in numbers if number is not None]
    return steps[0] if update.opcode == "add" and len(steps) == 1 else None


def loops(module: Module, unknown: int = 1) -> list[Loop]:
    """Returns the loops of a run, those inside of others after them (see `walk`)."""
    return [
        Loop(each.name, trip_count(module, each, computation), runs)
        for each, computation, runs, _, _ in walk(module, unknown)
        if each.opcode == "while"
    ]


def cycles(module: Module, unknown: int = 1) -> int | None:
    """Returns XLA:TPU's estimate of a run [clock cycles]; None where there is none.

    It has no time for collectives, nor for copies that run beside the arithmetic.
    """
    total = None
    for instruction, _, runs, _, is_fused in walk(module, unknown):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if estimate and not is_fused:
            total = (total or 0) + runs * int(estimate[1])
    return total


def collectives(module: Module, unknown: int = 1) -> list[Collective]:
    """Returns the collectives of a run; one that is started and awaited counts once."""
    found = []
    for instruction, computation, runs, loop, _ in walk(module, unknown):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            given = sum(size(computation[name].shape) for name in instruction.operands)
            got = size(instruction.shape)
            if kind != instruction.opcode and kind != "all-reduce":  # (given, got, context)
                got -= given
            found.append(Collective(kind, instruction.name, max(given, got), runs, loop))
    return found


def size(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple, without padding.

    The scalars `u32[]` that asynchronous instructions carry do not count.
    """
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
        if dtype == "u32" and not dimensions:
            continue
        total += math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
    return total
