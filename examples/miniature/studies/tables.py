"""Tables and figures of a study, from its results.

    python -m vllama_jax.miniature.studies.tables RESULTS [FOLDER]

prints the tables of a results file in Markdown, and draws their figures in FOLDER. The results of the pages are
docs/studies/NAME.json.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllama_jax.errors import DataError
from vllama_jax.io.json_files import parse_object
from vllama_jax.miniature.command import run_command
from vllama_jax.miniature.figures import Measures, format_markdown_table

MARKERS = "osD^vPX*"
SHIFT = 0.12  # of the first and the last measure to both sides of their setting


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of a table: a setting, and what was measured with it.

    Attributes:
        name: The setting, such as "8 frames".
        facts: Properties of the setting that are not accuracies, such as the number of media tokens, by name.
        seeds: The measures of each seed; of one model if nothing was trained.
    """

    name: str
    facts: Mapping[str, str]
    seeds: Sequence[Measures]


@dataclasses.dataclass(frozen=True)
class Table:
    """A comparison of settings.

    Attributes:
        name: The name of the figure's file.
        title: What is compared, for the heading of the table and of the figure.
        settings: The settings, in order. All have the same facts and the same measures.
    """

    name: str
    title: str
    settings: Sequence[Setting]


def format_table(table: Table) -> str:
    """Format a table in Markdown, with its title.

    Args:
        table: The table.

    Returns:
        A row for each fact and each measure, and a column for each setting. Accuracies are the mean of the seeds with
        their range, or one accuracy with its 95 % interval if there is one. The last column is chance.
    """
    first = table.settings[0]
    columns = ["", *(setting.name for setting in table.settings), "chance"]
    rows = [[fact, *(setting.facts[fact] for setting in table.settings), ""] for fact in first.facts]
    for name, one in first.seeds[0].items():
        cells = [_format_accuracies([seed[name] for seed in setting.seeds]) for setting in table.settings]
        rows.append([f"`{name}`", *cells, f"{one['chance']:.3f}"])
    return f"{table.title}:\n\n{format_markdown_table(columns, rows)}"


def _format_accuracies(seeds: Sequence[Mapping[str, float]]) -> str:
    accuracies = [one["accuracy"] for one in seeds]
    low, high = (min(accuracies), max(accuracies)) if len(seeds) > 1 else (seeds[0]["low"], seeds[0]["high"])
    return f"{np.mean(accuracies):.3f} ({low:.3f} to {high:.3f})"


def plot_table(table: Table) -> Figure:
    """Plot the accuracy of each measure by setting: the mean, a point for each seed, and chance as a dashed line.

    If a setting has one seed, its 95 % interval is drawn. Measures are shifted, so that equal ones remain visible.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    first = table.settings[0].seeds[0]
    shifts = np.linspace(-SHIFT, SHIFT, len(first)) if len(first) > 1 else [0.0]
    for number, (name, shift) in enumerate(zip(first, shifts, strict=True)):
        style: dict[str, Any] = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        positions = np.arange(len(table.settings)) + shift
        seeds = [[seed[name] for seed in setting.seeds] for setting in table.settings]
        axes.plot(positions, [np.mean([one["accuracy"] for one in several]) for several in seeds], label=name, **style)
        axes.axhline(first[name]["chance"], color=style["color"], linestyle="--", linewidth=0.8, alpha=0.6)
        for position, several in zip(positions, seeds, strict=True):
            _draw_seeds(axes, position, several, {**style, "linestyle": "none", "alpha": 0.5})
    names = [setting.name for setting in table.settings]
    axes.set_xticks(range(len(names)), names, rotation=25, rotation_mode="anchor", ha="right")
    axes.set(ylim=(-0.02, 1.02), ylabel="accuracy on held-out combinations", title=table.title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center")
    return figure


def _draw_seeds(axes: Axes, position: float, seeds: Sequence[Mapping[str, float]], style: dict[str, Any]) -> None:
    accuracies = np.array([one["accuracy"] for one in seeds])
    errors = None
    if len(seeds) == 1:
        errors = np.maximum([[accuracies[0] - seeds[0]["low"]], [seeds[0]["high"] - accuracies[0]]], 0)
    axes.errorbar(np.full(len(seeds), position), accuracies, yerr=errors, **style)


def plot_tables(tables: Sequence[Table], folder: Path) -> None:
    """Draw the figure of each table, FOLDER/NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        plot_table(table).savefig(folder / f"{table.name}.png", dpi=80)


def read_tables(path: Path) -> list[Table]:
    """Read the tables of a results file.

    Args:
        path: OUT/results.json of a study.

    Raises:
        DataError: The file is missing or is not the results of a study.
    """
    try:
        content = parse_object(path.read_bytes(), str(path), DataError)
        return [
            Table(one["name"], one["title"], [Setting(**setting) for setting in one["settings"]])
            for one in content["tables"]
        ]
    except (OSError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of a study ({error!r})") from error


def main(results: Path, folder: Path | None = None, /) -> None:
    """Print the tables of a study.

    Args:
        results: OUT/results.json of the study.
        folder: Where the figures of the tables are drawn.
    """
    tables = read_tables(results)
    if folder is not None:
        plot_tables(tables, folder)
    print("\n\n".join(map(format_table, tables)))


if __name__ == "__main__":
    run_command("vllama_jax.miniature.studies.tables", main)
