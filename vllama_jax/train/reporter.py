"""Who shows how a run goes: the protocol, and a reporter that prints lines."""

import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vllama_jax.train.setup import RunPlan

MAX_STEPS_PER_LINE = 50


class Reporter(Protocol):
    """What the training loop calls; `cli/_training_display.py` has the command's."""

    def show_message(self, text: str) -> None:
        """Show a sentence."""

    def show_plan(self, plan: "RunPlan") -> None:
        """Show what trains, before the first step."""

    def begin(self, step: int) -> None:
        """The first step of this process comes next; `step` are done."""

    def step(self, metrics: dict[str, Any]) -> None:
        """A step was done: the line that metrics.jsonl has of it."""


class PrintReporter:
    """A `Reporter` that prints to stderr: sentences, and a line for the first step, the last, and some in between.

    Args:
        steps: Of the whole run.
        every: Steps from one line to the next; a twentieth of the run, at most 50, unless given.
    """

    def __init__(self, steps: int, every: int | None = None):
        self._steps = steps
        self._every = every or min(max(steps // 20, 1), MAX_STEPS_PER_LINE)
        self._first = 1

    def show_message(self, text: str) -> None:
        """Print a sentence."""
        print(text, file=sys.stderr, flush=True)

    def show_plan(self, plan: "RunPlan") -> None:
        """Print how many arrays train, of which components."""
        components = dict.fromkeys(path.split("/")[0] for path in plan.trainable_paths)
        self.show_message(f"{len(plan.trainable_paths)} arrays train, of {', '.join(components)}; {plan.mesh_summary}")

    def begin(self, step: int) -> None:
        """Note where this process starts."""
        self._first = step + 1

    def step(self, metrics: dict[str, Any]) -> None:
        """Print the line of a step, if it is one of those that get one."""
        step = metrics["step"]
        if step in (self._first, self._steps) or step % self._every == 0:
            self.show_message(f"{step}/{self._steps} steps  {step_summary(metrics, metrics['loss'])}")


def step_summary(metrics: dict[str, Any], loss: float) -> str:
    """The metrics of a step for people. loss: of the step, or a mean up to it."""
    summary = f"loss {loss:.4f}"
    summary += f"  lr {metrics['lr']:.2e}" if "lr" in metrics else ""  # not known of every optimizer
    summary += f"  {metrics['samples_per_second']:.1f} samples/s"
    summary += f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    return f"{summary}  waits {metrics['waited_for_data']:.0%}"
