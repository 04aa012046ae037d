"""One line chart as inline SVG: small, sharp at any size, colored by report.css."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_engine.report.html import Markup, tag
from lora_engine.report.series import Series, x_limits, y_limits

MAX_BUCKETS = 300  # of a long line, each drawn by its lowest and its highest value
MAX_DOTS = 60
TOP, RIGHT, BOTTOM = 8, 8, 26  # margins around the plot, in the chart's units
DIGIT = 7.0  # width of a digit


@dataclass(frozen=True)
class Line:
    """A series and how it is drawn: `style` are classes of report.css.

    `label` names the line in a dot's tooltip. Lines with dots are shown in full; of the others the
    most extreme 1 % of the values may be cut off.
    """

    series: Series
    label: str
    style: str
    has_dots: bool = False


def line_chart(lines: Sequence[Line], *, title: str, width: int, height: int) -> Markup:
    """Draw lines over optimizer steps; `title` is for screen readers.

    At least one of the lines must have a value.
    """
    lines = [line for line in lines if line.series.steps]
    left, right = x_limits(line.series for line in lines)
    low, high = y_limits(
        whole=[line.series for line in lines if line.has_dots],
        trimmed=[line.series for line in lines if not line.has_dots],
    )
    rows = _ticks(low, high, count=height // 45)
    margin = 10 + DIGIT * max(len(label) for _, label in rows)
    inner_width, inner_height = width - margin - RIGHT, height - TOP - BOTTOM

    def x(step: float) -> float:
        return round((step - left) / (right - left) * inner_width, 1)

    def y(value: float) -> float:
        return round((high - value) / (high - low) * inner_height, 1)

    # A nested <svg> clips what lies outside of it.
    frame = tag(
        "svg",
        *(
            tag("line", x1=0, x2=inner_width, y1=y(value), y2=y(value), class_="grid")
            for value, _ in rows
        ),
        *(part for line in lines for part in _drawn(line, x, y)),
        x=margin, y=TOP, width=inner_width, height=inner_height,
    )
    labels = [
        tag("text", label, x=margin - 6, y=TOP + y(value) + 4, class_="row")
        for value, label in rows
    ]
    labels += [
        tag("text", label, x=margin + x(step), y=height - 8, class_="column")
        for step, label in _ticks(0, right, count=width // 90, smallest=1)
    ]
    return tag(
        "svg", frame, *labels,
        class_="chart", role="img", aria_label=title, viewBox=f"0 0 {width} {height}",
    )


def _drawn(
    line: Line, x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[Markup]:
    points = " ".join(f"{x(step)},{y(value)}" for step, value in _thinned(line.series))
    yield tag("polyline", points=points, class_=line.style)
    count = len(line.series.steps)
    if count == 1 or line.has_dots and count <= MAX_DOTS:
        for step, value in zip(*line.series):
            tooltip = tag("title", f"{line.label}, step {step:,}: {value:.4g}")
            yield tag("circle", tooltip, cx=x(step), cy=y(value), r=3.5, class_=line.style)


def _thinned(series: Series) -> list[tuple[int, float]]:
    """Fewer points that look the same: the lowest and the highest of each bucket."""
    points = list(zip(*series))
    if len(points) <= 2 * MAX_BUCKETS:
        return points
    size = math.ceil(len(points) / MAX_BUCKETS)
    kept = []
    for begin in range(0, len(points), size):
        bucket = points[begin : begin + size]
        low, high = (pick(bucket, key=lambda point: point[1]) for pick in (min, max))
        kept += sorted({low, high})
    return kept


def _ticks(
    low: float, high: float, *, count: int, smallest: float = 0.0
) -> list[tuple[float, str]]:
    """About `count` round values from `low` to `high`, with their labels."""
    rough = max((high - low) / count, smallest)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((n * power for n in (1, 2, 5) if n * power >= rough), 10 * power)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, _label(number * step, step)) for number in numbers]


def _label(value: float, step: float) -> str:
    if value and not 1e-4 <= step < 1e7:
        return f"{value:.7g}".replace("e-0", "e-").replace("e+0", "e+")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{min(decimals, 4)}f}"
