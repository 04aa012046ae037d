"""Values over optimizer steps: smoothing, and the axis limits to plot them with."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Series(NamedTuple):
    """Finite values over optimizer steps, in the order in which they were logged."""

    steps: list[int]
    values: list[float]


def lowest(series: Series) -> tuple[int, float]:
    """(step, value) of the lowest value, the first of equal ones."""
    value = min(series.values)
    return series.steps[series.values.index(value)], value


def smoothed(series: Series) -> Series:
    """The series' moving average, over a window that suits its length."""
    decay = smoothing_decay(len(series.steps))
    return Series(series.steps, smooth(series.values, decay=decay))


def smoothing_decay(num_values: int) -> float:
    """For `smooth`: averages a tenth of a short run, and 100 values of a long one."""
    return 1 - 1 / min(max(num_values // 10, 2), 100)


def smooth(values: Sequence[float], *, decay: float) -> list[float]:
    """Exponential moving average, m = decay * m + (1 - decay) * value, starting from m = 0.

    Divided by 1 - decay^n, the total weight of n values, as in Adam (arXiv:1412.6980): the first
    average is the first value, not biased towards zero.
    """
    mean, missing, averages = 0.0, 1.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        missing *= decay
        averages.append(mean / (1 - missing))
    return averages


def x_limits(found: Iterable[Series]) -> tuple[float, float]:
    """Limits of a step axis from 0 to the last step, with a margin for markers at both ends."""
    last = max((step for series in found for step in series.steps), default=0) or 1
    return -0.03 * last, 1.03 * last


def y_limits(whole: Iterable[Series], trimmed: Iterable[Series]) -> tuple[float, float]:
    """Limits that show all values of `whole`, and all but the most extreme 1 % of `trimmed`.

    At least one of the series must have a value.
    """
    shown = [value for series in whole for value in series.values]
    for series in trimmed:
        cut = len(series.values) // 200
        shown += sorted(series.values)[cut : len(series.values) - cut]
    low, high = min(shown), max(shown)
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))
    margin = (0.05 * abs(high) if is_flat else 0.1 * (high - low)) or 1.0
    margin = max(margin, 1e-12)
    bottom = low - margin
    if low >= 0:  # leave no empty band below zero
        bottom = max(bottom, -0.03 * (high + margin))
    return bottom, high + margin
