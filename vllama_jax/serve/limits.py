"""Totals that all requests share: answers, tokens, frames and bytes. What exceeds one gets status 429."""

import contextlib
import math
import time
from collections.abc import Iterator

from vllama_jax.serve.errors import ApiError

_SMOOTHING = 0.2  # of the average time of a reservation
_MAX_RETRY_SECONDS = 60


class Limits:
    """Totals of what requests use at a time. Used by one event loop only.

    Args:
        **totals: The largest amount of each resource.
    """

    def __init__(self, **totals: int):
        self._totals = totals
        self._used = dict.fromkeys(totals, 0)
        self._average_seconds = 1.0

    def used(self, name: str) -> int:
        """Return how much of a resource is used now."""
        return self._used[name]

    def check_possible(self, name: str, amount: int, what: str) -> None:
        """Raise ApiError with status 413 if a request alone exceeds a total."""
        if amount > self._totals[name]:
            raise ApiError(413, f"{what}: {amount}, but this server takes at most {self._totals[name]} at a time")

    def take(self, **amounts: int) -> None:
        """Use an amount of each resource until `give_back`.

        Raises:
            ApiError: A total would be exceeded; nothing is taken.
        """
        for name, amount in amounts.items():
            if self._used[name] + amount > self._totals[name]:
                seconds = min(max(math.ceil(self._average_seconds), 1), _MAX_RETRY_SECONDS)
                raise ApiError(429, f"too many {name} at a time; try again in {seconds} s", retry_after=seconds)
        for name, amount in amounts.items():
            self._used[name] += amount

    def give_back(self, **amounts: int) -> None:
        """Return what `take` took."""
        for name, amount in amounts.items():
            self._used[name] -= amount

    @contextlib.contextmanager
    def reserve(self, **amounts: int) -> Iterator[None]:
        """Use an amount of each resource while the context lasts.

        Raises:
            ApiError: A total would be exceeded.
        """
        self.take(**amounts)
        start = time.monotonic()
        try:
            yield
        finally:
            self.give_back(**amounts)
            self._average_seconds += _SMOOTHING * (time.monotonic() - start - self._average_seconds)
