"""Run directories: what a run is, how far it came, and what it learned.

config.json       the run's config, its base model's path and digest     step_N/   weights, moments, iterator (Orbax)
metrics.jsonl     one object for each step                               quarantine.jsonl   samples that were not used
samples.jsonl     answers about fixed clips                    tensorboard/   the same for TensorBoard, if installed
"""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vllama_jax.checkpoint import ModelDirectory, nest, restore_arrays, run_steps, write_config
from vllama_jax.config import changes, flat
from vllama_jax.errors import CheckpointError, ConfigError
from vllama_jax.io.atomic import check_output_files, locked, own_directory
from vllama_jax.io.json_files import read_object
from vllama_jax.journal import WholeFile
from vllama_jax.train.config import CheckpointConfig, TrainConfig
from vllama_jax.train.state import TrainState

OUTPUT_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl")
logger = logging.getLogger(__name__)

# What may differ when a run is taken up again: nothing that changes what is learned.
FREE_FIELDS = (
    "model",
    "mesh",
    "remat",
    "checkpoint",
    "validation",
    "data.threads",
    "data.processes",
    "data.prefetch",
)


@contextlib.contextmanager
def open_run(out: Path, config: TrainConfig, base: ModelDirectory, dtype: str) -> Iterator[None]:
    """Makes `out` a run directory, or takes up the one that it is, and keeps other processes off it.

    Raises CheckpointError when it is another kind of directory, when another process trains into it, and when it
    cannot be written; ConfigError when the run in it has another config or base.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, f"{out}: another process is training into it; wait for that one, or choose another --out"):
            check_output_files(out, OUTPUT_FILES)
            if (out / "config.json").exists():
                _check_same(out, config, base, dtype)
            elif strangers := _strangers(out):
                raise CheckpointError(f"{out}: not a run directory (it has {strangers[0]}); choose another --out")
            else:
                where = {"path": str(base.opened.absolute()), "digest": base.digest}
                fields = {"run": dataclasses.asdict(config), "base": where, "compute_dtype": dtype}
                write_config(out, base.config, **fields)
            yield
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error


def _strangers(out: Path) -> list[str]:
    return sorted(entry.name for entry in out.iterdir() if entry.name != "inputs")


def _check_same(out: Path, config: TrainConfig, base: ModelDirectory, dtype: str) -> None:
    """Whether the run in `out` is this one."""
    fields = read_object(out / "config.json")
    if not isinstance(fields.get("run"), dict):
        raise CheckpointError(f"{out}: a model directory, not a run; choose another --out")
    before, now = _settings(fields["run"]), _settings(json.loads(json.dumps(dataclasses.asdict(config))))
    before["compute_dtype"], now["compute_dtype"] = fields["compute_dtype"], dtype
    if changed := changes(before, now):
        told = ", ".join(changed[:3])
        raise ConfigError(f"{out}: holds a run with another config ({told}); give the same, or choose another --out")
    if fields["base"]["digest"] != base.digest:
        raise ConfigError(f"{out}: its run was started from another base model than {base.path}; name that one")


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without what may change when it goes on."""
    return {name: value for name, value in flat(run).items() if not name.startswith(FREE_FIELDS)}


class Checkpoints:
    """The checkpoints of a run. Saving is asynchronous and atomic: a step's directory is whole, or not there."""

    def __init__(self, out: Path, cfg: CheckpointConfig):
        self._out = out
        self._saving = 0
        self._manager = ocp.CheckpointManager(
            out.absolute(),
            options=ocp.CheckpointManagerOptions(
                step_prefix="step",
                max_to_keep=cfg.keep_last,
                keep_period=cfg.keep_every or None,
                create=False,
                save_root_metadata=False,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving, when `finish` has seen the save before. Raises CheckpointError when that fails at once."""
        self._saving = step
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.PyTreeSave(nest(state.weights)),
                    moments=ocp.args.PyTreeSave(nest(_by_path(state.moments))),
                    iterator=ocp.args.JsonSave({"step": step}),
                ),
            )

    def finish(self) -> None:
        """Waits for what is being saved. Raises CheckpointError when that fails; what was saved before stays."""
        with self._told():
            self._manager.wait_until_finished()
        self._remove_partial()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The last good state, in the shapes and shardings of `abstract`; None where there is none yet.

        A checkpoint that cannot be read is named in a warning, and put aside once one before it was read.
        Raises CheckpointError when there are some, and none can be read: nothing is changed then.
        """
        steps, unread = run_steps(self._out), []
        for step in reversed(steps):
            folder = self._out / f"step_{step}"
            try:
                weights = restore_arrays(folder / "weights", abstract.weights)
                moments = restore_arrays(folder / "moments", _by_path(abstract.moments))
            except CheckpointError as error:
                logger.warning(f"{error}; going back to the checkpoint before it")
                unread.append(folder)
                continue
            for damaged in unread:
                self._put_aside(damaged)
            counted = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
            return TrainState(
                counted, weights, jax.tree.unflatten(jax.tree.structure(abstract.moments), moments.values())
            )
        if steps:
            raise CheckpointError(
                f"{self._out}: none of its {len(steps)} checkpoints can be read; run it again once their files can be, "
                "or choose another --out to start anew"
            )
        if damaged := sorted(self._out.glob("damaged_step_*")):
            raise CheckpointError(
                f"{self._out}: {damaged[0].name} could not be read, and there is no other checkpoint; rename it to "
                f"{damaged[0].name.removeprefix('damaged_')} to try it again, or choose another --out to start anew"
            )
        return None

    def size(self, step: int) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in (self._out / f"step_{step}").rglob("*") if file.is_file())

    def _put_aside(self, folder: Path) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(folder.with_name(f"damaged_{folder.name}"), ignore_errors=True)
            folder.rename(folder.with_name(f"damaged_{folder.name}"))
        self._manager.reload()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of Orbax in one line, whatever they are: a full disk comes as many kinds of errors."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            said_by_system = re.search(r"\[Errno \d+\] ([^:]+)|([^:]+) \[os_error_code", text)
            reason = (said_by_system[1] or said_by_system[2]).strip() if said_by_system else text[:200]
            self._remove_partial()
            self._manager.reload()
            last = run_steps(self._out)
            kept = f"the last good one is step {last[-1]}" if last else "there is none before it"
            what = f"the checkpoint of step {self._saving}"
            raise CheckpointError(f"{self._out}: {what} could not be saved ({reason}); {kept}") from error

    def _remove_partial(self) -> None:
        """What a failed save left takes the room that the next one needs. Some of its writers may still be at work when
        it fails, and leave files again, which go with the save after it or when the run is taken up.
        """
        if jax.process_index() == 0:
            for partial in self._out.glob("step_*.orbax-checkpoint-tmp"):
                shutil.rmtree(partial, ignore_errors=True)


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of tuples and dicts by path."""

    def name(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def hush_failed_saves() -> None:
    """Orbax tells of each write of a failed save in many lines, in three ways; what counts is raised by `finish`."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tell = sys.unraisablehook
    sys.unraisablehook = lambda told: None if str(told.exc_value) == "Event loop is closed" else tell(told)


class Board:
    """Numbers by step in TensorBoard's format; none are written where it is not installed."""

    def __init__(self, folder: Path, first: int):
        """first: the step that the run starts at; what an earlier process wrote of later ones is not shown."""
        self._writer = None
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        own_directory(folder)
        self._event = event_pb2.Event
        self._writer = RecordWriter(WholeFile(folder / f"events.out.tfevents.{time.time_ns()}", "a"))
        self._write(file_version="brain.Event:2")
        self._write(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Raises OSError when they cannot be written."""
        if self._writer is not None:
            scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
            self._write(step=step, summary={"value": scalars})

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
