"""vllama plot."""

import io
from pathlib import Path

import tyro

from vllama_jax.cli._usage import UsageError
from vllama_jax.errors import DataError
from vllama_jax.io.atomic import replace_file
from vllama_jax.train.plots import draw, read_metrics


def plot(
    run: tyro.conf.Positional[Path],
    others: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    *,
    out: Path | None = None,
    smoothing: float | None = None,
) -> None:
    """Draw the loss and the learning rate of a run, or of several to compare them, as a PNG.

    Example: vllama plot RUN

    Example: vllama plot RUN1 RUN2 --out both.png

    Args:
        run: The run directory.
        others: More run directories, drawn into the same axes.
        out: The PNG file; RUN/loss.png unless given, of several runs the first one's compared.png.
        smoothing: How slowly the mean of the loss follows it, from 0 to below 1. Unless given, the mean is over about a
            tenth of a run, at most 50 steps.
    """
    if smoothing is not None and not 0 <= smoothing < 1:
        raise UsageError(f"--smoothing must be at least 0 and below 1, not {smoothing}")
    runs = [run, *others]
    metrics = {path: read_metrics(path) for path in runs}
    out = out or run / ("compared.png" if others else "loss.png")
    figure, image = draw(metrics, smoothing), io.BytesIO()
    try:
        figure.savefig(image, format=out.suffix[1:] or "png", dpi=120)
        replace_file(out, image.getbuffer())
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written ({error})") from error
    for path, steps in metrics.items():
        where = f"{path}: " if others else f"{out}: "
        print(f"{where}steps {steps[0]['step']} to {steps[-1]['step']}, last loss {steps[-1]['loss']:.4f}")
    if others:
        print(out)
