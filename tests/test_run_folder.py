"""The share of images that may be unusable."""

import io

import pytest

from lora_engine.batches import Batch, Skipped
from lora_engine.journal import Journal, TrainingStopped
from lora_engine.run_folder import RunFolder, SkippedRows, allowed_failures


def batch(num_good: int, num_bad: int, begin: int = 0) -> Batch:
    problems = [Skipped(i, f"{begin + i}.jpg", "truncated") for i in range(num_bad)]
    return Batch(None, None, None, None, list(range(num_good)), problems)


@pytest.fixture
def skipped(tmp_path):
    with Journal(tmp_path / "metrics.jsonl", total_steps=9, stream=io.StringIO()) as journal:
        yield SkippedRows(RunFolder(tmp_path), journal, max_share=0.05)


def test_a_set_below_the_share_is_not_refused_by_chance(skipped):
    """12 of the first 204 rows, 4 % of all: more than 5 % of the sample, less than its chance."""
    skipped.add([batch(160, 12)], dataset_size=10_000)
    skipped.add([batch(32, 0)], dataset_size=10_000)


def test_too_many_stop_the_run_even_at_a_step_without_a_problem_of_its_own(skipped):
    skipped.add([batch(140, 50)], dataset_size=10_000)  # too few rows tried to tell
    with pytest.raises(TrainingStopped, match=r"50 of 222 .* 49.jpg: truncated"):
        skipped.add([batch(32, 0)], dataset_size=10_000)


def test_after_a_whole_epoch_the_share_holds_as_it_stands(skipped):
    with pytest.raises(TrainingStopped, match="6 of 100"):
        skipped.add([batch(94, 6)], dataset_size=100)
    assert allowed_failures(100, 0.05, is_sample=False) == 5


def test_a_batch_without_one_usable_image_stops_the_run(skipped):
    with pytest.raises(TrainingStopped, match="truncated"):
        skipped.add([batch(0, 1)], dataset_size=10_000)
