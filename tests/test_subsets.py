"""Held-out images, and evenly spaced samples."""

import pytest

from lora_engine.data.rows import Row
from lora_engine.data.sampling import evenly_spaced
from lora_engine.data.subsets import hold_out

ROWS = [Row(f"caption {i}", f"/images/{i % 40}.jpg") for i in range(100)]


def test_hold_out_splits_by_image_and_loses_no_row():
    train, validation = hold_out(ROWS, fraction=0.2, seed=1)
    assert not {row.image for row in train} & {row.image for row in validation}
    assert len({row.image for row in validation}) == 8
    assert sorted(train + validation) == sorted(ROWS)
    assert train == [row for row in ROWS if row in train]


def test_hold_out_depends_on_the_seed_and_not_on_the_order():
    def held_out(rows, seed):
        return {row.image for row in hold_out(rows, fraction=0.2, seed=seed)[1]}

    assert held_out(ROWS, 1) == held_out(ROWS[::-1], 1) != held_out(ROWS, 2)
    moved = [Row(row.text, "/elsewhere" + row.image) for row in ROWS]
    assert held_out(moved, 1) == {"/elsewhere" + image for image in held_out(ROWS, 1)}


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_hold_out_leaves_an_image_on_each_side(fraction):
    for count in (2, 3):
        train, validation = hold_out(ROWS[:count], fraction=fraction, seed=0)
        assert train and validation


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_hold_out_refuses_an_impossible_fraction(fraction):
    with pytest.raises(ValueError, match="--val_fraction is .*, expected a number between 0 and 1"):
        hold_out(ROWS, fraction=fraction, seed=0)


def test_hold_out_needs_two_images():
    with pytest.raises(ValueError, match="pass a validation file with --val_data_path"):
        hold_out([Row("a", "1.jpg"), Row("b", "1.jpg")], fraction=0.5, seed=0)


def test_evenly_spaced_indices_reach_from_end_to_end():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 64) == [0, 1, 2]
    assert evenly_spaced(5, 1) == [0]
    assert evenly_spaced(0, 4) == evenly_spaced(4, 0) == []
