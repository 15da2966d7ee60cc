"""Reports of programs on topologies: memory, FLOPs, network, expected time and bottleneck.

Importing this file imports no jax.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vllama_jax.aot.costs import Costs, LoopCost
from vllama_jax.aot.topologies import Topology
from vllama_jax.memory.chips import Chip

WIDTH = 80  # columns of the terminal
COLUMNS = 4  # programs side by side, so that a table has at most WIDTH
MIN_SHOWN_BYTES = 5 * 10**6
MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """The report of a program on a topology.

    Attributes:
        topology: Its name, as `parse_topology` returns it.
        program: "train_step", "prefill" or "decode".
        mesh: Sizes of the axes data, fsdp and tensor.
        rows: Rows of a chip at a time; for prefill and decode, of all chips.
        tokens: Padded length of a sequence or a prompt.
        compiled: Whether XLA compiled it; else the figures are estimates by arithmetic.
        fits: Whether it fits a chip's memory.
        hbm_bytes_per_chip: In all; what the compiler asked for if it does not fit.
        hbm_bytes: By kind.
        hbm_limit_bytes: What a chip has.
        flops_per_chip: That the program executes.
        model_flops_per_chip: Of the model by arithmetic, recomputed layers included (memory/flops.py).
        hbm_traffic_bytes: Read and written by a chip.
        collective_bytes: Bytes that arrive at a chip, by kind of collective.
        compute_ms, memory_ms, network_ms: Roofline times of the three, each if it alone bound.
        schedule_ms: By XLA's estimate in cycles, without the network; None where it gives none.
        step_ms: Expected time of a step, of a prefill, or of a decoded token.
        mfu: Model FLOPs over what the chip could do in that time.
        samples_per_second: On all chips; for decode, tokens.
        compile_seconds: On this machine.
        binds: "compute", "memory" or "network": the longest of the three; "capacity" if it does not fit.
        note: A sentence about this program.
    """

    topology: str
    program: str
    mesh: tuple[int, int, int]
    rows: int
    tokens: int
    compiled: bool
    fits: bool
    hbm_bytes_per_chip: int
    hbm_bytes: dict[str, int]
    hbm_limit_bytes: int
    flops_per_chip: float | None = None
    model_flops_per_chip: float | None = None
    hbm_traffic_bytes: float | None = None
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    compute_ms: float | None = None
    memory_ms: float | None = None
    network_ms: float | None = None
    schedule_ms: float | None = None
    step_ms: float | None = None
    mfu: float | None = None
    samples_per_second: float | None = None
    compile_seconds: float | None = None
    binds: str = "capacity"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `vllama compile --json` prints them."""
        fields = dataclasses.asdict(self)
        return fields | {"mesh": dict(zip(MESH_AXES, self.mesh, strict=True))}


def time_fields(costs: Costs, topology: Topology, model_flops: float, samples: float) -> dict[str, Any]:
    """Return the fields of a `ProgramReport` that follow from a program's costs.

    The expected time adds up the loops of the schedule. Within one, the longest of XLA's estimate, the HBM traffic and
    the network hides the others: XLA's estimate does not include weights that are copied to VMEM meanwhile. Collectives
    of one loop cannot hide behind another loop.

    Args:
        costs: Of one chip.
        topology: The chips.
        model_flops: Of one chip.
        samples: That the program computes, on all chips together.
    """
    chip = topology.chip
    compute, memory = costs.flops / chip.flops, costs.hbm_bytes / chip.hbm_bandwidth
    networks = [_network_seconds(loop, topology) for loop in costs.loops]
    network = sum(networks)
    if costs.cycles and chip.clock:
        schedules = [_schedule_seconds(loop, chip) for loop in costs.loops]
        traffic = [loop.hbm_bytes / chip.hbm_bandwidth for loop in costs.loops]
        schedule, step = sum(schedules), sum(map(max, schedules, networks, traffic))
    else:
        schedule, step = None, max(compute, memory, network)
    times = {"compute": compute, "memory": memory, "network": network}
    return {
        "flops_per_chip": costs.flops,
        "model_flops_per_chip": model_flops,
        "hbm_traffic_bytes": costs.hbm_bytes,
        "collective_bytes": {kind: count for kind, count in sorted(costs.collective_bytes.items()) if count},
        **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
        "schedule_ms": None if schedule is None else 1e3 * schedule,
        "step_ms": 1e3 * step,
        "mfu": model_flops / chip.flops / step if step else None,
        "samples_per_second": samples / step if step else None,
        "binds": max(times, key=lambda name: times[name]),
    }


def _schedule_seconds(loop: LoopCost, chip: Chip) -> float:
    """Compute the time of a loop without the network: XLA's estimate, and of kernels the roofline time."""
    kernels = max(loop.kernel_flops / chip.flops, loop.kernel_bytes / chip.hbm_bandwidth)
    return loop.cycles / chip.clock + kernels


def _network_seconds(loop: LoopCost, topology: Topology) -> float:
    """Compute the network time of a loop. Collectives of different groups are serialized, as they may share links."""
    return sum(size / topology.network_bandwidth(group) for group, size in loop.bytes_by_group.items())


def print_reports(reports: list[ProgramReport], console: Console) -> None:
    """Print a table for each topology, a column for each program."""
    for name in dict.fromkeys(report.topology for report in reports):
        chosen = [report for report in reports if report.topology == name]
        for start in range(0, len(chosen), COLUMNS):
            console.print(make_table(chosen[start : start + COLUMNS]))
    for note in dict.fromkeys(report.note for report in reports if report.note):
        console.print(textwrap.fill(note, WIDTH), markup=False)


def make_table(reports: list[ProgramReport]) -> Table:
    """Make a table of programs on one topology."""
    table = Table(box=None, pad_edge=False)
    table.add_column(reports[0].topology, no_wrap=True)
    for report in reports:
        table.add_column(report.program, justify="right", no_wrap=True)
    kinds = _large_kinds([report.hbm_bytes for report in reports])
    collectives = _large_kinds([report.collective_bytes for report in reports])
    rows = {
        "tokens": [f"{report.tokens:,}" for report in reports],
        "mesh (data, fsdp, tensor)": [",".join(map(str, report.mesh)) for report in reports],
        "rows": [f"{report.rows:,}" for report in reports],
        **{f"GB of {kind}": [_gigabytes(report.hbm_bytes.get(kind)) for report in reports] for kind in kinds},
        "GB on each chip": [_gigabytes(report.hbm_bytes_per_chip) for report in reports],
        f"fits {_gigabytes(reports[0].hbm_limit_bytes)} GB": ["yes" if report.fits else "no" for report in reports],
        "TFLOP of a chip": [_number(report.flops_per_chip, 1e12) for report in reports],
        **{f"GB {kind}": [_gigabytes(report.collective_bytes.get(kind)) for report in reports] for kind in collectives},
        "ms compute": [_number(report.compute_ms) for report in reports],
        "ms memory": [_number(report.memory_ms) for report in reports],
        "ms network": [_number(report.network_ms) for report in reports],
        "ms expected": [_number(report.step_ms) for report in reports],
        "binds": [report.binds for report in reports],
        "MFU": ["–" if report.mfu is None else f"{report.mfu:.0%}" for report in reports],
        "per second, all chips": [_number(report.samples_per_second) for report in reports],
        "s to compile": [_number(report.compile_seconds) for report in reports],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _large_kinds(columns: Sequence[Mapping[str, float]]) -> list[str]:
    """List the kinds that are large enough to show in any of the columns."""
    kinds = dict.fromkeys(kind for column in columns for kind in column)
    return [kind for kind in kinds if any(column.get(kind, 0) >= MIN_SHOWN_BYTES for column in columns)]


def _gigabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:,.2f}"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Format a number with three digits, or with all digits before the point."""
    if value is None:
        return "–"
    value /= unit
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}"
