"""Exponential moving averages, which smooth the noisy losses of single steps."""

from collections.abc import Iterable

MAX_WINDOW = 50  # steps


def default_smoothing(steps: int) -> float:
    """Return the default smoothing of a run: 1 - 1 / window, with a window of a tenth of its steps, from 1 to 50."""
    return 1 - 1 / min(max(steps // 10, 1), MAX_WINDOW)


class SmoothedMean:
    """An exponential moving average with Adam's bias correction: the first average is the first value.

    Args:
        smoothing: The weight of the previous average, from 0 (no smoothing) to below 1.
    """

    def __init__(self, smoothing: float):
        self._smoothing, self._sum, self._weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> float:
        """Add a value and return the average."""
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        return self._sum / self._weight


def smooth(values: Iterable[float], smoothing: float) -> list[float]:
    """Return the moving average after each value."""
    mean = SmoothedMean(smoothing)
    return [mean.add(value) for value in values]
