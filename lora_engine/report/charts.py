"""The curves of the report: which are drawn, and in which colors.

A new curve of the training lines in metrics.jsonl is a line in TRAINING_CURVES.
"""

from collections.abc import Sequence

from lora_engine.report import run_facts
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.line_chart import Line, line_chart
from lora_engine.report.run_record import RunRecord
from lora_engine.report.series import Series, smoothed

NUM_COLORS = 8  # in report.css

# Keys of the training lines, with a title and the factor that values are multiplied by.
TRAINING_CURVES = {
    "learning_rate": ("Learning rate", 1),
    "grad_norm": ("Gradient norm", 1),
    "images_per_s": ("Images per second", 1),
    "data_wait_share": ("Waiting for data, %", 100),
}


def charts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Markup]:
    """A large chart of the loss, and small ones of everything else that is logged by step."""
    lines = _loss_lines(runs, names)
    if not any(line.series.steps for line in lines):
        return []
    chart = line_chart(lines, title="Loss over optimizer steps", width=720, height=320)
    small = []
    for key in run_facts.score_keys(runs):
        title = run_facts.score_name(key)
        small += _small_chart(title, [run.validation(key) for run in runs], names, has_dots=True)
    for key, (title, factor) in TRAINING_CURVES.items():
        found = [run.training(key) for run in runs]
        scaled = [Series(s.steps, [factor * value for value in s.values]) for s in found]
        small += _small_chart(title, scaled, names, has_dots=False)
    return [
        tag("figure", tag("figcaption", "Loss, nats per token", _legend(runs)), chart),
        tag("div", *small, class_="charts"),
    ]


def _loss_lines(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Line]:
    lines = []
    for index, (run, name) in enumerate(zip(runs, names)):
        training = run.training("loss")
        color = run_color(index)
        if len(runs) == 1:
            lines.append(Line(training, "training", f"{color} faint"))
        lines.append(Line(smoothed(training), f"{name}, training", f"{color} thin"))
        color = run_color(1) if len(runs) == 1 else color
        lines.append(Line(run.validation("loss"), f"{name}, validation", color, has_dots=True))
    return lines


def _legend(runs: Sequence[RunRecord]) -> Markup:
    if len(runs) > 1:
        return tag("span", "dots: validation; thin: training, smoothed", class_="hint")
    return join([
        tag("span", color_chip(run_color(0)), "training, with its moving average", class_="key"),
        tag("span", color_chip(run_color(1)), "validation", class_="key"),
    ])


def _small_chart(
    title: str, found: Sequence[Series], names: Sequence[str], *, has_dots: bool
) -> list[Markup]:
    if not any(series.steps for series in found):
        return []
    lines = [
        Line(series, name, run_color(index), has_dots)
        for index, (series, name) in enumerate(zip(found, names))
    ]
    chart = line_chart(lines, title=f"{title} over optimizer steps", width=340, height=180)
    return [tag("figure", tag("figcaption", title), chart)]


def run_color(index: int) -> str:
    """The class in report.css of a run's color."""
    return f"c{index % NUM_COLORS}"


def color_chip(color: str) -> Markup:
    return tag("i", class_=f"chip {color}")
