"""Values over optimizer steps: smoothing, and the axis limits to plot them with."""

from collections.abc import Iterable
from statistics import fmean
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
    """The mean over a window centered at each value, which does not lag behind.

    Towards both ends the window narrows, to the value itself at the first and the last.
    """
    values, half = series.values, smoothing_window(len(series.values)) // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append(fmean(values[i - reach : i + reach + 1]))
    return Series(series.steps, means)


def smoothing_window(num_values: int) -> int:
    """An odd number: a tenth of the values, at most 101 of them; 1 for less than 20 values."""
    return 2 * min(num_values // 20, 50) + 1


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
