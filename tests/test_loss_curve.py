"""The loss curve is drawn from metrics.jsonl, whatever state the file is in."""

import json

import pytest
from PIL import Image

from lora_engine.report import loss_curve
from lora_engine.report.loss_curve import draw_loss_curve
from lora_engine.report.series import Series, smoothed, smoothing_window, x_limits, y_limits

BLUE, ORANGE = (42, 120, 181), (200, 80, 30)


def train(step, loss):
    return {
        "event": "train", "step": step, "epoch": step / 10, "loss": loss,
        "learning_rate": 1e-5, "grad_norm": 0.8, "images_per_s": 410.0,
    }


def validation(step, loss):
    return {"event": "validation", "step": step, "epoch": step / 10, "loss": loss}


def write(folder, records, ending=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + ending)
    return path


def colours(path) -> set:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000
        return {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}


WHOLE_RUN = [
    validation(0, 4.2), *(train(s, 4 - s / 10) for s in range(1, 21)), validation(20, 2.5)
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "records, drawn, absent",
    [
        (WHOLE_RUN, {BLUE, ORANGE}, set()),
        ([validation(0, 4.2)], {ORANGE}, {BLUE}),
        ([validation(0, 2.0), validation(10, 2.0)], {ORANGE}, {BLUE}),
        ([train(1, 4.2)], {BLUE}, {ORANGE}),
        ([train(1, 0.0), train(2, float("nan")), train(3, 0.1)], {BLUE}, {ORANGE}),
        ([{"event": "start", "time": 1}, *WHOLE_RUN, {"event": "end"}], {BLUE, ORANGE}, set()),
    ],
)
def test_a_curve_is_drawn_for_any_number_of_points(tmp_path, records, drawn, absent):
    draw_loss_curve(write(tmp_path, records), tmp_path / "loss_curve.png")
    found = colours(tmp_path / "loss_curve.png")
    assert drawn <= found and not absent & found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_a_truncated_last_line_changes_nothing(tmp_path):
    draw_loss_curve(write(tmp_path, WHOLE_RUN), tmp_path / "whole.png")
    draw_loss_curve(write(tmp_path, WHOLE_RUN, '{"event": "tra'), tmp_path / "cut.png")
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "cut.png").read_bytes()


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    path = write(tmp_path, WHOLE_RUN[:2], '{"event": "tra\n' + json.dumps(train(3, 1.0)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a JSON line"):
        draw_loss_curve(path, tmp_path / "loss_curve.png")


@pytest.mark.parametrize("records", [[], [{"event": "start"}], [train(1, float("inf"))]])
def test_a_file_without_losses_is_refused(tmp_path, records):
    with pytest.raises(ValueError, match="no training or validation losses"):
        draw_loss_curve(write(tmp_path, records), tmp_path / "loss_curve.png")


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def disk_full(self, path, **options):
        path.write_bytes(b"half a pic")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", disk_full)
    out_path = tmp_path / "loss_curve.png"
    out_path.write_bytes(b"the old picture")
    with pytest.raises(OSError, match="No space left"):
        draw_loss_curve(write(tmp_path, WHOLE_RUN), out_path)
    assert out_path.read_bytes() == b"the old picture"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_smoothing_is_a_centered_mean_that_does_not_lag():
    values = [float(n * n % 7) for n in range(45)]
    half = smoothing_window(len(values)) // 2
    assert half == 2
    for n, mean in enumerate(smoothed(Series(list(range(45)), values)).values):
        reach = min(half, n, 44 - n)
        window = values[n - reach : n + reach + 1]
        assert mean == pytest.approx(sum(window) / len(window), rel=1e-12)
    line = Series(list(range(45)), [3.0 - n / 9 for n in range(45)])
    assert smoothed(line).values == pytest.approx(line.values)
    assert [smoothing_window(n) for n in (0, 19, 20, 10**6)] == [1, 1, 3, 101]


def test_the_title_names_the_run_and_states_the_outcome(tmp_path, monkeypatch):
    def title(*points):
        return loss_curve._outcome(Series([p[0] for p in points], [p[1] for p in points]))

    assert title((0, 4.21), (10, 2.0), (20, 2.5)) == "Validation loss 4.210 → 2.000 at step 10"
    assert title((0, 2.0), (10, 2.5)) == "Validation loss 2.000 at step 0, no improvement since"
    assert title((0, 4.21)) == "Validation loss 4.210 at step 0"
    assert title() == "Training loss"

    from matplotlib.axes import Axes

    titles = []
    real = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda *args, **more: titles.append(args[1]) or real(*args, **more)
    )
    run = tmp_path / "a$run$ \u6f22"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "/models/" + "long-" * 20}))
    draw_loss_curve(write(run, WHOLE_RUN[:2]), run / "loss_curve.png")
    name = ("long-" * 20)[:40]
    assert titles == [f"{name}..., run a$run$ \u6f22\nValidation loss 4.200 at step 0"]


def test_the_limits_show_everything_but_the_most_extreme_steps():
    wild = Series(list(range(1, 401)), [2.0] * 398 + [1e6, -1e6])
    low, high = y_limits(whole=[Series([0, 400], [4.0, 1.0])], trimmed=[wild])
    assert (low, high) == pytest.approx((0.7, 4.3))  # one tenth beyond 1.0 and 4.0
    low, high = y_limits(whole=[Series([0], [2.0])], trimmed=[])
    assert low < 2.0 < high
    assert y_limits(whole=[Series([0, 1], [0.0, 1.0])], trimmed=[])[0] > -0.05  # no empty band
    assert x_limits([wild, Series([], [])]) == pytest.approx((-12, 412))
