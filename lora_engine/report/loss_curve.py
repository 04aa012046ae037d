"""loss_curve.png: a run's training and validation losses, drawn from its metrics.jsonl."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.files import replaced_file
from lora_engine.report.run_facts import figure, model_name
from lora_engine.report.run_record import (
    AVERAGE,
    epochs_per_step,
    logged_series,
    read_object,
    read_records,
)
from lora_engine.report.series import (
    Series,
    lowest,
    smoothed,
    smoothing_window,
    x_limits,
    y_limits,
)
from lora_engine.terminal import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_COLOR = "#2a78b5"
VALIDATION_COLOR = "#c8501e"
AVERAGE_COLOR = "#3c8d40"
TEXT_COLOR = "#333333"
MAX_NAME_LENGTH = 40  # characters, of the model and of the run


def draw_loss_curve(metrics_path: str | Path, out_path: str | Path) -> None:
    """Draw the losses over steps and epochs as a PNG.

    Its title names the model, by the config.json beside the metrics, and the run folder. Other
    events, losses that are not finite, and a last line truncated by a crash are ignored. An
    existing picture is replaced only once the new one is complete. Raises ValueError if the file
    holds no loss, or a damaged line before its last.
    """
    # Imported here because it takes half a second, which only runs that draw should pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_records(metrics_path, event=str)
    training = logged_series(records, "train", "loss")
    validation = logged_series(records, "validation", "loss")
    average = logged_series(records, "validation", f"{AVERAGE}loss")
    if not training.steps and not validation.steps:
        raise ValueError(f"{metrics_path}: no training or validation losses to draw")
    config = read_object(Path(metrics_path).with_name("config.json"))
    picture = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    if training.steps:
        _draw_training(axes, training)
    if validation.steps:
        _draw_validation(axes, validation)
    if average.steps:
        axes.plot(*average, color=AVERAGE_COLOR, linewidth=1.6, label="validation, moving average")
    axes.set_xlim(*x_limits([training, validation]))
    axes.set_ylim(*y_limits(whole=[validation, average], trimmed=[training]))
    _label_axes(axes, epochs_per_step(records))
    whose = [model_name(config), f"run {Path(metrics_path).resolve().parent.name}"]
    axes.set_title(
        f"{', '.join(map(_shortened, whose))}\n{_outcome(validation)}", fontsize=16,
        color=TEXT_COLOR, pad=12, parse_math=False,
    )
    picture.legend(fontsize=12, frameon=False, loc="outside lower center", ncols=2)
    with replaced_file(out_path) as new, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name
        picture.savefig(new, format="png", bbox_inches="tight", pad_inches=0.2)


def _draw_training(axes: "Axes", losses: Series) -> None:
    window = smoothing_window(len(losses.steps))
    axes.plot(
        *losses, color=TRAINING_COLOR, alpha=0.3 if window > 1 else 1, linewidth=1,
        label="training", marker="o", markersize=4 if len(losses.steps) <= 100 else 0,
    )
    if window > 1:
        axes.plot(
            *smoothed(losses), color=TRAINING_COLOR, linewidth=2.2,
            label=f"training, centered average over {window} values",
        )


def _draw_validation(axes: "Axes", losses: Series) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot(
        *losses, color=VALIDATION_COLOR, linewidth=1.6, marker="o",
        markersize=6 if len(losses.steps) <= 40 else 3, label="validation",
    )
    step, value = lowest(losses)
    axes.plot(
        step, value, color=VALIDATION_COLOR, marker="*", markersize=20, linestyle="none",
        markeredgecolor="white", label=f"best validation, {figure(value)} at step {step:,}",
    )
    axes.annotate(
        figure(value), (step, value), xytext=(0, 14), textcoords="offset points",
        # Centered at step 0 it would cover the axis, and at the last step it would be cut off.
        ha="left" if step == 0 else "right" if step > 0.9 * losses.steps[-1] else "center",
        fontsize=14, fontweight="bold", color=VALIDATION_COLOR,
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )


def _label_axes(axes: "Axes", step_in_epochs: float | None) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step", fontsize=14, color=TEXT_COLOR)
    axes.set_ylabel("loss (nats per token)", fontsize=14, color=TEXT_COLOR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=12, colors=TEXT_COLOR)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if step_in_epochs is None:
        return
    above = axes.twiny()
    above.set_xlim(*(step * step_in_epochs for step in axes.get_xlim()))
    above.set_xlabel("epoch", fontsize=14, color=TEXT_COLOR)
    above.tick_params(labelsize=12, colors=TEXT_COLOR)
    above.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    above.spines[["right"]].set_visible(False)


def _outcome(validation: Series) -> str:
    if not validation.steps:
        return "Training loss"
    step, value = lowest(validation)
    if len(validation.steps) == 1:
        return f"Validation loss {figure(value)} at step {step:,}"
    if step == validation.steps[0]:
        return f"Validation loss {figure(value)} at step {step:,}, no improvement since"
    return f"Validation loss {figure(validation.values[0])} → {figure(value)} at step {step:,}"


def _shortened(name: str) -> str:
    name = escaped(name.encode(errors="replace").decode())  # bytes that are not text
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}..."
