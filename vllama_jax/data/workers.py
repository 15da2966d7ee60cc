"""Worker processes that compute results ahead of time. If one dies, the caller gets one clear error.

Each worker has its own pipe for results. Only the worker can write to it, so the end of the pipe means that the worker
has ended, even within a result. With a queue that processes share, the caller would wait for the rest of the result.
A worker runs this module, not the caller's script, so scripts need no `if __name__ == "__main__"`.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any, BinaryIO, Self, TypeVar

from vllama_jax.errors import VllamaError
from vllama_jax.io.prefetch import map_in_order

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    ahead: int = 2,
    finish: Callable[[Item, Callable[[], Result]], Result] = lambda item, receive: receive(),
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order, from workers that end with this generator.

    See `WorkerPool.map` for arguments and errors.
    """
    with WorkerPool(processes) as workers:
        yield from workers.map(function, items, ahead, finish)


class WorkerPool:
    """A pool of worker processes, which start when they are first needed and run until `close`."""

    def __init__(self, processes: int):
        self._processes = processes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        ahead: int = 2,
        finish: Callable[[Item, Callable[[], Result]], Result] = lambda item, receive: receive(),
    ) -> Generator[Result, None, None]:
        """Yield `function(item)` for each item, in order.

        Args:
            function: A picklable function, which the workers call.
            items: Distributed over the workers in turn.
            ahead: Maximum number of results of each worker that are being computed or ready: one in this process, and
                the others (at least one) in the worker, which computes them in threads.
            finish: Called in threads of this process with an item and a function that receives its result. It returns
                the final result.

        Yields:
            The final results.

        Raises:
            VllamaError: A worker ended early, or `function` raised an error.
        """
        if not self._workers:
            self._workers = [_Worker() for _ in range(self._processes)]
        workers, done = self._workers, False
        problems: list[VllamaError] = []

        def receive(number: int) -> Result:
            try:
                return finish(items[number], workers[number % len(workers)].receive)
            except VllamaError as error:
                problems.append(error)
                for worker in workers:  # so that the threads that wait for the others end
                    worker.kill()
                raise problems[0] from error

        # With as many threads as workers, no two threads wait for the same worker.
        results = map_in_order(receive, range(len(items)), len(workers))
        try:
            for first, worker in enumerate(workers):
                worker.submit(function, items[first :: len(workers)], ahead)
            for result in results:  # noqa: UP028
                yield result  # `yield from` would wait for the threads before the workers are killed
            done = True
        finally:
            if not done:
                self.close()
            results.close()


class _Worker:
    """A handle of a worker process, for the process that uses it."""

    def __init__(self) -> None:
        program = f"import sys; sys.path[:] = {sys.path!r}; from vllama_jax.data import workers; workers.run_worker()"
        # In its own process group, Ctrl-C on a terminal reaches only the command, which then kills its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._results = self._process.stdin, self._process.stdout

    def submit(self, function: Callable[[Any], Any], items: Sequence[Any], ahead: int) -> None:
        """Send the worker a function and its items."""
        task = pickle.dumps((function, items, ahead))
        with contextlib.suppress(BrokenPipeError):  # the worker has ended; `receive` reports it
            self._tasks.write(task)
            self._tasks.flush()

    def receive(self) -> Any:
        """Wait for the next result. Raises VllamaError if the worker has ended."""
        try:
            result, problem = pickle.load(self._results)
        except (EOFError, pickle.UnpicklingError) as error:
            raise VllamaError(_describe_exit(self._process.wait())) from error
        if problem is not None:
            raise problem
        return result

    def kill(self) -> None:
        """Kill the worker."""
        self._process.kill()

    def wait(self) -> None:
        """Release the resources of a killed worker."""
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._tasks.close()
        self._results.close()


def _describe_exit(code: int) -> str:
    """Return the error message for a worker that ended with an exit code."""
    if code == -signal.SIGKILL:
        return (
            "a worker process was killed (SIGKILL), as Linux does when memory runs out; "
            "free memory or use fewer workers, and run it again"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a worker process {how} before its work was done; run it again"


def run_worker() -> None:
    """Run a worker: read tasks from stdin and write results to stdout, until the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the results
    tasks: queue.SimpleQueue[tuple[Callable[[Any], Any], Sequence[Any], int]] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        _run_task(*tasks.get(), results)


def _read_tasks(tasks: queue.SimpleQueue) -> None:
    """Queue tasks, and end the process, even within a task, when the parent process has ended."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    os._exit(0)


def _run_task(function: Callable[[Any], Any], items: Sequence[Any], ahead: int, results: BinaryIO) -> None:
    """Write (result, None) for each item. An error is written as (None, error) and ends the task."""
    try:
        for result in map_in_order(function, items, max(ahead - 1, 1)):
            _write(results, pickle.dumps((result, None), pickle.HIGHEST_PROTOCOL))
    except VllamaError as error:
        _write(results, pickle.dumps((None, error)))
    except Exception as error:  # the parent process must learn of any error
        problem = VllamaError(f"a worker process failed: {type(error).__name__}: {' '.join(str(error).split())}")
        problem.add_note(traceback.format_exc())
        _write(results, pickle.dumps((None, problem)))


def _write(results: BinaryIO, pair: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent process has ended, and this one will
        results.write(pair)
        results.flush()
