"""Combine what each host knows about a batch: the padded length, unusable records, and the time spent waiting.

Each host tokenizes its own rows only, so it does not know the length that the longest text of the global batch needs.
It sends the length of its rows to process 0, which answers with the largest one. This happens where batches are read
ahead, in the key-value store of `runtime/coordination.py`, so no step waits for it. An error in reading a batch is
reported the same way, and all processes raise it.
"""

import concurrent.futures
import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vllama_jax.data.pipeline import HostBatch
from vllama_jax.data.tokenization import extend_padding
from vllama_jax.runtime.coordination import (
    find_store,
    num_processes,
    pack_error,
    process_number,
    unique_key,
    unpack_error,
)

POLL_MS = 1000  # the longest time that `close` waits for a thread that reads a batch


class BatchExchange:
    """Exchanges short reports on batches between the processes. With a single process it does nothing.

    Args:
        rows: The rows of the global batch that this process reads.
    """

    def __init__(self, rows: Sequence[int]):
        self._rows = list(rows)
        self._store = find_store()
        self._key = unique_key("batches")
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop waiting for other processes, which may no longer read batches."""
        self._closed.set()

    def read(self, name: str | int, read: Callable[[], HostBatch]) -> HostBatch:
        """Read this process's rows of a batch, and pad them to the length of the global batch.

        Threads may call this concurrently, for different batches.

        Args:
            name: The step of the batch, or another name that all processes use for this batch only.
            read: Reads this process's rows.

        Returns:
            The batch. In process 0, with the unusable records of all processes.

        Raises:
            VllamaError: A process could not read its rows. All processes raise the same error.
        """
        if self._store is None:
            return read()
        try:
            batch = read()
        except Exception as error:  # the other processes must learn of any error
            report = {"error": pack_error(error)}
            self._set(f"{name}/{process_number()}", report)
            if process_number() == 0:
                self._set(f"{name}/agreed", report)
            raise
        length = batch.arrays["ids"].shape[1]
        problems = [(self._rows[row], batch.names[row], why) for row, why in batch.problems.items()]
        self._set(f"{name}/{process_number()}", {"length": length, "problems": problems})
        if process_number() == 0:
            batch = self._combine(str(name), batch)
        agreed = self._get(f"{name}/agreed")
        if "error" in agreed:
            raise unpack_error(agreed["error"])
        return dataclasses.replace(batch, arrays=extend_padding(batch.arrays, agreed["length"]))

    def _combine(self, name: str, batch: HostBatch) -> HostBatch:
        """In process 0, answer with the padded length, or an error. Return the batch with all unusable records."""
        reports = [self._get(f"{name}/{process}") for process in range(num_processes())]
        if failed := [report for report in reports if "error" in report]:
            self._set(f"{name}/agreed", failed[0])
            return batch
        self._set(f"{name}/agreed", {"length": max(report["length"] for report in reports)})
        masked = {row: (record, why) for report in reports for row, record, why in report["problems"]}
        remote = [masked[row] for row in sorted(masked.keys() - set(self._rows))]  # hosts may have rows in common
        return dataclasses.replace(batch, remote_problems=tuple(remote))

    def report_wait(self, step: int, seconds: float) -> None:
        """Report the time that this process waited for the data of a step. Call it before the step is dispatched.

        Args:
            step: The step.
            seconds: The time.
        """
        if self._store is not None and process_number() > 0:
            self._set(f"{step}/waited/{process_number()}", seconds)

    def longest_wait(self, step: int, seconds: float) -> float:
        """Return the longest time that a process waited for the data of a step that is done, in process 0.

        A step is done when all processes have dispatched it, so all reports are there. They are removed (`remove`).

        Args:
            step: The step.
            seconds: The time that this process waited. Processes other than 0 return it.
        """
        if self._store is None or process_number() > 0:
            return seconds
        reports = self._store.key_value_dir_get(f"{self._key}/{step}/waited")
        self.remove(step)
        return max([seconds, *(json.loads(text) for _, text in reports)])

    def remove(self, name: str | int) -> None:
        """Remove the reports on a batch that all processes have used, in process 0.

        Args:
            name: The name of the batch in `read`.
        """
        if self._store is not None and process_number() == 0:
            self._store.key_value_delete(f"{self._key}/{name}")

    def _set(self, key: str, value: Any) -> None:
        self._store.key_value_set(f"{self._key}/{key}", json.dumps(value))

    def _get(self, key: str) -> Any:
        """Wait for a value. Raise CancelledError if this exchange is closed."""
        while not self._closed.is_set():
            try:
                return json.loads(self._store.blocking_key_value_get(f"{self._key}/{key}", POLL_MS))
            except RuntimeError as error:  # JAX's type of all errors of the store
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise concurrent.futures.CancelledError
