"""vllama plot."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vllama_jax.errors import DataError
from vllama_jax.io.atomic import replace_file


def plot(run: Path, /, *, out: Path | None = None, smoothing: float = 0.95) -> None:
    """Draw a run's loss and learning rate as a PNG.

    Example: vllama plot RUN

    Args:
        run: The run directory.
        out: The PNG file; RUN/loss.png unless given.
        smoothing: How slowly the drawn mean of the loss follows it, from 0 to below 1.
    """
    if not 0 <= smoothing < 1:
        raise DataError(f"smoothing must be at least 0 and below 1, not {smoothing}")
    steps = read_lines(run / "metrics.jsonl")
    validation = [line for line in read_lines(run / "samples.jsonl", needed=False) if "validation_loss" in line]
    out = out or run / "loss.png"
    _draw(steps, validation, smoothing, out)
    print(f"{out}: steps {steps[0]['step']} to {steps[-1]['step']}, last loss {steps[-1]['loss']:.4f}")


def read_lines(path: Path, *, needed: bool = True) -> list[dict[str, Any]]:
    """The lines of a journal that is whole but perhaps for a last one under way."""
    if not path.is_file():
        if needed:
            raise DataError(f"{path}: no such file; name a run directory that has done a step")
        return []
    lines = path.read_text().splitlines()
    try:
        found = [json.loads(line) for line in lines[:-1]]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not the metrics of a run ({error})") from error
    with contextlib.suppress(json.JSONDecodeError):  # the last line may be under way
        found += [json.loads(line) for line in lines[-1:]]
    if needed and not found:
        raise DataError(f"{path}: no step is done yet; wait for the first")
    return found


def _draw(steps: list[dict[str, Any]], validation: list[dict[str, Any]], smoothing: float, out: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    numbers = [line["step"] for line in steps]
    loss.plot(numbers, [line["loss"] for line in steps], color="tab:blue", alpha=0.3, label="loss")
    loss.plot(numbers, smoothed([line["loss"] for line in steps], smoothing), color="tab:blue", label="its mean")
    if validation:
        places = [line["step"] for line in validation]
        loss.plot(places, [line["validation_loss"] for line in validation], "o-", color="tab:orange", label="held out")
    loss.set_ylabel("loss")
    loss.legend()
    rate.plot(numbers, [line["lr"] for line in steps], color="tab:green")
    rate.set(xlabel="step", ylabel="learning rate")
    image = io.BytesIO()
    try:
        figure.savefig(image, format=out.suffix[1:] or "png", dpi=120)
        replace_file(out, image.getbuffer())
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written ({error})") from error


def smoothed(values: list[float], smoothing: float) -> list[float]:
    """The exponential mean, from the first value on."""
    smoothed, mean = [], values[0]
    for value in values:
        mean = smoothing * mean + (1 - smoothing) * value
        smoothed.append(mean)
    return smoothed
