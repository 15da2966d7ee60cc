"""Several processes that work together: how they find each other, and how all of them end when one does.

Each process shows that it is alive in the key-value store that JAX keeps in process 0. Process 0 declares one lost that
has shown nothing for LOST_AFTER seconds; the others notice by their connection when process 0 itself is lost. What went
wrong is written to the store too, so that every process prints the same line and ends, also one that waits in a
computation for the lost one. JAX's own checks take 100 seconds, and end a process from C++ with a stack trace.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vllama_jax.errors import ConfigError, VllamaError, format_os_error
from vllama_jax.runtime.interrupts import EXIT_CODE, SavedInterrupt, exit_now
from vllama_jax.train.relay import Relay

Result = TypeVar("Result")

STOP_CHECK_SECONDS = 1.0
HEARTBEAT_TIMEOUT = 25.0  # seconds without a sign of life; a busy host can keep a thread waiting for some
EXIT_TIMEOUT = 10.0  # seconds that process 0 waits for the others to read why it ends, at most
START_TIMEOUT = 300  # seconds until all processes have to be there
END_TIMEOUT = 7 * 24 * 3600  # seconds that the first process to finish waits for the last
# How errors of JAX's runtime begin, but for those of this process alone: its memory, what it was given.
STATUS = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): "
)
HEARTBEATS, FAILURES, ACKNOWLEDGED = "vllama/alive", "vllama/failed", "vllama/read"  # folders of the store


@contextlib.contextmanager
def join_processes(distributed: bool, *, preemption: bool) -> Iterator[None]:
    """Run the body as one of several processes, where `distributed`; JAX finds the others.

    When the body fails in one process, all end. The process that failed prints its own error and ends here.

    Args:
        distributed: Whether there are others.
        preemption: Whether SIGTERM is left to JAX's preemption service (train/stopping.py) and ends nothing by itself.

    Raises:
        ConfigError: The other processes cannot be found.
    """
    if not distributed:
        yield
        return
    job = _join(preemption)
    try:
        yield
    except SavedInterrupt:
        job.finish()
        raise
    except BaseException as error:
        job.fail(error)
        raise
    job.finish()


def call_on_process_zero_first(make: Callable[[], Result]) -> Result:
    """Call `make` in process 0, and after that in the others, which find the files that it made."""
    import jax

    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    if first:
        result = make()
    multihost_utils.sync_global_devices("process 0 has made its files")
    return result if first else make()


def _join(preemption: bool) -> "_Job":
    import jax
    from jax._src.clusters import ClusterEnv
    from jax._src.distributed import global_state

    jax.config.update("jax_enable_preemption_service", preemption)
    coordinator_address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        coordinator, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address, None, None, None, None, START_TIMEOUT
        )
        if coordinator is None or count is None or process is None:
            raise ConfigError(
                "--distributed: the other processes cannot be found; start it under Slurm, Open MPI or Kubernetes, "
                "or on a TPU pod"
            )
        job = _Job(process, count, coordinator)
        jax.distributed.initialize(
            job.coordinator, count, process, local_device_ids=devices, initialization_timeout=START_TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed: the other processes cannot be found ({error})") from error
    job.watch(global_state.client)
    return job


class _Job:
    """This process and the others, from their first contact to their common end."""

    def __init__(self, process: int, count: int, coordinator: str):
        self._process, self._count = process, count
        self._host = coordinator.rpartition(":")[0]
        self._relay = Relay(coordinator, self._on_coordinator_lost) if process else None
        self.coordinator = self._relay.address if self._relay else coordinator
        self._lost: set[int] = set()
        self._finished = threading.Event()
        self._ending = threading.Lock()  # taken once, by the thread that ends this process

    def watch(self, client: Any) -> None:
        """From now on, end this process when another one fails or is lost."""
        self._client = client
        if self._relay:
            self._send_heartbeat(0)
            self._relay.watch(silence_timeout=HEARTBEAT_TIMEOUT)
        self._last_heartbeats = {other: ("", time.monotonic()) for other in range(1, self._count)}
        self._watching = threading.Thread(target=self._watch, daemon=True, name="vllama-processes")
        self._watching.start()

    def finish(self) -> None:
        """Wait until every process has finished, and part from them."""
        import jax

        self._client.wait_at_barrier("vllama/finished", END_TIMEOUT * 1000)
        self._finished.set()
        self._watching.join()
        if self._relay:
            self._relay.watch(silence_timeout=0)
        jax.distributed.shutdown()
        if self._relay:
            self._relay.stop()

    def fail(self, error: BaseException) -> None:
        """Report an error of this process to the others, print it, and end this process."""
        if not isinstance(error, KeyboardInterrupt) and _may_be_caused_by_other_process(error):
            # The watching thread ends this process when it knows the cause.
            time.sleep(HEARTBEAT_TIMEOUT + 5 * STOP_CHECK_SECONDS)
        self._ending.acquire()
        self._write_failure(f"{self._process_name(self._process)} {_describe_error(error)}")
        code = 1
        if isinstance(error, VllamaError):
            _print(str(error))
        elif isinstance(error, OSError):
            _print(format_os_error(error))
        elif isinstance(error, KeyboardInterrupt):
            code = EXIT_CODE
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exception(error)
        self._end(code)

    def _watch(self) -> None:
        beat = 0
        while not self._finished.wait(STOP_CHECK_SECONDS):
            beat += 1
            try:
                if self._relay:
                    self._send_heartbeat(beat)
                else:
                    self._check_heartbeats()
                failure = self._read_failure()
            except RuntimeError:  # of JAX, when process 0 does not answer
                if self._relay and not self._finished.is_set():
                    self._on_coordinator_lost()
                continue
            if failure:
                self._exit_message(failure)
                self._end(1)

    def _send_heartbeat(self, beat: int) -> None:
        self._client.key_value_set(f"{HEARTBEATS}/{self._process}", f"{beat} {socket.gethostname()}", True)

    def _check_heartbeats(self) -> None:
        """In process 0: write to the store which process has shown nothing for too long."""
        shown = {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(HEARTBEATS)}
        now = time.monotonic()
        for other, (before, when) in self._last_heartbeats.items():
            if shown[other] != before:
                self._last_heartbeats[other] = shown[other], now
            elif now - when > HEARTBEAT_TIMEOUT:
                host = before.partition(" ")[2]
                self._lost.add(other)
                self._write_failure(
                    f"{self._process_name(other)} ({host}) was lost: no sign of life for {HEARTBEAT_TIMEOUT:.0f} s"
                )

    def _read_failure(self) -> str:
        """What went wrong first, and in which process; "" where nothing did."""
        return next((text for _, text in self._client.key_value_dir_get(FAILURES)), "")

    def _write_failure(self, text: str) -> None:
        with contextlib.suppress(RuntimeError):  # another one was written before, and stands
            self._client.key_value_set(f"{FAILURES}/first", text)

    def _on_coordinator_lost(self) -> None:
        """Process 0 has closed or broken its connection, or is silent; at the end of the job it may."""
        if not self._finished.is_set():
            self._exit_message(f"{self._process_name(0)} ({self._host}) was lost: its connection ended or is silent")
            exit_now(1)

    def _exit_message(self, failure: str) -> None:
        """Print what ends this process, unless another thread of it does."""
        self._ending.acquire()
        _print(f"{failure}; see its output, and run all processes again to resume")

    def _end(self, code: int) -> None:
        """End this process. Process 0 keeps the store, so it waits until the others have read why."""
        sys.stdout.flush()
        with contextlib.suppress(RuntimeError):
            if self._process:
                self._client.key_value_set(f"{ACKNOWLEDGED}/{self._process}", "", True)
            else:
                self._wait_for_readers()
        exit_now(code)

    def _wait_for_readers(self) -> None:
        start_time = time.monotonic()
        while time.monotonic() - start_time < EXIT_TIMEOUT:
            readers = {int(key.rpartition("/")[2]) for key, _ in self._client.key_value_dir_get(ACKNOWLEDGED)}
            if len(readers | self._lost) == self._count - 1:
                return
            time.sleep(STOP_CHECK_SECONDS / 5)

    def _process_name(self, process: int) -> str:
        return f"process {process} of {self._count}"


def _may_be_caused_by_other_process(error: BaseException | None) -> bool:
    """Whether an error may come from a computation that another process left: JAX raises several types for that."""
    while error is not None and not STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def _describe_error(error: BaseException) -> str:
    """What the other processes say of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    text = " ".join(str(error).split())
    return f"failed: {text}" if isinstance(error, VllamaError) else f"failed: {type(error).__name__}: {text}"


def _print(line: str) -> None:
    os.write(2, f"vllama: {' '.join(line.split())}\n".encode())
