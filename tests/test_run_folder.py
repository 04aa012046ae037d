"""The share of images that may be unusable."""


import pytest

from lora_engine.data.batches import Skipped
from lora_engine.report.run_folder import RunFolder
from lora_engine.stopping import TrainingStopped
from lora_engine.training.skipped_rows import SkippedRows, allowed_failures


def step(num_good: int, num_bad: int, begin: int = 0) -> tuple[list[list[int]], list[Skipped]]:
    """A step of one micro-batch: rows from `begin` on, of which the first ones are bad."""
    bad = range(begin, begin + num_bad)
    problems = [Skipped(row, f"{row}.jpg", "truncated") for row in bad]
    good = range(begin + num_bad, begin + num_bad + num_good)
    return [[*good]], problems


@pytest.fixture
def skipped(tmp_path):
    return lambda num_rows: SkippedRows(RunFolder(tmp_path), max_share=0.05, num_rows=num_rows)


def test_a_set_below_the_share_is_not_refused_by_chance(skipped):
    """12 of the first 204 rows: more than 5 % of the sample, less than chance allows it."""
    rows = skipped(10_000)
    rows.add(*step(160, 12))
    rows.add(*step(32, 0, begin=172))


def test_too_many_stop_the_run_even_at_a_step_without_a_problem_of_its_own(skipped):
    rows = skipped(10_000)
    rows.add(*step(140, 50))  # too few rows tried to tell
    with pytest.raises(TrainingStopped, match=r"50 of 222 .* 49.jpg: truncated"):
        rows.add(*step(32, 0, begin=190))


def test_after_a_whole_epoch_the_share_holds_as_it_stands(skipped):
    with pytest.raises(TrainingStopped, match="6 of 100"):
        skipped(100).add(*step(94, 6))
    assert allowed_failures(100, 0.05, is_sample=False) == 5


def test_a_row_that_is_tried_again_and_again_counts_once(skipped):
    rows = skipped(100)
    rows.add(*step(95, 5))
    for _ in range(9):
        rows.add(*step(1, 5))
    assert rows.num_images == 5


def test_a_batch_without_one_usable_image_stops_the_run(skipped):
    with pytest.raises(TrainingStopped, match="truncated"):
        skipped(10_000).add(*step(0, 1))
