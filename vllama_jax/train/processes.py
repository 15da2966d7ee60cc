"""Run several processes as one job: connect them, and end all of them when one fails or is lost.

Each process writes a heartbeat to the key-value store that JAX keeps in process 0. Process 0 declares a process lost if
its heartbeat has not changed for HEARTBEAT_TIMEOUT seconds. The other processes detect the loss of process 0 by their
connection to it. The first failure is written to the store too. Every process reads it, prints the same line and ends,
even if it waits in a computation for the lost process. JAX's own checks take 100 seconds and end a process from C++
with a stack trace.
"""

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vllama_jax.errors import ConfigError, VllamaError
from vllama_jax.runtime.coordination import (
    describe_process,
    find_store,
    pack_error,
    process_number,
    share_errors,
    unpack_error,
)
from vllama_jax.runtime.interrupts import EXIT_CODE, SavedInterrupt, exit_now
from vllama_jax.train.relay import Relay

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

STOP_CHECK_SECONDS = 1.0
HEARTBEAT_TIMEOUT = 25.0  # seconds; a busy host can delay a thread by some
EXIT_TIMEOUT = 10.0  # seconds that process 0 waits, at most, for the others to read why it ends
START_TIMEOUT = 300  # seconds until all processes must have started
END_TIMEOUT = 7 * 24 * 3600  # seconds that the first process to finish waits for the last
# Status codes of JAX runtime errors that another process can cause. RESOURCE_EXHAUSTED and INVALID_ARGUMENT cannot.
STATUS = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): "
)
RESTART_HINT = "; see its output, and run all processes again to resume"
HEARTBEATS, FAILURES, ACKNOWLEDGED = "vllama/alive", "vllama/failed", "vllama/read"  # folders of the store


@contextlib.contextmanager
def join_processes(distributed: bool, *, preemption: bool) -> Iterator[None]:
    """Run the body as one of several processes if `distributed`.

    JAX detects the others under Slurm, Open MPI and Kubernetes, and on TPU pods. Elsewhere the environment variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the job.

    If the body fails in one process, all processes print the same line and end with exit code 1. For an error that is
    not a `VllamaError`, the process that failed prints the traceback instead.

    Args:
        distributed: Whether there are several processes. Otherwise this does nothing.
        preemption: Whether JAX's preemption service handles SIGTERM (train/stopping.py), which then does not end the
            process.

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
    """Call `make` in process 0, and then in the other processes, which find the files that process 0 made.

    Raises:
        VllamaError: `make` failed in a process. All processes raise the same error.
    """
    if find_store() is None:
        return make()
    import jax

    jax.devices()  # this waits for all processes, so it must not happen in one of them only
    results: list[Result] = []
    for is_turn in (process_number() == 0, process_number() > 0):
        with share_errors():
            results += [make()] if is_turn else []
    return results[0]


def _join(preemption: bool) -> "_Job":
    import jax
    from jax._src.clusters import ClusterEnv
    from jax._src.distributed import global_state

    jax.config.update("jax_enable_preemption_service", preemption)
    coordinator_address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    given_count, given_process = (_read_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        coordinator, count, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address, given_count, given_process, None, None, START_TIMEOUT
        )
        if coordinator is None or count is None or process is None:
            raise ConfigError(
                "--distributed: the other processes cannot be found; start it under Slurm, Open MPI or Kubernetes, "
                "or on a TPU pod, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            )
        if not 0 <= process < count or ":" not in coordinator:
            raise ConfigError(
                f"--distributed: process {process} of {count} with coordinator {coordinator} is not possible; numbers "
                "start at 0, and the coordinator is HOST:PORT"
            )
        job = _Job(process, count, coordinator)
        jax.distributed.initialize(
            job.coordinator, count, process, local_device_ids=devices, initialization_timeout=START_TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed: the other processes cannot be found ({error})") from error
    job.watch(global_state.client)
    return job


def _read_number(variable: str) -> int | None:
    """Read a number from the environment. Return None if the variable is not set."""
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise ConfigError(f"{variable} is {text!r}: must be a number")
    return None if text is None else int(text)


class _Job:
    """A job of several processes, seen from one of them: heartbeats, failures and exit."""

    def __init__(self, process: int, count: int, coordinator: str):
        self._process, self._count = process, count
        self._name = describe_process(process, count, socket.gethostname())
        self._coordinator_name = describe_process(0, count, coordinator.rpartition(":")[0])
        self._relay = Relay(coordinator, self._on_coordinator_lost) if process else None
        self.coordinator = self._relay.address if self._relay else coordinator
        self._lost: set[int] = set()
        self._finished = threading.Event()
        self._ending = threading.Lock()  # taken once, by the thread that ends this process

    def watch(self, client: Any) -> None:
        """Start a thread that ends this process when another one fails or is lost."""
        self._client = client
        if self._relay:
            self._send_heartbeat(0)
            self._relay.watch(silence_timeout=HEARTBEAT_TIMEOUT)
        self._last_heartbeats = {other: ("", time.monotonic()) for other in range(1, self._count)}
        self._watching = threading.Thread(target=self._watch, daemon=True, name="vllama-processes")
        self._watching.start()

    def finish(self) -> None:
        """Wait until every process has finished, and disconnect."""
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
        """Report an error of this process to the others, print the first error of the job, and end this process."""
        if not isinstance(error, KeyboardInterrupt) and _may_be_caused_by_other_process(error):
            # The thread of `watch` ends this process when it has read the cause.
            time.sleep(HEARTBEAT_TIMEOUT + 5 * STOP_CHECK_SECONDS)
        self._ending.acquire()
        line = self._describe_failure(error)
        self._write_failure(line)
        code = 1
        if isinstance(error, (VllamaError, OSError)):
            with contextlib.suppress(RuntimeError):  # process 0 does not answer
                line = self._read_failure() or line
            _print(line)
        elif isinstance(error, KeyboardInterrupt):
            code = EXIT_CODE
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exception(error)
        self._end(code)

    def _describe_failure(self, error: BaseException) -> str:
        """Return the line that all processes print about an error of this process."""
        if isinstance(error, VllamaError) and error.in_all_processes:
            return str(error)
        if isinstance(error, Exception):
            return str(unpack_error(pack_error(error)))
        what = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"ended by {error!r}"
        return f"{self._name} {what}{RESTART_HINT}"

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
        """In process 0, write to the store which process has sent no heartbeat for too long."""
        heartbeats = {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(HEARTBEATS)}
        now = time.monotonic()
        for other, (before, when) in self._last_heartbeats.items():
            if heartbeats[other] != before:
                self._last_heartbeats[other] = heartbeats[other], now
            elif now - when > HEARTBEAT_TIMEOUT:
                host = before.partition(" ")[2]
                self._lost.add(other)
                name = describe_process(other, self._count, host)
                self._write_failure(f"{name} was lost: no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s{RESTART_HINT}")

    def _read_failure(self) -> str:
        """Return the first failure and its process; "" if there is none."""
        return next((text for _, text in self._client.key_value_dir_get(FAILURES)), "")

    def _write_failure(self, text: str) -> None:
        with contextlib.suppress(RuntimeError):  # another failure was written first, and remains
            self._client.key_value_set(f"{FAILURES}/first", text)

    def _on_coordinator_lost(self) -> None:
        """End this process because the connection to process 0 ended or is silent, unless the job has finished."""
        if not self._finished.is_set():
            self._exit_message(f"{self._coordinator_name} was lost: its connection ended or is silent{RESTART_HINT}")
            exit_now(1)

    def _exit_message(self, failure: str) -> None:
        """Print the failure that ends this process, unless another thread is ending it."""
        self._ending.acquire()
        _print(failure)

    def _end(self, code: int) -> None:
        """End this process. Process 0 holds the store, so it waits until the others have read the failure."""
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


def _may_be_caused_by_other_process(error: BaseException | None) -> bool:
    """Return whether another process may have caused an error by leaving a computation: JAX raises several types."""
    while error is not None and not STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def _print(line: str) -> None:
    logger.info(line)
    with contextlib.suppress(OSError):  # stderr is closed: the process must end all the same
        os.write(2, f"vllama: {' '.join(line.split())}\n".encode())
