"""The curves of the report: which are drawn, and in which colors.

A new curve of the training lines in metrics.jsonl is a line in TRAINING_CURVES.
"""

from collections.abc import Sequence
from functools import partial

from lora_engine.report import run_facts
from lora_engine.report.html import Markup, tag
from lora_engine.report.line_chart import Line, line_chart
from lora_engine.report.run_record import AVERAGE, RunRecord
from lora_engine.report.series import Series, smoothed, smoothing_window

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
    steps_per_epoch = {run.steps_per_epoch for run in runs}
    draw = partial(
        line_chart,
        steps_per_epoch=steps_per_epoch.pop() if len(steps_per_epoch) == 1 else None,
        tells_best=len(runs) == 1,
    )
    scores = {
        run_facts.score_name(key): [
            Line(run.validation(key), name, run_color(index), True, run.best_step)
            for index, (run, name) in enumerate(zip(runs, names))
        ] + _average_lines(runs, key)
        for key in run_facts.score_keys(runs)
    }
    training = {
        title: [
            Line(_scaled(run.training(key), factor), name, run_color(index))
            for index, (run, name) in enumerate(zip(runs, names))
        ]
        for key, (title, factor) in TRAINING_CURVES.items()
    }
    small = [
        tag(
            "figure",
            tag("figcaption", title),
            draw(found, title=f"{title} over optimizer steps", width=340, height=190),
        )
        for title, found in (scores | training).items() if any(line.series.steps for line in found)
    ]
    # A chart shrinks to the page's width, and so does its text: phones get one of their own.
    sizes = {"wide": (720, 340), "narrow": (340, 260)}
    return [
        tag("figure", tag("figcaption", "Loss, nats per token", *_legend(runs)), *(
            tag("div", draw(
                lines, title="Loss over optimizer steps", width=width, height=height
            ), class_=name)
            for name, (width, height) in sizes.items()
        )),
        tag("div", *small, class_="charts"),
    ]


def _loss_lines(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Line]:
    lines = []
    for index, (run, name) in enumerate(zip(runs, names)):
        training = run.training("loss")
        color = run_color(index)
        if len(runs) == 1 and smoothing_window(len(training.steps)) > 1:
            lines.append(Line(training, "training", f"{color} faint"))
        lines.append(Line(smoothed(training), f"{name}, training", f"{color} thin"))
        color = run_color(1) if len(runs) == 1 else color
        lines.append(
            Line(run.validation("loss"), f"{name}, validation", color, True, run.best_step)
        )
    return lines + _average_lines(runs, "loss")


def _average_lines(runs: Sequence[RunRecord], key: str) -> list[Line]:
    """A result of the moving average; where several runs are compared, that of none."""
    if len(runs) > 1 or runs[0].best_average_step is None:
        return []
    series = runs[0].validation(f"{AVERAGE}{key}")
    return [Line(series, "moving average", f"{run_color(2)} thin", True)]


def _legend(runs: Sequence[RunRecord]) -> list[Markup]:
    best = tag("span", tag("i", class_="chip ring"), "the saved adapter", class_="key")
    if len(runs) > 1:
        text = "dots: validation; thin: training, centered moving average"
        return [tag("span", text, class_="key"), best]
    window = smoothing_window(len(runs[0].training("loss").steps))
    average = f", and its centered average over {window} values" if window > 1 else ""
    return [
        tag("span", color_chip(run_color(0)), f"training{average}", class_="key"),
        tag("span", color_chip(run_color(1)), "validation", class_="key"),
        *([] if runs[0].best_average_step is None else [
            tag("span", color_chip(run_color(2)), "validation of the moving average", class_="key")
        ]),
        best,
    ]


def _scaled(series: Series, factor: float) -> Series:
    return Series(series.steps, [factor * value for value in series.values])


def run_color(index: int) -> str:
    """The class in report.css of a run's color."""
    return f"c{index % NUM_COLORS}"


def color_chip(color: str) -> Markup:
    return tag("i", class_=f"chip {color}")
