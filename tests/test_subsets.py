"""Splits, held-out images, and evenly spaced samples."""

import numpy as np
import pytest

from lora_engine.data.pairs import Pairs
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.sampling import evenly_spaced
from lora_engine.data.subsets import (
    evaluation_split,
    hold_out,
    hold_out_sampled,
    named_split,
    of_splits,
    splits_of,
)

ROWS = [(f"/images/{i % 40}.jpg", f"caption {i}") for i in range(100)]


def pairs(rows=ROWS) -> Pairs:
    return read_pairs(list(rows))


def divided(rows=ROWS, *, fraction=None, size=None, seed=1) -> tuple[Pairs, Pairs]:
    return hold_out(pairs(rows), fraction=fraction, size=size, seed=seed)


def test_hold_out_splits_by_image_and_loses_no_row():
    train, validation = divided(fraction=0.2)
    assert not set(train.images) & set(validation.images) and len(validation.images) == 8
    everything = [*pairs()]
    assert sorted([*train, *validation]) == sorted(everything)
    assert [*train] == [row for row in everything if row in [*train]]
    for part in (train, validation):
        assert len(set(part.images)) == len(part.images)
        first = [part.images[i] for i in np.unique(part.image_of_row, return_index=True)[0]]
        assert [*part.images] == first == list(dict.fromkeys(row.image for row in part))


def test_hold_out_depends_on_seed_and_names_alone():
    def held_out(rows, seed):
        _, validation = divided(rows, fraction=0.2, seed=seed)
        return {image.rpartition("/")[2] for image in validation.images}

    assert held_out(ROWS, 1) == held_out(ROWS[::-1], 1) != held_out(ROWS, 2)
    moved = [(f"/elsewhere{image}", text) for image, text in ROWS]
    assert held_out(moved, 1) == held_out(ROWS, 1)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_hold_out_leaves_an_image_on_each_side(fraction):
    for count in (2, 3):
        train, validation = divided(ROWS[:count], fraction=fraction)
        assert train and validation


def test_by_default_the_smaller_of_five_percent_and_5000_images_is_held_out():
    few, many = (
        read_pairs([(f"{i}.jpg", "a") for i in range(num_images)]) for num_images in (200, 102_000)
    )
    assert len(hold_out(few, fraction=None, size=None, seed=0)[1]) == 10
    assert len(hold_out(few, fraction=None, size=70, seed=0)[1]) == 70
    assert len(hold_out(many, fraction=None, size=None, seed=0)[1]) == 5_000
    assert len(hold_out(many, fraction=0.05, size=None, seed=0)[1]) == 5_100


def test_hold_out_needs_two_images():
    with pytest.raises(ValueError, match="pass validation data with --val_data_path"):
        divided([("1.jpg", "a"), ("1.jpg", "b")], fraction=0.5)


def test_runs_of_earlier_versions_keep_the_images_that_they_held_out():
    """The names of what the version before columns held out of these rows."""
    train, validation = hold_out_sampled(pairs(), fraction=0.2, seed=1)
    assert sorted(image.removeprefix("/images/") for image in validation.images) == EARLIER
    assert len(train) + len(validation) == 100


EARLIER = [f"{i}.jpg" for i in (12, 15, 16, 23, 34, 36, 37, 6)]


def test_rows_are_chosen_by_split():
    data = pairs([
        {"image": f"{i}.jpg", "text": "a", "split": split}
        for i, split in enumerate(["train", "restval", "Validation", "test", "train", "dev"])
    ])
    assert splits_of(data) == {"train": 3, "val": 2, "test": 1}
    assert len(of_splits(data, ["train"])) == 3 and of_splits(data, splits_of(data)) is data
    assert [row.image[-5:] for row in named_split(data, "validation")] == ["2.jpg", "5.jpg"]
    assert len(evaluation_split(data, ["test", "val"])) == 1
    assert evaluation_split(data, ["nothing"]) is data
    with pytest.raises(ValueError, match=r"--split dog: .* train \(3 rows\), val \(2 rows\)"):
        named_split(data, "dog")


def test_evenly_spaced_indices_reach_from_end_to_end():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 64) == [0, 1, 2]
    assert evenly_spaced(5, 1) == [0]
    assert evenly_spaced(0, 4) == evenly_spaced(4, 0) == []
