"""Kept features equal those that the encoder computes now, whatever happens to files and disks."""

import errno
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from fake_cuda import Event, FakeCuda
from feature_rows import wait_until
from pictures import caption_of, json_lines, settings
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine import cli
from lora_engine.config import TrainingConfig
from lora_engine.data import batches, image_identity
from lora_engine.data.batches import FeatureBatch, Identified, PixelBatch, SampleIndex, read_image
from lora_engine.data.image_table import ImageTable
from lora_engine.data.pixels import load_pixels
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.seen_images import ImageList
from lora_engine.devices import autocast
from lora_engine.features import encoder, placement
from lora_engine.features import source as source_module
from lora_engine.features import store as store_module
from lora_engine.features.cache import FeatureCache, RowMemory
from lora_engine.features.encoder import FeatureEncoder, encode_pixels
from lora_engine.features.format import FeatureFormat
from lora_engine.features.source import FeatureSource, open_features
from lora_engine.features.store import FeatureStore
from lora_engine.lora.adapter import read_adapter
from lora_engine.lora.injection import cast_frozen, inject
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.report.summary import TrainingSummary
from lora_engine.stopping import LoadingStopped, StopSignal
from lora_engine.training import run as run_module
from lora_engine.training import setup as run_setup
from lora_engine.training.checkpoint import CheckpointError
from lora_engine.training.loop import train
from lora_engine.training.run_data import captioned_images
from lora_engine.training.trainer import Trainer
from recipes import blip_cc3m

CPU = torch.device("cpu")
NUM_TOKENS, WIDTH = 17, 64  # of the small checkpoints' features
ROW_BYTES = 4 * NUM_TOKENS * WIDTH  # in fp32


@pytest.fixture(autouse=True)
def _fast_disk_fine_clock_and_no_loss_curve(monkeypatch):
    """Measuring the disk and drawing the loss curve take longer than most of these tests.

    Files need not be 2 s old either; `write_image` gives each a different time.
    """
    monkeypatch.setattr(placement, "read_rate", lambda cache_dir: 1e12)
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", 0)
    monkeypatch.setattr(run_module, "draw_loss_curve", lambda *paths: None)


# --- pictures, sources, epochs --------------------------------------------------------------

_times = itertools.count(1_600_000_000)  # seconds


def write_image(path: Path, content: int) -> str:
    """An image of noise. All files have the same size, and no two have the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(content).integers(0, 256, (48, 60, 3), np.uint8)
    Image.fromarray(noise).save(path, format="BMP")
    set_time(path)
    return str(path)


def set_time(path: Path) -> None:
    mtime_ns = next(_times) * 10**9
    os.utime(path, ns=(mtime_ns, mtime_ns))


@pytest.fixture
def images(tmp_path) -> list[str]:
    return [write_image(tmp_path / "images" / f"{n}.bmp", n) for n in range(8)]


@pytest.fixture
def captioner(blip_folder) -> Captioner:
    return load_captioner(blip_folder)


def open_source(captioner: Captioner, cache_dir: Path, **changes) -> FeatureSource:
    given = {
        "device": CPU, "dtype": torch.float32, "num_images": 8, "cache": "disk",
        "cache_dir": cache_dir, "cache_dtype": None, "cache_limit_bytes": 1e9,
    }
    return open_features(captioner, **given | changes)


def features_of(source: FeatureSource, path: str) -> Tensor:
    """Features (P, D) of one image file, in a batch of one row."""
    images = ImageList(ImageTable.of_files([path]))
    pixels, loaded = torch.empty(0, 3, *source.encoder.pixels.size, dtype=torch.uint8), []
    if not source.has(images, 0):
        image, file, digest = read_image(images.table, 0, source.encoder.pixels)
        pixels, loaded = torch.from_numpy(image)[None], [Identified(0, file, digest)]
    none = torch.empty(0)
    batch, = source.attach([PixelBatch(none, none, none, 0, [0], [0], [], pixels, loaded)], images)
    return batch.features[0]


def encoded(captioner: Captioner, path: str, dtype=torch.float32) -> Tensor:
    """Features (P, D) of the current content of a file, from the encoder alone."""
    pixels = torch.from_numpy(load_pixels(path, captioner.pixels))[None]
    with autocast(CPU, dtype):
        return encode_pixels(captioner.model, pixels, captioner.pixels)[0]


class Loader:
    """Loads the rows (captions) of a run as training does, from one source."""

    def __init__(
        self, source: FeatureSource, captioner: Captioner, images: list[str], *, num_workers=0
    ) -> None:
        rows = read_pairs([(image, caption_of(n)) for n, image in enumerate(images)])
        config = TrainingConfig(model="", num_workers=num_workers)
        dataset = captioned_images(rows, captioner, config, substitute=False)
        self.images = images
        self.load = partial(
            run_setup.feature_loader,
            dataset,
            features=source,
            captioner=captioner,
            config=config,
            stop=StopSignal(),
        )

    def batches(self, *, size: int = 3) -> Iterator[FeatureBatch]:
        places = [SampleIndex(0, row, row) for row in range(len(self.images))]
        return iter(self.load([places[i : i + size] for i in range(0, len(places), size)]))

    def epoch(self, *, size: int = 3) -> list[Tensor]:
        """The features of each row, in order."""
        seen: list[Tensor] = []
        for batch in self.batches(size=size):
            assert batch.rows == list(range(len(seen), len(seen) + len(batch.rows)))
            seen += batch.features
        assert len(seen) == len(self.images)
        return seen


def assert_equal(seen: list[Tensor], expected: list[Tensor]) -> None:
    assert len(seen) == len(expected)
    for number, (ours, theirs) in enumerate(zip(seen, expected)):
        assert torch.equal(ours, theirs), number


def fill(captioner: Captioner, cache_dir: Path, images: list[str], **changes) -> int:
    """Put the features of the images on disk -> how many images were encoded."""
    with open_source(captioner, cache_dir, **changes) as source:
        for image in images:
            features_of(source, image)
    return source.encoder.num_encoded


def wait_until_stopped(store: FeatureStore) -> None:
    with store._changed:
        assert store._changed.wait_for(lambda: store.stopped_because, timeout=20)


# --- stale features -------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_other_pixels_under_the_same_name_and_size_are_encoded_again(
    captioner, tmp_path, cache
):
    path = tmp_path / "a.bmp"
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        before = features_of(source, write_image(path, 0))
        size = path.stat().st_size
        after = features_of(source, write_image(path, 1))
        assert path.stat().st_size == size and not torch.equal(before, after)
        assert torch.equal(after, encoded(captioner, path))
        assert torch.equal(features_of(source, write_image(path, 0)), before)
        assert source.encoder.num_encoded == 2
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        write_image(path, 2)
        assert torch.equal(features_of(source, str(path)), encoded(captioner, path))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_file_written_just_now_is_read_again_each_time(captioner, tmp_path, monkeypatch, cache):
    """Within one tick of the clock its content may change while its stamp does not."""
    path = tmp_path / "a.bmp"
    write_image(path, 0)
    written_ns = path.stat().st_mtime_ns
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", 60 * 10**9)
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        features_of(source, str(path))
        Loader(source, captioner, [str(path)]).epoch()
        write_image(path, 1)
        os.utime(path, ns=(written_ns, written_ns))
        assert torch.equal(features_of(source, str(path)), encoded(captioner, path))
        loader = Loader(source, captioner, [str(path)])
        assert_equal(loader.epoch(), [encoded(captioner, path)])


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_an_image_replaced_by_one_of_equal_size_and_time_is_encoded_again(
    captioner, tmp_path, cache
):
    path = tmp_path / "a.bmp"

    def put(content: int) -> Tensor:
        new = Path(write_image(tmp_path / "new.bmp", content))
        os.utime(new, ns=(0, 10**18))
        new.replace(path)
        return encoded(captioner, path)

    for contents in [(0, 1), (2, 3)]:
        with open_source(captioner, tmp_path / "cache", cache=cache) as source:
            for content in contents:
                expected = put(content)
                assert_equal(Loader(source, captioner, [str(path)]).epoch(), [expected])


def with_pixels(**changes):
    def change(folder: Path, captioner: Captioner) -> Captioner:
        return replace(captioner, pixels=replace(captioner.pixels, **changes))

    return change


def with_checkpoint(*, seed=0, image_size=64):
    def change(folder: Path, captioner: Captioner) -> Captioner:
        checkpoints.write_blip(folder, seed=seed, vision={"image_size": image_size})
        edit_json(folder / "preprocessor_config.json", size=image_size)
        return load_captioner(folder)

    return change


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_config(**vision):
    """The same weights with a configuration that computes something else from them."""
    def change(folder: Path, captioner: Captioner) -> Captioner:
        shutil.copytree(captioner.name, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", vision_config=config["vision_config"] | vision)
        changed = load_captioner(folder)
        assert changed.fingerprints["base"] == captioner.fingerprints["base"]
        return changed

    return change


OTHER = {
    "weights": (with_checkpoint(seed=1), {}),
    "image size": (with_checkpoint(image_size=48), {}),
    "heads": (with_config(num_attention_heads=2), {}),
    "epsilon": (with_config(layer_norm_eps=0.1), {}),
    "activation": (with_config(hidden_act="relu"), {}),
    "mean": (with_pixels(mean=(0.4, 0.5, 0.5)), {}),
    "std": (with_pixels(std=(0.4, 0.5, 0.5)), {}),
    "scale": (with_pixels(rescale_factor=1 / 127.5), {}),
    "filter": (with_pixels(resample=0), {}),
    "crop": (with_pixels(resize=80, crop=(64, 64)), {}),
    "compute dtype": (None, {"dtype": torch.bfloat16}),
    "compute dtype alone": (None, {"dtype": torch.bfloat16, "cache_dtype": "fp32"}),
    "cache dtype": (None, {"cache_dtype": "bf16"}),
    "cache dtype int8": (None, {"cache_dtype": "int8"}),
}


@pytest.mark.parametrize("what", OTHER)
def test_everything_that_features_depend_on_is_part_of_the_key(
    captioner, tmp_path, images, monkeypatch, what
):
    """Even if all rows have the same size, which alone would distinguish some of them."""
    monkeypatch.setattr(FeatureFormat, "row_bytes", property(lambda self: 8192))
    change, changes = OTHER[what]
    (tmp_path / "other").mkdir()
    other = change(tmp_path / "other", captioner) if change else captioner
    image, cache = images[0], tmp_path / "cache"
    assert fill(captioner, cache, [image]) == 1
    with open_source(other, cache, **changes) as source:
        seen = features_of(source, image)
        assert source.encoder.num_encoded == 1
        row = source.encoder.format.pack(encoded(other, image, source.encoder.dtype)[None])
        assert torch.equal(seen, source.encoder.format.unpack(row, source.encoder.dtype)[0])
        first = encoded(captioner, image)
        assert seen.shape != first.shape or not torch.equal(seen.float(), first)
    with open_source(captioner, cache) as source:
        assert torch.equal(features_of(source, image), first)
        assert source.encoder.num_encoded == 0
    assert fill(other, cache, [image], **changes) == 0


def test_features_do_not_depend_on_the_decoder_or_its_adapters(
    captioner_folder, tmp_path, images
):
    captioner = load_captioner(captioner_folder)
    assert fill(captioner, tmp_path / "cache", images) == 8
    inject(captioner.model, ("attention", "feed_forward"), rank=2)
    with torch.no_grad():
        for parameter in captioner.model.decoder.parameters():
            parameter.add_(1)
    assert fill(captioner, tmp_path / "cache", images) == 0
    encoder = captioner.model.encoder
    parts = [encoder.class_token, encoder.layers[1].fc2.bias, encoder.norm.weight]
    for number, part in enumerate(parts):
        with torch.no_grad():
            part.view(-1)[-1] += 1
        assert fill(captioner, tmp_path / "cache", images) == 8, number


def test_compiled_layers_have_separate_features(captioner, tmp_path, images):
    """Their last bits may differ. Here the layers only claim to be compiled."""
    assert fill(captioner, tmp_path / "cache", images[:1]) == 1
    for layer in captioner.model.encoder.layers:
        layer._compiled_call_impl = layer._call_impl
    assert fill(captioner, tmp_path / "cache", images[:1]) == 1
    assert fill(captioner, tmp_path / "cache", images[:1]) == 0


def test_a_projection_of_the_features_belongs_to_the_encoder(tmp_path, images):
    checkpoints.write_vit_gpt2(tmp_path / "model", encoder={"hidden_size": 48})
    captioner = load_captioner(tmp_path / "model")
    assert fill(captioner, tmp_path / "cache", images[:1]) == 1
    with torch.no_grad():
        captioner.model.enc_to_dec_proj.bias += 1
    with open_source(captioner, tmp_path / "cache") as source:
        seen = features_of(source, images[0])
        assert torch.equal(seen, encoded(captioner, images[0])) and source.encoder.num_encoded == 1


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_images_with_the_same_name_in_two_folders_are_different(captioner, tmp_path, cache):
    paths = [write_image(tmp_path / name / "a.bmp", n) for n, name in enumerate("xy")]
    expected = [encoded(captioner, path) for path in paths]
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        loader = Loader(source, captioner, paths)
        assert_equal(loader.epoch(), expected)
        assert_equal(loader.epoch(), expected)
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        assert_equal([features_of(source, path) for path in reversed(paths)], expected[::-1])


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_an_image_under_several_names_is_encoded_once(captioner, tmp_path, images, cache, size):
    copies = [write_image(tmp_path / "copies" / f"{n}.bmp", n) for n in range(8)]
    link = tmp_path / "link.bmp"
    link.symlink_to(images[5])
    rows = [*images, *copies, str(link), images[2], images[2]]
    expected = [encoded(captioner, path) for path in rows]
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        loader = Loader(source, captioner, rows)
        assert_equal(loader.epoch(size=size), expected)
        assert source.encoder.num_encoded == 8
        assert_equal(loader.epoch(size=size), expected)
        assert source.encoder.num_encoded == 8
    if cache == "disk":
        with open_source(captioner, tmp_path / "cache") as source:
            assert_equal(Loader(source, captioner, copies).epoch(size=size), expected[:8])
            assert source.encoder.num_encoded == 0 and source.cache.store.num_rows == 8


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_a_file_that_changes_between_two_epochs_stops_loading_until_it_is_restored(
    captioner, tmp_path, images, cache, num_workers
):
    expected = [encoded(captioner, path) for path in images]
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        loader = Loader(source, captioner, images, num_workers=num_workers)
        assert_equal(loader.epoch(), expected)
        write_image(Path(images[4]), 100)
        with pytest.raises(LoadingStopped, match=f"^{re.escape(images[4])} has changed since"):
            loader.epoch()
        write_image(Path(images[4]), 4)  # as it was
        assert_equal(loader.epoch(), expected)
        write_image(Path(images[4]), 100)
        assert torch.equal(features_of(source, images[4]), encoded(captioner, images[4]))


def test_digests_of_an_earlier_state_of_the_files_are_not_trusted(
    captioner, tmp_path, images
):
    """identities.sqlite is restored from a backup, or comes from another machine."""
    cache = tmp_path / "cache"
    fill_epoch(captioner, cache, images)
    database, backup = cache / "identities.sqlite", tmp_path / "backup"
    shutil.copy(database, backup)
    for number, path in enumerate(images[:4]):
        write_image(Path(path), 100 + number)
    expected = [encoded(captioner, path) for path in images]
    assert fill_epoch(captioner, cache, images) == 4
    shutil.copy(backup, database)
    with open_source(captioner, cache) as source:
        assert_equal(Loader(source, captioner, images).epoch(), expected)
        assert source.encoder.num_encoded == 0  # found by content


def fill_epoch(captioner: Captioner, cache_dir: Path, images: list[str], **changes) -> int:
    with open_source(captioner, cache_dir, **changes) as source:
        Loader(source, captioner, images).epoch()
    return source.encoder.num_encoded


# --- the number format ----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_features_equal_those_that_are_read_later(
    captioner, tmp_path, images, cache, cache_dtype, dtype
):
    changes = {"cache": cache, "cache_dtype": cache_dtype, "dtype": dtype}
    exact = [encoded(captioner, path, dtype) for path in images]
    with open_source(captioner, tmp_path / "cache", **changes) as source:
        loader = Loader(source, captioner, images)
        first = loader.epoch()
        assert_equal(loader.epoch(), first)
        assert_equal([features_of(source, path) for path in images], first)
    with open_source(captioner, tmp_path / "cache", **changes) as source:
        assert_equal([features_of(source, path) for path in images], first)
        assert_equal(Loader(source, captioner, images).epoch(), first)
    format = FeatureFormat(NUM_TOKENS, WIDTH, cache_dtype)
    assert_equal(first, [format.unpack(format.pack(f[None]), dtype)[0] for f in exact])
    if cache_dtype != "fp32":
        assert not any(torch.equal(ours.float(), f.float()) for ours, f in zip(first, exact))


@pytest.mark.parametrize("dtype, cache_dtype", [
    (torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "bf16"),
])
def test_the_default_number_format_follows_the_compute_dtype(
    captioner, tmp_path, images, dtype, cache_dtype
):
    with open_source(captioner, tmp_path, dtype=dtype) as source:
        assert source.encoder.format == FeatureFormat(NUM_TOKENS, WIDTH, cache_dtype)
        assert features_of(source, images[0]).dtype == dtype


@pytest.mark.parametrize("reference", ["uncached", "uncached_vit_gpt2"])
def test_lower_precision_hardly_changes_the_validation_loss(request, tmp_path, reference):
    """Over ten steps within 1e-5 (bf16) and 1e-4 (int8) of fp32's loss; measured 2e-6 and 2e-5."""
    config, (lines, *_) = request.getfixturevalue(reference)
    losses = {step: loss for event, step, loss, *_ in lines if event == "validation"}
    config = replace(config, cache="memory", num_samples=0)
    for cache_dtype, tolerance in (("bf16", 1e-5), ("int8", 1e-4)):
        done = run(config, cache_dtype=cache_dtype, output_path=str(tmp_path / cache_dtype))
        assert done.summary.losses == pytest.approx(losses, rel=tolerance)
        assert done.summary.losses != pytest.approx(losses, rel=1e-7)


# --- where features are kept ----------------------------------------------------------------


def test_a_full_cache_keeps_what_fits_and_the_rest_is_encoded_in_each_epoch(
    captioner, tmp_path, images, caplog
):
    expected = [encoded(captioner, path) for path in images]
    with open_source(captioner, tmp_path, cache_limit_bytes=5.5 * ROW_BYTES) as source:
        loader = Loader(source, captioner, images)
        assert_equal(loader.epoch(), expected)
        assert source.encoder.num_encoded == 8
        wait_until_stopped(source.cache.store)
        for epoch in (1, 2):
            assert_equal(loader.epoch(), expected)
            assert source.encoder.num_encoded == 8 + 3 * epoch
    assert len(caplog.messages) == 1 and "has reached its limit of 0.0 GB" in caplog.text
    assert fill(captioner, tmp_path, images, cache_limit_bytes=5.5 * ROW_BYTES) == 3


def free_memory(monkeypatch, cpu: float, cuda: float = 0, *, row_bytes: int = ROW_BYTES) -> None:
    """Make half of the free memory hold this many rows."""
    rows = {"cpu": cpu, "cuda": cuda}
    monkeypatch.setattr(
        placement, "free_memory_bytes", lambda device: int(2 * rows[device.type] * row_bytes)
    )


@pytest.mark.parametrize("num_kept", [0, 1, 5, 20])
def test_memory_keeps_what_fits(captioner, tmp_path, images, monkeypatch, num_kept):
    free_memory(monkeypatch, num_kept + 0.5)
    expected = [encoded(captioner, path) for path in images]
    num_missing = max(8 - num_kept, 0)
    with open_source(captioner, tmp_path / "cache", cache="memory") as source:
        loader = Loader(source, captioner, images)
        for epoch in range(3):
            assert_equal(loader.epoch(), expected)
            assert source.encoder.num_encoded == 8 + num_missing * epoch
        assert source.cache.host_memory.rows.shape == (min(8, num_kept), ROW_BYTES)
    assert not (tmp_path / "cache").exists()


def test_auto_keeps_in_memory_what_the_disk_does_not_take(
    captioner, tmp_path, images, monkeypatch
):
    free_memory(monkeypatch, 2)
    expected = [encoded(captioner, path) for path in images]
    changes = {"cache": "auto", "cache_limit_bytes": 5 * ROW_BYTES}
    with open_source(captioner, tmp_path, **changes) as source:
        loader = Loader(source, captioner, images)
        assert_equal(loader.epoch(size=1), expected)
        wait_until_stopped(source.cache.store)
        for _ in range(3):
            assert_equal(loader.epoch(size=1), expected)
        assert source.cache.store.num_rows == 5 and len(source.cache.host_memory.slots) == 2


def test_auto_keeps_in_memory_what_a_cache_full_of_other_images_does_not_take(
    captioner, tmp_path, images
):
    """The cache serves all runs with an encoder: its rows need not be of images of this run."""
    others = [write_image(tmp_path / "others" / f"{n}.bmp", 100 + n) for n in range(10)]
    cache = tmp_path / "cache"
    assert fill(captioner, cache, others) == 10
    changes = {"cache": "auto", "cache_limit_bytes": 10 * ROW_BYTES}
    with open_source(captioner, cache, **changes) as source:
        loader = Loader(source, captioner, images)
        loader.epoch()
        wait_until_stopped(source.cache.store)
        loader.epoch()
        num_encoded = source.encoder.num_encoded
        assert_equal(loader.epoch(), [encoded(captioner, path) for path in images])
        assert source.encoder.num_encoded == num_encoded  # nothing in the third epoch


def test_rows_read_from_the_disk_stay_in_gpu_memory_under_the_right_digest(
    captioner, tmp_path, images
):
    """Here in CPU memory, with images that occur more than once in a batch."""
    rows = [images[n] for n in (0, 0, 1, 2, 2, 2, 3, 0, 4, 5, 5, 6, 7, 7, 1)]
    expected = [encoded(captioner, path) for path in rows]
    assert fill(captioner, tmp_path / "cache", images) == 8
    with open_source(captioner, tmp_path / "cache") as source:
        source.cache.device_memory = RowMemory(7, ROW_BYTES, CPU)
        loader = Loader(source, captioner, rows)
        for _ in range(3):
            assert_equal(loader.epoch(), expected)
        assert source.encoder.num_encoded == 0
        assert sorted(source.cache.device_memory.slots.values()) == list(range(7))


def test_memory_keeps_the_first_rows_and_evicts_none():
    memory = RowMemory(4, 2, CPU)
    rows = torch.arange(12, dtype=torch.uint8).view(6, 2)
    memory.keep([b"a", b"b", b"a"], rows[[0, 1, 0]])
    memory.keep([], rows[:0])
    memory.keep([b"b", b"c"], rows[[5, 2]])
    memory.keep([b"d", b"e", b"f"], rows[3:])
    assert memory.slots.keys() == {b"a", b"b", b"c", b"d"}
    kept = [memory.rows[memory.slots[digest]].tolist() for digest in (b"a", b"b", b"c", b"d")]
    assert kept == rows[:4].tolist()


# --- the plan -------------------------------------------------------------------------------


PLANS = {
    "off": "kept no longer than for a batch (--cache off)",
    "memory": "kept 8 in memory",
    "disk": "kept on disk in FOLDER (3 there already; reading one takes 0.00435 ms)",
    "auto": "kept on disk in FOLDER (3 there already; reading one takes 0.00435 ms)",
}


def plan_of(captioner, cache_dir, monkeypatch, *, encode_s=0.035, rate=1e9, **changes) -> str:
    """The plan with these measurements, and with short names for the folders."""
    with monkeypatch.context() as patch:
        patch.setattr(placement, "read_rate", lambda folder: rate)
        patch.setattr(FeatureEncoder, "measure_s", lambda self: encode_s)
        with open_source(captioner, cache_dir, **changes) as source:
            folder = source.cache.store.folder if source.cache.store else cache_dir
            plan = source.placement.plan.replace(str(folder), "FOLDER")
            return plan.replace(str(cache_dir), "CACHE")


@pytest.mark.parametrize("cache", PLANS)
def test_the_plan_says_where_features_are_kept(captioner, tmp_path, images, monkeypatch, cache):
    fill(captioner, tmp_path / "cache", images[:3])
    assert plan_of(captioner, tmp_path / "cache", monkeypatch, cache=cache) == (
        "features of 8 images, 0.0348 MB as fp32 (encoding one takes 35 ms): " + PLANS[cache]
    )


def test_the_plan_of_a_large_set(captioner, tmp_path, monkeypatch):
    plan = plan_of(
        captioner, tmp_path / "cache", monkeypatch, cache="auto", num_images=3_300_000,
        cache_dtype="int8", encode_s=1.3, cache_limit_bytes=1500 * 1344,
    )
    num_fitting = placement.free_memory_bytes(CPU) // 2 // 1344
    begin, _, end = plan.rpartition(", up to ")
    assert begin == (
        "features of 3,300,000 images, 4.4 GB as int8 (encoding one takes 1,300 ms): kept on disk "
        "in FOLDER (0 there already, space for 1,500 more; reading one takes 0.00134 ms)"
    )
    assert end == f"{min(num_fitting, 3_298_500):,} in memory" or num_fitting < 3_298_500


def test_auto_uses_no_disk_that_is_slower_than_the_encoder(captioner, tmp_path, monkeypatch):
    """Reading a row takes as long as encoding, then one percent less."""
    cache, rate = tmp_path / "cache", ROW_BYTES / 0.035
    slow = plan_of(captioner, cache, monkeypatch, cache="auto", rate=rate)
    assert slow.endswith(
        "kept 8 in memory; not on disk in FOLDER, where reading one takes 35 ms"
    )
    assert not cache.exists()
    fast = plan_of(captioner, cache, monkeypatch, cache="auto", rate=1.01 * rate)
    assert fast.endswith("kept on disk in FOLDER (0 there already; reading one takes 34.7 ms)")
    explicit = plan_of(captioner, cache, monkeypatch, cache="disk", rate=1.0)
    assert explicit.endswith(
        "kept on disk in FOLDER (0 there already; reading one takes 4,352,000 ms)"
    )


# --- a cache that is damaged while it is used -----------------------------------------------


DAMAGE = {
    "cut to nothing": lambda store: os.truncate(store.folder / "features.bin", 0),
    "cut in half": lambda store: os.truncate(store.folder / "features.bin", 7 * ROW_BYTES // 2),
    "folder deleted": lambda store: shutil.rmtree(store.folder),
    "cache deleted": lambda store: shutil.rmtree(store.cache_dir),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("num_read, num_workers", [(0, 0), (4, 2)])
def test_a_cache_that_is_damaged_under_a_run_changes_no_feature(
    captioner, tmp_path, images, damage, num_read, num_workers
):
    """Before an epoch, and in the middle of one, when workers have all their requests."""
    expected = [encoded(captioner, path) for path in images]
    fill_epoch(captioner, tmp_path / "cache", images)
    with open_source(captioner, tmp_path / "cache") as source:
        loader = Loader(source, captioner, images, num_workers=num_workers)
        seen: list[Tensor] = []
        for batch in loader.batches(size=1):
            if len(seen) == num_read:
                DAMAGE[damage](source.cache.store)
            seen += batch.features
        assert_equal(seen, expected)
        for _ in range(2):
            assert_equal(loader.epoch(), expected)
    with open_source(captioner, tmp_path / "cache") as source:
        assert_equal(Loader(source, captioner, images).epoch(), expected)


def test_what_the_disk_cannot_read_is_encoded_again(captioner, tmp_path, images, monkeypatch):
    fill_epoch(captioner, tmp_path / "cache", images)
    preadv, failing = os.preadv, {1, 4, 5}

    def read(file, buffers, offset):
        if offset // ROW_BYTES in failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with open_source(captioner, tmp_path / "cache") as source:
        loader = Loader(source, captioner, images)
        assert_equal(loader.epoch(), [encoded(captioner, path) for path in images])
        assert source.encoder.num_encoded == 3


def test_damaged_rows_are_encoded_again_once_and_reported(captioner, tmp_path, images, caplog):
    expected = [encoded(captioner, path) for path in images]
    fill_epoch(captioner, tmp_path / "cache", images)
    with open_source(captioner, tmp_path / "cache") as source:
        path = source.cache.store.folder / "features.bin"
        rows = np.memmap(path, np.uint8, "r+").reshape(8, ROW_BYTES)
        rows[1, 1000] ^= 1
        rows[2] = 0xFF
        rows[[4, 5]] = rows[[5, 4]]
        rows.flush()
        loader = Loader(source, captioner, images)
        for _ in range(3):
            assert_equal(loader.epoch(), expected)
        assert source.encoder.num_encoded == 4
    assert caplog.messages == ["4 damaged rows of features encoded again"]
    with open_source(captioner, tmp_path / "cache") as source:
        assert_equal(Loader(source, captioner, images).epoch(), expected)
        assert source.encoder.num_encoded == 0
    assert len(caplog.messages) == 1


def test_a_cut_file_that_has_grown_again_gives_no_zeros(captioner, tmp_path, images):
    """The offsets of rows that a run has read before are in the file again, without content."""
    expected = [encoded(captioner, path) for path in images]
    fill_epoch(captioner, tmp_path / "cache", images[:6])
    with open_source(captioner, tmp_path / "cache") as source:
        loader = Loader(source, captioner, images[:6])
        assert_equal(loader.epoch(), expected[:6])
        os.truncate(source.cache.store.folder / "features.bin", 0)
        assert fill(captioner, tmp_path / "cache", images[6:]) == 2  # by another run
        assert (source.cache.store.folder / "features.bin").stat().st_size == 8 * ROW_BYTES
        assert_equal(loader.epoch(), expected[:6])
        assert source.encoder.num_encoded == 6


def test_a_lost_row_of_a_changed_file_stops_loading(captioner, tmp_path, images):
    fill_epoch(captioner, tmp_path / "cache", images)
    with open_source(captioner, tmp_path / "cache") as source:
        source.group_size = 1
        batches = Loader(source, captioner, images, num_workers=2).batches(size=1)
        next(batches)  # by now the workers have all their requests, and rows 0 and 1 are read
        os.truncate(source.cache.store.folder / "features.bin", 0)
        write_image(Path(images[3]), 21)
        with pytest.raises(LoadingStopped, match=f"^{re.escape(images[3])} has changed since"):
            list(batches)


def test_an_image_without_features_that_cannot_be_read_stops_loading(captioner, tmp_path, images):
    fill_epoch(captioner, tmp_path / "cache", images)
    reason = "its features are no longer in the cache, and it cannot be read: no such file"
    with open_source(captioner, tmp_path / "cache") as source:
        source.group_size = 1
        batches = Loader(source, captioner, images, num_workers=2).batches(size=1)
        next(batches)  # by now the workers have all their requests, and rows 0 and 1 are read
        os.truncate(source.cache.store.folder / "features.bin", 0)
        Path(images[3]).unlink()
        # Keep no reference to the error: DataLoader's workers would live as long as it does.
        with pytest.raises(LoadingStopped, match=f"^{re.escape(images[3])}: {reason}$"):
            list(batches)


# --- groups of batches, as a GPU encodes them -----------------------------------------------


def group(source: FeatureSource) -> FeatureSource:
    """Make a source encode four batches together, and begin four before four are trained on."""
    source.group_size, source.num_ahead, source.encoder.batch_size = 4, 1, 5
    return source


@pytest.fixture(params=["off", "memory", "disk", "little memory"])
def grouped(request, captioner, tmp_path, monkeypatch) -> Iterator[FeatureSource]:
    """A source that works on groups of batches; see `group`."""
    if request.param == "little memory":
        free_memory(monkeypatch, 2)
    cache = "memory" if request.param == "little memory" else request.param
    with open_source(captioner, tmp_path / "cache", cache=cache) as source:
        yield group(source)


def encoded_alone(captioner: Captioner, cache_dir: Path, path: str) -> Tensor:
    """Features from a padded encoder batch of this one image."""
    with open_source(captioner, cache_dir, cache="off") as source:
        return features_of(group(source), path)


@pytest.mark.parametrize("num_rows", [7, 24, 29])
def test_batches_of_a_group_get_the_features_of_their_images(
    grouped, captioner, tmp_path, images, num_rows
):
    """Groups of 12 rows, of which none, some or all are complete; captions share images."""
    alone = [encoded_alone(captioner, tmp_path, path) for path in images]
    numbers = [n * n % 11 % 8 for n in range(num_rows)]
    loader = Loader(grouped, captioner, [images[n] for n in numbers])
    for _ in range(2):
        assert_equal(loader.epoch(), [alone[n] for n in numbers])
    torch.testing.assert_close(alone[0], encoded(captioner, images[0]))


def test_captions_in_neighbouring_groups_share_an_encoding(grouped, captioner, images):
    """The second group begins while the first one is being encoded."""
    loader = Loader(grouped, captioner, images + images[:4] + images)  # 12 rows, and 8
    loader.epoch()
    assert grouped.encoder.num_encoded == len(images)


def test_the_encoder_gets_batches_of_one_size_only(grouped, captioner, images, monkeypatch):
    """With others the last bits of the features could differ."""
    sizes = []

    def spy(model, pixels, settings):
        sizes.append(len(pixels))
        return encode_pixels(model, pixels, settings)

    monkeypatch.setattr(encoder, "encode_pixels", spy)
    Loader(grouped, captioner, images[:7]).epoch()
    features_of(grouped, images[7])
    assert sizes == [5, 5, 5] and grouped.encoder.num_encoded == 8


class _NoListAsIndex(TorchDispatchMode):
    """tensor[list]: on a GPU the index comes from pageable memory, and the copy waits for all."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        return operator(*args, **kwargs or {})


def test_rows_are_chosen_without_waiting_for_the_device(grouped, captioner, images, monkeypatch):
    start = source_module.FeatureSource._start

    def watched(*args):
        with _NoListAsIndex(), monkeypatch.context() as patch:
            patch.setattr(FeatureCache, "keep", lambda *args: None)  # on the host
            return start(*args)

    monkeypatch.setattr(source_module.FeatureSource, "_start", watched)
    Loader(grouped, captioner, images + images[:4] + images).epoch()
    memory = RowMemory(3, 2, CPU)
    with _NoListAsIndex():
        for digests in ([b"a"], [b"a", b"b", b"c"], [b"c", b"d"]):
            memory.keep(digests, torch.tensor([[ord(digest)] * 2 for digest in digests]).byte())
    assert memory.rows.tolist() == [[97, 97], [98, 98], [99, 99]]
    cache = FeatureCache(CPU)
    cache.host_memory = memory
    fresh = torch.full((1, 2), 120, dtype=torch.uint8)
    with _NoListAsIndex():
        rows = cache.gather([b"b", b"x", b"a"], {b"x": 0}, fresh, encode_again=lambda _: fresh[0])
    assert rows.tolist() == [[98, 98], [120, 120], [97, 97]]
    cache.close(0.0)


def test_all_encoding_is_on_the_encoders_stream_and_waited_for(
    captioner, tmp_path, images, monkeypatch
):
    """So are copies to the host; also those of a row that is gone from the disk."""
    cuda = FakeCuda(monkeypatch)
    copied, recorded = [], []
    monkeypatch.setattr(Tensor, "record_stream", lambda rows, stream: recorded.append(stream))
    with open_source(captioner, tmp_path / "cache") as source:
        stream = group(source).encoder.stream = cuda.new_stream(CPU)
        encode, used = source.encoder.encode, []

        def spy(pixels):
            used.append(cuda.current)
            return encode(pixels)

        keep = source.cache.keep

        def spy_on_copy(*args):
            copied.append(cuda.current)
            keep(*args)

        monkeypatch.setattr(source.encoder, "encode", spy)
        monkeypatch.setattr(source.cache, "keep", spy_on_copy)
        loader = Loader(source, captioner, images)
        seen = loader.epoch()
        again = source._encode_again(loader.load.args[0].images, [3], 0)
        assert_equal([*source.encoder.unpack(again[None])], [seen[3]])
    assert used == copied == [stream] * 2 and recorded == [cuda.default] * 2
    assert cuda.current is cuda.default and len(cuda.waits) == 2
    for waiting, event in cuda.waits:
        assert waiting is cuda.default and event.stream is stream


def test_fresh_rows_have_arrived_when_the_stream_that_copies_them_says_so(monkeypatch):
    """Not another device's: the disk would get rows that are copied in part."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(Event, "query", lambda event: False)
    cache = FeatureCache(CPU)
    cache._uses_gpu = True
    cache.host_memory = RowMemory(4, 2, CPU)
    stream = cuda.new_stream(CPU)
    with torch.cuda.stream(stream):
        cache.keep([b"a"], torch.zeros(1, 2, dtype=torch.uint8))
    (copied, _, _), = cache._leaving
    assert copied.stream is stream and cuda.devices == {CPU}
    cache.close(0.0)


def test_a_file_that_changes_while_groups_are_under_way_stops_loading(grouped, captioner, images):
    loader = Loader(grouped, captioner, images * 6)
    batches = loader.batches(size=2)
    next(batches)
    write_image(Path(images[3]), 100)
    with pytest.raises(LoadingStopped, match=f"^{re.escape(images[3])} has changed since"):
        list(batches)


PLACES = {  # cache, and how many rows fit in host memory, in GPU memory and on disk
    "nowhere": ("off", 0, 0, 0),
    "GPU memory": ("memory", 0, 100, 0),
    "host memory": ("memory", 100, 0, 0),
    "disk": ("disk", 0, 0, 100),
    "disk and GPU memory": ("auto", 0, 100, 100),
    "all three": ("auto", 25, 25, 25),
}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_on_a_gpu_each_batch_gets_the_features_of_its_images_bit_for_bit(
    captioner, tmp_path, monkeypatch, place, num_workers
):
    """90 images, some of them repeated, in groups of 4 x 20 rows; the second group is incomplete.

    They are encoded on a separate stream while another one works on the previous batches, and
    compared with each image encoded alone.
    """
    device, dtype, row_bytes = torch.device("cuda"), torch.bfloat16, ROW_BYTES // 2
    cache, cpu, cuda, disk = PLACES[place]
    free_memory(monkeypatch, cpu, cuda, row_bytes=row_bytes)
    cast_frozen(captioner.model, dtype)
    captioner.model.to(device)
    images = [write_image(tmp_path / "images" / f"{n}.bmp", n) for n in range(90)]
    rows = images[:45] + images[:4] + images[45:] + images[60:68]
    given = {
        "device": device, "dtype": dtype, "num_images": 90, "cache_limit_bytes": disk * row_bytes
    }
    with open_source(captioner, tmp_path, cache="off", **given) as source:
        alone = {path: features_of(source, path) for path in images}
    work = torch.randn(2048, 2048, device=device)
    num_encoded = []
    for _ in ("first", "second run"):
        with open_source(captioner, tmp_path / "cache", cache=cache, **given) as source:
            loader = Loader(source, captioner, rows, num_workers=num_workers)
            for _ in range(3):
                seen: list[Tensor] = []
                for batch in loader.batches(size=20):
                    seen += batch.features
                    for _ in range(10):
                        work = (work @ work).tanh()
                assert_equal(seen, [alone[path] for path in rows])
        num_encoded.append(source.encoder.num_encoded)
    assert num_encoded[0] >= 90
    if disk == 100:
        assert num_encoded[1] == 0


# --- runs -----------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run, its source, and the image files that any of its processes has read."""

    summary: TrainingSummary
    source: FeatureSource
    read: list[str]
    printed: str
    logged: list[str]

    @property
    def trajectory(self) -> tuple:
        return trajectory(self.summary.path)

    @property
    def num_encoded(self) -> int:
        return self.source.encoder.num_encoded


class Recorder(logging.Handler):
    """Collects messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(config: TrainingConfig, **changes) -> Run:
    sources: list[FeatureSource] = []
    config = replace(config, **changes)
    log = Path(f"{config.output_path}.read")
    log.touch()
    printed, recorder = io.StringIO(), Recorder()

    def open_and_remember(*args, **kwargs):
        sources.append(open_features(*args, **kwargs))
        return sources[0]

    def read_and_write_down(images, image, settings):
        with open(log, "a") as file:
            file.write(f"{images[image]}\n")
        return read_image(images, image, settings)

    logger = logging.getLogger("lora_engine.features")
    logger.addHandler(recorder)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(run_setup, "open_features", open_and_remember)
        for module in (batches, source_module):
            patch.setattr(module, "read_image", read_and_write_down)
        summary = train(config)
    logger.removeHandler(recorder)
    read = log.read_text().splitlines()
    return Run(summary, sources[0], read, printed.getvalue(), recorder.messages)


def trajectory(folder: Path) -> tuple:
    """What must be equal in equal runs: everything but speeds."""
    keys = ("event", "step", "loss", "grad_norm", "learning_rate")
    losses = [tuple(line.get(k) for k in keys) for line in json_lines(folder / "metrics.jsonl")]
    assert len(losses) > 5
    adapters = [
        {name: matrix.numpy().tobytes() for name, matrix in read_adapter(path).matrices.items()}
        for path in sorted(folder.glob("adapter*"))
    ]
    samples, skipped = (
        json_lines(folder / name) if (folder / name).exists() else []
        for name in ("samples.jsonl", "skipped.jsonl")
    )
    return losses, adapters, samples, sorted(line["image"] for line in skipped)


def write_rows(path: Path, images: list[str], *, per_image: int) -> None:
    rows = [
        {"text": caption_of(7 * n + number), "image": image}
        for number in range(per_image) for n, image in enumerate(images)
    ]
    path.write_text(json.dumps(rows))


def write_data(folder: Path) -> Path:
    """28 captions of 14 training images, 2 of which are equal, and 5 of validation images.

    Two of the validation images are also training images.
    """
    images = [write_image(folder / f"{n}.bmp", n) for n in range(13)]
    images.append(write_image(folder / "again.bmp", 3))
    val_images = [write_image(folder / f"val_{n}.bmp", 50 + n) for n in range(3)]
    write_rows(folder / "train.json", images, per_image=2)
    write_rows(folder / "val.json", val_images + images[4:6], per_image=1)
    return folder


NUM_UNIQUE = 13 + 3


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def damaged_data(tmp_path_factory) -> Path:
    """The same with 2 unusable training images and 1 unusable validation image."""
    folder = write_data(tmp_path_factory.mktemp("damaged"))
    (folder / "2.bmp").unlink()
    (folder / "6.bmp").write_text("<html>404</html>")
    (folder / "val_1.bmp").write_bytes(b"BM")
    for name in ("6.bmp", "val_1.bmp"):
        set_time(folder / name)
    return folder


def few_steps(model: Path, data: Path, run_folder: Path, cache_dir: Path, **changes):
    """Two epochs of five steps."""
    given = {
        "cache": "disk", "cache_dir": str(cache_dir), "batch_size": 6, "eval_every": 10,
        "max_bad_share": 0.5,
    }
    return settings(model, data, run_folder, **given | changes)


def train_uncached(model: Path, data: Path, folder: Path) -> tuple[TrainingConfig, tuple]:
    """A run without a cache: its settings and its trajectory."""
    config = few_steps(model, data, folder / "run", folder / "cache", cache="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
        done = run(config)
    assert not (folder / "cache").exists()
    assert len(done.trajectory[-1]) == 3
    return config, done.trajectory


@pytest.fixture(scope="module")
def uncached(blip_folder, damaged_data, tmp_path_factory) -> tuple[TrainingConfig, tuple]:
    return train_uncached(blip_folder, damaged_data, tmp_path_factory.mktemp("uncached"))


@pytest.fixture(scope="module")
def uncached_vit_gpt2(vit_gpt2_folder, damaged_data, tmp_path_factory) -> tuple:
    return train_uncached(vit_gpt2_folder, damaged_data, tmp_path_factory.mktemp("uncached"))


@pytest.mark.parametrize("cache, num_workers, reference", [
    ("off", 2, "uncached"), ("memory", 0, "uncached_vit_gpt2"), ("memory", 2, "uncached"),
    ("auto", 0, "uncached_vit_gpt2"), ("disk", 0, "uncached"), ("disk", 2, "uncached"),
    ("disk", 2, "uncached_vit_gpt2"),
])
def test_a_run_is_bit_identical_wherever_features_are_kept(
    request, tmp_path, reference, cache, num_workers
):
    """With unusable images, and images with several captions; on disk, a second time too."""
    config, expected = request.getfixturevalue(reference)
    config = replace(
        config, cache=cache, cache_dir=str(tmp_path / "cache"), num_workers=num_workers,
        output_path=str(tmp_path / "run"),
    )
    first = run(config)
    assert first.trajectory == expected
    if cache == "disk":
        second = run(config, output_path=str(tmp_path / "second"))
        assert second.trajectory == expected
        assert second.num_encoded == 0 < first.num_encoded


@pytest.mark.parametrize("cache, num_workers", [("memory", 0), ("disk", 2)])
def test_a_run_encodes_each_image_once_and_the_next_one_reads_no_file(
    blip_folder, data, tmp_path, cache, num_workers
):
    config = few_steps(
        blip_folder, data, tmp_path / "run", tmp_path / "cache", cache=cache, eval_every=5,
        num_samples=4, num_workers=num_workers,
    )
    first = run(config)
    assert len(first.summary.losses) == 3 and len(first.summary.samples) == 4
    assert first.num_encoded == NUM_UNIQUE
    assert len(set(first.read)) == NUM_UNIQUE + 1  # one image under two names
    again = run(config, output_path=str(tmp_path / "again"))
    assert again.trajectory == first.trajectory
    if cache == "disk":
        assert again.num_encoded == 0 and again.read == []
    else:
        assert again.num_encoded == NUM_UNIQUE and again.source.cache.store is None


def test_the_next_run_reads_the_images_that_have_changed_and_no_other(
    blip_folder, data, tmp_path
):
    config = few_steps(blip_folder, data, tmp_path / "run", tmp_path / "cache", epochs=1)
    first = run(config)
    write_image(data / "7.bmp", 100)
    shutil.copy(data / "val_0.bmp", data / "8.bmp")
    set_time(data / "8.bmp")
    second = run(config, output_path=str(tmp_path / "second"))
    assert second.num_encoded == 1
    assert set(second.read) == {str(data / name) for name in ("7.bmp", "8.bmp")}
    uncached = run(config, output_path=str(tmp_path / "uncached"), cache="off")
    assert second.trajectory == uncached.trajectory != first.trajectory


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_an_image_that_changes_stops_a_run_which_resumes_once_it_is_restored(
    blip_folder, data, tmp_path, monkeypatch, cache
):
    """It changes in the first epoch, and is needed again in the second, after step 5."""
    accumulate, path = Trainer.accumulate, data / "7.bmp"

    def change_and_accumulate(trainer, batches, step, **settings):
        if step == 4:
            write_image(path, 100)
        return accumulate(trainer, batches, step, **settings)

    config = few_steps(
        blip_folder, data, tmp_path / "constant", tmp_path / "cache", num_samples=0, cache=cache
    )
    constant = run(config)
    config = replace(config, output_path=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(LoadingStopped) as caught:
        patch.setattr(Trainer, "accumulate", change_and_accumulate)
        run(config)
    assert str(caught.value) == (
        f"{path} has changed since the run began; restore it, or begin another run"
    )
    assert "--resume to continue from there" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError, match=f"other images: {re.escape(str(path))} has changed"):
        run(config, resume="newest")
    write_image(path, 7)
    assert run(config, resume="newest").trajectory == constant.trajectory


def test_a_run_that_can_keep_few_features_is_the_same(uncached, tmp_path, monkeypatch):
    config, expected = uncached
    free_memory(monkeypatch, 3)
    limits = {"cache_limit_gb": 4 * ROW_BYTES / 1e9, "cache_dir": str(tmp_path / "cache")}
    num_encoded = {}
    for cache in ("memory", "disk", "auto"):
        done = run(config, output_path=str(tmp_path / cache), cache=cache, **limits)
        assert done.trajectory == expected
        num_encoded[cache] = done.num_encoded
    assert num_encoded["memory"] > num_encoded["disk"] > num_encoded["auto"]


def test_a_run_on_an_overwritten_cache_equals_the_run_without_a_cache(uncached, tmp_path):
    config, expected = uncached
    config = replace(config, cache="disk", cache_dir=str(tmp_path / "cache"))
    assert run(config, output_path=str(tmp_path / "first")).trajectory == expected
    path, = (tmp_path / "cache").glob("*/features.bin")
    num_rows = path.stat().st_size // ROW_BYTES
    path.write_bytes(num_rows * ROW_BYTES * b"\xff")
    done = run(config, output_path=str(tmp_path / "second"))
    assert done.trajectory == expected
    assert done.logged == [f"{num_rows} damaged rows of features encoded again"]
    again = run(config, output_path=str(tmp_path / "third"))
    assert again.trajectory == expected and again.num_encoded == 0


def full_disk(monkeypatch, *, num_rows: int, wait: bool = False) -> None:
    """A disk that is full after this many rows; with `wait` it fails only when the run ends."""
    pwrite, stores = os.pwrite, []

    def write(file, data, offset):
        nonlocal num_rows
        num_rows -= 1
        if num_rows >= 0:
            return pwrite(file, data, offset)
        if wait:
            with stores[0]._changed:
                assert stores[0]._changed.wait_for(lambda: stores[0]._closing, timeout=20)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_and_remember(*args, **kwargs):
        stores.append(FeatureStore(*args, **kwargs))
        return stores[0]

    monkeypatch.setattr(placement, "FeatureStore", open_and_remember)
    monkeypatch.setattr(store_module.os, "pwrite", write)


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("cache", ["disk", "auto"])
def test_a_full_disk_costs_features_and_a_warning(
    uncached, tmp_path, monkeypatch, cache, wait
):
    config, expected = uncached
    full_disk(monkeypatch, num_rows=2, wait=wait)
    done = run(
        config, cache=cache, cache_dir=str(tmp_path / "cache"), output_path=str(tmp_path / "run")
    )
    assert done.trajectory == expected
    folder = done.source.cache.store.folder
    reason = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    assert done.logged == [f"{folder}: no more features are kept: {reason}"]


@pytest.fixture(params=["a file", "no permission"])
def no_cache_dir(request, tmp_path) -> Iterator[Path]:
    path = tmp_path / "no" / "cache"
    if request.param == "a file":
        path.parent.touch()
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        path.parent.mkdir(mode=0o500)
    yield path


def test_auto_continues_without_a_cache_folder_and_reports_it(
    uncached, tmp_path, monkeypatch, no_cache_dir
):
    config, expected = uncached
    monkeypatch.setattr(placement, "read_rate", store_module.read_rate)
    done = run(
        config, cache="auto", cache_dir=str(no_cache_dir), output_path=str(tmp_path / "run")
    )
    assert done.trajectory == expected
    assert done.source.cache.store is None and len(done.source.cache.host_memory.slots) == 13
    plan, = (line for line in done.printed.splitlines() if line.startswith("features of"))
    # 14 training and 5 validation images; two of them are both.
    assert f": kept 19 in memory; not on disk: {no_cache_dir}: features cannot be kept here" in plan


def test_cache_disk_with_an_unusable_folder_is_an_error(
    blip_folder, data, tmp_path, monkeypatch, capsys, no_cache_dir
):
    monkeypatch.setattr(placement, "read_rate", store_module.read_rate)
    monkeypatch.chdir(tmp_path)
    flags = {
        "model": blip_folder, "train_data_path": data / "train.json", "output_path": "run",
        "val_data_path": data / "val.json", "cache": "disk", "cache_dir": no_cache_dir,
    }
    arguments = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    assert cli.run(blip_cc3m.main) == cli.USAGE_ERROR
    out, err = capsys.readouterr()
    warning, error = err.splitlines()
    assert "2 of 5 validation images are also training images" in warning
    assert error.startswith(f"error: --cache disk: {no_cache_dir}: features cannot be kept here")
    assert "Choose another cache folder" in error and out == ""
    assert not (tmp_path / "run").exists()


# --- other processes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(uncached, tmp_path_factory) -> Path:
    """The results of three concurrent processes: two that share a cache, and one that is killed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config, _ = uncached
    context, children = multiprocessing.get_context("fork"), []
    for name, cache, kill_before in (("one", "ab", 0), ("other", "ab", 0), ("killed", "c", 2)):
        changes = {"output_path": str(folder / name), "cache_dir": str(folder / cache)}
        config = replace(config, cache="disk", **changes)
        if kill_before:  # so that the first group does not contain all images
            config = replace(config, batch_size=1)
        children.append(context.Process(target=_train, args=(config, kill_before)))
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, -signal.SIGKILL]
    return folder


def test_processes_that_share_a_cache_train_as_they_would_alone(
    uncached, elsewhere, tmp_path
):
    config, expected = uncached
    assert trajectory(elsewhere / "one") == trajectory(elsewhere / "other") == expected
    third = run(
        config, cache="disk", cache_dir=str(elsewhere / "ab"), output_path=str(tmp_path / "third")
    )
    assert third.num_encoded == 0 and third.trajectory == expected


def test_a_killed_run_leaves_features_that_the_next_one_uses(uncached, elsewhere, tmp_path):
    """Killed in the first epoch, after two batches."""
    config, expected = uncached
    index, = (elsewhere / "c").glob("*/index.sqlite")
    database = sqlite3.connect(index)
    (num_there,), = database.execute("SELECT count(*) FROM rows")
    database.close()
    done = run(
        config, cache="disk", cache_dir=str(elsewhere / "c"), output_path=str(tmp_path / "next")
    )
    assert done.trajectory == expected
    alone = run(config, output_path=str(tmp_path / "alone"), cache="memory")
    assert 4 <= num_there < alone.num_encoded
    assert done.num_encoded == alone.num_encoded - num_there


def _train(config: TrainingConfig, kill_before: int) -> None:
    """Train in a process of its own, which kills itself before a step, unless that is 0."""
    stores: list[FeatureStore] = []
    accumulate = Trainer.accumulate

    def open_and_remember(*args, **kwargs):
        stores.append(FeatureStore(*args, **kwargs))
        return stores[0]

    def accumulate_or_die(trainer, batches, step, **settings):
        if step == kill_before:
            wait_until(lambda: not stores[0]._queue)
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(trainer, batches, step, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
        patch.setattr(placement, "FeatureStore", open_and_remember)
        patch.setattr(Trainer, "accumulate", accumulate_or_die)
        train(config)
