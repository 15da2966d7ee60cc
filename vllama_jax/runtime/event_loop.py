"""Call libraries that run an event loop of their own, which a thread with a running one does not allow."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_without_event_loop(function: Callable[[], Result]) -> Result:
    """Call a function; if this thread runs an event loop, in another thread.

    Cells of a notebook and coroutines run in an event loop. Orbax then needs nest_asyncio or uvloop, which Jupyter's
    kernel no longer installs.

    Args:
        function: The function.

    Returns:
        What it returns.

    Raises:
        Exception: What the function raises.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
