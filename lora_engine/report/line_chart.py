"""One line chart as inline SVG: small, sharp at any size, colored by report.css."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_engine.report.html import Markup, tag
from lora_engine.report.run_facts import figure
from lora_engine.report.series import Series, x_limits, y_limits

MAX_BUCKETS = 300  # of a long line, each drawn by its lowest and its highest value
MAX_DOTS = 60
TOP, RIGHT, BOTTOM = 30, 8, 26  # margins around the plot, in the chart's units
DIGIT = 7.0  # width of a digit
LINE = 20.0  # height of a line of text
MAX_ROWS = 9
MIN_MARGIN = 46.0  # fits the names of the axes


@dataclass(frozen=True)
class Line:
    """A series and how it is drawn: `style` are classes of report.css.

    `label` names the line in a dot's tooltip. Lines with dots are shown in full; of the others the
    most extreme 1 % of the values may be cut off. The value at `best_step` gets a ring.
    """

    series: Series
    label: str
    style: str
    has_dots: bool = False
    best_step: int | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    width: int,
    height: int,
    steps_per_epoch: int | None,
    tells_best: bool,
) -> Markup:
    """Draw lines over optimizer steps, and over epochs on the axis above.

    `title` is for screen readers. With `tells_best` the values in rings are written beside them. At
    least one of the lines must have a value.
    """
    lines = [line for line in lines if line.series.steps]
    left, right = x_limits(line.series for line in lines)
    low, high = y_limits(
        whole=[line.series for line in lines if line.has_dots],
        trimmed=[line.series for line in lines if not line.has_dots],
    )
    inner_height = height - TOP - BOTTOM
    rows = _ticks(low, high, count=min(inner_height / LINE, MAX_ROWS))
    margin = max(MIN_MARGIN, 10 + DIGIT * max(len(label) for _, label in rows))
    inner_width = width - margin - RIGHT

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
    axes = {("step", height - 8): 1.0}
    if steps_per_epoch is not None:
        axes["epoch", TOP - 16] = 1 / steps_per_epoch
    for (name, at), scale in axes.items():
        labels.append(tag("text", name, x=margin - 6, y=at, class_="row axis"))
        end = scale * right
        space = DIGIT * (len(f"{end:,.0f}") + 3)
        labels += [
            tag("text", label, x=round(margin + x(value / scale), 1), y=at, class_="column")
            for value, label in _ticks(
                0, end, count=inner_width / space, smallest=1 if name == "step" or end >= 2 else 0
            )
        ]
    for line in lines:
        for step, value in zip(*line.series):
            if step == line.best_step:
                labels += _ring(
                    line, value, round(margin + x(step), 1), round(TOP + y(value), 1),
                    is_left=x(step) <= inner_width / 2, is_told=tells_best,
                )
    return tag(
        "svg", frame, *labels,
        class_="chart", role="img", aria_label=title, viewBox=f"0 0 {width} {height}",
    )


def _ring(
    line: Line, value: float, x: float, y: float, *, is_left: bool, is_told: bool
) -> Iterator[Markup]:
    """The ring of a line's best step, with its value beside it, toward the chart's middle."""
    yield tag("circle", cx=x, cy=y, r=7, class_=f"ring {line.style}")
    if is_told:
        yield tag(
            "text", figure(value), x=x, y=y - 12 if y > TOP + 2 * LINE else y + LINE,
            class_=f"best {'' if is_left else 'row'} {line.style}",
        )


def _drawn(
    line: Line, x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[Markup]:
    points = " ".join(f"{x(step)},{y(value)}" for step, value in _thinned(line.series))
    yield tag("polyline", points=points, class_=line.style)
    count = len(line.series.steps)
    if count == 1 or line.has_dots and count <= MAX_DOTS:
        for step, value in zip(*line.series):
            tooltip = tag("title", f"{line.label}, step {step:,}: {figure(value)}")
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
    low: float, high: float, *, count: float, smallest: float = 0.0
) -> list[tuple[float, str]]:
    """Round values from `low` to `high` with their labels: at most about `count`, and half of it
    at least."""
    rough = max((high - low) / count, smallest)
    power = 10.0 ** math.floor(math.log10(rough))
    sizes = (1, 2, 5) if smallest else (1, 2, 2.5, 5)
    step = next((n * power for n in sizes if n * power >= rough), 10 * power)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, _label(number * step, step)) for number in numbers]


def _label(value: float, step: float) -> str:
    if value and not 1e-4 <= step < 1e7:
        return f"{value:.7g}".replace("e-0", "e-").replace("e+0", "e+")
    decimals = next(n for n in range(6) if n == 5 or math.isclose(round(step, n), step))
    return f"{value:,.{decimals}f}"
