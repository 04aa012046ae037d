"""The learning-rate curve: a line up, a line down, and no step that learns nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.config import TrainingConfig
from lora_engine.training.schedule import Schedule, learning_rate


def curve(warmup_steps, total_steps, peak=1.0):
    return [
        learning_rate(step, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(1, total_steps + 1)
    ]


def test_without_warmup_the_rate_falls_in_a_line_from_the_peak():
    assert curve(0, 5, peak=2.0) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_with_warmup_it_rises_in_a_line_to_the_peak_and_falls_from_it():
    assert curve(4, 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_a_run_shorter_than_its_warmup_only_rises():
    assert curve(10, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@given(st.integers(0, 500), st.integers(1, 500), st.floats(1e-8, 1.0))
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(warmup_steps, total_steps, peak):
    rates = curve(warmup_steps, total_steps, peak)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    top = min(warmup_steps, total_steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if warmup_steps < total_steps:
        assert max(rates) == pytest.approx(peak)


@pytest.mark.parametrize("max_steps, limits", [
    (None, ["--epochs"]), (5, ["--max_steps"]), (6, ["--epochs", "--max_steps"]), (7, ["--epochs"]),
])
def test_the_flags_that_set_the_number_of_steps_are_known(max_steps, limits):
    config = TrainingConfig(model="m", epochs=2, batch_size=1, max_steps=max_steps)
    assert Schedule(config, num_rows=3).limits == limits
