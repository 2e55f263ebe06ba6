"""Counts of what a compiled program does, from its HLO text: bytes, kernels, loops, collectives."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Instructions that move no data: they name, group or pick buffers, or end what another instruction
# began.
_FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
_LOOP, _BRANCH = "while", "conditional"
# The attributes that name the computations that an instruction runs. Those of a fusion or a sum are
# not among them, because they are part of one kernel.
_CALLS = {
    "call": ("to_apply",),
    "async-start": ("calls",),
    _LOOP: ("condition", "body"),
    _BRANCH: ("branch_computations", "true_computation", "false_computation"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = {
    *("all-reduce", "all-gather", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all", "reduce-scatter"),
}
# Their asynchronous form returns its operands beside its results.
_RETURNS_OPERANDS = {"all-gather-start", "collective-permute-start"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    arguments: str  # what stands between the parentheses: the operands, or a parameter's number
    attributes: str


class Program(NamedTuple):
    computations: Mapping[str, list[Instruction]]
    entry: str


class Kernel(NamedTuple):
    name: str
    opcode: str
    read: int
    written: int


class Collective(NamedTuple):
    kind: str
    bytes: int


class Counts(NamedTuple):
    """What a program does once; a round of each loop, and every branch, counts in `loop_bytes`."""

    bytes: int
    kernels: int
    loops: int
    branches: int
    loop_bytes: int


def array_bytes(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple, given the text of its shape."""
    return sum(
        (_bits(dtype) * math.prod(int(n) for n in sizes.split(",") if n) + 7) // 8
        for dtype, sizes in _ARRAY.findall(shape)
    )


def parse(text: str) -> Program:
    """Return the computations of a module's text.

    Raises:
      ValueError: no entry computation is found.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            arguments, attributes = _split_arguments(found[4])
            operands = _NAME.findall(arguments)
            current.append(
                Instruction(found[1], found[2], found[3], operands, arguments, attributes)
            )
    if entry is None:
        raise ValueError("the text has no line that begins with ENTRY, so it is not HLO")
    return Program(computations, entry)


def count(text: str) -> Counts:
    """Return the counts of a program."""
    program = parse(text)
    once: list[Kernel] = []
    repeated: list[Kernel] = []
    opcodes: list[str] = []
    for instruction, shapes, in_loop in _executed(program, program.entry):
        opcodes.append(instruction.opcode)
        if kernel := _kernel(program, instruction, shapes):
            (repeated if in_loop else once).append(kernel)
    return Counts(
        sum(kernel.read + kernel.written for kernel in once),
        len(once),
        opcodes.count(_LOOP),
        opcodes.count(_BRANCH),
        sum(kernel.read + kernel.written for kernel in repeated),
    )


def collectives(text: str) -> list[Collective]:
    """Return every collective of a program, with the bytes of its result on a device."""
    return [
        Collective(kind, array_bytes(_result(instruction)))
        for computation in parse(text).computations.values()
        for instruction in computation
        if (kind := instruction.opcode.removesuffix("-start")) in _COLLECTIVES
    ]


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0  # a token has none


def _split_arguments(rest: str) -> tuple[str, str]:
    """Split what follows an opcode's parenthesis into arguments and attributes."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def _executed(
    program: Program, computation: str, in_loop: bool = False
) -> Iterator[tuple[Instruction, Mapping[str, str], bool]]:
    """Yield the instructions that run, the shapes around them, and whether they are in a loop."""
    instructions = program.computations[computation]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for instruction in instructions:
        yield instruction, shapes, in_loop
        is_control = instruction.opcode in (_LOOP, _BRANCH)
        for called in _called(instruction):
            yield from _executed(program, called, in_loop or is_control)


def _called(instruction: Instruction) -> list[str]:
    """Return the names of the computations that an instruction runs."""
    names = []
    for attribute in _CALLS.get(instruction.opcode, ()):
        value = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        if value:
            names += re.findall(r"[\w.\-]+", value[1])
    return names


def _kernel(program: Program, instruction: Instruction, shapes: Mapping[str, str]) -> Kernel | None:
    """Return what an instruction reads and writes, or None if it moves no data itself."""
    name, shape, opcode, operands, *_ = instruction
    if opcode in _FREE or opcode in _CALLS or opcode.endswith("-done"):
        return None
    sizes = [array_bytes(shapes.get(operand, "")) for operand in operands]
    written = array_bytes(shape)
    if opcode == "fusion":
        sizes = _read_by_fusion(program, instruction, sizes)
    elif opcode in _SLICES:
        sizes[0] = min(sizes[0], written)
    elif opcode == "custom-call" and shape.startswith("("):
        # Its workspace is not data.
        written = sum(array_bytes(one) for one in _elements(shape) if not one.startswith("u8["))
    elif opcode in _RETURNS_OPERANDS:
        written = array_bytes(_result(instruction))
    return Kernel(name, opcode, sum(sizes), written)


def _read_by_fusion(program: Program, fusion: Instruction, sizes: list[int]) -> list[int]:
    """Return the bytes that a fusion reads of each operand; of a sliced one, only the slices."""
    called = re.search(r"\bcalls=%?([\w.\-]+)", fusion.attributes)
    body = program.computations.get(called[1], []) if called else []
    parameters = {int(one.arguments): one.name for one in body if one.opcode == "parameter"}
    return [
        min(size, _used(body, parameters[place], size)) if place in parameters else size
        for place, size in enumerate(sizes)
    ]


def _used(body: list[Instruction], name: str, size: int) -> int:
    """Return how many of the `size` bytes of `name` the other instructions of a body use."""
    total = 0
    for user in body:
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += array_bytes(user.shape)
        elif user.opcode == "bitcast":
            total += _used(body, user.name, size)
        else:
            return size
    return total


def _result(instruction: Instruction) -> str:
    """Return the shape of a collective's results, without the operands that some return as well."""
    if instruction.opcode in _RETURNS_OPERANDS:
        return _elements(instruction.shape)[1]
    return instruction.shape


def _elements(shape: str) -> list[str]:
    """Return the shapes of a tuple's elements."""
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [re.sub(r"/\*.*?\*/", "", element).strip() for element in elements]
