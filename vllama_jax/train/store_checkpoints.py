"""Checkpoints of a run directory on an object store.

step_N/weights/, step_N/moments/   arrays (checkpoints/store_arrays.py), of which each process writes its shards
step_N/process_K.json              size and digest of each object that process K wrote, for all processes but the first
step_N/digests.json                the same of the whole checkpoint: written last, by the first process

A store has no rename, so digests.json is the commit marker: a step without it is a partial checkpoint and is ignored.
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
from orbax.checkpoint import multihost

from vllama_jax.checkpoints.digests import DIGESTS, DIGESTS_FORMAT, NAME, FileDigest, list_checkpoint_steps
from vllama_jax.checkpoints.store_arrays import HostArray, copy_shards, write_arrays
from vllama_jax.errors import CheckpointError, format_error
from vllama_jax.io.atomic import write_json
from vllama_jax.io.json_files import read_object
from vllama_jax.io.leases import LEASE, check_lease
from vllama_jax.io.paths import is_store_path
from vllama_jax.io.store_path import StorePath
from vllama_jax.runtime.coordination import decide
from vllama_jax.train.config import CheckpointConfig
from vllama_jax.train.run_directory import LAST_SAVED, Checkpoints, leaves_by_path
from vllama_jax.train.state import TrainState

DAMAGED = "damaged_digests.json"  # digests.json of a corrupt checkpoint
BARRIER_TIMEOUT = 30 * 60  # seconds that a process waits for the uploads of the others


def open_checkpoints(out: Path, cfg: CheckpointConfig) -> Checkpoints:
    """Return the checkpoints of a run directory, local or on an object store."""
    return StoreCheckpoints(out, cfg) if is_store_path(out) else Checkpoints(out, cfg)


class StoreCheckpoints(Checkpoints):
    """The checkpoints of a run on an object store. Saving is asynchronous: shards are copied to the host at once."""

    def __init__(self, out: StorePath, cfg: CheckpointConfig):
        super().__init__(cast(Path, out), cfg)
        self._store: Any = out  # a StorePath has the methods of a Path
        self._uploads = concurrent.futures.ThreadPoolExecutor(1, "vllama-save")
        self._upload: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Start to save a checkpoint; see `Checkpoints.save`."""
        self._saving = step
        parts = {"weights": state.weights, "moments": leaves_by_path(state.opt_state)}
        copied = {part: {path: copy_shards(array) for path, array in arrays.items()} for part, arrays in parts.items()}
        self._upload = self._uploads.submit(self._write, step, copied)

    def finish(self) -> None:
        """Wait until the checkpoint is saved. Raise CheckpointError if that failed; earlier checkpoints are kept."""
        upload, self._upload, step = self._upload, None, self._saving
        if upload is None:
            return
        self._saving = 0
        try:
            upload.result()
        except CheckpointError:
            raise
        except Exception as error:  # of the store, or of a barrier that timed out
            reason = getattr(error, "strerror", None) or format_error(error)
            raise CheckpointError(
                f"{self._store}: the checkpoint of step {step} could not be saved ({reason}); earlier ones are kept"
            ) from error

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """Restore the last intact checkpoint; see `Checkpoints.restore`. Partial checkpoints are removed."""
        decide(self._remove_partial)
        return super().restore(abstract_state)

    def _folder(self, step: int) -> Any:
        return self._store / f"step_{step}"

    def _write(self, step: int, parts: Mapping[str, Mapping[str, HostArray]]) -> None:
        """Upload this process's shards. In the first process, commit the checkpoint when all have uploaded theirs."""
        folder, first = self._folder(step), jax.process_index() == 0
        barrier = multihost.get_barrier_sync_fn()

        def wait_for_all(phase: str) -> None:
            barrier(key=f"vllama {phase} {step}", timeout_ms=BARRIER_TIMEOUT * 1000)

        try:
            if first:
                folder.rmtree()  # of a killed save, or of a corrupt checkpoint
        finally:
            wait_for_all("clear")
        try:
            files: dict[str, FileDigest] = {}
            for part, arrays in parts.items():
                if arrays:
                    files |= {f"{part}/{name}": one for name, one in write_arrays(folder / part, arrays, first).items()}
            if not first:
                write_json(folder / _process_file(jax.process_index()), _as_fields(files))
        finally:
            wait_for_all("upload")
        try:
            if first:
                self._commit(step, files)
        finally:
            wait_for_all("commit")

    def _commit(self, step: int, files: dict[str, FileDigest]) -> None:
        """Write digests.json with the files of all processes, and remove checkpoints that are no longer kept."""
        folder = self._folder(step)
        check_lease(self._store / LEASE)
        entries = _as_fields(files)
        for process in range(1, jax.process_count()):
            entries |= read_object(folder / _process_file(process))
        write_json(folder / DIGESTS, {"format": DIGESTS_FORMAT, "step": step, "files": entries})
        write_json(self._store / LAST_SAVED, {"step": step})
        steps = list_checkpoint_steps(self._out)
        for old in steps[: -self._cfg.max_to_keep]:
            if not (self._cfg.keep_period and old % self._cfg.keep_period == 0):
                (self._folder(old) / DIGESTS).unlink(missing_ok=True)
                self._folder(old).rmtree()

    def _rename_corrupt(self, steps: list[int]) -> None:
        """Remove the commit marker of corrupt checkpoints; they stay until their step is saved again."""
        for step in steps:
            digests = self._folder(step) / DIGESTS
            if digests.exists():
                (self._folder(step) / DAMAGED).write_bytes(digests.read_bytes())
                digests.unlink()

    def _remove_partial(self) -> None:
        """Remove checkpoints without a commit marker, which a killed save left."""
        for folder in self._store.iterdir() if self._store.exists() else ():
            if NAME.fullmatch(folder.name) and not any((folder / name).exists() for name in (DIGESTS, DAMAGED)):
                folder.rmtree()


def _process_file(process: int) -> str:
    return f"process_{process}.json"


def _as_fields(files: Mapping[str, FileDigest]) -> dict[str, Any]:
    return {name: dataclasses.asdict(digest) for name, digest in files.items()}
