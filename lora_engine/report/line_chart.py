"""Line charts as inline SVG: small, crisp at any size, coloured by the page's style sheet."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_engine.report.markup import Markup, tag
from lora_engine.report.run_record import Series

MAX_BUCKETS = 300  # parts of a long line, each drawn by its lowest and its highest value
MAX_DOTS = 60
TOP, RIGHT, BOTTOM = 8, 8, 26  # around the frame, in the chart's units
DIGIT = 7.0  # width of a digit


@dataclass(frozen=True)
class Line:
    """A series and how it is drawn: `style` are classes of the style sheet.

    `label` says in a dot's tooltip whose it is. Lines with dots are shown whole; of the others the
    wildest 1 % of the values may leave the frame.
    """

    series: Series
    label: str
    style: str
    has_dots: bool = False


def line_chart(lines: Sequence[Line], *, title: str, width: int, height: int) -> Markup:
    """Draw lines over optimizer steps; `title` is read out in place of the picture.

    At least one of the lines must have a value.
    """
    lines = [line for line in lines if line.series.steps]
    left, right = _x_limits(lines)
    low, high = _y_limits(lines)
    rows = _ticks(low, high, count=height // 45)
    margin = 10 + DIGIT * max(len(label) for _, label in rows)
    inner_width, inner_height = width - margin - RIGHT, height - TOP - BOTTOM

    def x(step: float) -> float:
        return round((step - left) / (right - left) * inner_width, 1)

    def y(value: float) -> float:
        return round((high - value) / (high - low) * inner_height, 1)

    # A picture within the picture cuts off what leaves its frame.
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
            told = tag("title", f"{line.label}, step {step:,}: {value:.4g}")
            yield tag("circle", told, cx=x(step), cy=y(value), r=3.5, class_=line.style)


def _thinned(series: Series) -> list[tuple[int, float]]:
    """Points that look like all of them: a part's lowest and highest, in their order."""
    points = list(zip(*series))
    if len(points) <= 2 * MAX_BUCKETS:
        return points
    size = math.ceil(len(points) / MAX_BUCKETS)
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _x_limits(lines: Sequence[Line]) -> tuple[float, float]:
    last = max(max(line.series.steps) for line in lines) or 1
    return -0.03 * last, 1.03 * last  # dots at both ends are whole


def _y_limits(lines: Sequence[Line]) -> tuple[float, float]:
    shown: list[float] = []
    for line in lines:
        cut = 0 if line.has_dots else len(line.series.values) // 200
        shown += sorted(line.series.values)[cut : len(line.series.values) - cut]
    low, high = min(shown), max(shown)
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))
    room = (0.05 * abs(high) if is_flat else 0.08 * (high - low)) or 1.0
    room = max(room, 1e-12)
    # Nothing here is negative but by surprise: leave no empty stripe below zero.
    bottom = max(low - room, -0.03 * (high + room)) if low >= 0 else low - room
    return bottom, high + room


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
