"""Run directories: the config of a run, its checkpoints and its metrics.

config.json       the run config, path and digest of the base model, digests of the other inputs
step_N/           a checkpoint: weights, moments (the optimizer state) and iterator, written by Orbax, and digests.json
                  (checkpoints/digests.py)
last_saved.json   the step of the last checkpoint
damaged_step_N/   a corrupt checkpoint
metrics.jsonl     the metrics of each step
samples.jsonl     validation losses, and answers about the validation clips
quarantine.jsonl  the records that were masked
tensorboard/      metrics for TensorBoard, if it is installed
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vllama_jax.checkpoints.digests import check_checkpoint, list_checkpoint_steps, write_digests
from vllama_jax.checkpoints.directory import BaseReference, ModelDirectory, read_config, write_config
from vllama_jax.checkpoints.restore import restore_arrays, unflatten_paths
from vllama_jax.config import describe_changes, flatten_fields, from_dict
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.atomic import check_output_files, ensure_directory, lock_directory, replace_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.jsonl import AtomicWriteFile, StoreFile
from vllama_jax.io.leases import LEASE
from vllama_jax.io.paths import is_store_path, list_file_sizes
from vllama_jax.runtime.coordination import decide, gather
from vllama_jax.train.config import CheckpointConfig, TrainConfig, rename_fields
from vllama_jax.train.custom import check_custom
from vllama_jax.train.state import TrainState

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl")
logger = logging.getLogger(__name__)

# Fields that may change when a run is resumed, because they do not change its result. A name includes nested fields.
MUTABLE_FIELDS = (
    "model",
    "mesh",
    "remat_policy",
    "checkpoint",
    "validation",
    "data.num_threads",
    "data.num_workers",
    "data.prefetch",
)
ANY_INTEGER = range(2**63)  # for integers in config.json; TrainConfig checks them
LAST_SAVED = "last_saved.json"  # {"step": N}, so that a run whose checkpoints were removed does not start from scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """The fields of a run's config.json other than its TrainConfig and its base model.

    Attributes:
        compute_dtype: Dtype of frozen parameters and of matrix products.
        inputs: Digests of the other directories that the run reads, by the config field with their path. None in runs
            of earlier versions.
        custom: The custom loss and optimizer, as `describe_custom` returns them. None if there are none.
    """

    compute_dtype: str
    inputs: dict[str, str] | None = None
    custom: dict[str, str] | None = None


@contextlib.contextmanager
def open_run(
    out: Path,
    config: TrainConfig,
    base: ModelDirectory,
    dtype: str,
    inputs: Mapping[str, str],
    custom: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Create a run directory, or check that the run in it can be resumed with this config, and lock it.

    In other processes than the first one this does nothing.

    Args:
        out: The run directory.
        config: The config of the run.
        base: The base model.
        dtype: The name of the compute dtype.
        inputs: Digests of the other directories that the run reads, as `RunPlan.inputs` returns them.
        custom: The custom loss and optimizer, as `describe_custom` returns them.

    Raises:
        CheckpointError: `out` is a directory of another type, another process is training into it, or it cannot be
            written.
        ConfigError: The run in `out` has another config, base model, inputs, loss or optimizer, or its config.json is
            corrupt.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_directory(
            out, f"{out}: another process is training into it; wait for that one, or choose another --out"
        ):
            check_output_files(out, RUN_FILES)
            if (out / "config.json").exists():
                metadata = _check_run_config(out, config, base, dtype, inputs)
                check_custom(out, metadata.custom or {}, custom or {})
            elif unexpected := _unexpected_entries(out):
                raise CheckpointError(f"{out}: not a run directory (it has {unexpected[0]}); choose another --out")
            else:
                model = {"path": str(base.opened_path.absolute()), "digest": base.digest}
                fields = {"run": dataclasses.asdict(config), "base": model, "compute_dtype": dtype, "inputs": inputs}
                write_config(out, base.config, **fields, **({"custom": custom} if custom else {}))
            yield
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error


def _unexpected_entries(out: Path) -> list[str]:
    """List the entries of a directory without config.json, except the lease, and inputs/, which `prepare` creates."""
    return sorted(entry.name for entry in out.iterdir() if entry.name not in ("inputs", LEASE))


def _check_run_config(
    out: Path, config: TrainConfig, base: ModelDirectory, dtype: str, inputs: Mapping[str, str]
) -> RunMetadata:
    """Return the recorded fields of the run in `out`. Raise ConfigError if it is not this run.

    Directories may have moved: they are compared by digest.
    """
    fields = read_config(out)
    if not isinstance(fields.get("run"), dict):
        raise CheckpointError(f"{out}: a model directory, not a run; choose another --out")
    run, run_base, metadata = _read_metadata(out / "config.json", fields)
    before, now = _fixed_settings(run, metadata.compute_dtype), _fixed_settings(config, dtype)
    earlier = metadata.inputs or {}
    for name in inputs.keys() & earlier.keys():
        if inputs[name] != earlier[name]:
            raise ConfigError(
                f"{out}: {name} {now[name]}: the content has changed since the run was started; give the original, "
                "or choose another --out"
            )
        before[name] = now[name]
    if changed := describe_changes(before, now):
        differences = ", ".join(changed[:3])
        raise ConfigError(
            f"{out}: contains a run with another config ({differences}); give the same, or choose another --out"
        )
    if run_base.digest != base.digest:
        raise ConfigError(f"{out}: the run was started from another base model than {base.path}; give that one")
    return metadata


def _read_metadata(path: Path, fields: Mapping[str, Any]) -> tuple[TrainConfig, BaseReference, RunMetadata]:
    """Read the run config, the base model and the other fields from config.json of a run.

    Raises:
        ConfigError: A field is missing or invalid. The message contains its name.
    """
    try:
        run = from_dict(rename_fields(fields["run"]), TrainConfig, f"{path}: run", ANY_INTEGER)
        base = from_dict(fields.get("base"), BaseReference, f"{path}: base")
        names = [field.name for field in dataclasses.fields(RunMetadata) if field.name in fields]
        return run, base, from_dict({name: fields[name] for name in names}, RunMetadata, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; restore config.json from a backup, or choose another --out") from error


def _fixed_settings(config: TrainConfig, dtype: str) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed, by dotted name."""
    fields = dataclasses.asdict(config)
    fields["datasets"] = {str(number): dataset for number, dataset in enumerate(fields["datasets"])}
    settings = {name: value for name, value in flatten_fields(fields).items() if not _is_mutable(name)}
    return settings | {"compute_dtype": dtype}


def _is_mutable(name: str) -> bool:
    return any(f"{name}.".startswith(f"{free}.") for free in MUTABLE_FIELDS)


class Checkpoints:
    """The checkpoints of a run. Saving is asynchronous and atomic: the directory of a step is complete or absent."""

    def __init__(self, out: Path, cfg: CheckpointConfig):
        self._out = out
        self._cfg = cfg
        self._saving = 0

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's checkpoint manager. Created after `restore`, because it lists corrupt checkpoints too."""
        return ocp.CheckpointManager(
            self._out.absolute(),
            options=ocp.CheckpointManagerOptions(
                step_prefix="step",
                max_to_keep=self._cfg.max_to_keep,
                keep_period=self._cfg.keep_period or None,
                create=False,
                save_root_metadata=False,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
        )

    def _write_digests(self) -> None:
        """Write digests.json. Orbax calls this in the first process's saving thread, before renaming the directory."""
        partial = self._out / f"step_{self._saving}.orbax-checkpoint-tmp"
        write_digests(partial, self._saving)

    def save(self, step: int, state: TrainState) -> None:
        """Start to save a checkpoint. Call `finish` for the previous one first.

        Args:
            step: Number of steps done.
            state: The state after that step.

        Raises:
            CheckpointError: Saving failed at once. Later failures are raised by `finish`.
        """
        self._saving = step
        items = {"weights": ocp.args.PyTreeSave(unflatten_paths(state.weights))}
        if opt_state := leaves_by_path(state.opt_state):  # Orbax rejects an empty tree, such as plain SGD's state
            items["moments"] = ocp.args.PyTreeSave(unflatten_paths(opt_state))
        with self._translate_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(**items, iterator=ocp.args.JsonSave({"step": step, "digests": True})),
                force=True,  # otherwise Orbax skips a step below the largest in the directory
            )

    def finish(self) -> None:
        """Wait until the checkpoint is saved. Raise CheckpointError if that failed; earlier checkpoints are kept."""
        with self._translate_errors():
            self._manager.wait_until_finished()
            if jax.process_index() == 0 and self._saving:
                replace_json(self._out / LAST_SAVED, {"step": self._saving})
            self._saving = 0
        self._remove_partial()

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """Restore the last intact checkpoint.

        A corrupt checkpoint is reported in a warning. It is renamed to damaged_step_N after an earlier checkpoint has
        been restored. All processes restore the same checkpoint: the first process compares files with their digests.

        Args:
            abstract_state: The shapes and shardings of the state.

        Returns:
            The state, or None if the run has not saved a checkpoint yet.

        Raises:
            CheckpointError: There are checkpoints, but none can be read. Nothing is changed then.
        """
        corrupt_steps: list[int] = []
        while (step := decide(lambda: self._find_last_intact(corrupt_steps))) is not None:
            state = self._read(step, abstract_state)
            if state is not None:
                decide(lambda: self._rename_corrupt(corrupt_steps))
                return state
            corrupt_steps.append(step)
        return None

    def _find_last_intact(self, corrupt_steps: list[int]) -> int | None:
        """Return the step of the last intact checkpoint, or None if the run has not saved one yet.

        Args:
            corrupt_steps: Steps that could not be read. Those that are found corrupt are added.
        """
        steps, saved = list_checkpoint_steps(self._out), self._last_saved()
        if saved > max([0, *steps]) and not corrupt_steps:
            logger.warning(f"{self._out}/step_{saved}: missing; falling back to the previous checkpoint")
        for step in reversed(steps):
            if step in corrupt_steps:
                continue
            try:
                check_checkpoint(self._out / f"step_{step}")
                return step
            except CheckpointError as error:
                logger.warning(f"{error}; falling back to the previous checkpoint")
                corrupt_steps.append(step)
        if steps:
            raise CheckpointError(
                f"{self._out}: none of the {len(steps)} checkpoints can be read; restore their files and run the "
                "command again, or choose another --out to start a new run"
            )
        if corrupt := sorted(self._out.glob("damaged_step_*")):
            raise CheckpointError(
                f"{self._out}: {corrupt[0].name} could not be read, and there is no other checkpoint; rename it to "
                f"{corrupt[0].name.removeprefix('damaged_')} to try again, or choose another --out to start a new run"
            )
        if saved:
            raise CheckpointError(
                f"{self._out}: step_{saved} was saved, but no checkpoint is left; restore one from a backup, or choose "
                "another --out to start a new run"
            )
        return None

    def _last_saved(self) -> int:
        """Return the last step that was saved; 0 if none is recorded."""
        if not (self._out / LAST_SAVED).exists():
            return 0
        step = read_object(self._out / LAST_SAVED).get("step")
        return step if isinstance(step, int) else 0

    def _read(self, step: int, abstract_state: TrainState) -> TrainState | None:
        """Restore the state of a step. Return None if any of the processes cannot read it."""
        folder, readable = self._out / f"step_{step}", True
        try:
            weights = restore_arrays(folder / "weights", abstract_state.weights)
            opt_state = restore_arrays(folder / "moments", leaves_by_path(abstract_state.opt_state))
        except CheckpointError as error:
            logger.warning(f"{error}; falling back to the previous checkpoint")
            readable = False
        if not all(gather(readable)):
            return None
        step_count = jax.device_put(jax.numpy.int32(step), abstract_state.step.sharding)
        return TrainState(
            step_count, weights, jax.tree.unflatten(jax.tree.structure(abstract_state.opt_state), opt_state.values())
        )

    def size(self, step: int) -> int:
        """Return the size of a checkpoint, in bytes."""
        return sum(list_file_sizes(self._out / f"step_{step}").values())

    def _rename_corrupt(self, steps: list[int]) -> None:
        """Rename corrupt checkpoints to damaged_step_N, or damaged_step_N.2 and so on if that exists."""
        for step in steps:
            names = itertools.chain([f"damaged_step_{step}"], (f"damaged_step_{step}.{n}" for n in itertools.count(2)))
            free = next(path for path in map(self._out.joinpath, names) if not os.path.lexists(path))
            (self._out / f"step_{step}").rename(free)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate errors of Orbax to a CheckpointError of one line. A full disk raises errors of many types."""
        try:
            yield
        except Exception as error:  # Orbax raises errors of every type
            text = " ".join(str(error).split())
            system_error = re.search(r"\[Errno \d+\] ([^:]+)|([^:]+) \[os_error_code", text)
            reason = (system_error[1] or system_error[2]).strip() if system_error else text[:200]
            self._remove_partial()
            self._manager.reload()
            last = list_checkpoint_steps(self._out)
            kept = f"the last checkpoint is step {last[-1]}" if last else "there is no earlier one"
            failed, self._saving = self._saving, 0
            raise CheckpointError(
                f"{self._out}: the checkpoint of step {failed} could not be saved ({reason}); {kept}"
            ) from error

    def _remove_partial(self) -> None:
        """Remove partial files of a failed or killed save, which take the space that the next save needs.

        `finish` does so before each save. Threads of a failed save may still write files, which are removed before the
        next one. Orbax's own removal is not used: it runs in the background, and fails if another process removes the
        same files.
        """
        if jax.process_index() == 0:
            for partial in self._out.glob("step_*.orbax-checkpoint-tmp"):
                shutil.rmtree(partial, ignore_errors=True)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree of tuples and dicts by path, such as "0/mu/video_qformer/queries"."""

    def name(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def silence_orbax_save_logs() -> None:
    """Silence Orbax's messages about failed saves.

    It reports each failed write in many lines, through two loggers and `sys.unraisablehook`. `Checkpoints.finish`
    raises the error.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    original_hook = sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else original_hook(args)


class TensorBoardWriter:
    """A writer of scalars for TensorBoard, which does nothing if TensorBoard is not installed."""

    def __init__(self, folder: Path, first: int):
        """Open a new event file.

        Args:
            folder: The directory of event files.
            first: The step at which the run starts or resumes. TensorBoard hides later steps of earlier event files.
        """
        self._writer = None
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        ensure_directory(folder)
        self._event = event_pb2.Event
        path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._object = StoreFile(path) if is_store_path(path) else None
        self._writer = RecordWriter(self._object or AtomicWriteFile(path, "a"))
        self._write(file_version="brain.Event:2")
        self._write(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step. Raise OSError if that fails."""
        if self._writer is not None:
            scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
            self._write(step=step, summary={"value": scalars})

    def publish(self) -> None:
        """Write the events to the object store, if the run directory is there. Raise OSError if that fails."""
        if self._writer is not None and self._object is not None:
            self._object.publish()

    def _write(self, **fields: Any) -> None:
        assert self._writer is not None  # checked by callers
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
