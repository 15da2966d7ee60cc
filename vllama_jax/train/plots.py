"""Read the metrics of run directories and plot them."""

import collections
import math
from pathlib import Path
from typing import Any

from vllama_jax.errors import DataError
from vllama_jax.io.json_files import parse_object
from vllama_jax.train.smoothing import default_smoothing, smooth

REQUIRED_FIELDS = ("step", "loss")
NO_LEARNING_RATE = math.nan  # the learning rate of a custom optimizer may be unknown


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run directory.

    Args:
        run: The run directory.

    Returns:
        The metrics of each step, with "step" and "loss" at least.

    Raises:
        DataError: The file is missing or corrupt, or no step has been done yet.
    """
    path = run / "metrics.jsonl"
    steps = read_journal(path)
    for number, line in enumerate(steps, 1):
        values = [*(line.get(name) for name in REQUIRED_FIELDS), line.get("lr", NO_LEARNING_RATE)]
        if not all(isinstance(value, int | float) for value in values):
            raise DataError(
                f"{path}, line {number}: not the metrics of a step ({', '.join(REQUIRED_FIELDS)} must be numbers)"
            )
    return steps


def read_journal(path: Path, *, needed: bool = True) -> list[dict[str, Any]]:
    """Read a JSON lines file of a run, without a last line that is still being written.

    Args:
        path: metrics.jsonl or samples.jsonl of a run directory.
        needed: Raise DataError if the file is missing or has no complete line. Otherwise return [].

    Returns:
        The object of each line.

    Raises:
        DataError: A line is not a JSON object, or see `needed`.
    """
    if not path.is_file():
        if needed:
            raise DataError(f"{path}: no such file; give a run directory with at least one step")
        return []
    lines = path.read_bytes().decode(errors="replace").rpartition("\n")[0].splitlines()
    if needed and not lines:
        raise DataError(f"{path}: no step has been done yet; wait for the first")
    return [parse_object(line, f"{path}, line {number}", DataError) for number, line in enumerate(lines, 1)]


def plot_metrics(metrics: dict[Path, list[dict[str, Any]]], smoothing: float | None) -> Any:
    """Plot the training loss, its moving average, the validation loss and the learning rate of runs.

    Args:
        metrics: The metrics of each run, by run directory. samples.jsonl is read from the directory.
        smoothing: The weight of the previous average in the moving average, from 0 (no smoothing) to below 1. None
            chooses it by the number of steps (`default_smoothing`).

    Returns:
        A `matplotlib.figure.Figure`.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (run, steps) in enumerate(metrics.items()):
        name, color = _run_names(metrics)[run], f"C{number}"
        numbers, losses = ([line[key] for line in steps] for key in ("step", "loss"))
        weight = default_smoothing(len(steps)) if smoothing is None else smoothing
        loss.plot(numbers, losses, color=color, alpha=0.25, linewidth=0.8)
        mean = "each step" if weight == 0 else f"average over about {1 / (1 - weight):.0f} steps"
        loss.plot(numbers, smooth(losses, weight), color=color, label=f"{name} ({mean})")
        validations = [
            line
            for line in read_journal(run / "samples.jsonl", needed=False)
            if {"step", "validation_loss"} <= line.keys()
        ]
        if validations:
            validated, values = ([line[key] for line in validations] for key in ("step", "validation_loss"))
            loss.plot(validated, values, "o--", color=color, markersize=4, label=f"{name} (validation)")
        rate.plot(numbers, [line.get("lr", NO_LEARNING_RATE) for line in steps], color=color)
    last = next(iter(metrics.values()))[-1]
    title = f"{next(iter(_run_names(metrics).values()))}: training loss, {last['step']} steps"
    figure.suptitle(title if len(metrics) == 1 else f"Training loss of {len(metrics)} runs")
    loss.set_ylabel("loss")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.grid(alpha=0.3)
    return figure


def _run_names(runs: dict[Path, Any]) -> dict[Path, str]:
    """Return labels of runs: the names of their directories, or the paths where two names are equal."""
    names = {run: run.absolute().name for run in runs}
    count = collections.Counter(names.values())
    return {run: name if count[name] == 1 else str(run) for run, name in names.items()}
