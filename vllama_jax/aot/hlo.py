"""Parser of scheduled HLO text, as `compiled.as_text()` returns it: computations, instructions and loops.

Only what `costs.py` needs is parsed; an instruction's attributes stay text. Importing this file imports no jax.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEMSIZES = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{\s*$")
_MEMORY_SPACE = re.compile(r"S\(\d+\)")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """The type of an array.

    Attributes:
        dtype: As HLO names it.
        shape: The sizes of its dimensions.
        in_hbm: False for an array in another memory of the chip, such as VMEM, `S(1)`.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        return ITEMSIZES[self.dtype] * self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction: `name = type opcode(arguments), attributes`.

    Attributes:
        arrays: Of its type, a tuple flattened.
        operands: Names of instructions of the same computation.
    """

    name: str
    arrays: tuple[ArrayType, ...]
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def find(self, pattern: str) -> str | None:
        """Search the attributes for a pattern and return its first group."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, except for those of loops and conditionals."""
        single = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", self.attributes)
        groups = re.findall(r"called_computations=\{([^}]*)\}", self.attributes)
        return (*single, *(name for group in groups for name in re.findall(r"[\w.-]+", group)))

    @property
    def nbytes(self) -> float:
        """Bytes of all its arrays, in any memory."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> float:
        """Bytes of its arrays in HBM."""
        return sum(array.nbytes for array in self.arrays if array.in_hbm)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module.

    Attributes:
        computations: Computations by name. Their instructions are in the order of the schedule.
        entry: The name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str

    def walk(self, dynamic_trips: int = 1) -> "Iterator[Step]":
        """Yield the instructions in order. Those in loops are yielded once, with the number of iterations.

        Args:
            dynamic_trips: Number of iterations of loops whose trip count depends on data.
        """
        yield from self._walk(self.entry, 1, dynamic_trips)

    def _walk(self, name: str, repeats: int, dynamic_trips: int) -> "Iterator[Step]":
        computation = self.computations[name]
        for instruction in computation.values():
            yield Step(instruction, computation, name, repeats)
            for inner, count in self._calls(instruction, computation):
                yield from self._walk(inner, repeats * (count or dynamic_trips), dynamic_trips)

    def _calls(self, instruction: Instruction, computation: Computation) -> list[tuple[str, int | None]]:
        """List the computations that a loop, conditional or call runs, with the number of times that each runs."""
        if instruction.opcode == "while":
            return [(self.body(instruction), self.trip_count(instruction, computation))]
        if instruction.opcode == "conditional":
            branches = instruction.find(r"branch_computations=\{([^}]*)\}") or ""
            pair = [instruction.find(rf"{side}_computation=%?([\w.-]+)") for side in ("true", "false")]
            return [(name, 1) for name in re.findall(r"[\w.-]+", branches) + pair if name]
        return [(name, 1) for name in instruction.called] if instruction.opcode == "call" else []

    def body(self, loop: Instruction) -> str:
        """Return the name of a loop's body."""
        return loop.find(r"body=%?([\w.-]+)") or ""

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """Return the number of iterations of a loop; None if it depends on data, as in decoding.

        XLA records it or it follows from the condition (counter < constant) and the counter's start and step: 0 and 1
        in JAX's scans, 2 in windowed einsum, whose body XLA has unrolled once.
        """
        if known := loop.find(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[loop.find(r"condition=%?([\w.-]+)") or ""]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        compared = self._through_fusion(root)
        limits = [limit for name in root.operands if (limit := integer_constant(condition.get(name))) is not None]
        index = self._counter_index(root, condition)
        if compared is None or compared.opcode != "compare" or len(limits) != 1 or index is None:
            return None
        start, step = self._counter_start(loop, computation, index), self._counter_step(loop, index)
        including = compared.find(r"direction=(\w+)") in ("LE", "GE")
        return max(-(-(limits[0] + including - start) // step), 1)

    def _through_fusion(self, instruction: Instruction) -> Instruction | None:
        """Return the root instruction of the computation that a fusion or call wraps, or the instruction itself."""
        if instruction.opcode not in ("fusion", "call"):
            return instruction
        inner = self.computations[instruction.called[0]]
        return next((found for found in inner.values() if found.is_root), None)

    def _counter_index(self, root: Instruction, condition: Computation) -> int | None:
        """Return the index of the counter in the tuple that a loop carries."""
        reads = [condition[name] for name in root.operands if condition[name].opcode == "get-tuple-element"]
        index = reads[0].find(r"index=(\d+)") if len(reads) == 1 else None
        return None if index is None else int(index)

    def _counter_start(self, loop: Instruction, computation: Computation, index: int) -> int:
        carried = computation.get(loop.operands[0])
        while carried is not None and carried.opcode in ("copy", "bitcast"):
            carried = computation.get(carried.operands[0])
        if carried is None or carried.opcode != "tuple":
            return 0
        start = computation.get(carried.operands[index])
        while start is not None and start.opcode in ("copy", "bitcast"):
            start = computation.get(start.operands[0])
        return integer_constant(start) or 0

    def _counter_step(self, loop: Instruction, index: int) -> int:
        """Return the number that the body adds to the counter; 1 if it cannot be determined."""
        body = self.computations[self.body(loop)]
        root = next(instruction for instruction in body.values() if instruction.is_root)
        step, counter = 0, body.get(root.operands[index]) if root.opcode == "tuple" else None
        while counter is not None and counter.opcode in ("add", "copy", "bitcast", "fusion"):
            constants = [integer_constant(body.get(name)) for name in counter.operands]
            added = next((number for number in constants if number is not None), 0)
            if counter.opcode == "fusion":
                inner = self._through_fusion(counter)
                if inner is None or inner.opcode != "add":
                    break
                names = self.computations[counter.called[0]]
                inside = [integer_constant(names.get(name)) for name in inner.operands]
                added = added or next((number for number in inside if number is not None), 0)
            step += added
            variables = [name for name in counter.operands if integer_constant(body.get(name)) is None]
            counter = body.get(variables[0]) if len(variables) == 1 else None
        return max(step, 1)


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction, its computation, and the number of times that it runs."""

    instruction: Instruction
    computation: Computation
    computation_name: str
    repeats: int


def integer_constant(instruction: Instruction | None) -> int | None:
    """Return the value of a scalar integer constant; None for other instructions."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def parse_hlo(text: str) -> Module:
    """Parse an HLO module.

    Raises:
        ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            found = None if line.startswith((" ", "HloModule")) else _COMPUTATION.match(line)
            if found:
                current = computations[found[2]] = {}
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(found[2], found[3], is_root=bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    return Module(computations, entry)


def parse_arrays(text: str) -> tuple[ArrayType, ...]:
    """Parse the arrays of a type: "(f32[8]{0}, bf16[2,4]{1,0:T(8,128)S(1)})"."""
    return tuple(
        ArrayType(dtype, tuple(map(int, filter(None, sides.split(",")))), not _MEMORY_SPACE.search(layout or ""))
        for dtype, sides, layout in _ARRAY.findall(text)
        if dtype in ITEMSIZES
    )


def _parse_instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _matching_parenthesis(text) if text.startswith("(") else text.index(" ")
    types, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _matching_parenthesis("(" + rest) - 2
    arguments = rest[:close]
    operands = tuple(re.findall(r"%([\w.-]+)", arguments))
    return Instruction(name, parse_arrays(types), opcode, arguments, operands, rest[close + 1 :], is_root)


def _matching_parenthesis(text: str) -> int:
    """Return the index after the parenthesis that closes the first one of a text."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)
