"""What was measured, as figures: accuracies with their intervals, curves over scale and noise, loss curves.

    python -m vllama_jax.miniature.figures OUT FOLDER

writes those of docs/miniature.md: of the model and the results in the box, and the losses of the runs in OUT.

Results are what OUT/results.json holds: {"seed", "minutes", "measures"} of one seed, or a list of those.
Every function returns a matplotlib figure and needs no display.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.errors import DataError
from vllama_jax.train.plots import read_journal
from vllama_jax.train.smoothing import smooth

Measures = Mapping[str, Mapping[str, float]]  # accuracy, n, chance, low and high by measure
SWEEP = re.compile(r"(?P<name>.+)_(times_(?P<scale>[\d.]+)|at_(?P<noise>-?[\d.]+)_db)")
RECOGNITION, ORDER = "sound_only", "sound_order"
SMOOTHING = 0.9


def read_results(path: Path) -> list[Measures]:
    """The measures of each seed. Raises DataError for a file that is none of results."""
    try:
        found = json.loads(path.read_text())
        return [one["measures"] for one in (found if isinstance(found, list) else [found])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no results of a miniature ({error!r})") from error


def format_results(seeds: Sequence[Measures]) -> str:
    """Markdown: each measure of the first seed with its 95 % interval; before it, the mean and spread of several."""
    of_seeds = ["mean", "least to most"] if len(seeds) > 1 else []
    head = ["measure", *of_seeds, "accuracy", "95 % interval", "chance"]
    rows = [head, ["---"] * len(head)]
    for name, first in seeds[0].items():
        found = [seed[name]["accuracy"] for seed in seeds]
        spread = [f"{np.mean(found):.3f}", f"{min(found):.3f} to {max(found):.3f}"] if of_seeds else []
        interval = f"{first['low']:.3f} to {first['high']:.3f}"
        rows.append([f"`{name}`", *spread, f"{first['accuracy']:.3f}", interval, f"{first['chance']:.3f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_accuracies(seeds: Sequence[Measures], names: Sequence[str] = ()) -> Figure:
    """A row for each measure (all but those of the curves, unless named): every seed's accuracy with its 95 % interval,
    the mean of the seeds, and chance.
    """
    names = list(names) or [name for name in seeds[0] if not SWEEP.fullmatch(name)]
    figure = Figure(figsize=(8, 1 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    means = [np.mean([seed[name]["accuracy"] for seed in seeds]) for name in names]
    axes.barh(rows, means, height=0.7, color="tab:blue", alpha=0.35, label="mean" if len(seeds) > 1 else "accuracy")
    for row, name in enumerate(names):
        places = row + np.linspace(-0.2, 0.2, len(seeds)) * (len(seeds) > 1)
        _draw_intervals(axes, [seed[name] for seed in seeds], places)
        chance = seeds[0][name]["chance"]
        axes.plot([chance, chance], [row - 0.4, row + 0.4], color="tab:red", label="chance" if row == 0 else None)
    axes.set_yticks(rows, names)
    axes.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _draw_intervals(axes: Axes, measures: Sequence[Mapping[str, float]], places: np.ndarray) -> None:
    middles = np.array([one["accuracy"] for one in measures])
    reach = [[one["accuracy"] - one["low"] for one in measures], [one["high"] - one["accuracy"] for one in measures]]
    axes.errorbar(middles, places, xerr=np.maximum(reach, 0), fmt=".", color="black", markersize=4, linewidth=1)


def plot_scale_sweep(seeds: Sequence[Measures]) -> Figure:
    """What is heard, and in which order, by how many times the norm of training sound vectors have."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in ((RECOGNITION, "tab:blue"), (ORDER, "tab:orange")):
        _draw_curve(axes, seeds, list_variants(seeds[0], name, "scale"), name, color)
    axes.set_xscale("log")
    scales = list(list_variants(seeds[0], RECOGNITION, "scale"))
    axes.set_xticks(scales, [f"×{scale:g}" for scale in scales], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="norm of sound vectors (training saw ×1, the published weights give ×20)")
    axes.legend()
    return figure


def plot_noise_sweep(seeds: Sequence[Measures]) -> Figure:
    """What is heard, by how far white noise is below the sound."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    _draw_curve(axes, seeds, list_variants(seeds[0], RECOGNITION, "noise"), RECOGNITION, "tab:blue")
    axes.set(xlabel="signal to noise (dB)")
    axes.legend()
    return figure


def list_variants(measures: Measures, name: str, of: str) -> dict[float, str]:
    """The names of a measure's variants by "scale" (the measure itself is at 1) or by "noise", in rising order."""
    found = {1.0: name} if of == "scale" and name in measures else {}
    for variant in measures:
        match = SWEEP.fullmatch(variant)
        if match and match["name"] == name and match[of] is not None:
            found[float(match[of])] = variant
    return dict(sorted(found.items()))


def _draw_curve(axes: Axes, seeds: Sequence[Measures], variants: Mapping[float, str], label: str, color: str) -> None:
    """The mean of the seeds over a sweep, in the band of their intervals; and chance."""
    places, names = list(variants), list(variants.values())
    low = [min(seed[name]["low"] for seed in seeds) for name in names]
    high = [max(seed[name]["high"] for seed in seeds) for name in names]
    means = [np.mean([seed[name]["accuracy"] for seed in seeds]) for name in names]
    axes.fill_between(places, low, high, color=color, alpha=0.2)
    axes.plot(places, means, "o-", color=color, label=label)
    axes.plot(places, [seeds[0][name]["chance"] for name in names], ":", color=color, label=f"chance of {label}")
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    axes.grid(alpha=0.3)


def plot_losses(runs: Mapping[str, Path]) -> Figure:
    """The loss of each run directory, by the name to give it: every step's pale, its running mean in full colour."""
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


def write_figures(out: Path, folder: Path) -> None:
    """PNGs of all figures, and of what the model in the box reads of the clips beside it."""
    import vllama_jax as vl
    from vllama_jax.chat import prepare_media
    from vllama_jax.checkpoints.shipped import CLIPS, RESULTS
    from vllama_jax.miniature import attention

    seeds, model = read_results(RESULTS), vl.load("miniature")
    bell, two = (prepare_media(CLIPS / name, model.config) for name in ("bell.mp4", "two.mp4"))
    frames = vl.media.read_video(CLIPS / "bell.mp4", size=model.config.vit.image_size).frames
    assert bell.frames is not None  # both clips have pictures and sound
    assert two.mel is not None
    tower, cfg, ends = model.network.imagebind.audio, model.config.require_imagebind().audio, two.mel[[0, -1]]
    runs = {f"{branch}, stage {stage}": out / f"{branch}{stage}" for branch in ("vision", "audio") for stage in (1, 2)}
    found = {
        "accuracies": plot_accuracies(seeds),
        "scale": plot_scale_sweep(seeds),
        "noise": plot_noise_sweep(seeds),
        "losses": plot_losses(runs),
        "seen": attention.plot_over_frames(frames, np.asarray(attention.attended_patches(model.network, bell.frames))),
        "heard": attention.plot_over_mels(ends, np.asarray(attention.attended_mel_patches(tower, cfg, ends)), cfg),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in found.items():
        figure.savefig(folder / f"{name}.png", dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m vllama_jax.miniature.figures OUT FOLDER")
    write_figures(*map(Path, sys.argv[1:]))
