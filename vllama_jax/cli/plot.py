"""The command `vllama plot`."""

import io
from pathlib import Path
from typing import Any

import tyro

from vllama_jax.cli._usage import UsageError
from vllama_jax.errors import DataError
from vllama_jax.io.atomic import replace_file
from vllama_jax.train.plots import plot_metrics, read_metrics


def plot(
    run: tyro.conf.Positional[Path],
    others: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    *,
    out: Path | None = None,
    smoothing: float | None = None,
) -> None:
    """Plot the loss and the learning rate of one run, or compare several runs in one figure, as a PNG file.

    For a video or audio file, plot the log-mel spectrograms that are the input of the audio branch.

    Example: vllama plot RUN

    Example: vllama plot clip.mp4 --out mel.png

    Example: vllama plot RUN1 RUN2 --out both.png

    Args:
        run: The run directory, or a video or audio file.
        others: More run directories, for comparison.
        out: The PNG file. The default is loss.png in the run directory, compared.png in the first of several, and
            clip.mp4.mel.png next to clip.mp4.
        smoothing: The decay of the running mean of the loss, at least 0 and below 1. By default the mean covers about a
            tenth of a run, at most 50 steps.
    """
    if smoothing is not None and not 0 <= smoothing < 1:
        raise UsageError(f"--smoothing must be at least 0 and below 1, not {smoothing}")
    if run.is_file():
        if others:
            raise UsageError(f"{run} is a media file: plot one file at a time; only runs can be compared")
        _plot_mel(run, out or run.with_name(f"{run.name}.mel.png"))
        return
    runs = [run, *others]
    metrics = {path: read_metrics(path) for path in runs}
    out = out or run / ("compared.png" if others else "loss.png")
    _save(plot_metrics(metrics, smoothing), out)
    for path, steps in metrics.items():
        prefix = f"{path}: " if others else f"{out}: "
        print(f"{prefix}steps {steps[0]['step']} to {steps[-1]['step']}, last loss {steps[-1]['loss']:.4f}")
    if others:
        print(out)


def _plot_mel(file: Path, out: Path) -> None:
    from vllama_jax.media.plots import plot_mel

    figure, audio = plot_mel(file)
    _save(figure, out)
    assert audio.mel is not None  # plot_mel has plotted it
    print(f"{out}: {len(audio.mel)} clips of {audio.report}")


def _save(figure: Any, out: Path) -> None:
    image = io.BytesIO()
    try:
        figure.savefig(image, format=out.suffix[1:] or "png", dpi=120)
        replace_file(out, image.getbuffer())
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written ({error})") from error
