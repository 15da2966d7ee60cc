"""Compute results ahead of their consumer in threads, such as reading and decoding files."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """Apply `function` to each item in threads, and yield the results in the items' order.

    Args:
        function: The function.
        items: The items. They are consumed as needed, so there may be millions.
        num_threads: The number of threads, and the largest number of items that are in progress or whose results are
            not consumed yet.

    Yields:
        The results.
    """
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
