"""The metrics of runs, read from their directories and drawn."""

import collections
import math
from pathlib import Path
from typing import Any

from vllama_jax.errors import DataError
from vllama_jax.io.json_files import parse_object
from vllama_jax.train.smoothing import default_smoothing, smooth

REQUIRED_FIELDS = ("step", "loss")
NO_LEARNING_RATE = math.nan  # an optimizer that a program passed need not have a learning rate


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return what a run wrote of each step. Raises DataError when it has done none, or the file is damaged."""
    path = run / "metrics.jsonl"
    steps = read_journal(path)
    for number, line in enumerate(steps, 1):
        values = [*(line.get(name) for name in REQUIRED_FIELDS), line.get("lr", NO_LEARNING_RATE)]
        if not all(isinstance(value, int | float) for value in values):
            raise DataError(f"{path}, line {number}: not the metrics of a step (it needs {', '.join(REQUIRED_FIELDS)})")
    return steps


def read_journal(path: Path, *, needed: bool = True) -> list[dict[str, Any]]:
    """Return the lines of a journal, without a last one that is still being written."""
    if not path.is_file():
        if needed:
            raise DataError(f"{path}: no such file; name a run directory that has done a step")
        return []
    whole = path.read_bytes().decode(errors="replace").rpartition("\n")[0].splitlines()
    if needed and not whole:
        raise DataError(f"{path}: no step is done yet; wait for the first")
    return [parse_object(line, f"{path}, line {number}", DataError) for number, line in enumerate(whole, 1)]


def plot_metrics(metrics: dict[Path, list[dict[str, Any]]], smoothing: float | None) -> Any:
    """Return a figure of the loss, its mean, the loss of held-out records, and the learning rate of each run."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (run, steps) in enumerate(metrics.items()):
        name, color = _run_names(metrics)[run], f"C{number}"
        numbers, losses = ([line[key] for line in steps] for key in ("step", "loss"))
        share = default_smoothing(len(steps)) if smoothing is None else smoothing
        loss.plot(numbers, losses, color=color, alpha=0.25, linewidth=0.8)
        mean = "each step" if share == 0 else f"mean of about {1 / (1 - share):.0f} steps"
        loss.plot(numbers, smooth(losses, share), color=color, label=f"{name} ({mean})")
        holdout = [
            line
            for line in read_journal(run / "samples.jsonl", needed=False)
            if {"step", "validation_loss"} <= line.keys()
        ]
        if holdout:
            places, values = ([line[key] for line in holdout] for key in ("step", "validation_loss"))
            loss.plot(places, values, "o--", color=color, markersize=4, label=f"{name}, held out")
        rate.plot(numbers, [line.get("lr", NO_LEARNING_RATE) for line in steps], color=color)
    last = next(iter(metrics.values()))[-1]
    one = f"{next(iter(_run_names(metrics).values()))}: training loss, {last['step']} steps"
    figure.suptitle(one if len(metrics) == 1 else f"Training loss of {len(metrics)} runs")
    loss.set_ylabel("loss")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.grid(alpha=0.3)
    return figure


def _run_names(runs: dict[Path, Any]) -> dict[Path, str]:
    """What to call runs: their directories' names, or their whole paths where two have one name."""
    names = {run: run.absolute().name for run in runs}
    count = collections.Counter(names.values())
    return {run: name if count[name] == 1 else str(run) for run, name in names.items()}
