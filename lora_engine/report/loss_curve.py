"""What is drawn from a run's metrics.jsonl: the loss curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.files import replaced_file
from lora_engine.report.run_record import Series, epoch_scale, lowest, read_records, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_COLOUR = "#2a78b5"
VALIDATION_COLOUR = "#c8501e"
TEXT_COLOUR = "#333333"


def draw_loss_curve(metrics_path: str | Path, out_path: str | Path) -> None:
    """Draw a run's training and validation losses over its steps and epochs as a PNG.

    Lines of other events, losses that are not finite, and a last line cut short by a crash are
    passed over. A picture that is there is replaced only by a whole one. Raises ValueError if the
    file holds no loss, or a damaged line before its last.
    """
    # Imported here because it takes half a second, which captioning need not pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_records(metrics_path, event=str)
    training = series(records, "train", "loss")
    validation = series(records, "validation", "loss")
    if not training.steps and not validation.steps:
        raise ValueError(f"{metrics_path}: no training or validation losses to draw")
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training.steps:
        _draw_training(axes, training)
    if validation.steps:
        _draw_validation(axes, validation)
    _set_limits(axes, training, validation)
    _label_axes(axes, epoch_scale(records))
    axes.set_title(_title(validation), fontsize=16, color=TEXT_COLOUR, pad=12)
    figure.legend(fontsize=12, frameon=False, loc="outside lower center", ncols=2)
    with replaced_file(out_path) as new:
        figure.savefig(new, format="png", bbox_inches="tight", pad_inches=0.2)


def smooth(values: Sequence[float], *, decay: float) -> list[float]:
    """Exponential moving average, m = decay * m + (1 - decay) * value from m = 0.

    Divided by 1 - decay^n, the weight that n values have had, as in Adam (arXiv:1412.6980): the
    first one is the first value, and not a value pulled towards zero.
    """
    mean, missing, smoothed = 0.0, 1.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        missing *= decay
        smoothed.append(mean / (1 - missing))
    return smoothed


def smoothing_decay(num_values: int) -> float:
    """For `smooth`: a mean over a tenth of a short run, and over 100 values of a long one."""
    return 1 - 1 / min(max(num_values // 10, 2), 100)


def _draw_training(axes: "Axes", losses: Series) -> None:
    decay = smoothing_decay(len(losses.steps))
    axes.plot(
        *losses, color=TRAINING_COLOUR, alpha=0.3, linewidth=1, label="training",
        marker="o", markersize=4 if len(losses.steps) <= 100 else 0,
    )
    axes.plot(
        losses.steps, smooth(losses.values, decay=decay), color=TRAINING_COLOUR, linewidth=2.2,
        label=f"training, smoothed (exponential moving average, decay {decay:.3g})",
    )


def _draw_validation(axes: "Axes", losses: Series) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot(
        *losses, color=VALIDATION_COLOUR, linewidth=1.6, marker="o",
        markersize=6 if len(losses.steps) <= 40 else 3, label="validation",
    )
    step, value = lowest(losses)
    axes.plot(
        step, value, color=VALIDATION_COLOUR, marker="*", markersize=20, linestyle="none",
        markeredgecolor="white", label=f"best validation, {value:#.4g} at step {step:,}",
    )
    axes.annotate(
        f"{value:#.4g}", (step, value), xytext=(0, 14), textcoords="offset points",
        # Centred at step 0 it would cover the axis, and at the last step leave the frame.
        ha="left" if step == 0 else "right" if step > 0.9 * losses.steps[-1] else "center",
        fontsize=14, fontweight="bold", color=VALIDATION_COLOUR,
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )


def _set_limits(axes: "Axes", training: Series, validation: Series) -> None:
    """Fit all validations and 99 % of the training losses: wild steps may leave the frame."""
    last = max(training.steps + validation.steps + [1])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    ordered = sorted(training.values)
    cut = len(ordered) // 200
    shown = validation.values + ordered[cut:len(ordered) - cut]
    low, high = min(shown), max(shown)
    room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
    floor = -0.03 * high if low >= 0 else low - room  # no loss is negative; leave the marks room
    axes.set_ylim(max(low - room, floor), high + room)


def _label_axes(axes: "Axes", epochs_per_step: float | None) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step", fontsize=14, color=TEXT_COLOUR)
    axes.set_ylabel("loss (nats per token)", fontsize=14, color=TEXT_COLOUR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=12, colors=TEXT_COLOUR)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if epochs_per_step is None:
        return
    above = axes.twiny()
    above.set_xlim(*(step * epochs_per_step for step in axes.get_xlim()))
    above.set_xlabel("epoch", fontsize=14, color=TEXT_COLOUR)
    above.tick_params(labelsize=12, colors=TEXT_COLOUR)
    above.spines[["right"]].set_visible(False)


def _title(validation: Series) -> str:
    if not validation.steps:
        return "Training loss"
    step, value = lowest(validation)
    if len(validation.steps) == 1:
        return f"Validation loss {value:#.4g} at step {step:,}"
    if step == validation.steps[0]:
        return f"Validation loss {value:#.4g} at step {step:,}, and never lower after it"
    return f"Validation loss {validation.values[0]:#.4g} → {value:#.4g} at step {step:,}"
