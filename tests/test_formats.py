"""Every format gives the same pairs, and every kind of storage the same losses, to the bit."""

import dataclasses
from pathlib import Path

import data_formats
import pytest
from data_formats import FILES, FROM_PYTHON, NEEDS, Sample, Write, samples
from pictures import json_lines, settings, write_pictures

from lora_engine.data.read_pairs import read_pairs
from lora_engine.training.loop import train

SAMPLES = samples(40)


def written(write, folder: Path, given: list[Sample] = SAMPLES):
    if write in NEEDS:
        pytest.importorskip(NEEDS[write])
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, given)


@pytest.mark.parametrize("write", FILES + FROM_PYTHON, ids=lambda write: write.__name__)
def test_all_formats_give_the_same_captions_and_images(write, tmp_path):
    pairs = read_pairs(written(write, tmp_path), max_bad_share=0.0)
    if write is data_formats.arrow_dict:  # its split "test" comes last
        pairs = pairs.choose("training", lambda: range(40))
    assert [*pairs.captions()] == [sample.caption for sample in SAMPLES] and not pairs.bad
    assert len(pairs.images) == 40
    data = [pairs.images.read(image) for image in pairs.image_of_row.tolist()]
    if write in (data_formats.python_pictures, data_formats.python_arrays):
        assert all(image.startswith(b"\x89PNG") for image in data)
    else:
        assert data == [sample.data for sample in SAMPLES]


@pytest.fixture(scope="module")
def losses_of(blip_folder, tmp_path_factory):
    """A function: data -> the losses of three steps, and of validations, on the same images."""
    folder = tmp_path_factory.mktemp("validation")
    write_pictures(folder, num_images=4, name="val.json")

    def run(data) -> list[float]:
        path = tmp_path_factory.mktemp("run") / "run"
        config = settings(blip_folder, folder, path)
        config = dataclasses.replace(
            config, val_data_path=str(folder / "val.json"), max_steps=3, batch_size=8,
            eval_captions=0, num_samples=0, cache="memory",
        )
        if isinstance(data, Path):
            train(dataclasses.replace(config, train_data_path=str(data)))
        elif isinstance(data, tuple):
            train(dataclasses.replace(config, train_data_path=tuple(map(str, data))))
        else:
            train(dataclasses.replace(config, train_data_path=None), data=data)
        return [line["loss"] for line in json_lines(path / "metrics.jsonl")]

    return run


@pytest.fixture(scope="module")
def expected(losses_of, tmp_path_factory):
    return losses_of(data_formats.json_list(tmp_path_factory.mktemp("list"), SAMPLES))


# One format for each kind of storage: files, tars, Parquet files, Arrow files, Python objects. Of
# several formats of one kind a run gets the same pairs, as the test above shows.
STORAGES: list[Write] = [
    data_formats.sidecars, data_formats.several_files, data_formats.tars, data_formats.parquet,
    data_formats.arrow_dict, data_formats.python_bytes, data_formats.python_pictures,
    data_formats.python_arrays, data_formats.hugging_face_dataset,
]


@pytest.mark.parametrize("write", STORAGES, ids=lambda write: write.__name__)
def test_all_storages_give_the_same_losses(write, tmp_path, losses_of, expected):
    assert losses_of(written(write, tmp_path)) == expected and len(expected) == 5
