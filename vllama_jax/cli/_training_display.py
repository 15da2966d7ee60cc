"""What the user sees of a training run, on stderr: what trains, how far it is, and sentences.

A terminal gets a progress bar. Elsewhere, as in a log file, a line is printed for the first step and then every 30
seconds.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from vllama_jax.branches import get_component
from vllama_jax.train.reporter import step_summary
from vllama_jax.train.smoothing import SmoothedMean, default_smoothing

LOG_INTERVAL = 30.0  # seconds


class TrainingDisplay:
    """A `Reporter` (train/reporter.py) for people.

    Args:
        steps: Of the whole run.
        verbose: List every trainable parameter in place of one line for each module.
        clock: Seconds that only rise.
    """

    def __init__(self, steps: int, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic):
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._steps, self._verbose, self._clock = steps, verbose, clock
        self._task = self._bar.add_task("loading", total=steps)
        self._loss, self._seconds = (SmoothedMean(default_smoothing(steps)) for _ in range(2))
        self._logged = -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show_message(self, text: str) -> None:
        """Print a sentence that stays."""
        self._console.print(text, markup=False)

    def show_plan(self, plan: Any) -> None:
        """Print what trains: parameters by module, or each one, and where their first values come from."""
        rows: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for path in plan.trainable_paths:
            name = path if self._verbose else get_component(path)
            rows.setdefault((name, _format_source(plan.sources[path])), []).append(
                plan.abstract_model.variables[path].shape
            )
        shown = "shape" if self._verbose else "arrays"
        table = Table(
            Column("trainable", overflow="fold"),
            Column(shown, justify="right"),
            Column("parameters", justify="right"),
            "from",
        )
        for (name, origin), shapes in rows.items():
            arrays = "×".join(map(str, shapes[0])) if self._verbose else f"{len(shapes):,}"
            table.add_row(name, arrays, f"{_count_parameters(shapes):,}", origin)
        self._console.print(table)
        frozen = _count_parameters(
            [leaf.shape for path, leaf in plan.abstract_model.variables.items() if path not in plan.sources]
        )
        total = _count_parameters([shape for shapes in rows.values() for shape in shapes])
        self.show_message(f"{total:,} parameters train, {frozen:,} are frozen ({plan.dtype.name})")
        self.show_message(plan.mesh_summary)

    def begin(self, step: int) -> None:
        """Show how far the run is before the first step of this process, which loads and compiles."""
        self._bar.update(self._task, completed=step, description="preparing the first step")
        if not self._console.is_terminal:
            self.show_message(f"{step}/{self._steps} steps")

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a step that is done."""
        loss, seconds = self._loss.add(metrics["loss"]), self._seconds.add(metrics["seconds"])
        shown = step_summary(metrics, loss)
        self._bar.update(self._task, completed=metrics["step"], description=shown)
        now, left = self._clock(), self._steps - metrics["step"]
        if not self._console.is_terminal and now - self._logged >= LOG_INTERVAL:
            self._logged = now
            self.show_message(
                f"{metrics['step']}/{self._steps} steps  {shown}  {_format_duration(left * seconds)} left"
            )


def _format_source(source: Any) -> str:
    if source is None:
        return "random"
    return str(source.trained[-1].path.parent if source.trained else source.path)


def _count_parameters(shapes: list[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
