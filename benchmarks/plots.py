"""Plots of measurements, where matplotlib is there to draw them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Draw = Callable[[Any], None]  # of matplotlib's Axes


def save_plot(path: Path, title: str, draw: Draw) -> bool:
    """Draw one pair of axes into a PNG file -> whether matplotlib is there to do it."""
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
    """A bar a contender, as long as its median, with its range."""
    names = list(figures)
    medians = [figures[name]["median"] for name in names]
    axes.barh(names, medians, xerr=_range(list(figures.values())), capsize=3)
    axes.invert_yaxis()  # the first on top
    axes.set_xlabel(label)


def line(axes: Any, x: Sequence, figures: Sequence[Mapping[str, float]], **style: Any) -> None:
    """Medians over `x`, each with its range."""
    medians = [figure["median"] for figure in figures]
    axes.errorbar(x, medians, yerr=_range(figures), **{"marker": "o", "capsize": 3, **style})


def _range(figures: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far each range reaches below and above its median."""
    return [
        [figure["median"] - figure["min"] for figure in figures],
        [figure["max"] - figure["median"] for figure in figures],
    ]
