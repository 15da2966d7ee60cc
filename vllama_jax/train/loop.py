"""The loop around the step: batches in, metrics and checkpoints out, and a clean end whatever happens.

The device is always a step ahead of what is written: metrics of a step are read when the next one has been started.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vllama_jax.data.pipeline import HostBatch, prefetched_batches
from vllama_jax.errors import CheckpointError, VllamaError
from vllama_jax.io.jsonl import Journal
from vllama_jax.memory.flops import peak_flops, step_flops
from vllama_jax.sharding import under
from vllama_jax.train import setup
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.custom import describe_custom
from vllama_jax.train.reporter import Reporter
from vllama_jax.train.run_directory import Board, Checkpoints, open_run
from vllama_jax.train.setup import RunPlan
from vllama_jax.train.state import TrainState, Weights
from vllama_jax.train.step import Loss, Optimizer, jit_step, make_step
from vllama_jax.train.stopping import stop_requests
from vllama_jax.train.validation import Validation

SHOWN_ON_BOARD = ("loss", "lr", "gradient_norm", "samples_per_second")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        path: The run directory, which `vllama_jax.load` reads.
        step: The steps that are done: all of the run's, or fewer where SIGTERM stopped it.
        metrics: The last step's, as metrics.jsonl has them ("loss", "gradient_norm", …); empty where the run was
            finished before and has no metrics.jsonl.
    """

    path: Path
    step: int
    metrics: dict[str, Any]


def train(
    config: TrainConfig,
    out: Path,
    reporter: Reporter,
    base: str = "",
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
) -> TrainResult:
    """Train as `vllama_jax.train` does, which see, with a reporter that is given."""
    plan = setup.plan_run(config, base)
    plan = dataclasses.replace(plan, loss=loss, optimizer=plan.optimizer if optimizer is None else optimizer)
    custom = describe_custom(loss, optimizer, plan.abstract.moments)
    with open_run(out, config, plan.base, str(plan.dtype), plan.inputs, custom), under(plan.mesh):
        checkpoints = Checkpoints(out, config.checkpoint)
        state = checkpoints.restore(plan.abstract)
        if state is not None and int(state.step) >= config.steps:
            reporter.say(f"{out}: finished, {config.steps} steps; ask it with `vllama chat FILE --model {out}`")
            lines = Journal(out / "metrics.jsonl").read()
            return TrainResult(out, int(state.step), lines[-1] if lines else {})
        for note in plan.notes:
            reporter.say(note)
        reporter.table(plan)
        if state is None:
            state, first = setup.start(plan), 0
        else:
            first = int(state.step)
            reporter.say(f"{out}: going on from step {first}")
        run = _Run(plan, out, reporter, checkpoints)
        run.go(state, setup.load_frozen(plan), first)
        return TrainResult(out, run.last["step"], run.last)


@dataclasses.dataclass
class _Pending:
    """A step that was started and not yet looked at."""

    number: int
    metrics: dict[str, jax.Array]
    batch: HostBatch
    waited: float
    dataset: str
    compiling: float  # seconds, before the step


class _Run:
    def __init__(self, plan: RunPlan, out: Path, reporter: Reporter, checkpoints: Checkpoints):
        self.plan, self.out, self.reporter, self.checkpoints = plan, out, reporter, checkpoints
        self.config = plan.config
        self.metrics = Journal(out / "metrics.jsonl")
        process = jax.process_index()
        self.quarantine = Journal(out / ("quarantine.jsonl" if process == 0 else f"quarantine.{process}.jsonl"))
        self.masked: set[str] = set()
        self.last: dict[str, Any] = {}  # the metrics of the last step
        self.pending: _Pending | None = None
        self.clock = time.perf_counter()
        self.step = compile_step(plan)
        self.programs: dict[tuple, Any] = {}  # the step, compiled, by the shapes of a batch

    def go(self, state: TrainState, frozen: Weights, first: int) -> None:
        """From step `first` to the end."""
        steps = self.config.steps
        validation = Validation(self.plan, self.out, self._mask)
        named = self.quarantine.cut(first)
        self.masked = {f"{line['dataset']}: {line['sample']}" for line in named}
        if jax.process_index() == 0:
            for journal in (self.metrics, validation.journal):
                journal.cut(first)
            self.board = Board(self.out / "tensorboard", first)
        self.reporter.begin(first)
        ahead = contextlib.closing(prefetched_batches(self.plan.reader, first, steps, self.config.data))
        with self._last_save_finished(), stop_requests() as requests, ahead as host_batches:
            for number in range(first, steps):
                asked = time.perf_counter()
                batch = next(host_batches)
                waited = time.perf_counter() - asked
                arrays = setup.place(batch.arrays, self.plan)
                program, compiling = self._program(number + 1, state, frozen, arrays)
                state, metrics = program(state, frozen, arrays)
                requests.save_on_interrupt()
                self._look()
                dataset = self.plan.reader.order.stream(number).dataset.path
                waited = 0.0 if compiling else waited  # both were before the step's clock started
                self.pending = _Pending(number + 1, metrics, batch, waited, dataset, compiling)
                stopping = requests.at_step(number + 1)
                if stopping or (number + 1) % self.config.checkpoint.save_interval_steps == 0 or number + 1 == steps:
                    self._look()
                    self._save(number + 1, state, last=stopping or number + 1 == steps)
                if validation.due(number + 1):
                    self._look()
                    for line in validation.run(number + 1, state.weights, frozen):
                        self.reporter.say(line)
                    self.clock = time.perf_counter()
                if stopping:
                    self.reporter.say(f"{self.out}: told to stop, saved at step {number + 1}; run it again to go on")
                    requests.finish()
                    return
        size = self.checkpoints.size(steps) / 1e6
        self.reporter.say(f"{self.out}: finished, {steps} steps; its last checkpoint has {size:.1f} MB")

    @contextlib.contextmanager
    def _last_save_finished(self) -> Iterator[None]:
        """An error ends the run when what is being saved is on disk."""
        try:
            yield
        except VllamaError:
            with contextlib.suppress(CheckpointError):
                self.checkpoints.finish()
            raise

    def _program(self, step: int, state: TrainState, frozen: Weights, batch: dict[str, Any]) -> tuple[Any, float]:
        """The step compiled for the shapes of a batch, and the seconds that took; 0 when it was compiled before."""
        shapes = tuple((name, rows.shape) for name, rows in batch.items())
        if shapes in self.programs:
            return self.programs[shapes], 0.0
        self._look()
        length = batch["ids"].shape[-1]
        if self.programs:
            self.reporter.say(f"step {step}: compiling for text of {length} tokens")
        else:
            self.reporter.say(f"compiling the first step (text of {length} tokens): up to minutes, and kept on disk")
        begun = time.perf_counter()
        self.programs[shapes] = self.step.lower(state, frozen, batch).compile()
        self.clock = time.perf_counter()
        return self.programs[shapes], self.clock - begun

    def _look(self) -> None:
        """Waits for the step that is under way, and writes down how it went."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        self._mask(pending.number, pending.dataset, pending.batch)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise VllamaError(self._lost(pending, values))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        line = {"step": pending.number, **values, "dataset": pending.dataset, "masked": len(pending.batch.problems)}
        line |= {
            "seconds": round(seconds, 4),
            "samples_per_second": round(self.config.batch_size / seconds, 3),
            "frames_per_second": round(pending.batch.frames * jax.process_count() / seconds, 3),
            "waited_for_data": round(min(pending.waited / seconds, 1.0), 4),
        }
        if pending.compiling:
            line["compile_seconds"] = round(pending.compiling, 4)
        if peak := peak_flops(jax.devices()[0]):
            arrays = pending.batch.arrays
            share = self.config.batch_size / len(arrays["ids"])
            flops = share * step_flops(self.plan.base.config, self.config.branch, arrays, self.config.remat_policy)
            line["mfu"] = round(flops / seconds / peak / jax.device_count(), 4)
        if jax.process_index() == 0:
            with self._tolerated():
                self.metrics.add(line)
                self.board.add(pending.number, {name: line[name] for name in SHOWN_ON_BOARD if name in line})
        self.reporter.step(line)
        self.last = line

    def _mask(self, number: int, dataset: str, batch: HostBatch) -> None:
        """Names the samples of a batch that were not used, each once in a run."""
        for row, why in batch.problems.items():
            name = f"{dataset}: {batch.names[row]}"
            if name not in self.masked:
                self.masked.add(name)
                self.quarantine.add({"step": number, "dataset": dataset, "sample": batch.names[row], "why": why})
                self.reporter.say(f"{name} is left out: {why}")

    def _lost(self, pending: _Pending, values: dict[str, float]) -> str:
        names = ", ".join(pending.batch.names[:8]) + (", …" if len(pending.batch.names) > 8 else "")
        return (
            f"step {pending.number}: the loss is {values['loss']} and the gradient's norm {values['gradient_norm']}, "
            f"on {pending.dataset} ({names}); the last good checkpoint is kept in {self.out}. "
            "Lower optim.lr, or look at these samples"
        )

    def _save(self, number: int, state: TrainState, *, last: bool) -> None:
        with self._tolerated():  # saving goes on while steps run, and its failure shows at the next one
            self.checkpoints.finish()
        with self._tolerated(last):
            self.checkpoints.save(number, state)
            if last:
                self.checkpoints.finish()

    @contextlib.contextmanager
    def _tolerated(self, last: bool = False) -> Iterator[None]:
        """What cannot be written ends the run, or is said and left out, as checkpoint.on_error has it."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            told = f"{self.out}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
            self.reporter.say(f"{told}; going on")


def compile_step(plan: RunPlan) -> Any:
    """The step of a plan, under `jax.jit`."""
    return jit_step(make_step(plan.config, plan.skeleton, plan.optimizer, plan.loss), plan.abstract)
