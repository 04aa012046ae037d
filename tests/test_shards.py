"""Runs over tars: killed and resumed in both orders, with bad shards, and an index on disk."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from data_formats import samples
from forking import in_child
from pictures import json_lines, write_pictures
from tars import write_tar
from test_resume import assert_same_run, killing, long_run

from lora_engine.config import TrainingConfig
from lora_engine.data import batches, image_identity, pair_builder, pair_index, read_order
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import AnnotationError, SourceOptions
from lora_engine.training import setup
from lora_engine.training.loop import train

SAMPLES = samples(40)


def write_shards(folder: Path) -> Path:
    """Four tars of ten samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        write_tar(folder / f"{shard:05d}.tar", (
            (sample.name[:5], {"jpg": sample.data, "txt": sample.caption.encode()})
            for sample in SAMPLES[10 * shard : 10 * shard + 10]
        ))
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def on_disk(monkeypatch):
    """Small data sets, and files that have just been written, get an index on disk."""
    monkeypatch.setattr(pair_index, "MIN_ROWS_ON_DISK", 0)
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", -(10**9))


# --- runs -----------------------------------------------------------------------------------------


def tar_run(model: Path, shards: Path, run: Path, **changes) -> TrainingConfig:
    """Thirteen steps of which the first ten are an epoch."""
    write_pictures(shards.parent, num_images=4, name="val.json")
    config = long_run(model, shards.parent, run, batch_size=2, **changes)
    return replace(
        config, train_data_path=str(shards / "{00000..00003}.tar"),
        cache_dir=str(shards.parent / "cache"), cache="memory",
    )


@pytest.mark.parametrize("order", ["random", "blocks"])
def test_killed_three_times_in_an_epoch_over_tars_a_run_is_bit_identical(
    blip_folder, shards, tmp_path, monkeypatch, on_disk, order
):
    """The last time without its index, which is built again."""
    monkeypatch.setattr(read_order, "BLOCK_BYTES", 8192)
    whole = tar_run(blip_folder, shards, tmp_path / "whole", read_order=order)
    train(whole)
    config = replace(whole, output_path=str(tmp_path / "run"))
    for attempt in range(3):
        given = config if not attempt else replace(config, resume="newest")
        ended = in_child(killing(given, at_step=3), tmp_path / "log")
        assert ended.status == -signal.SIGKILL, ended.output
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["index"]
    shutil.rmtree(tmp_path / "cache")
    train(replace(config, resume="newest"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert any(line["loss"] != lines[0]["loss"] for line in lines)


def test_a_run_keeps_the_order_that_was_measured_when_it_began(
    blip_folder, shards, tmp_path, monkeypatch
):
    config = tar_run(blip_folder, shards, tmp_path / "run", max_steps=4)
    monkeypatch.setattr(setup, "choose_read_order", lambda images: ("blocks", "a slow disk"))
    train(config)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["read_order"] == "blocks"
    monkeypatch.setattr(setup, "choose_read_order", lambda images: pytest.fail("measured again"))
    train(replace(config, max_steps=6, resume="newest"))
    with pytest.raises(ValueError, match="--read_order random"):
        train(replace(config, max_steps=8, read_order="random", resume="newest"))


def test_a_second_run_decodes_no_image(blip_folder, shards, tmp_path, monkeypatch, on_disk):
    """It finds the digests with the index, and the features by them."""
    config = tar_run(blip_folder, shards, tmp_path / "run", max_steps=10, eval_every=99)
    config = replace(config, cache="disk", cache_limit_gb=1.0)
    train(config)
    monkeypatch.setattr(batches, "load_pixels", lambda *given: pytest.fail("decoded again"))
    train(replace(config, output_path=str(tmp_path / "second")))
    losses = [json_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "second")]
    assert [line["loss"] for line in losses[0]] == [line["loss"] for line in losses[1]]


def test_rows_of_bad_shards_are_counted_and_the_rest_is_trained_on(blip_folder, shards, tmp_path):
    data = (shards / "00002.tar").read_bytes()
    (shards / "00002.tar").write_bytes(data[: len(data) // 2])
    (shards / "00003.tar").write_bytes(b"<html>not a tar</html>" * 100)
    config = tar_run(
        blip_folder, shards, tmp_path / "run", max_steps=2, max_bad_share=0.5, eval_captions=0
    )
    train(replace(config, train_data_path=str(shards / "{00000..00004}.tar")))
    skipped = [line["row"] for line in json_lines(tmp_path / "run" / "skipped.jsonl")]
    assert {Path(name).name for name in skipped} >= {"00003.tar", "00004.tar"}
    assert any("00002.tar" in name for name in skipped)


def test_a_shard_that_changes_during_a_run_costs_its_rows(shards):
    pairs = read_pairs(str(shards))
    write_tar(shards / "00001.tar", [("x", {"jpg": SAMPLES[0].data, "txt": b"another"})])
    for image, path in enumerate(pairs.images):
        if "00001.tar" in path:
            with pytest.raises(ValueError, match="00001.tar.*has changed since it was indexed"):
                pairs.images.read(image)
        else:
            assert pairs.images.read(image) == SAMPLES[image].data
    (shards / "00002.tar").unlink()
    with pytest.raises(ValueError, match="00002.tar.*No such file"):
        pairs.images.read(25)


# --- the index ------------------------------------------------------------------------------------


def test_an_index_holds_what_the_source_holds(shards, tmp_path, on_disk):
    in_memory = read_pairs(str(shards))
    built = read_pairs(str(shards), index_folder=tmp_path)
    opened = read_pairs(str(shards), index_folder=tmp_path)
    assert built.source.folder == opened.source.folder and in_memory.source.folder is None
    assert [*built] == [*opened] == [*in_memory] and len(built) == 40
    assert built.fingerprint() == opened.fingerprint() == in_memory.fingerprint()
    assert built.images.read(17) == opened.images.read(17) == SAMPLES[17].data
    assert opened.location(3) == built.location(3) == str(shards / "00000.tar" / "00003.jpg")


def test_an_index_is_opened_without_reading_its_source(shards, tmp_path, monkeypatch, on_disk):
    read_pairs(str(shards), index_folder=tmp_path)
    monkeypatch.setattr(pair_builder, "read_chunks", lambda *a, **k: pytest.fail("read again"))
    assert len(read_pairs(str(shards), index_folder=tmp_path)) == 40


@pytest.mark.parametrize("change", ["another shard", "a changed shard", "other options"])
def test_another_source_gets_another_index(shards, tmp_path, on_disk, change):
    read_pairs(str(shards), index_folder=tmp_path)
    options = SourceOptions()
    if change == "another shard":
        shutil.copy(shards / "00000.tar", shards / "00009.tar")
    elif change == "a changed shard":
        with open(shards / "00000.tar", "r+b") as file:
            file.write(file.read(1))
    else:
        options = SourceOptions(caption_field="txt")
    pairs = read_pairs(str(shards), options, index_folder=tmp_path)
    assert len(list(tmp_path.glob("index/*/index.json"))) == 2
    assert len(pairs) == (50 if change == "another shard" else 40)


@pytest.mark.parametrize("name", ["text.bin", "offset.bin", "columns.json", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_index_is_built_again(shards, tmp_path, on_disk, name, damage):
    path = read_pairs(str(shards), index_folder=tmp_path).source.folder / name
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    assert [row.text for row in read_pairs(str(shards), index_folder=tmp_path)] == [
        sample.caption for sample in SAMPLES
    ]
    assert path.exists()


def test_without_a_place_for_it_the_index_is_kept_in_memory(shards, tmp_path, on_disk, caplog):
    (tmp_path / "cache").write_text("a file")
    pairs = read_pairs(str(shards), index_folder=tmp_path / "cache")
    assert len(pairs) == 40 and pairs.source.folder is None
    assert "cannot keep an index" in caplog.text


def test_a_source_that_is_being_written_gets_no_index(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_index, "MIN_ROWS_ON_DISK", 0)
    assert read_pairs(str(shards), index_folder=tmp_path / "cache").source.folder is None


def test_what_follows_from_rows_is_computed_once(shards, tmp_path, on_disk):
    def pairs():
        return read_pairs(str(shards), index_folder=tmp_path)

    calls = []

    def some(key):
        return pairs().choose(key, lambda: calls.append(key) or range(0, 40, 2))

    first, again = some("even"), some("even")
    assert calls == ["even"] and [*first] == [*again] == [*pairs()][::2]
    some("other")
    assert calls == ["even", "other"]
    assert first.choose("few", lambda: range(3)).fingerprint() == (
        again.choose("few", lambda: range(3)).fingerprint()
    )


def test_digests_outlive_a_run_with_the_index(shards, tmp_path, on_disk):
    images = read_pairs(str(shards), index_folder=tmp_path).images
    assert images.kept_digest(3) == bytes(16)
    assert images.keep_digest(3, b"x" * 16)
    assert read_pairs(str(shards), index_folder=tmp_path).images.kept_digest(3) == b"x" * 16
    assert read_pairs(str(shards)).images.kept_digest(3) is None


def test_too_many_lost_shards_are_an_error(shards):
    for number in (1, 2):
        (shards / f"{number:05d}.tar").write_bytes(b"nothing")
    with pytest.raises(AnnotationError, match=r"00001.tar.*\n.*00002.tar"):
        read_pairs(str(shards))
    assert len(read_pairs(str(shards), max_bad_share=0.5)) == 20
