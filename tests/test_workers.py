"""Worker processes: results in order, and one clear error when a worker ends, for whatever reason."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import worker_processes

from vllama_jax.data.workers import WorkerPool, map_in_processes
from vllama_jax.errors import DataError, VllamaError


@pytest.fixture
def worker_pids() -> Callable[[], list[int]]:
    """List the worker processes that the test has started; other tests keep theirs for the whole session."""
    before = worker_processes(os.getpid())
    return lambda: sorted(worker_processes(os.getpid()) - before)


def fail_at(number: int, error: Exception, item: int) -> int:
    if item == number:
        raise error
    return item


def print_and_return(item: int) -> int:
    print("noise")
    os.write(1, b"more noise\n")
    return item


def test_results_are_in_order_and_workers_are_reusable(worker_pids):
    with WorkerPool(2) as workers:
        assert list(workers.map(math.sqrt, [0, 1, 4, 9, 16])) == [0, 1, 2, 3, 4]
        first = worker_pids()
        assert len(first) == 2
        assert list(workers.map(abs, [-1], ahead=4)) == [1], "fewer items than workers"
        assert list(workers.map(abs, [])) == []
        assert worker_pids() == first
    assert worker_pids() == []


@pytest.mark.slow
def test_what_a_function_prints_does_not_come_between_results():
    assert list(map_in_processes(print_and_return, range(4), 1)) == [0, 1, 2, 3]


def test_closing_the_pool_ends_the_workers(worker_pids):
    results = map_in_processes(time.sleep, [0, *[1000] * 5], 2)
    next(results)
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < 5
    assert worker_pids() == []


def end_by(how: int, item: int) -> None:
    if item == 1:
        os.kill(os.getpid(), how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functools.partial(fail_at, 1, DataError("1.png: no picture")), r"^1.png: no picture$"),
        (functools.partial(fail_at, 1, KeyError("x")), r"^a worker process failed: KeyError: 'x'"),
        (functools.partial(fail_at, 1, MemoryError("of\ntwo lines")), r"^a worker process failed: MemoryError: of two"),
        (functools.partial(end_by, signal.SIGTERM), r"^a worker process was ended by SIGTERM before its work was done"),
        (os._exit, r"^a worker process ended with exit code \d before its work was done"),
    ],
    ids=["our error", "another error", "memory", "signal", "exit"],
)
def test_an_exception_in_a_worker_is_a_one_line_error(function, message, worker_pids):
    with pytest.raises(VllamaError, match=message) as raised:
        list(map_in_processes(function, [0, 1, 2, 3], 2))
    assert "\n" not in str(raised.value), "one line; the worker's traceback is a note"
    assert worker_pids() == []


def test_a_worker_killed_while_sending_a_result_is_detected(worker_pids):
    results = map_in_processes(np.zeros, [10_000_000] * 50, 2, ahead=4)  # 80 MB each, so that the worker is sending one
    next(results)
    os.kill(worker_pids()[0], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(VllamaError, match=r"killed \(SIGKILL\), as Linux does when memory runs out; free memory"):
        list(results)
    assert time.monotonic() - begun < 30
    assert worker_pids() == []


def test_workers_need_no_main_guard_in_a_script(tmp_path):
    """No worker imports it: with multiprocessing, each would start its own workers and fail."""
    script = tmp_path / "script.py"
    script.write_text("from vllama_jax.miniature.images import draw_images\nprint(draw_images(4, 0).pixels.shape)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(4, 64, 64, 3)\n", "")


def test_workers_end_with_their_parent_process(tmp_path):
    code = (
        "import time, sys\nfrom vllama_jax.data.workers import WorkerPool\nworkers = WorkerPool(1)\n"
        "results = workers.map(time.sleep, [0, 1000])\nnext(results)\n"
        "print(workers._workers[0]._process.pid, flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        worker = Path("/proc") / process.stdout.readline().strip()
        assert worker.exists()
        process.kill()
    limit = time.monotonic() + 20
    while worker.exists() and "workers.run_worker()" in (worker / "cmdline").read_text() and time.monotonic() < limit:
        time.sleep(0.05)
    assert time.monotonic() < limit
