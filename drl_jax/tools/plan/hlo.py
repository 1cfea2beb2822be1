"""Reads XLA's optimised HLO text: loops, collectives and estimated cycles of a program.

An HLO module consists of computations, each of which is a list of instructions. `walk` follows
the calls from the entry computation and counts how often each instruction runs, so that sums
over its results are totals for one execution of the program. The operations are described at
https://openxla.org/xla/operation_semantics.
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

# Instructions that forward the value of their operand.
_FORWARDING = ("copy", "copy-start", "copy-done", "convert", "bitcast", "opt-barrier")


class Instruction(NamedTuple):
    """An instruction, which is one line of a computation.

    Attributes:
      name: name, unique in the module.
      shape: shape of the result, such as `f32[8,3]{1,0}`, or `(f32[8], s32[])` for a tuple.
      opcode: the operation, such as `fusion`.
      operands: names of the operands; for a constant, its literal; for a parameter, its number.
      attributes: the rest of the line.
      is_root: whether it is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns VALUE, which must be one word, of the attribute `name=VALUE`, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: for the name of each computation, its instructions by name.
      entry: name of the computation that the program starts with.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Visit(NamedTuple):
    """An instruction, and how often it runs in one execution of the program.

    Attributes:
      instruction: the instruction.
      computation: the computation that contains it.
      runs: number of executions: the product of the trip counts of all enclosing loops.
      loop: name of the innermost enclosing loop; '' outside loops.
      is_fused: whether it is part of a fusion. XLA estimates cycles for the whole fusion.
    """

    instruction: Instruction
    computation: dict[str, Instruction]
    runs: int
    loop: str
    is_fused: bool


class Collective(NamedTuple):
    """A collective operation: communication between devices.

    Attributes:
      kind: one of COLLECTIVES.
      name: name of the instruction.
      size: size per device of its operands or of its result, whichever is larger [bytes].
      runs: number of executions per execution of the program.
      loop: name of the innermost enclosing loop; '' outside loops.
    """

    kind: str
    name: str
    size: int
    runs: int
    loop: str


class Loop(NamedTuple):
    """A while-loop.

    Attributes:
      name: name of the instruction.
      trips: trip count; None if it depends on the program's data.
      runs: number of executions of the loop per execution of the program.
    """

    name: str
    trips: int | None
    runs: int


def parse(text: str) -> Module:
    """Parses the text of an optimised module, as `jax.stages.Compiled.as_text` returns it."""
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
    """Parses `[ROOT ]%name = shape opcode(operands), attributes`."""
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    # An operand may be preceded by its shape: its name is the last word.
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
    """Returns the index of the parenthesis that closes the one at the start of the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"no closing parenthesis in HLO text {text[:60]!r}")


def _split(text: str) -> list[str]:
    """Splits a list at the commas that are outside brackets."""
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


def walk(module: Module, unknown_trips: int = 1) -> Iterator[Visit]:
    """Yields every instruction that one execution runs, including those inside fusions.

    All branches of a conditional are counted as if each were taken.

    Args:
      module: the program.
      unknown_trips: trip count assumed for loops whose trip count depends on data.
    """

    def visit(name: str, runs: int, loop: str, is_fused: bool) -> Iterator[Visit]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield Visit(instruction, computation, runs, loop, is_fused)
            opcode = instruction.opcode
            if opcode == "while":
                trips = trip_count(module, instruction, computation)
                each = runs * (unknown_trips if trips is None else trips)
                for part in ("condition", "body"):
                    called = instruction.attribute(part)
                    assert called
                    yield from visit(called, each, instruction.name, is_fused)
            elif opcode in ("fusion", "call", "async-start", "conditional"):
                for called in _called(instruction):
                    yield from visit(called, runs, loop, is_fused or opcode == "fusion")

    yield from visit(module.entry, 1, "", False)


def _called(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that a call, fusion or conditional executes."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
        return [name.strip().lstrip("%") for name in branches[1].split(",")]
    parts = ("calls", "to_apply", "true_computation", "false_computation")
    return [name for part in parts if (name := instruction.attribute(part))]


def trip_count(
    module: Module, loop: Instruction, computation: dict[str, Instruction]
) -> int | None:
    """Returns the trip count of a while loop, or None if it is not a constant of the program.

    XLA:CPU and XLA:GPU annotate loops with their trip count. XLA:TPU does not, so it is derived
    from the loop's condition, which compares a counter with a bound, and from the counter's
    initial value and increment.

    Args:
      module: the program.
      loop: the instruction `while`.
      computation: the computation that contains it.
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

    def initial(name: str) -> int | None:
        """Returns the value of an instruction of the condition before the first trip."""
        index = _state_index(name, scope)
        if index is None:
            return _constant(name, scope)
        return _constant(state[index], computation) if state else None

    operands, direction = test.operands, test.attribute("direction")
    if direction in ("GT", "GE"):
        operands, direction = operands[::-1], {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE"):
        return None
    counter, bound = operands
    first, last, index = initial(counter), initial(bound), _state_index(counter, scope)
    step = None if index is None else _increment(module, body, index)
    if first is None or last is None or not step or step < 0:
        return None
    return max(0, -(-(last - first + (direction == "LE")) // step))


def _root(computation: dict[str, Instruction]) -> Instruction:
    """Returns the instruction whose result is that of the computation."""
    return next(each for each in computation.values() if each.is_root)


def _source(name: str, computation: dict[str, Instruction]) -> Instruction | None:
    """Returns the instruction that computes a value, skipping those that only forward it."""
    instruction = computation.get(name)
    while instruction and instruction.opcode in _FORWARDING:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(name: str, computation: dict[str, Instruction]) -> int | None:
    """Returns the value of an integer constant, or None for any other instruction."""
    source = _source(name, computation)
    if source is None or source.opcode != "constant":
        return None
    return int(source.operands[0]) if re.fullmatch(r"-?\d+", source.operands[0]) else None


def _state_index(name: str, computation: dict[str, Instruction]) -> int | None:
    """Returns the index of a value in the tuple of the loop's state, or None if not in it."""
    source = _source(name, computation)
    if source is None or source.opcode != "get-tuple-element":
        return None
    return int(source.attribute("index") or 0)


def _unfused(
    module: Module, instruction: Instruction, computation: dict[str, Instruction]
) -> tuple[Instruction, dict[str, Instruction]]:
    """Returns the root of a fusion, or the instruction itself if it is not a fusion.

    The second result contains, by name, the instructions that may be its operands.
    """
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


def _increment(module: Module, body: dict[str, Instruction], index: int) -> int | None:
    """Returns the constant that each trip adds to the counter at this index of the state."""
    root = _root(body)
    update = _source(root.operands[index], body) if root.opcode == "tuple" else None
    if update is None:
        return None
    update, scope = _unfused(module, update, body)
    values = [_constant(name, scope) for name in update.operands]
    constants = [value for value in values if value is not None]
    return constants[0] if update.opcode == "add" and len(constants) == 1 else None


def loops(module: Module, unknown_trips: int = 1) -> list[Loop]:
    """Returns all loops; nested loops follow those that contain them.

    The arguments are those of `walk`.
    """
    return [
        Loop(each.name, trip_count(module, each, computation), runs)
        for each, computation, runs, _, _ in walk(module, unknown_trips)
        if each.opcode == "while"
    ]


def cycles(module: Module, unknown_trips: int = 1) -> int | None:
    """Returns XLA:TPU's estimate of the clock cycles of one execution; None without one.

    The estimate excludes collectives, and copies that overlap with arithmetic. The arguments
    are those of `walk`.
    """
    total = None
    for instruction, _, runs, _, is_fused in walk(module, unknown_trips):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if estimate and not is_fused:
            total = (total or 0) + runs * int(estimate[1])
    return total


def collectives(module: Module, unknown_trips: int = 1) -> list[Collective]:
    """Returns all collectives. The start and the end of an asynchronous one count as one.

    The arguments are those of `walk`.
    """
    found = []
    for instruction, computation, runs, loop, _ in walk(module, unknown_trips):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = sum(size(computation[name].shape) for name in instruction.operands)
            result = size(instruction.shape)
            if kind != instruction.opcode and kind != "all-reduce":
                result -= operands  # its shape is the tuple (operands, result, context)
            found.append(Collective(kind, instruction.name, max(operands, result), runs, loop))
    return found


def size(shape: str) -> int:
    """Returns the size of an array, or of all arrays of a tuple, without padding [bytes].

    Scalars of type u32 are ignored, because they are contexts of asynchronous instructions.
    """
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
        if dtype == "u32" and not dimensions:
            continue
        total += math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
    return total
