"""Losses of single steps are noisy; what is shown is their exponential mean."""

from collections.abc import Iterable

MAX_WINDOW = 50  # steps


def default_smoothing(steps: int) -> float:
    """Return the smoothing whose window is a tenth of a run, from 1 to 50 steps: 1 - 1 / window."""
    return 1 - 1 / min(max(steps // 10, 1), MAX_WINDOW)


class SmoothedMean:
    """An exponential mean with Adam's correction of bias: the first value is its own mean.

    smoothing: The share of the mean that each new value keeps, from 0 to below 1.
    """

    def __init__(self, smoothing: float):
        self._smoothing, self._sum, self._weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> float:
        """Return the mean with one more value."""
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        return self._sum / self._weight


def smooth(values: Iterable[float], smoothing: float) -> list[float]:
    """Return the mean after each value."""
    mean = SmoothedMean(smoothing)
    return [mean.add(value) for value in values]
