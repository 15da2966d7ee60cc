"""Terminal output of `vllama train` on stderr: the trainable parameters, the progress, and messages.

On a terminal the progress is a bar. Elsewhere, as in a log file, it is a line for the first step and then one every
30 seconds.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vllama_jax.branches import get_component
from vllama_jax.checkpoints.shipped import MODEL_NAME, is_shipped_digest
from vllama_jax.train.reporter import PrintReporter, Reporter, Reporters, log_line, step_summary
from vllama_jax.train.smoothing import SmoothedMean, default_smoothing

LOG_INTERVAL = 30.0  # seconds
MIN_BAR_WIDTH = 4  # columns
TIME_WIDTH = 8  # of the remaining time, such as 12:34:56
OPTIONAL_METRICS = ("lr", "MFU")  # left out of the bar, in this order, if the terminal is too narrow


class TrainingDisplay:
    """Reports a training run on stderr (a `Reporter`, train/reporter.py).

    Args:
        steps: The number of steps of the run.
        verbose: List every trainable parameter instead of one row for each component.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, steps: int, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic):
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._has_bar = sys.stderr.isatty()  # not console.is_terminal, which FORCE_COLOR makes true for a pipe too
        self._count_width = len(f"{steps}/{steps}")
        columns = (
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=self._count_width)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=TIME_WIDTH)),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._has_bar)
        self._steps, self._verbose, self._clock = steps, verbose, clock
        self._task = self._bar.add_task("loading", total=steps)
        self._loss, self._seconds = (SmoothedMean(default_smoothing(steps)) for _ in range(2))
        self._last_logged = -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show_message(self, text: str) -> None:
        """Print a line that stays above the progress bar."""
        self._console.print(text, markup=False)

    def show_plan(self, plan: Any) -> None:
        """Print a table of the trainable parameters and the sources of their initial values."""
        rows: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for path in plan.trainable_paths:
            name = path if self._verbose else get_component(path)
            rows.setdefault((name, _format_source(plan.sources[path])), []).append(
                plan.abstract_model.variables[path].shape
            )
        table = Table(
            Column("trainable", overflow="fold"),
            Column("shape" if self._verbose else "arrays", justify="right"),
            Column("parameters", justify="right"),
            Column("initialized from", overflow="fold"),
        )
        for (name, source), shapes in rows.items():
            arrays = "×".join(map(str, shapes[0])) if self._verbose else f"{len(shapes):,}"
            table.add_row(name, arrays, f"{_count_parameters(shapes):,}", source)
        self._console.print(table)
        frozen = _count_parameters(
            [leaf.shape for path, leaf in plan.abstract_model.variables.items() if path not in plan.sources]
        )
        total = _count_parameters([shape for shapes in rows.values() for shape in shapes])
        self.show_message(f"{total:,} trainable parameters, {frozen:,} frozen ({plan.dtype.name})")
        self.show_message(plan.mesh_summary)

    def begin(self, step: int) -> None:
        """Show the progress before the first step of this process, which loads and compiles."""
        self._bar.update(self._task, completed=step, description="preparing the first step")
        if not self._has_bar:
            self.show_message(f"{step}/{self._steps} steps")

    def step(self, metrics: dict[str, Any]) -> None:
        """Show the metrics of a finished step, with a running mean of the loss."""
        loss, seconds = self._loss.add(metrics["loss"]), self._seconds.add(metrics["seconds"])
        summary = step_summary(metrics, loss)
        width = self._console.width - MIN_BAR_WIDTH - self._count_width - TIME_WIDTH - 3  # spaces between columns
        self._bar.update(self._task, completed=metrics["step"], description=_shorten_summary(summary, width))
        now, remaining = self._clock(), self._steps - metrics["step"]
        if not self._has_bar and now - self._last_logged >= LOG_INTERVAL:
            self._last_logged = now
            self.show_message(
                f"{metrics['step']}/{self._steps} steps  {summary}  {_format_duration(remaining * seconds)} left"
            )


@contextlib.contextmanager
def show_training(steps: int, process: int, *, verbose: bool = False) -> Iterator[Reporter]:
    """Yield the reporter of a process: every process writes to the log, and only process 0 to the terminal.

    Args:
        steps: The number of steps of the run.
        process: The number of the process.
        verbose: List every trainable parameter.
    """
    log = PrintReporter(steps, write=log_line)
    if process:
        yield log
        return
    with TrainingDisplay(steps, verbose=verbose) as display:
        yield Reporters(display, log)


def _shorten_summary(summary: str, width: int) -> str:
    """Leave out optional metrics until a summary fits into `width` columns."""
    metrics = summary.split("  ")
    for name in OPTIONAL_METRICS:
        if len("  ".join(metrics)) > width:
            metrics = [metric for metric in metrics if not metric.startswith(f"{name} ")]
    return "  ".join(metrics)


def _format_source(source: Any) -> str:
    if source is None:
        return "random"
    if source.trained:
        return str(source.trained[-1].path.parent)
    return MODEL_NAME if is_shipped_digest(source.digest) else str(source.path)  # not a path in the cache folder


def _count_parameters(shapes: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
