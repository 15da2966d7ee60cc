"""Threads of a test in place of the processes of a job, with a key-value store like JAX's."""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from vllama_jax.runtime import coordination


class Store:
    """The methods of JAX's client that are used, for threads."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self.values, f"ALREADY_EXISTS: {key}"
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, min(timeout_ms / 1000, 20)):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(f"{folder}/")]

    def key_value_delete(self, folder: str) -> None:
        for key in list(self.values):
            if key == folder or key.startswith(f"{folder}/"):
                del self.values[key]


def run_processes(patch: pytest.MonkeyPatch, count: int, *modules: Any) -> tuple[Store, Callable]:
    """Replace processes by threads.

    Args:
        patch: Undoes the changes.
        count: The number of processes.
        *modules: Modules that import functions of `coordination`.

    Returns:
        The store, and a function that calls its argument with the number of the process in each of them. It returns the
        results and raised errors in order.
    """
    store, local, calls = Store(), threading.local(), [0] * count

    def unique_key(name: str) -> str:
        calls[local.number] += 1
        return f"{name}/{calls[local.number]}"

    replaced = {
        "find_store": lambda: store,
        "process_number": lambda: local.number,
        "num_processes": lambda: count,
        "unique_key": unique_key,
    }
    for module in (coordination, *modules):
        for name, function in replaced.items():
            patch.setattr(module, name, function, raising=False)

    def call(function: Callable[[int], Any], number: int) -> Any:
        local.number = number
        time.sleep(0.01 * (count - number))  # process 0 is the last
        try:
            return function(number)
        except Exception as error:
            return error

    def run(function: Callable[[int], Any]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda number: call(function, number), range(count)))

    return store, run
