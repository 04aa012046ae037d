"""The data of a run: which rows it trains and validates on, and what it says about them."""

import json
import logging
from pathlib import Path

import pytest
from pictures import settings, write_pictures

from lora_engine.config import TrainingConfig
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import AnnotationError
from lora_engine.models.pretrained import load_captioner
from lora_engine.training import run_data
from lora_engine.training.run_data import captioned_images, read_rows

SPLITS = ["train", "restval", "val", "test"]


@pytest.fixture
def folder(tmp_path, caplog) -> Path:
    """Twelve images in train.json, four others in val.json, and in split.json four splits."""
    caplog.set_level(logging.INFO)
    write_pictures(tmp_path, num_images=12)
    write_pictures(tmp_path, num_images=4, name="val.json")
    rows = json.loads((tmp_path / "train.json").read_text())
    rows = [row | {"split": SPLITS[number % 4]} for number, row in enumerate(rows)]
    (tmp_path / "split.json").write_text(json.dumps(rows))
    return tmp_path


def images_of(folder: Path, **changes) -> tuple[list[int], list[int]]:
    """The numbers of the training and the validation images of a run on split.json."""
    given = {"train_data_path": str(folder / "split.json"), "val_data_path": None} | changes
    rows = read_rows(settings(folder, folder, folder, **given))
    assert list(rows.images) == [*rows.train.images, *rows.val.images]
    return tuple(
        [int(Path(image).stem[-2:]) for image in pairs.images] for pairs in (rows.train, rows.val)
    )


def test_the_datas_own_splits_are_used(folder, caplog):
    assert images_of(folder) == ([0, 1, 4, 5, 8, 9], [2, 6, 10])
    assert caplog.messages == [
        "splits: 6 rows to train on, 3 for validation, 3 of other splits unused"
    ]
    text = (folder / "split.json").read_text()
    (folder / "split.json").write_text(text.replace('"test"', '"val"'))
    assert images_of(folder) == ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    assert caplog.messages[1] == "splits: 6 rows to train on, 6 for validation"


def test_another_split_can_be_named(folder):
    assert images_of(folder, split="test") == ([3, 7, 11], [2, 6, 10])
    for name in ("val", "validation", "dev"):  # part of which is held out
        train, val = images_of(folder, split=name)
        assert sorted(train + val) == [2, 6, 10] and len(val) == 1
    with pytest.raises(ValueError, match=r"--split dog: no row .* are train \(6 rows\), val"):
        images_of(folder, split="dog")


def test_validation_data_of_their_own_are_used_before_splits(folder):
    assert images_of(folder, val_data_path=str(folder / "val.json")) == (
        [0, 1, 4, 5, 8, 9], [0, 1, 2, 3]
    )
    train, val = images_of(
        folder, train_data_path=str(folder / "train.json"), val_data_path=str(folder / "split.json")
    )
    assert len(train) == 12 and val == [2, 6, 10]


def test_without_splits_images_are_held_out(folder):
    path = str(folder / "train.json")
    train, val = images_of(folder, train_data_path=path)
    assert len(val) == 1 and sorted(train + val) == [*range(12)]
    assert {*val} < {*images_of(folder, train_data_path=path, val_size=4)[1]}
    assert len(images_of(folder, train_data_path=path, val_size=4)[1]) == 4
    assert len(images_of(folder, train_data_path=path, val_fraction=0.25)[1]) == 3


@pytest.mark.parametrize("num_images, is_warning", [(19, True), (20, False)])
def test_few_validation_images_are_a_warning(folder, caplog, monkeypatch, num_images, is_warning):
    monkeypatch.setattr(run_data, "FEW_IMAGES", 20)
    write_pictures(folder, num_images=num_images, name="val.json")
    config = TrainingConfig(
        model="m", train_data_path=str(folder / "train.json"),
        val_data_path=str(folder / "val.json"),
    )
    run_data.warn_of_few_images(run_data.read_rows(config).val, config)
    warning = (
        "only 19 validation images: their loss and scores say little (--val_size)"
    )
    assert caplog.messages == [warning] * is_warning


def test_one_validation_image_cannot_select_an_adapter_by_cider_d(folder, caplog, monkeypatch):
    monkeypatch.setattr(run_data, "FEW_IMAGES", 20)
    config = TrainingConfig(
        model="m", train_data_path=str(folder / "train.json"), best_by="cider_d"
    )
    run_data.warn_of_few_images(run_data.read_rows(config).val, config)
    few, useless = caplog.messages
    assert few.startswith("only 1 validation image: ")
    assert "CIDEr-D is 0 by definition for one image" in useless
    assert "lowest validation loss" in useless


def test_images_on_both_sides_are_a_warning(folder, caplog):
    rows = json.loads((folder / "train.json").read_text())
    (folder / "val.json").write_text(json.dumps([*rows[1:3], rows[1]]))
    images_of_both = read_rows(settings(folder, folder, folder)).val.images
    (message,) = caplog.messages
    assert message.startswith(
        f"2 of 2 validation images are also training images, such as {images_of_both[0]}"
    )


# --- characters that the tokenizer does not know --------------------------------------------------


def said_about(caplog, captions: list[str], captioner) -> list[str]:
    """What is logged when the captions are tokenized."""
    caplog.clear()
    pairs = read_pairs([(f"/{number}.jpg", text) for number, text in enumerate(captions)])
    config = TrainingConfig(captioner.name, max_caption_tokens=20)
    captioned_images(pairs, captioner, config, substitute=False)
    return caplog.messages


def test_one_unknown_token_in_a_hundred_is_a_warning(blip_folder, caplog):
    captioner = load_captioner(blip_folder)
    rest = 9 * ["a dog on the beach with a red small car"]
    assert said_about(caplog, [*rest, "a dog on the beach with a red small"], captioner) == []
    (message,) = said_about(caplog, [*rest, "a dog on the beach with a red small 😀"], captioner)
    assert message.startswith("1.0% of the captions' tokens stand for characters that the ")
    assert str(blip_folder) in message and "emoji" in message
    assert said_about(caplog, [*rest, "a dog on the beach with a red small a 😀"], captioner) == []


def test_captions_of_unknown_characters_alone_are_refused(blip_folder, vit_gpt2_folder, caplog):
    captions = ["😀", "日本", "😀 😀"]
    with pytest.raises(ValueError, match="does not know a single character .*'😀'; choose a model"):
        said_about(caplog, captions, load_captioner(blip_folder))
    said_about(caplog, [*captions, "a"], load_captioner(blip_folder))
    assert len(caplog.messages) == 1
    assert said_about(caplog, captions, load_captioner(vit_gpt2_folder)) == []  # works on bytes


def test_most_images_must_be_where_the_paths_lead(folder):
    for path in sorted((folder / "images").glob("train_*"))[:2]:
        path.unlink()
    given = {
        "train_data_path": str(folder / "train.json"), "val_data_path": str(folder / "val.json")
    }
    with pytest.raises(ValueError, match=(
        r"no image file for 2 of 12 rows checked, .* /.*train_\w+\.png \(/.*/train\.json:\d+\)\."
    )):
        images_of(folder, **given)
    assert len(images_of(folder, **given, max_bad_share=0.2)[0]) == 12
    with pytest.raises(AnnotationError, match="no such file"):
        images_of(folder, train_data_path=str(folder / "absent.json"))
