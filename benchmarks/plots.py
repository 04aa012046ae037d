"""Plots of measurements, if matplotlib is installed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Draw = Callable[[Any], None]  # takes matplotlib's Axes


def save_plot(path: Path, title: str, draw: Draw) -> bool:
    """Draw one pair of axes into a PNG file -> whether matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    draw(axes)
    figure.savefig(path, dpi=120)
    return True


def bars(axes: Any, figures: Mapping[str, Mapping[str, float]], label: str) -> None:
    """One bar per contender: its median, with its range."""
    names = list(figures)
    medians = [figures[name]["median"] for name in names]
    axes.barh(names, medians, xerr=_range(list(figures.values())), capsize=3)
    axes.invert_yaxis()  # the first on top
    axes.set_xlabel(label)


def line(axes: Any, x: Sequence, figures: Sequence[Mapping[str, float]], **style: Any) -> None:
    """Medians by `x`, each with its range."""
    medians = [figure["median"] for figure in figures]
    axes.errorbar(x, medians, yerr=_range(figures), **{"marker": "o", "capsize": 3, **style})


def _range(figures: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Distances from each median to its minimum and maximum."""
    return [
        [figure["median"] - figure["min"] for figure in figures],
        [figure["max"] - figure["median"] for figure in figures],
    ]
