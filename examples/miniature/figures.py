"""Plot results: accuracies with their intervals, accuracy by audio scale and by noise, losses, and attention.

    python -m vllama_jax.miniature.figures OUT FOLDER

writes the figures of docs/miniature.md: of the model and the results in the package, and the losses of the runs in OUT.

A results file, such as OUT/results.json, has {"seed", "minutes", "measures"} of one seed, or a list of those. The plot
functions return a matplotlib figure and need no display.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.errors import DataError
from vllama_jax.miniature.command import run_command
from vllama_jax.train.plots import read_journal
from vllama_jax.train.smoothing import smooth

Measures = Mapping[str, Mapping[str, float]]  # accuracy, n, chance, low and high of each measure
SWEEP = re.compile(r"(?P<name>.+)_(times_(?P<scale>[\d.]+)|at_(?P<noise>-?[\d.]+)_db)")  # names of variants
RECOGNITION, ORDER = "sound_only", "sound_order"
SMOOTHING = 0.9


def read_results(path: Path) -> list[Measures]:
    """Read a results file.

    Args:
        path: The file, of one seed or of several.

    Returns:
        The measures of each seed.

    Raises:
        DataError: The file is missing or is not a results file.
    """
    try:
        content = json.loads(path.read_text())
        return [seed["measures"] for seed in (content if isinstance(content, list) else [content])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a results file of a miniature ({error!r})") from error


def format_results(seeds: Sequence[Measures]) -> str:
    """Format results as a Markdown table.

    Args:
        seeds: The measures of each seed.

    Returns:
        A row for each measure of the first seed with its accuracy, interval and chance. If there are several seeds, the
        mean and the range of all precede them, or a dash if another seed does not have the measure.
    """
    summary_columns = ["mean", "range"] if len(seeds) > 1 else []
    header = ["measure", *summary_columns, "accuracy", "95 % interval", "chance"]
    rows = []
    for name, first in seeds[0].items():
        summary = ["–"] * len(summary_columns)
        if summary and all(name in seed for seed in seeds):
            values = [seed[name]["accuracy"] for seed in seeds]
            summary = [f"{np.mean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"]
        interval = f"{first['low']:.3f} to {first['high']:.3f}"
        rows.append([f"`{name}`", *summary, f"{first['accuracy']:.3f}", interval, f"{first['chance']:.3f}"])
    return format_markdown_table(header, rows)


def format_markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with the given headings and cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def plot_accuracies(seeds: Sequence[Measures], names: Sequence[str] = ()) -> Figure:
    """Plot the accuracy of each seed with its 95 % interval, the mean of the seeds, and chance.

    Args:
        seeds: The measures of each seed.
        names: The measures to plot; by default all that every seed has, except the variants by scale and by noise.
    """
    common = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    names = list(names) or [name for name in common if not SWEEP.fullmatch(name)]
    figure = Figure(figsize=(8, 1 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    means = [np.mean([seed[name]["accuracy"] for seed in seeds]) for name in names]
    bar_label = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "accuracy"
    axes.barh(rows, means, height=0.7, color="tab:blue", alpha=0.35, label=bar_label)
    for row, name in enumerate(names):
        positions = row + np.linspace(-0.2, 0.2, len(seeds)) * (len(seeds) > 1)
        label = ("one seed, 95 % interval" if len(seeds) > 1 else "95 % interval") if row == 0 else None
        _draw_intervals(axes, [seed[name] for seed in seeds], positions, label)
        chance = seeds[0][name]["chance"]
        axes.plot([chance, chance], [row - 0.4, row + 0.4], color="tab:red", label="chance" if row == 0 else None)
    axes.set_yticks(rows, names)
    axes.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy on held-out combinations")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def _draw_intervals(
    axes: Axes, measures: Sequence[Mapping[str, float]], positions: np.ndarray, label: str | None
) -> None:
    accuracies = np.array([one["accuracy"] for one in measures])
    errors = [[one["accuracy"] - one["low"] for one in measures], [one["high"] - one["accuracy"] for one in measures]]
    style: dict[str, Any] = {"fmt": ".", "color": "black", "markersize": 4, "linewidth": 1}
    axes.errorbar(accuracies, positions, xerr=np.maximum(errors, 0), label=label, **style)


def plot_scale_sweep(seeds: Sequence[Measures]) -> Figure:
    """Plot the accuracy for sounds and for their order by the norm of audio vectors."""
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, color in ((RECOGNITION, "tab:blue"), (ORDER, "tab:orange")):
        _draw_curve(axes, seeds, list_variants(seeds[0], name, "scale"), name, color)
    axes.set_xscale("log")
    scales = list(list_variants(seeds[0], RECOGNITION, "scale"))
    axes.set_xticks(scales, [f"×{scale:g}" for scale in scales], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(
        title=_make_title("sounds", seeds), xlabel="norm of audio vectors (×1 in training, ×20 in published weights)"
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def plot_noise_sweep(seeds: Sequence[Measures]) -> Figure:
    """Plot the accuracy for sounds by the signal-to-noise ratio of white noise."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    _draw_curve(axes, seeds, list_variants(seeds[0], RECOGNITION, "noise"), RECOGNITION, "tab:blue")
    axes.set(title=_make_title("sounds with white noise", seeds), xlabel="signal-to-noise ratio (dB)")
    axes.legend()
    return figure


def _make_title(subject: str, seeds: Sequence[Measures]) -> str:
    if len(seeds) == 1:
        return f"Recognition of {subject}"
    return f"Recognition of {subject}: mean of {len(seeds)} seeds"


def list_variants(measures: Measures, name: str, parameter: str) -> dict[float, str]:
    """List the variants of a measure.

    Args:
        measures: The measures of a seed.
        name: The measure.
        parameter: "scale" or "noise". The measure itself has scale 1.

    Returns:
        The names of the variants by the value of the parameter, in ascending order.
    """
    variants = {1.0: name} if parameter == "scale" and name in measures else {}
    for variant in measures:
        match = SWEEP.fullmatch(variant)
        if match and match["name"] == name and match[parameter] is not None:
            variants[float(match[parameter])] = variant
    return dict(sorted(variants.items()))


def _draw_curve(axes: Axes, seeds: Sequence[Measures], variants: Mapping[float, str], label: str, color: str) -> None:
    """Draw the mean of the seeds, a band over their 95 % intervals, and chance."""
    positions, names = list(variants), list(variants.values())
    low = [min(seed[name]["low"] for seed in seeds) for name in names]
    high = [max(seed[name]["high"] for seed in seeds) for name in names]
    means = [np.mean([seed[name]["accuracy"] for seed in seeds]) for name in names]
    axes.plot(positions, means, "o-", color=color, label=label)
    axes.fill_between(positions, low, high, color=color, alpha=0.2, label=f"{label}, 95 % intervals")
    axes.plot(positions, [seeds[0][name]["chance"] for name in names], ":", color=color, label=f"{label}, chance")
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    axes.grid(alpha=0.3)


def plot_losses(runs: Mapping[str, Path]) -> Figure:
    """Plot the losses of runs: each step in a light color, and the running mean.

    Args:
        runs: Run directories by the name for the legend.

    Raises:
        DataError: A run has no metrics.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, run) in enumerate(runs.items()):
        steps: list[dict[str, Any]] = read_journal(run / "metrics.jsonl")
        numbers, values = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(numbers, values, color=f"C{number}", alpha=0.25)
        axes.plot(numbers, smooth(values, SMOOTHING), color=f"C{number}", label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return figure


def write_figures(out: Path, folder: Path, /) -> None:
    """Write all figures as PNG files, including attention maps of the packaged model on its demo clips.

    Args:
        out: OUT, with the runs.
        folder: Where the files are written.
    """
    import vllama_jax as vl
    from vllama_jax.checkpoints.shipped import CLIPS, RESULTS
    from vllama_jax.media_tokens import prepare_media
    from vllama_jax.miniature import attention_plots
    from vllama_jax.nn import attention_maps

    seeds, model = read_results(RESULTS), vl.load("miniature")
    bell, two = (prepare_media(CLIPS / name, model.config) for name in ("bell.mp4", "two.mp4"))
    frames = vl.media.read_video(CLIPS / "bell.mp4", size=model.config.vit.image_size).frames
    assert bell.frames is not None  # both clips have frames and audio
    assert two.mel is not None
    tower, cfg, ends = model.network.imagebind.audio, model.config.require_imagebind().audio, two.mel[[0, -1]]
    runs = {f"{branch}, stage {stage}": out / f"{branch}{stage}" for branch in ("vision", "audio") for stage in (1, 2)}
    figures = {
        "accuracies": plot_accuracies(seeds),
        "scale": plot_scale_sweep(seeds),
        "noise": plot_noise_sweep(seeds),
        "losses": plot_losses(runs),
        "frame_attention": attention_plots.plot_over_frames(
            frames, np.asarray(attention_maps.attended_patches(model.network, bell.frames))
        ),
        "audio_attention": attention_plots.plot_over_mels(
            ends, np.asarray(attention_maps.attended_mel_patches(tower, cfg, ends)), cfg
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=80)


if __name__ == "__main__":
    run_command("vllama_jax.miniature.figures", write_figures)
