"""The learning-rate curves: up in a line, down as a schedule says, no step that learns nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lora_engine.config import TrainingConfig
from lora_engine.training.schedule import Schedule, learning_rate

SCHEDULES = ["linear", "cosine", "constant", "wsd"]


def curve(warmup_steps, total_steps, peak=1.0, **settings):
    return [
        learning_rate(
            step, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps, **settings
        )
        for step in range(1, total_steps + 1)
    ]


def test_without_warmup_the_rate_falls_in_a_line_from_the_peak():
    assert curve(0, 5, peak=2.0) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])


def test_with_warmup_it_rises_in_a_line_to_the_peak_and_falls_from_it():
    assert curve(4, 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_a_run_shorter_than_its_warmup_only_rises():
    assert curve(10, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@given(st.integers(0, 500), st.integers(1, 500), st.floats(1e-8, 1.0))
def test_the_linear_curve_has_the_bits_of_earlier_versions(warmup_steps, total_steps, peak):
    assert curve(warmup_steps, total_steps, peak) == [
        peak * step / warmup_steps if step <= warmup_steps
        else peak * (total_steps - step + 1) / max(total_steps - warmup_steps, 1)
        for step in range(1, total_steps + 1)
    ]


@given(
    st.sampled_from(SCHEDULES), st.integers(0, 500), st.integers(1, 500), st.floats(1e-8, 1.0),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(
    schedule, warmup_steps, total_steps, peak, floor
):
    rates = curve(warmup_steps, total_steps, peak, schedule=schedule, min_lr=floor * peak)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    top = min(warmup_steps, total_steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == pytest.approx(sorted(rates[top:], reverse=True))
    assert all(rate >= floor * peak * (1 - 1e-12) for rate in rates[top:])
    if warmup_steps < total_steps:
        assert max(rates) == pytest.approx(peak)


@pytest.mark.parametrize("max_steps, limits", [
    (None, ["--epochs"]), (5, ["--max_steps"]), (6, ["--epochs", "--max_steps"]), (7, ["--epochs"]),
])
def test_the_flags_that_set_the_number_of_steps_are_known(max_steps, limits):
    config = TrainingConfig(model="m", epochs=2, batch_size=1, max_steps=max_steps)
    assert Schedule(config, num_rows=3).limits == limits


WARMUP, DECAY, TOTAL = 7, 11, 50
HUGGING_FACE = {
    "linear": lambda o: get_linear_schedule_with_warmup(o, WARMUP, TOTAL),
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, WARMUP, TOTAL),
    "cosine to 0.1": lambda o: get_cosine_with_min_lr_schedule_with_warmup(
        o, WARMUP, TOTAL, min_lr=0.1
    ),
    "constant": lambda o: get_constant_schedule_with_warmup(o, WARMUP),
    "wsd": lambda o: get_wsd_schedule(o, WARMUP, DECAY, TOTAL, decay_type="1-sqrt"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_rates_are_those_of_transformers_but_for_its_steps_with_a_rate_of_zero(name):
    """Theirs begins with a rate of 0: our warm-up is one step ahead of theirs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (theirs,) = HUGGING_FACE[name](optimizer).lr_lambdas
    ours = curve(
        WARMUP, TOTAL, schedule=name.split()[0], min_lr=0.1 if "0.1" in name else 0.0,
        decay_steps=DECAY if name == "wsd" else None,
    )
    assert ours == pytest.approx(
        [theirs(step if step <= WARMUP else step - 1) for step in range(1, TOTAL + 1)]
    )


def test_a_decay_to_min_lr_ends_one_step_before_it():
    assert curve(0, 4, min_lr=0.6) == pytest.approx([1.0, 0.9, 0.8, 0.7])
    root = math.sqrt(0.5)
    assert curve(0, 4, schedule="wsd", decay_steps=2) == pytest.approx([1, 1, 1, 1 - root])


# --- of a run -----------------------------------------------------------------------------------


def a_schedule(num_steps=50, **settings) -> Schedule:
    return Schedule(TrainingConfig("m", epochs=1, batch_size=1, lr=1.0, **settings), num_steps)


def test_shares_of_the_steps_are_rounded_up_as_in_transformers():
    schedule = a_schedule(num_steps=33, warmup_ratio=0.1, lr_schedule="wsd")
    assert (schedule.warmup_steps, schedule.decay_start, schedule.decay_steps) == (4, 26, 7)
    assert a_schedule(num_steps=33, lr_schedule="wsd", decay_ratio=0.5).decay_steps == 17
    assert a_schedule(warmup_steps=10).decay_start == 10


@pytest.mark.parametrize("settings, words", [
    ({"warmup_steps": 3, "warmup_ratio": 0.1}, "--warmup_steps and --warmup_ratio both set"),
    ({"min_lr": 2.0}, "--min_lr 2 is above --lr 1"),
    ({"min_lr": 0.1, "lr_schedule": "constant"}, "--lr_schedule constant has none"),
    ({"decay_ratio": 0.1, "lr_schedule": "cosine"}, "belongs to --lr_schedule wsd; cosine does"),
    ({"warmup_ratio": 1.5}, "--warmup_ratio is 1.5; it must be at least 0 and at most 1"),
    ({"decay_ratio": 0.0, "lr_schedule": "wsd"}, "--decay_ratio is 0.0"),
    ({"adam_beta1": 1.0}, "--adam_beta1 is 1.0; it must be at least 0 and below 1"),
    ({"ema_decay": 1.0}, "--ema_decay is 1.0"),
])
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError) as error:
        a_schedule(**settings).config.check()
    assert words in str(error.value)


@pytest.mark.parametrize("settings, words", [
    ({"warmup_steps": 41}, "warm-up of 41 steps and the decay of 10 are longer than the run of 50"),
    ({"warmup_steps": 51}, "the warm-up of 51 steps and"),
    ({"warmup_ratio": 0.6, "decay_ratio": 0.5}, "30 steps and the decay of 25 are longer"),
])
def test_a_decay_that_the_warmup_leaves_no_steps_for_is_refused(settings, words, caplog):
    with pytest.raises(ValueError) as error:
        a_schedule(lr_schedule="wsd", **settings).check()
    assert words in str(error.value) and not caplog.records


def test_a_warmup_and_a_decay_may_be_the_whole_run():
    """Shares that are rounded up may exceed it by one step."""
    whole = a_schedule(warmup_steps=40, lr_schedule="wsd")
    whole.check()
    rounded = a_schedule(num_steps=33, warmup_ratio=0.8, lr_schedule="wsd", min_lr=0.5)
    rounded.check()
    assert (whole.decay_start, rounded.warmup_steps, rounded.decay_steps) == (40, 27, 6)
    assert rounded.learning_rate(28) == 1.0
    assert rounded.learning_rate(33) == pytest.approx(0.5 + 0.5 * (1 - math.sqrt(5 / 6)))


def test_a_warmup_longer_than_the_run_is_a_warning(caplog):
    """A first trial with --max_steps goes on."""
    a_schedule(warmup_steps=50).check()
    assert not caplog.records
    a_schedule(warmup_steps=100).check()
    assert "only rises, to 0.5; lower --warmup_steps" in caplog.text
