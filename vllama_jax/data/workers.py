"""Worker processes that compute ahead of whoever takes their results, and whose death is one clear error.

Each worker has a pipe of its own for its results. Only the worker can write to it, so the end of the pipe means that
the worker has ended, even in the middle of a result; a queue that processes share would wait for the rest of it.
A worker runs this module and not the caller's script, so the script needs no `if __name__ == "__main__"`.
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
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, ahead: int = 2
) -> Generator[Result, None, None]:
    """Yield `function` of each item, in the items' order, from workers that end with this iterator: `Workers.map`."""
    with WorkerPool(processes) as workers:
        yield from workers.map(function, items, ahead)


class WorkerPool:
    """Worker processes, started when they are first needed and kept until `close`."""

    def __init__(self, processes: int):
        self._processes = processes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], ahead: int = 2
    ) -> Generator[Result, None, None]:
        """Yield `function` of each item, in the items' order.

        Args:
            function: Anything that can be pickled; it is called in the workers.
            items: Dealt out to the workers in turn.
            ahead: How many results of each worker are under way or ready, at most: one here, and the others (at least
                one) in the worker, which computes them in threads.

        Raises:
            VllamaError: A worker ended before its work was done, or `function` raised it, or anything else.
        """
        if not self._workers:
            self._workers = [_Worker() for _ in range(self._processes)]
        workers, done = self._workers, False
        problems: list[VllamaError] = []

        def receive(number: int) -> Result:
            try:
                return workers[number % len(workers)].receive()
            except VllamaError as error:
                problems.append(error)
                for worker in workers:  # else the threads that wait for the others keep this one waiting
                    worker.kill()
                raise problems[0] from error

        # As many threads as workers: no two of them wait for the same worker.
        results = map_in_order(receive, range(len(items)), len(workers))
        try:
            for first, worker in enumerate(workers):
                worker.submit(function, items[first :: len(workers)], ahead)
            for result in results:  # noqa: UP028
                yield result  # `yield from` would wait for the threads before the workers are ended
            done = True
        finally:
            if not done:
                self.close()
            results.close()


class _Worker:
    """One worker process, seen from the process that uses it."""

    def __init__(self) -> None:
        program = f"import sys; sys.path[:] = {sys.path!r}; from vllama_jax.data import workers; workers.run_worker()"
        # A process group of its own: Ctrl-C on a terminal reaches the command only, which then ends its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._results = self._process.stdin, self._process.stdout

    def submit(self, function: Callable[[Any], Any], items: Sequence[Any], ahead: int) -> None:
        """Let the worker begin with the items."""
        task = pickle.dumps((function, items, ahead))
        with contextlib.suppress(BrokenPipeError):  # the worker has ended, which `take` reports
            self._tasks.write(task)
            self._tasks.flush()

    def receive(self) -> Any:
        """The next result, which is waited for. Raises VllamaError where there is none."""
        try:
            result, problem = pickle.load(self._results)
        except (EOFError, pickle.UnpicklingError) as error:
            raise VllamaError(_death(self._process.wait())) from error
        if problem is not None:
            raise problem
        return result

    def kill(self) -> None:
        """End the worker."""
        self._process.kill()

    def wait(self) -> None:
        """Release what belonged to a worker that was killed."""
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._tasks.close()
        self._results.close()


def _death(code: int) -> str:
    """What is reported of a worker that ended with an exit code."""
    if code == -signal.SIGKILL:
        return (
            "a worker process was killed (SIGKILL), as Linux does when memory runs out; "
            "free memory or use fewer processes, and run it again"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a worker process {how} before its work was done; run it again"


def run_worker() -> None:
    """Be a worker: compute what stdin asks for, and write the results to stdout, until the other side ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the results
    tasks: queue.SimpleQueue[tuple[Callable[[Any], Any], Sequence[Any], int]] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(tasks,), daemon=True).start()
    while True:
        _do(*tasks.get(), results)


def _read_tasks(tasks: queue.SimpleQueue) -> None:
    """Queue tasks as they come; end the process, also in the midst of one, when the other side has ended."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    os._exit(0)


def _do(function: Callable[[Any], Any], items: Sequence[Any], ahead: int, results: BinaryIO) -> None:
    """Write a pair for each item: its result and None, or None and an error, which is the last."""
    try:
        for result in map_in_order(function, items, max(ahead - 1, 1)):
            _write(results, pickle.dumps((result, None), pickle.HIGHEST_PROTOCOL))
    except VllamaError as error:
        _write(results, pickle.dumps((None, error)))
    except Exception as error:  # whatever it is, the other side has to know
        problem = VllamaError(f"a worker process failed: {type(error).__name__}: {' '.join(str(error).split())}")
        problem.add_note(traceback.format_exc())
        _write(results, pickle.dumps((None, problem)))


def _write(results: BinaryIO, pair: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the other side has ended, and so will this process
        results.write(pair)
        results.flush()
