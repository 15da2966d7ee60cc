"""Timing in interleaved rounds, and the files of figures that report.py turns into tables and plots.

Machines are shared and change their speed within minutes. Whatever is compared therefore alternates, and the ratio of
two times is the median over the rounds of the ratios within a round.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from random_weights import DTYPE

RESULTS = Path(__file__).with_name("results")
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
OURS, TORCH = "vllama_jax", "PyTorch"


def measure_best_seconds(run: Callable[[], object], repeats: int = 3, calls: int = 1) -> float:
    """Return the shortest time of a call, after one that compiles.

    Args:
        run: What is called.
        repeats: Number of measurements, of which the shortest counts.
        calls: Number of calls in each. With several, an accelerator starts one while Python dispatches the next.
    """
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def time_rounds(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time candidates that alternate. Each runs once before, to compile and to fill caches.

    Args:
        candidates: Functions by name. A function that returns a number has measured its seconds itself; the arrays that
            another returns are waited for.
        rounds: The number of times that each is measured.

    Returns:
        The seconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            result = run()
            if not isinstance(result, float):
                _wait(result)
                result = time.perf_counter() - start
            times[name] += [result] if number else []
    return times


def _wait(result: object) -> None:
    if type(result).__module__.partition(".")[0] != "torch":
        jax.block_until_ready(result)
    elif result.is_cuda:
        import torch

        torch.cuda.synchronize()


def compare(
    name: str, ours: Callable[[], object], others: Mapping[str, Callable[[], object]], rounds: int, **more: Any
) -> dict[str, Any]:
    """Compare this package with the fastest of other candidates, such as PyTorch eager and compiled.

    Args:
        name: The name of the row.
        ours: Runs this package.
        others: Run what it is compared with, by name. With several, the fastest in a trial counts.
        rounds: The number of rounds.
        **more: Other fields of the row, such as "floor", the seconds that the work takes at least.

    Returns:
        A row of the results: median seconds of both, and the median of the ratio of ours to the other's within a round.
        Below 1, ours is faster.
    """
    trial = {other: min(times) for other, times in time_rounds(others, 1).items()} if len(others) > 1 else {}
    best = min(trial, key=lambda other: trial[other]) if trial else next(iter(others))
    times = time_rounds({OURS: ours, best: others[best]}, rounds)
    seconds, other_seconds = (statistics.median(times[one]) for one in (OURS, best))
    ratio = statistics.median(one / two for one, two in zip(times[OURS], times[best], strict=True))
    print(f"{name}: {seconds:.4g} s, {best} {other_seconds:.4g} s, ratio {ratio:.2f}", flush=True)
    row = {"name": name, "seconds": seconds, "other": best, "other_seconds": other_seconds, "ratio": ratio}
    return {**row, "trial": trial, **more}


def describe_machine() -> dict[str, Any]:
    """Return the processor, the device, the number of threads of both sides, the load and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("jax", "torch", "transformers", "av", "torchcodec"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": THREADS,
        "device": device.device_kind if device.platform != "cpu" else None,
        "dtype": DTYPE,
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(folder: Path, area: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write the figures of an area to `folder`, with the machine. The load is that at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{area}{'' if jax.default_backend() == 'cpu' else '_' + jax.default_backend()}.json"
    file.write_text(json.dumps({"machine": describe_machine(), "rows": rows, **more}, indent=1) + "\n")
    print(f"written: {file}")


def parse_arguments(description: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Return the options that all scripts of compare.py share, `size`, `rounds` and `out`, and `more`."""
    default = "medium" if jax.default_backend() == "cpu" else "full"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "medium", "full"), default=default)
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the figures are written")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def measure_product_rate(width: int = 4096) -> float:
    """Return the FLOP/s of one large matrix product, with a square matrix of this width."""
    x = jnp.ones((width // 2, width), DTYPE)
    w = jnp.ones((width, width), DTYPE)
    product = jax.jit(lambda x, w: x @ w)
    return width**3 / measure_best_seconds(lambda: product(x, w))


def measure_bandwidth(size: int) -> float:
    """Return the bandwidth, in bytes per second, of a matrix-vector product with a matrix of `size` bytes."""
    rows = jnp.ones((max(size // jnp.dtype(DTYPE).itemsize // 4096, 1), 4096), DTYPE)
    vector = jnp.ones(4096, DTYPE)
    product = jax.jit(lambda a, v: a @ v)
    return rows.nbytes / measure_best_seconds(lambda: product(rows, vector), 5)


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print one value per line, or one object with --json."""
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:40}{value if isinstance(value, str) else f'{value:.4g}'}")
