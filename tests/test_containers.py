"""Images in tars, Parquet, Arrow files and Python rows: encoded once, found later, changes noticed.
"""

import io
import shutil
from pathlib import Path

import data_formats
import numpy as np
import pytest
import torch
from data_formats import FILES, FROM_PYTHON, NEEDS, samples
from PIL import Image
from tars import write_tar
from test_features import Loader, _fast_disk_fine_clock_and_no_loss_curve, open_source  # noqa: F401

from lora_engine.config import TrainingConfig
from lora_engine.data import image_identity
from lora_engine.data.image_table import Folder, ImageTable, JoinedImages, PythonRows
from lora_engine.data.images import ImageError
from lora_engine.data.pairs import Pairs
from lora_engine.data.pixels import load_pixels
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import SourceOptions
from lora_engine.devices import autocast
from lora_engine.features.encoder import encode_pixels
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.stopping import LoadingStopped
from lora_engine.training.run_data import captioned_images

SAMPLES = samples(6)
TWICE = [*SAMPLES, SAMPLES[2]._replace(name="00006.jpg"), SAMPLES[0]._replace(name="00007.jpg")]
CONTAINERS = [data_formats.json_list, data_formats.tar, data_formats.parquet, data_formats.arrow,
              *FROM_PYTHON]


@pytest.fixture
def captioner(blip_folder) -> Captioner:
    return load_captioner(blip_folder)


@pytest.fixture(params=CONTAINERS, ids=lambda write: write.__name__)
def data(request, tmp_path):
    """Six images, two of them in two rows."""
    assert request.param in [*FILES, *FROM_PYTHON]
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return request.param(tmp_path, TWICE)


def loader_of(pairs: Pairs, source, captioner: Captioner, **changes) -> Loader:
    """The rows of all pairs, loaded as training does."""
    loader = Loader(source, captioner, [*pairs.captions()])
    config = TrainingConfig(model="", num_workers=0)
    dataset = captioned_images(pairs, captioner, config, substitute=False, **changes)
    loader.load = type(loader.load)(loader.load.func, dataset, **loader.load.keywords)
    return loader


def expected_features(captioner: Captioner, pairs: Pairs) -> list[torch.Tensor]:
    """Features of each row, from the encoder alone."""
    features = []
    for image in pairs.image_of_row.tolist():
        pixels = load_pixels(pairs.images.read(image), captioner.pixels)
        with autocast(torch.device("cpu"), torch.float32):
            pixels = torch.from_numpy(pixels)[None]
            features.append(encode_pixels(captioner.model, pixels, captioner.pixels)[0])
    return features


def assert_close(seen, expected) -> None:
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_each_image_is_encoded_once_and_read_in_one_epoch(captioner, data, tmp_path, cache):
    pairs = read_pairs(data)
    expected = expected_features(captioner, pairs)
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        loader = loader_of(pairs, source, captioner)
        assert_close(loader.epoch(), expected)
        assert source.encoder.num_encoded == 6
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageTable, "read", lambda *given: pytest.fail("read again"))
            assert_close(loader.epoch(), expected)
        assert source.encoder.num_encoded == 6


def test_what_was_written_just_now_is_read_until_its_stamp_is_reliable(
    captioner, data, tmp_path, monkeypatch
):
    """It is never encoded again; images from Python cannot change, and are read once."""
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", 600 * 10**9)
    pairs = read_pairs(data)
    is_from_python = any(isinstance(c, PythonRows) for c in pairs.images.containers)
    num_read = []
    read = ImageTable.read
    monkeypatch.setattr(ImageTable, "read", lambda *given: num_read.append(1) or read(*given))
    with open_source(captioner, tmp_path / "cache", cache="memory") as source:
        loader = loader_of(pairs, source, captioner)
        epochs, reads = [], []
        for epoch in range(4):
            if epoch == 2:
                monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", 0)
            num_read.clear()
            epochs.append(loader.epoch(size=1))
            reads.append(len(num_read))
        assert source.encoder.num_encoded == 6
    for epoch in epochs[1:]:
        assert all(map(torch.equal, epoch, epochs[0]))
    num_images = len(pairs.images)
    files_once = [len(pairs), len(pairs), num_images, 0]
    assert reads == ([num_images, 0, 0, 0] if is_from_python else files_once)


def test_other_python_rows_in_the_same_place_have_their_own_features(captioner, tmp_path):
    """Rows have no names that tell two data sets apart, also not to a later run."""
    for number in range(2):
        given = samples(4)[2 * number : 2 * number + 2]
        pairs = read_pairs(data_formats.python_bytes(tmp_path, given))
        with open_source(captioner, tmp_path / "cache") as source:
            seen = loader_of(pairs, source, captioner).epoch()
            assert_close(seen, expected_features(captioner, pairs))
            assert source.encoder.num_encoded == 2


def test_two_image_columns_of_a_parquet_file_have_their_own_features(captioner, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({
            "left": [sample.data for sample in SAMPLES[:3]],
            "right": [sample.data for sample in SAMPLES[3:]],
            "text": ["a", "b", "c"],
        }),
        tmp_path / "a.parquet",
    )
    for column in ("left", "right"):
        pairs = read_pairs(tmp_path / "a.parquet", SourceOptions(image_field=column))
        with open_source(captioner, tmp_path / "cache") as source:
            seen = loader_of(pairs, source, captioner).epoch()
            assert_close(seen, expected_features(captioner, pairs))


# --- changes --------------------------------------------------------------------------------------


def test_python_rows_that_are_replaced_during_a_run_stop_it_or_are_not_read_again(
    captioner, tmp_path
):
    rows = data_formats.python_bytes(tmp_path, SAMPLES)
    with open_source(captioner, tmp_path / "cache", cache="off") as off:
        with open_source(captioner, tmp_path / "cache", cache="memory") as kept:
            pairs = read_pairs(rows)
            first, second = loader_of(pairs, off, captioner), loader_of(pairs, kept, captioner)
            first.epoch()
            before = second.epoch()
            rows[3]["image"] = SAMPLES[0].data
            with pytest.raises(LoadingStopped, match="row 4 has changed since the run began"):
                first.epoch()
            assert all(map(torch.equal, second.epoch(), before))


@pytest.mark.parametrize("change", ["shorter", "without images", "other rows"])
def test_python_rows_that_are_no_longer_there_are_unreadable_images(tmp_path, change):
    rows = data_formats.python_bytes(tmp_path, SAMPLES)
    images = read_pairs(rows).images
    if change == "shorter":
        del rows[2:]
    elif change == "without images":
        rows[5] = {"text": "a"}
    else:
        rows[5] = None
    with pytest.raises(ImageError, match="^.*row 6: "):
        images.read(5)
    assert images.read(1) == SAMPLES[1].data


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_shard_that_is_replaced_between_epochs_gives_no_image_of_the_new_one(
    captioner, tmp_path, kind, cache
):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = Path(getattr(data_formats, kind)(tmp_path / "old", SAMPLES))
    other = Path(getattr(data_formats, kind)(tmp_path / "new", SAMPLES[::-1]))
    pairs = read_pairs(path)
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        loader = loader_of(pairs, source, captioner)
        loader.epoch()
        before = shutil.copy2(path, tmp_path / "before")
        shutil.copy(other, path)
        batches = list(loader.batches())
        assert not any(batch.rows for batch in batches)
        skipped = [problem for batch in batches for problem in batch.skipped]
        assert len(skipped) == 6
        assert all("has changed since it was indexed" in problem.reason for problem in skipped)
        shutil.copy2(before, path)  # the same bytes, but nothing proves it
        assert not any(batch.rows for batch in loader.batches())


# --- tables ---------------------------------------------------------------------------------------


def test_images_that_are_chosen_of_chosen_ones_keep_their_places(tmp_path):
    write_tar(tmp_path / "a.tar", ((s.name[:5], {"jpg": s.data, "txt": b"a"}) for s in SAMPLES))
    table = read_pairs(tmp_path / "a.tar").images
    table = ImageTable(table.containers, table.columns, digests=np.zeros(6, "V16"))
    some = table.choose(np.array([5, 3, 1, 0]))
    few = some.choose(np.array([2, 0]))
    assert few.choose(None) is few and len(few) == 2
    assert [*few] == [table[1], table[5]] == few[:] and few[-1] == table[5]
    assert [few.read(i) for i in range(2)] == [SAMPLES[1].data, SAMPLES[5].data]
    assert few.byte_range(0) == table.byte_range(1) and few.stamp(1) == table.stamp(5)
    assert few.keep_digest(1, b"d" * 16) and table.kept_digest(5) == b"d" * 16
    assert table.kept_digest(1) == few.kept_digest(0) == bytes(16)
    with pytest.raises(IndexError):
        few[2]


def test_members_of_a_shard_have_stamps_of_their_own(tmp_path):
    write_tar(tmp_path / "a.tar", ((s.name[:5], {"jpg": s.data, "txt": b"a"}) for s in SAMPLES))
    table = read_pairs(tmp_path / "a.tar").images
    assert len({table.stamp(image) for image in range(6)} - {None}) == 6


def test_joined_images_are_those_of_their_tables_one_after_the_other(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    (tmp_path / "c.png").write_bytes(stream.getvalue())
    first = ImageTable.of_files([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    empty = ImageTable.of_files([])
    last = ImageTable.of_files([str(tmp_path / "c.png")])
    joined = JoinedImages(first, empty, last)
    assert len(joined) == 3 and [*joined] == [*first, *last] == [joined[i] for i in range(3)]
    assert joined[-1] == last[0] and joined[-3] == first[0]
    assert joined.read(2) == joined.read(-1) == stream.getvalue()
    for index in (3, -4):
        with pytest.raises(IndexError):
            joined[index]
    assert [*JoinedImages()] == []


def test_files_of_several_folders_are_found_by_their_paths(tmp_path):
    paths = [str(tmp_path / "x" / "a.jpg"), str(tmp_path / "y" / "a.jpg"), "b.jpg"]
    table = ImageTable.of_files(paths)
    assert [*table] == paths and table.byte_range(1) == (paths[1], 0, 0)
    assert [isinstance(container, Folder) for container in table.containers] == [True] * 3
    assert not table.has_file(0) and table.stamp(0) is None
    assert not table.keep_digest(0, b"d" * 16)
