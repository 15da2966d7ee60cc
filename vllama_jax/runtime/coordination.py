"""Let the processes of a job decide together, and fail together with the same message.

The processes exchange short texts through the key-value store that JAX keeps in process 0 (`jax.distributed`). No
device takes part, so these functions work before the devices are ready and while a step runs. All processes must call
each function, in the same order. With a single process they add nothing.
"""

import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

from vllama_jax import errors
from vllama_jax.errors import VllamaError, format_os_error

TIMEOUT_MS = 7 * 24 * 3600 * 1000  # JAX ends a process much earlier if another one is lost
_calls = itertools.count()


def find_store() -> Any:
    """Return the client of the key-value store, or None if there is only one process."""
    from jax._src.distributed import global_state

    return global_state.client if global_state.num_processes > 1 else None


def process_number() -> int:
    """Return the number of this process in the job, without waiting for devices."""
    from jax._src.distributed import global_state

    return global_state.process_id


def num_processes() -> int:
    """Return the number of processes of the job, without waiting for devices."""
    from jax._src.distributed import global_state

    return global_state.num_processes


def describe_process(process: int, count: int, host: str) -> str:
    """Describe a process in messages, such as "process 3 of 64 (node7)"."""
    return f"process {process} of {count} ({host})"


def unique_key(name: str) -> str:
    """Return a key of the store that is used once, and is the same in all processes."""
    return f"vllama/{name}/{next(_calls)}"


def gather(value: Any) -> list[Any]:
    """Return the value of each process, in all processes.

    Args:
        value: A value that JSON can represent.

    Returns:
        The values in the order of the processes.
    """
    store, key = find_store(), unique_key("gathered")
    if store is None:
        return [value]
    store.key_value_set(f"{key}/{process_number()}", json.dumps(value))
    keys = [f"{key}/{process}" for process in range(num_processes())]
    return [json.loads(store.blocking_key_value_get(one, TIMEOUT_MS)) for one in keys]


def decide(function: Callable[[], Any]) -> Any:
    """Call a function in process 0 only, and return its result in all processes.

    Args:
        function: Returns a value that JSON can represent.

    Raises:
        VllamaError: The function failed. All processes raise the same error.
    """
    store, key = find_store(), unique_key("decided")
    if store is None:
        return function()
    with share_errors():
        if process_number() == 0:
            store.key_value_set(key, json.dumps(function()))
    return json.loads(store.blocking_key_value_get(key, TIMEOUT_MS))


@contextlib.contextmanager
def share_errors() -> Iterator[None]:
    """Run the body in all processes. If it fails in one of them, all raise that error.

    The body must not wait for other processes.

    Raises:
        VllamaError: The error of the first process that failed. The message identifies the process, unless it is
            process 0, or all processes failed with the same message.
    """
    if find_store() is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # the other processes must learn of any error
        own = error
    reports = gather(None if own is None else pack_error(own))
    failed = [report for report in reports if report]
    if own is not None and not isinstance(own, (VllamaError, OSError)):
        raise own
    if failed:
        alike = len(failed) == len(reports) and len({report["text"] for report in failed}) == 1
        raise unpack_error(failed[0], with_process=not alike) from own


def pack_error(error: Exception) -> dict[str, str]:
    """Convert an error of this process for `unpack_error` in another one."""
    is_input_error = isinstance(error, (VllamaError, OSError))
    text = format_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
    if not is_input_error:  # this process prints the traceback
        text = f"{type(error).__name__}: {text}; see its output"
    process = describe_process(process_number(), num_processes(), socket.gethostname())
    return {
        "type": type(error).__name__,
        "text": text,
        "process": process if process_number() or not is_input_error else "",
    }


def unpack_error(report: dict[str, str], *, with_process: bool = True) -> VllamaError:
    """Convert a report of `pack_error` to the error that all processes raise.

    Args:
        report: What `pack_error` returned.
        with_process: Prepend the process that failed. It is left out of input errors of process 0.
    """
    kind = getattr(errors, report["type"], VllamaError)
    prefix = f"{report['process']}: " if with_process and report["process"] else ""
    error = (kind if issubclass(kind, VllamaError) else VllamaError)(f"{prefix}{report['text']}")
    error.in_all_processes = True
    return error
