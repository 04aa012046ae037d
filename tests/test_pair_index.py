"""An index on disk that several processes use, that is read-only or removed, on a full disk."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from data_formats import samples
from tars import write_tar

from lora_engine.data import columns, image_identity, pair_builder, pair_index
from lora_engine.data.image_table import ImageTable
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.seen_images import ImageList
from lora_engine.stopping import LoadingStopped

SAMPLES = samples(12)
DIGEST = b"d" * 16


@pytest.fixture(autouse=True)
def _on_disk(monkeypatch):
    """Small data sets, and files that have just been written, get an index on disk."""
    monkeypatch.setattr(pair_index, "MIN_ROWS_ON_DISK", 0)
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", -(10**9))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three tars of four samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", (
            (sample.name[:5], {"jpg": sample.data, "txt": sample.caption.encode()})
            for sample in SAMPLES[4 * shard : 4 * shard + 4]
        ))
    return folder


def even(pairs):
    return pairs.choose("even", lambda: np.arange(0, len(pairs), 2))


def assert_whole(pairs) -> None:
    assert pairs[:] == read_pairs(str(Path(pairs.images[0]).parents[1]))[:]
    assert [pairs.images.read(image) for image in range(12)] == [s.data for s in SAMPLES]
    assert even(pairs)[:] == pairs[::2]


# --- several processes ----------------------------------------------------------------------------


def test_processes_that_build_an_index_at_the_same_time_build_it_once(shards, tmp_path):
    """The second one waits for the first."""
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(3), context.SimpleQueue()
    built = tmp_path / "built"
    built.mkdir()
    build = pair_index._build

    def slow_build(*given, **reading):
        (built / str(os.getpid())).touch()
        time.sleep(0.2)  # so that the others come meanwhile
        build(*given, **reading)

    def run():
        pair_index._build = slow_build
        start.wait()
        pairs = read_pairs(str(shards), index_folder=tmp_path)
        found.put((str(pairs.source.folder), len(pairs), len(even(pairs))))

    children = [context.Process(target=run) for _ in range(3)]
    for child in children:
        child.start()
    results = {found.get() for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    ((folder, num_rows, num_even),) = results
    assert folder != "None" and num_rows == 12 and num_even == 6
    assert len(list(built.iterdir())) == 1
    assert_whole(read_pairs(str(shards), index_folder=tmp_path))


def test_an_index_that_appears_while_another_is_built_is_replaced_by_an_equal_one(
    shards, tmp_path, monkeypatch
):
    """Where the lock does not work, such as on some network disks."""
    first = read_pairs(str(shards), index_folder=tmp_path)
    even(first)
    folder, away = first.source.folder, tmp_path / "away"
    folder.rename(away)
    read = pair_index.read_parts

    def read_slowly(*given, **reading):
        result = read(*given, **reading)
        if not folder.exists():
            away.rename(folder)
        return result

    monkeypatch.setattr(pair_index, "read_parts", read_slowly)
    second = read_pairs(str(shards), index_folder=tmp_path)
    assert second.source.folder == folder
    assert_whole(second)
    assert_whole(first)


def test_what_another_process_derives_meanwhile_is_used(shards, tmp_path):
    pairs = read_pairs(str(shards), index_folder=tmp_path)
    folder = pairs.source.folder

    def compute(writer):
        (path,) = folder.glob(".some-*.new")
        other = folder / path.name[1:].split(".")[0]
        if not other.exists():
            theirs = columns.ColumnWriter(other)
            other.mkdir()
            theirs.append("a", np.array([7], dtype=np.uint8))
            theirs.finish()
        writer.append("a", np.array([7], dtype=np.uint8))

    assert pairs.derived("some", None, compute)["a"].tolist() == [7]
    assert pairs.derived("some", None, lambda writer: pytest.fail("again"))["a"].tolist() == [7]


def test_what_a_killed_process_has_left_is_removed(shards, tmp_path):
    folder = read_pairs(str(shards), index_folder=tmp_path).source.folder
    folder.rename(folder.with_name(f".{folder.name}.1234.new"))  # killed while it was written
    (tmp_path / "index" / ".another.1234.new").mkdir()
    assert_whole(read_pairs(str(shards), index_folder=tmp_path))
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {folder.name, f"{folder.name}.lock", ".another.1234.new"}


# --- disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["columns", "index", "derived columns"])
def test_an_index_on_a_full_disk_is_kept_in_memory(shards, tmp_path, monkeypatch, caplog, what):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*given, **options):
        raise full

    if what == "index":
        monkeypatch.setattr(pair_index, "_build", fail)
    else:
        append = columns.ColumnWriter.append
        name = "name" if what == "columns" else "rows"

        def append_until_full(writer, column, values):
            if column == name and writer.folder is not None:
                raise full
            append(writer, column, values)

        monkeypatch.setattr(columns.ColumnWriter, "append", append_until_full)
    pairs = read_pairs(str(shards), index_folder=tmp_path / "cache")
    assert_whole(pairs)
    is_kept = what == "derived columns"
    assert (pairs.source.folder is not None) == is_kept
    assert ("No space left on device" in caplog.text) != is_kept
    left = [path for path in (tmp_path / "cache").rglob("*.bin")]
    assert bool(left) == is_kept and not list((tmp_path / "cache").rglob("rows*.bin"))


def test_digests_take_their_space_when_the_index_is_built(shards, tmp_path):
    """To write to a mapped hole of a full disk would kill the process."""
    path = read_pairs(str(shards), index_folder=tmp_path).source.folder / "digests.bin"
    assert path.read_bytes() == bytes(16 * 12)
    assert path.stat().st_blocks * 512 >= 16 * 12


@pytest.mark.parametrize("denied", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_an_index_that_may_not_be_written_is_used_without_keeping_digests(
    shards, tmp_path, monkeypatch, denied
):
    read_pairs(str(shards), index_folder=tmp_path)
    memmap = np.memmap

    def read_only(path, *given, mode, **options):
        if mode != "r":
            raise OSError(denied, os.strerror(denied), str(path))
        return memmap(path, *given, mode=mode, **options)

    def refuse(*given, **options):
        raise OSError(denied, os.strerror(denied))

    monkeypatch.setattr(np, "memmap", read_only)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(pair_builder, "read_chunks", refuse)
    pairs = read_pairs(str(shards), index_folder=tmp_path)
    assert pairs.source.folder is not None and len(pairs) == 12
    assert even(pairs)[:] == pairs[::2]  # in memory
    images = ImageList(pairs.images)
    assert not images.is_kept(3) and not pairs.images.keep_digest(3, DIGEST)
    stamp = pairs.images.stamp(3)
    images.record(3, stamp, DIGEST)
    assert images.knows(3, stamp) and not images.knows(4, pairs.images.stamp(4))


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_damaged_digests_are_noticed(shards, tmp_path, damage):
    path = read_pairs(str(shards), index_folder=tmp_path).source.folder / "digests.bin"
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 16 if damage == "truncated" else 16 * 13)
    pairs = read_pairs(str(shards), index_folder=tmp_path)
    assert_whole(pairs)
    assert path.read_bytes() == bytes(16 * 12)


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON", '{"parts": 3}', "\xff"])
def test_an_index_that_says_nonsense_is_built_again(shards, tmp_path, content, caplog):
    path = read_pairs(str(shards), index_folder=tmp_path).source.folder / "index.json"
    path.write_bytes(content.encode("latin-1"))
    assert_whole(read_pairs(str(shards), index_folder=tmp_path))
    assert isinstance(json.loads(path.read_text())["parts"], list)


def test_an_index_that_is_damaged_as_soon_as_it_is_written_is_kept_in_memory(
    shards, tmp_path, monkeypatch, caplog
):
    build = pair_index._build

    def damage(folder, *given, **reading):
        build(folder, *given, **reading)
        os.truncate(folder / "line.bin", 1)

    monkeypatch.setattr(pair_index, "_build", damage)
    pairs = read_pairs(str(shards), index_folder=tmp_path)
    assert pairs.source.folder is None and "cannot keep an index" in caplog.text
    assert len(pairs) == 12


# --- an index that disappears, and old ones -------------------------------------------------------


def test_an_index_that_is_removed_under_a_run_stays_usable(shards, tmp_path):
    """What is mapped stays; what is derived later is kept in memory."""
    pairs = read_pairs(str(shards), index_folder=tmp_path)
    shutil.rmtree(tmp_path / "index")
    assert_whole(pairs)
    assert pairs.images.keep_digest(3, DIGEST) and pairs.images.kept_digest(3) == DIGEST
    assert not (tmp_path / "index").exists()
    assert read_pairs(str(shards), index_folder=tmp_path).images.kept_digest(3) == bytes(16)


def test_kept_digests_are_shared_and_a_changed_image_is_noticed(shards, tmp_path):
    ours, theirs = (
        ImageList(read_pairs(str(shards), index_folder=tmp_path).images) for _ in range(2)
    )
    stamp = ours.table.stamp(5)
    assert not ours.knows(5, stamp)
    theirs.record(5, stamp, DIGEST)
    assert ours.knows(5, stamp) and ours.digests[5].tobytes() == DIGEST
    other = ImageList(theirs.table, np.full(12, b"e" * 16, dtype="V16"))
    with pytest.raises(LoadingStopped, match="00005.jpg has changed since the run began"):
        other.knows(5, stamp)


def test_unused_indexes_are_removed_and_a_used_one_is_not(shards, tmp_path, monkeypatch):
    folder = read_pairs(str(shards), index_folder=tmp_path).source.folder
    long_ago = time.time() - 2 * pair_index._UNUSED_S
    old = folder.with_name("old")
    shutil.copytree(folder, old)
    for path in (old, folder):
        os.utime(path, (long_ago, long_ago))
    assert_whole(read_pairs(str(shards), index_folder=tmp_path))
    assert time.time() - folder.stat().st_mtime < 600
    shutil.copy(shards / "00000.tar", shards / "00009.tar")
    read_pairs(str(shards), index_folder=tmp_path)
    assert folder.exists() and not old.exists()


def test_an_index_of_images_that_were_moved_is_built_again(tmp_path):
    (tmp_path / "images").mkdir()
    for sample in SAMPLES:
        (tmp_path / "images" / sample.name).write_bytes(sample.data)
    rows = [{"text": sample.caption, "image": sample.name} for sample in SAMPLES]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = str(tmp_path / "train.json")
    before = read_pairs(data, index_folder=tmp_path / "cache")
    assert isinstance(before.images, ImageTable) and before.images.has_file(0)
    (tmp_path / "images").rename(tmp_path / "pictures")
    after = read_pairs(data, index_folder=tmp_path / "cache")
    assert after.images.has_file(0) == read_pairs(data).images.has_file(0)
    assert after[:] == read_pairs(data)[:]
