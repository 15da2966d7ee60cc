"""Costs of a compiled program on one chip, from its HLO: FLOPs, HBM traffic, network bytes and estimated cycles.

XLA's own `cost_analysis` counts the body of a loop once, and most of a step is in loops over layers. Importing this
file imports no jax.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from vllama_jax.aot.hlo import Computation, Instruction, Module, Step

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_TRAFFIC = {  # these move nothing, or what they run is counted step by step
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "iota", "async-update"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class LoopCost:
    """Costs of one computation of the schedule: the entry computation or the body of a loop, over all its iterations.

    Attributes:
        name: The name of the computation.
        repeats: Number of iterations.
        cycles: XLA's estimate. It does not include kernels.
        bytes_by_group: Bytes of collectives, by the number of chips of a group.
        hbm_bytes: Read from HBM and written to it.
        kernel_flops: FLOPs that kernels declare.
        kernel_bytes: HBM bytes that kernels declare.
    """

    name: str
    repeats: int
    cycles: float = 0.0
    bytes_by_group: dict[int, float] = dataclasses.field(default_factory=dict)
    hbm_bytes: float = 0.0
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a program on one chip.

    Attributes:
        flops: Of dot products, convolutions and kernels that declare them.
        collective_bytes: Bytes that arrive at a chip, by kind of collective.
        loops: Costs by computation; a collective can overlap only with what is in the same one.
    """

    flops: float
    collective_bytes: dict[str, float]
    loops: tuple[LoopCost, ...]

    @property
    def hbm_bytes(self) -> float:
        """Bytes read from HBM and written to it by the instructions of the schedule."""
        return sum(loop.hbm_bytes for loop in self.loops)

    @property
    def cycles(self) -> float:
        """XLA's estimate; 0 where the backend gives none."""
        return sum(loop.cycles for loop in self.loops)

    def divide(self, count: int) -> "Costs":
        """Return the costs divided by `count`."""
        loops = tuple(
            dataclasses.replace(
                loop,
                cycles=loop.cycles / count,
                bytes_by_group={group: size / count for group, size in loop.bytes_by_group.items()},
                hbm_bytes=loop.hbm_bytes / count,
                kernel_flops=loop.kernel_flops / count,
                kernel_bytes=loop.kernel_bytes / count,
            )
            for loop in self.loops
        )
        kinds = {kind: size / count for kind, size in self.collective_bytes.items()}
        return Costs(self.flops / count, kinds, loops)


def analyze(module: Module, dynamic_trips: int = 1) -> Costs:
    """Add up the costs of all instructions that a program runs.

    Args:
        module: The program.
        dynamic_trips: Number of iterations of loops whose trip count depends on data.
    """
    flops = 0.0
    kinds: dict[str, float] = collections.defaultdict(float)
    loops: dict[str, LoopCost] = {}
    channels: set[str] = set()
    for step in module.walk(dynamic_trips):
        one, name = step.instruction, step.computation_name
        loop = loops.get(name, LoopCost(name, step.repeats))
        groups = dict(loop.bytes_by_group)
        for collective, computation in _collectives(module, one, step.computation):
            channel = collective.find(r"channel_id=(\d+)") or collective.name
            if channel not in channels:  # the start and the end of an asynchronous one are in fusions of their own
                channels.add(channel)
                count = step.repeats * wire_bytes(collective, computation)
                kinds[collective.opcode.removesuffix("-start")] += count
                group = group_size(collective)
                groups[group] = groups.get(group, 0.0) + count
        flops += step.repeats * _flops(module, one, step.computation)
        loops[name] = LoopCost(
            name,
            step.repeats,
            loop.cycles + step.repeats * float(one.find(r'"estimated_cycles":"(\d+)"') or 0),
            groups,
            loop.hbm_bytes + step.repeats * _traffic(module, step),
            loop.kernel_flops + step.repeats * _declared(one, "flops"),
            loop.kernel_bytes + step.repeats * _declared(one, "bytes_accessed"),
        )
    return Costs(flops, dict(kinds), tuple(loops.values()))


def _collectives(
    module: Module, instruction: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """Yield the instruction if it is a collective, and the collectives in the computations that it calls."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield instruction, computation
    if instruction.opcode in ("while", "conditional", "call"):
        return
    for name in instruction.called:
        inner = module.computations.get(name, {})
        for one in inner.values():
            yield from _collectives(module, one, inner)


def group_size(instruction: Instruction) -> int:
    """Return the number of devices in a group of a collective, from the three forms of `replica_groups`; 1 by default.

    `{{0,1},{2,3}}` lists groups, `[2,4]<=[8]` has 2 groups of 4, `mesh['a'=2,'b'=4]{'b'}` names axes of a mesh.
    """
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", instruction.attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return 1


def wire_bytes(instruction: Instruction, computation: Computation) -> float:
    """Compute the bytes that a chip receives with ring algorithms: each of n chips already has its shard of an array.

    An all-reduce is a reduce-scatter and an all-gather.
    """
    kind, chips = instruction.opcode.removesuffix("-start"), group_size(instruction)
    inputs = sum(computation[name].nbytes for name in instruction.operands if name in computation)
    outputs = instruction.nbytes - (inputs if instruction.opcode.endswith("-start") and kind == "all-gather" else 0)
    share = (chips - 1) / chips
    if kind == "collective-permute":
        return inputs
    if kind == "all-gather":
        return outputs * share
    return (2 if kind == "all-reduce" else 1) * inputs * share


def _flops(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Count the FLOPs of an instruction: of products, also in fusions, and of kernels that declare them."""
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0].shape
        contracted = instruction.find(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        sizes = [left[int(place)] for place in contracted.split(",") if place]
        return 2.0 * instruction.arrays[0].size * math.prod(sizes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call":
        return _declared(instruction, "flops")
    if instruction.opcode in ("while", "conditional", "call", "reduce"):
        return 0.0
    inner = (module.computations.get(name, {}) for name in instruction.called)
    return sum(_flops(module, one, names) for names in inner for one in names.values())


def _declared(instruction: Instruction, kind: str) -> float:
    """Return a cost that a kernel declares (`pallas_call(cost_estimate=…)`); 0 for other instructions."""
    if instruction.opcode != "custom-call":
        return 0.0
    return float(instruction.find(rf'"cost_estimate":\{{[^}}]*"{kind}":"(\d+)"') or 0)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Count the FLOPs of a convolution, as which XLA for TPUs writes most matrix products.

    Only taps of the window on real elements count, not those on padding or between dilated ones.
    """
    left, right = (computation[name].arrays[0].shape for name in instruction.operands[:2])
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()  # type: ignore[union-attr]
    window = dict(part.split("=", 1) for part in (instruction.find(r"window=\{([^}]*)\}") or "").split() if "=" in part)
    result = instruction.arrays[0]
    total = 2.0 * result.size * right[kernel.index("i")]
    for place, size in enumerate(map(int, filter(None, window.get("size", "").split("x")))):

        def option(name: str, default: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else default

        outputs = result.shape[output.index(str(place))]
        taps = _valid_taps(
            inputs=left[inputs.index(str(place))],
            outputs=outputs,
            size=size,
            stride=int(option("stride", "1")),
            padding=int(option("pad", "0_0").split("_")[0]),
            dilation=(int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))),
        )
        total *= taps / outputs
    return total


@functools.lru_cache(maxsize=4096)
def _valid_taps(*, inputs: int, outputs: int, size: int, stride: int, padding: int, dilation: tuple[int, int]) -> int:
    """Count the pairs of an output and a window tap that read an element of the input, along one dimension."""
    of_input, of_window = dilation
    last = (inputs - 1) * of_input
    places = (out * stride + tap * of_window - padding for out in range(outputs) for tap in range(size))
    return sum(0 <= place <= last and place % of_input == 0 for place in places)


def _traffic(module: Module, step: Step) -> float:
    """Count the HBM bytes that an instruction reads and writes when it runs once."""
    one = step.instruction
    if one.opcode in _NO_TRAFFIC or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode.endswith("-start") and one.opcode.removesuffix("-start") not in COLLECTIVES:
        moved = [array.nbytes for array in one.arrays if array.shape]
        return min(moved, default=0.0)  # copied between HBM and VMEM: one side of it is in HBM
    return _read(module, step) + _written(module, one, step.computation)


def _read(module: Module, step: Step) -> float:
    """Count the HBM bytes that an instruction reads. Of operands that are only sliced, the slices count."""
    one, total = step.instruction, 0.0
    body = module.computations.get(one.called[0], {}) if one.opcode == "fusion" and one.called else {}
    parameters = {int(inner.arguments): name for name, inner in body.items() if inner.opcode == "parameter"}
    for place, name in enumerate(one.operands):
        operand = step.computation.get(name)
        full = operand.hbm_bytes if operand is not None else 0.0
        if body and place in parameters and full:
            used, is_result = _used(module, body, parameters[place], full)
            full = full if is_result else min(full, used)
        elif place == 0 and one.opcode in _SLICES:
            full = min(full, one.nbytes)
        elif place == 0 and one.opcode == "dynamic-update-slice":
            full = 0.0
        total += full
    return total


def _used(module: Module, body: Computation, parameter: str, full: float) -> tuple[float, bool]:
    """Count the bytes of a fusion's parameter that its instructions use, and return whether it is also the result."""
    total, names, is_result = 0.0, [parameter], False
    while names:
        name = names.pop()
        is_result |= body[name].is_root
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape", "transpose") and user.nbytes == full:
                names.append(user.name)
            elif user.opcode in _SLICES:
                total += user.nbytes
            elif user.opcode == "fusion":
                inner = module.computations[user.called[0]]
                place = str(user.operands.index(name))
                found = (one.name for one in inner.values() if one.opcode == "parameter" and one.arguments == place)
                used, passed_on = _used(module, inner, next(found), full)
                total += used
                names += [user.name] * passed_on
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                total += full
    return min(total, full), is_result


def _written(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Count the HBM bytes that an instruction writes. Of an update in place, only the slice counts."""
    root, names = instruction, computation
    if instruction.opcode == "fusion" and instruction.called:
        names = module.computations.get(instruction.called[0], {})
        root = next((one for one in names.values() if one.is_root), instruction)
    if root.opcode == "dynamic-update-slice" and instruction.hbm_bytes:
        update = names.get(root.operands[1])
        return min(instruction.hbm_bytes, update.nbytes if update is not None else math.inf)
    return instruction.hbm_bytes
