"""What a run says: whole lines in metrics.jsonl, a bar on a terminal, few plain lines elsewhere."""

import io
import json
import logging
import math

import pytest
import torch
from pictures import json_lines

from lora_engine.config import TrainingConfig
from lora_engine.report import metrics_log as metrics_log_module
from lora_engine.report.metrics_log import MetricsLogger, TrainingStopped, duration
from lora_engine.training.meter import Meter
from lora_engine.training.schedule import Schedule

logger = logging.getLogger("lora_engine.a_module")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which only the tests move."""
    now = [1000.0]
    monkeypatch.setattr(metrics_log_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics_log_module.time, "perf_counter", lambda: now[0])
    return now


def report(metrics, step):
    metrics.progress(
        step=step, loss=2.34567, learning_rate=1e-4, images_per_s=123.44, data_wait_share=0.071,
        remaining_s=125.0,
    )


def test_elsewhere_than_on_a_terminal_there_is_a_plain_line_every_few_seconds(tmp_path, clock):
    stream = io.StringIO()
    with MetricsLogger(tmp_path / "metrics.jsonl", total_steps=100, stream=stream) as metrics:
        for step in range(1, 101):
            clock[0] += 0.5
            report(metrics, step)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == (
        "step 10/100 | loss 2.3457 | lr 1.00e-04 | 123.4 images/s | waiting for data 7 % | "
        "2 min 05 s left"
    )
    assert lines[-1].startswith("step 100/100 | ")


def test_the_last_step_has_a_line_however_short_the_run(tmp_path, clock):
    stream = io.StringIO()
    with MetricsLogger(tmp_path / "metrics.jsonl", total_steps=3, stream=stream) as metrics:
        for step in (1, 2, 3):
            report(metrics, step)
    assert stream.getvalue().startswith("step 3/3 | ")


def test_on_a_terminal_there_is_a_bar_and_messages_above_it(tmp_path):
    stream = Terminal()
    with MetricsLogger(tmp_path / "metrics.jsonl", total_steps=4, stream=stream) as metrics:
        report(metrics, 2)
        logger.info("step 2: validation loss 2.0000")
        report(metrics, 4)
    text = stream.getvalue()
    assert "4/4" in text and "loss 2.3457" in text and "\r" in text
    assert "step 2: validation loss 2.0000\n" in text
    assert text.count("\n") <= 2  # the message's, and the bar's own at the end


def test_each_event_is_a_whole_line_at_once_with_seven_digits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLogger(path, total_steps=1, stream=io.StringIO()) as metrics:
        metrics.record("train", step=1, loss=1 / 3)
        assert path.read_text() == '{"event": "train", "step": 1, "loss": 0.3333333}\n'
        metrics.record("validation", step=1, loss=123456.789)
        assert json.loads(path.read_text().splitlines()[1])["loss"] == 123456.8


def meter_of(metrics, **settings):
    schedule = Schedule(TrainingConfig(model="", epochs=10, batch_size=1), num_rows=10)
    return Meter(metrics, schedule, **{"has_grad_scaler": False} | settings)


def test_speed_and_waiting_are_of_the_interval(tmp_path, clock):
    path = tmp_path / "metrics.jsonl"

    with MetricsLogger(path, total_steps=100, stream=io.StringIO()) as metrics:
        meter = meter_of(metrics)
        for step in (1, 2):
            clock[0] += 5.0
            loss, norm = torch.tensor(2.0 + step), torch.tensor(0.5)
            meter.add(step, loss, norm, 1e-3, ["a"] * 20, waited_s=2.0 * step)
        meter.settle(2)
        clock[0] += 1000.0  # a validation
        meter.restart()
        clock[0] += 4.0
        meter.add(3, torch.tensor(1.0), torch.tensor(0.25), 1e-4, ["a"] * 20, waited_s=4.0)
        meter.settle(3)
        meter.settle(3)  # nothing new: nothing written
    assert json_lines(path) == [
        {"event": "train", "step": 2, "epoch": 0.2, "loss": 3.5, "learning_rate": 1e-3,
         "grad_norm": 0.5, "images_per_s": 4.0, "data_wait_share": 0.4},
        {"event": "train", "step": 3, "epoch": 0.3, "loss": 1.0, "learning_rate": 1e-4,
         "grad_norm": 0.25, "images_per_s": 5.0, "data_wait_share": 0.0},
    ]


def settle(meter, points, first_step=1):
    for step, (loss, norm) in enumerate(points, start=first_step):
        meter.add(step, torch.tensor(loss), torch.tensor(norm), 1e-3, [f"{step}.png"], 0.0)
    meter.settle(step)


GOOD, BAD_LOSS, BAD_GRADIENT = (1.0, 1.0), (math.nan, math.nan), (1.0, math.inf)


def test_three_in_a_row_are_counted_across_lines_and_a_good_one_begins_anew(tmp_path):
    with MetricsLogger(tmp_path / "m", total_steps=100, stream=io.StringIO()) as metrics:
        meter = meter_of(metrics)
        settle(meter, [BAD_LOSS, BAD_GRADIENT, GOOD, BAD_LOSS, BAD_LOSS])
        with pytest.raises(TrainingStopped, match=r"gradient was not finite.*step 6\."):
            settle(meter, [BAD_GRADIENT], first_step=6)
    skipped = [line["step"] for line in json_lines(tmp_path / "m") if line["event"] != "train"]
    assert skipped == [1, 2, 4, 5, 6]


def test_overflows_that_a_grad_scaler_meets_are_listed_but_stop_nothing(tmp_path):
    with MetricsLogger(tmp_path / "m", total_steps=100, stream=io.StringIO()) as metrics:
        meter = meter_of(metrics, has_grad_scaler=True)
        settle(meter, 5 * [BAD_GRADIENT] + [GOOD])
        with pytest.raises(TrainingStopped, match="loss was not finite"):
            settle(meter, 3 * [BAD_LOSS], first_step=7)
    lines = json_lines(tmp_path / "m")
    assert [line["by_grad_scaler"] for line in lines[:5]] == [True] * 5
    assert lines[5]["event"] == "train" and lines[5]["loss"] == 1.0


def test_a_grad_scaler_is_not_excused_for_ever(tmp_path):
    """Its scale has fallen from 65536 to 1 after 17 overflows: then the gradients are to blame."""
    with MetricsLogger(tmp_path / "m", total_steps=100, stream=io.StringIO()) as metrics:
        meter = meter_of(metrics, has_grad_scaler=True)
        settle(meter, 20 * [BAD_GRADIENT])
        with pytest.raises(TrainingStopped, match="gradient was not finite.*step 23"):
            settle(meter, 3 * [BAD_GRADIENT], first_step=21)


def test_what_came_after_the_bad_steps_is_recorded_before_the_run_stops(tmp_path):
    with MetricsLogger(tmp_path / "m", total_steps=100, stream=io.StringIO()) as metrics:
        with pytest.raises(TrainingStopped, match="up to step 3"):
            settle(meter_of(metrics), 3 * [BAD_LOSS] + [GOOD])
    assert json_lines(tmp_path / "m")[-1]["event"] == "train"


def test_a_value_that_is_not_finite_is_null_in_the_metrics(tmp_path):
    with MetricsLogger(tmp_path / "m", total_steps=1, stream=io.StringIO()) as metrics:
        metrics.record("validation", step=1, loss=math.nan)
    assert json_lines(tmp_path / "m") == [{"event": "validation", "step": 1, "loss": None}]


@pytest.mark.parametrize("seconds, text", [
    (0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599, "59 min 59 s"),
    (3600, "1 h 00 min"), (26_000, "7 h 13 min"),
])
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
