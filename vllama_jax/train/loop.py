"""The training loop: reads batches, runs steps, and writes metrics, checkpoints and validation results.

The device runs one step ahead of the host: the metrics of a step are read after the next step has been dispatched.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vllama_jax.data.pipeline import HostBatch, prefetch_batches
from vllama_jax.errors import CheckpointError, VllamaError
from vllama_jax.io.jsonl import JsonLinesFile
from vllama_jax.memory.flops import peak_flops, step_flops
from vllama_jax.runtime.coordination import share_errors
from vllama_jax.sharding import use_mesh
from vllama_jax.train import setup
from vllama_jax.train.batch_exchange import BatchExchange
from vllama_jax.train.config import TrainConfig
from vllama_jax.train.custom import describe_custom
from vllama_jax.train.hosts import plan_job
from vllama_jax.train.reporter import Reporter
from vllama_jax.train.run_directory import Checkpoints, TensorBoardWriter, open_run
from vllama_jax.train.setup import RunPlan
from vllama_jax.train.state import TrainState, Weights
from vllama_jax.train.step import Loss, Optimizer, jit_step, make_step
from vllama_jax.train.stopping import catch_stop_signals
from vllama_jax.train.store_checkpoints import open_checkpoints
from vllama_jax.train.validation import Validation

TENSORBOARD_METRICS = ("loss", "lr", "gradient_norm", "samples_per_second")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of `train`.

    Attributes:
        path: The run directory, which `vllama_jax.load` loads.
        step: Number of steps done: all steps of the run, or fewer if SIGTERM stopped it.
        metrics: The metrics of the last step as written to metrics.jsonl ("loss", "gradient_norm", …). Empty if the run
            was already finished and has no metrics.jsonl.
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
    """Train, or resume a run. See `vllama_jax.train`, which calls this with a default reporter."""
    plan = plan_job(config, base, out)
    plan = dataclasses.replace(plan, loss=loss, optimizer=plan.optimizer if optimizer is None else optimizer)
    custom = describe_custom(loss, optimizer, plan.abstract_state.opt_state)
    with contextlib.ExitStack() as stack:
        with share_errors():
            stack.enter_context(open_run(out, config, plan.base, str(plan.dtype), plan.inputs, custom))
        stack.enter_context(use_mesh(plan.mesh))
        checkpoints = open_checkpoints(out, config.checkpoint)
        state = checkpoints.restore(plan.abstract_state)
        if state is not None and int(state.step) >= config.steps:
            reporter.show_message(
                f"{out}: already finished, {config.steps} steps; chat with it: `vllama chat FILE --model {out}`"
            )
            lines = JsonLinesFile(out / "metrics.jsonl").read()
            return TrainResult(out, int(state.step), lines[-1] if lines else {})
        for note in plan.notes:
            reporter.show_message(note)
        reporter.show_plan(plan)
        if state is None:
            state, start_step = setup.init_train_state(plan), 0
        else:
            start_step = int(state.step)
            reporter.show_message(f"{out}: resuming from step {start_step}")
        run = _Run(plan, out, reporter, checkpoints)
        run.train_steps(state, setup.load_frozen(plan), start_step)
        return TrainResult(out, run.last["step"], run.last)


@dataclasses.dataclass
class _Pending:
    """A step that was dispatched and whose metrics have not been read yet."""

    number: int
    metrics: dict[str, jax.Array]
    batch: HostBatch
    data_wait: float  # seconds
    dataset: str
    compile_seconds: float  # before the step


class _Run:
    """The state of the loop on this process."""

    def __init__(self, plan: RunPlan, out: Path, reporter: Reporter, checkpoints: Checkpoints):
        self.plan, self.out, self.reporter, self.checkpoints = plan, out, reporter, checkpoints
        self.config = plan.config
        self.metrics = JsonLinesFile(out / "metrics.jsonl")
        self.quarantine = JsonLinesFile(out / "quarantine.jsonl")
        self.exchange = BatchExchange(plan.reader.rows)
        self.journals: list[JsonLinesFile | TensorBoardWriter] = [self.metrics, self.quarantine]
        self.masked: set[str] = set()
        self.last: dict[str, Any] = {}  # metrics of the last step
        self.pending: _Pending | None = None
        self.clock = time.perf_counter()
        self.step = make_train_step(plan)
        self.programs: dict[tuple, Any] = {}  # compiled steps by the shapes of a batch

    def train_steps(self, state: TrainState, frozen: Weights, start_step: int) -> None:
        """Run the steps from `start_step` to the last."""
        steps = self.config.steps
        validation = Validation(self.plan, self.out, self._report_masked)
        if jax.process_index() == 0:
            quarantined = self.quarantine.truncate_after(start_step)
            self.masked = {f"{line['dataset']}: {line['sample']}" for line in quarantined}
            for journal in (self.metrics, validation.journal):
                journal.truncate_after(start_step)
            self.journals.append(validation.journal)
            self.tensorboard = TensorBoardWriter(self.out / "tensorboard", start_step)
            self.journals.append(self.tensorboard)
        self.reporter.begin(start_step)
        read = prefetch_batches(self.plan.reader, start_step, steps, self.config.data, self.exchange.read)
        batch_reader = contextlib.closing(read)
        with (
            self._finish_save_on_error(),
            catch_stop_signals() as requests,
            batch_reader as host_batches,
            contextlib.closing(self.exchange),
        ):
            for number in range(start_step, steps):
                wait_start = time.perf_counter()
                batch = next(host_batches)
                data_wait = time.perf_counter() - wait_start
                arrays = setup.shard_batch(batch.arrays, self.plan)
                program, compile_seconds = self._program(number + 1, state, frozen, arrays)
                data_wait = 0.0 if compile_seconds else data_wait  # the step's clock started after both
                self.exchange.report_wait(number, data_wait)
                state, metrics = program(state, frozen, arrays)
                requests.catch_interrupts()
                self._finish_pending_step()
                dataset = self.plan.reader.sampler.stream(number).dataset.path
                self.pending = _Pending(number + 1, metrics, batch, data_wait, dataset, compile_seconds)
                stopping = requests.should_stop(number + 1)
                if stopping or (number + 1) % self.config.checkpoint.save_interval_steps == 0 or number + 1 == steps:
                    self._finish_pending_step()
                    self._save(number + 1, state, last=stopping or number + 1 == steps)
                if validation.is_due(number + 1):
                    self._finish_pending_step()
                    for line in validation.run(number + 1, state.weights, frozen):
                        self.reporter.show_message(line)
                    self._publish()
                    self.clock = time.perf_counter()
                if stopping:
                    self.reporter.show_message(
                        f"{self.out}: stopped by a signal, saved at step {number + 1}; run the same command to resume"
                    )
                    requests.raise_if_interrupted()
                    return
        size = self.checkpoints.size(steps) / 1e6
        self.reporter.show_message(f"{self.out}: finished, {steps} steps; the last checkpoint has {size:.1f} MB")

    def _publish(self) -> None:
        """Write metrics and other lines to the object store of the run; they are in local files already."""
        with self._handle_write_errors():
            for journal in self.journals:
                journal.publish()

    @contextlib.contextmanager
    def _finish_save_on_error(self) -> Iterator[None]:
        """Wait for the checkpoint that is being saved before an error ends the run."""
        try:
            yield
        except VllamaError:
            for complete in (self._publish, self.checkpoints.finish):
                with contextlib.suppress(CheckpointError, OSError):
                    complete()
            raise

    def _program(self, step: int, state: TrainState, frozen: Weights, batch: dict[str, Any]) -> tuple[Any, float]:
        """Return the step compiled for the shapes of a batch, and the seconds it took; 0 if it was compiled before."""
        shapes = tuple((name, rows.shape) for name, rows in batch.items())
        if shapes in self.programs:
            return self.programs[shapes], 0.0
        self._finish_pending_step()
        length = batch["ids"].shape[-1]
        if self.programs:
            self.reporter.show_message(f"step {step}: compiling for sequences of {length} tokens")
        else:
            self.reporter.show_message(
                f"compiling the first step (sequences of {length} tokens); this may take minutes, and is cached on disk"
            )
        start_time = time.perf_counter()
        self.programs[shapes] = self.step.lower(state, frozen, batch).compile()
        self.clock = time.perf_counter()
        return self.programs[shapes], self.clock - start_time

    def _finish_pending_step(self) -> None:
        """Wait for the pending step, and write and report its metrics. Raise VllamaError if its loss is not finite."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        self._report_masked(pending.number, pending.dataset, pending.batch)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            raise VllamaError(self._describe_non_finite(pending, values))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        data_wait = self.exchange.longest_wait(pending.number - 1, pending.data_wait)
        line = {"step": pending.number, **values, "dataset": pending.dataset, "masked": len(pending.batch.masked)}
        line |= {
            "seconds": round(seconds, 4),
            "samples_per_second": round(self.config.batch_size / seconds, 3),
            "frames_per_second": round(pending.batch.frames * jax.process_count() / seconds, 3),
            "waited_for_data": round(min(data_wait / seconds, 1.0), 4),
        }
        if pending.compile_seconds:
            line["compile_seconds"] = round(pending.compile_seconds, 4)
        if peak := peak_flops(jax.devices()[0]):
            arrays = pending.batch.arrays
            share = self.config.batch_size / len(arrays["ids"])
            flops = share * step_flops(self.plan.base.config, self.config.branch, arrays, self.config.remat_policy)
            line["mfu"] = round(flops / seconds / peak / jax.device_count(), 4)
        if jax.process_index() == 0:
            with self._handle_write_errors():
                self.metrics.add(line)
                self.tensorboard.add(pending.number, {name: line[name] for name in TENSORBOARD_METRICS if name in line})
        self.reporter.step(line)
        self.last = line

    def _report_masked(self, number: int, dataset: str, batch: HostBatch) -> None:
        """Report the masked records of a batch and write them to quarantine.jsonl, each once in a run, in process 0.

        Other processes send them to process 0 (`BatchExchange`), so that they need no access to the run directory.
        """
        for record, why in batch.masked if jax.process_index() == 0 else ():
            name = f"{dataset}: {record}"
            if name not in self.masked:
                self.masked.add(name)
                self.quarantine.add({"step": number, "dataset": dataset, "sample": record, "why": why})
                self.reporter.show_message(f"{name} is masked: {why}")

    def _describe_non_finite(self, pending: _Pending, values: dict[str, float]) -> str:
        names = ", ".join(pending.batch.names[:8]) + (", …" if len(pending.batch.names) > 8 else "")
        return (
            f"step {pending.number}: loss {values['loss']}, gradient norm {values['gradient_norm']}, "
            f"in a batch of {pending.dataset} ({names}); the checkpoints in {self.out} are kept. "
            "Lower optim.lr, or inspect these records"
        )

    def _save(self, number: int, state: TrainState, *, last: bool) -> None:
        with self._handle_write_errors():  # saving is asynchronous: its errors are raised when the next one starts
            self.checkpoints.finish()
        self._publish()  # before the checkpoint, from which a resumed run continues them
        with self._handle_write_errors(last):
            self.checkpoints.save(number, state)
            if last:
                self.checkpoints.finish()

    @contextlib.contextmanager
    def _handle_write_errors(self, last: bool = False) -> Iterator[None]:
        """Raise errors of writing, or report them and continue, depending on checkpoint.on_error."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            problem = f"{self.out}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
            self.reporter.show_message(f"{problem}; continuing")


def make_train_step(plan: RunPlan) -> Any:
    """Make the training step of a plan, wrapped in `jax.jit`; it compiles when it is lowered or called.

    Args:
        plan: The plan of the run.

    Returns:
        A jitted function (state, frozen, batch) → (state, metrics). See `make_step` and `jit_step`.
    """
    return jit_step(make_step(plan.config, plan.abstract_model, plan.optimizer, plan.loss), plan.abstract_state)
