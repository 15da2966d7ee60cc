"""Reporters of the progress of a run: the protocol, and a reporter that prints lines."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllama_jax.train.setup import RunPlan

MAX_STEPS_PER_LINE = 50


class Reporter(Protocol):
    """The methods that the training loop calls. `vllama train` uses the reporter in `cli/_training_display.py`."""

    def show_message(self, text: str) -> None:
        """Show a message."""

    def show_plan(self, plan: "RunPlan") -> None:
        """Show the trainable parameters, before the first step."""

    def begin(self, step: int) -> None:
        """Prepare for the first step of this process. `step` steps are done."""

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a step that is done. `metrics` is its line in metrics.jsonl."""


def print_line(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def log_line(text: str) -> None:
    """Write a line to the log of this package. It is not shown; `--log-dir` writes the log to a file."""
    logging.getLogger(__package__).info(text)


class PrintReporter:
    """A `Reporter` that prints messages, and a line for the first step, the last, and some in between.

    Args:
        steps: Number of steps of the run.
        every: Steps between lines. The default is a twentieth of the run, at most 50.
        write: Writes a line. The default prints it to stderr.
    """

    def __init__(self, steps: int, every: int | None = None, write: Callable[[str], None] = print_line):
        self._steps, self._write = steps, write
        self._every = every or min(max(steps // 20, 1), MAX_STEPS_PER_LINE)
        self._first = 1

    def show_message(self, text: str) -> None:
        """Print a message."""
        self._write(text)

    def show_plan(self, plan: "RunPlan") -> None:
        """Print the number of trainable arrays, and their components."""
        components = dict.fromkeys(path.split("/")[0] for path in plan.trainable_paths)
        self.show_message(
            f"{len(plan.trainable_paths)} trainable arrays, in {', '.join(components)}; {plan.mesh_summary}"
        )

    def begin(self, step: int) -> None:
        """Remember the first step of this process, which gets a line."""
        self._first = step + 1

    def step(self, metrics: dict[str, Any]) -> None:
        """Print a line for the first step, the last, and every `every` steps."""
        step = metrics["step"]
        if step in (self._first, self._steps) or step % self._every == 0:
            self.show_message(f"{step}/{self._steps} steps  {step_summary(metrics, metrics['loss'])}")


class Reporters:
    """A `Reporter` that forwards to several others."""

    def __init__(self, *reporters: Reporter):
        self._reporters = reporters

    def show_message(self, text: str) -> None:
        """Show a message."""
        for reporter in self._reporters:
            reporter.show_message(text)

    def show_plan(self, plan: "RunPlan") -> None:
        """Show the trainable parameters."""
        for reporter in self._reporters:
            reporter.show_plan(plan)

    def begin(self, step: int) -> None:
        """Prepare for the first step of this process."""
        for reporter in self._reporters:
            reporter.begin(step)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a step that is done."""
        for reporter in self._reporters:
            reporter.step(metrics)


def step_summary(metrics: dict[str, Any], loss: float) -> str:
    """Format the metrics of a step as one line.

    Args:
        metrics: The metrics of a step, as in metrics.jsonl.
        loss: The loss to show: that of the step, or a moving average.
    """
    summary = f"loss {loss:.4f}"
    summary += f"  lr {metrics['lr']:.2e}" if "lr" in metrics else ""  # a custom optimizer may not have it
    summary += f"  {metrics['samples_per_second']:.1f} samples/s"
    summary += f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    return f"{summary}  data wait {metrics['waited_for_data']:.0%}"
