"""Processes that train together encode each image once, and share what they keep."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from feature_rows import ROW_BYTES, digest_of, found, open_store, wait_until, write

from lora_engine.data.batches import Identified, PixelBatch
from lora_engine.data.image_table import ImageTable
from lora_engine.data.seen_images import ImageList
from lora_engine.features import cache as cache_module
from lora_engine.features import machine, placement
from lora_engine.features import source as source_module
from lora_engine.features import store as store_module
from lora_engine.features.cache import FeatureCache
from lora_engine.features.format import FeatureFormat
from lora_engine.features.machine import MachineFolder
from lora_engine.features.placement import CacheSettings, place_features, place_features_used_once
from lora_engine.features.source import FeatureSource
from lora_engine.features.store import FeatureStore, FeatureStoreError
from lora_engine.ranks import OneProcess

CPU = torch.device("cpu")
NUM_IMAGES, BATCH = 48, 4
TIMEOUT_S = 20


class ToyEncoder:
    """The features of an image are its number, everywhere; encoding takes a moment."""

    device, stream, batch_size = CPU, None, 2
    pixels = SimpleNamespace(size=(1, 1))
    format = FeatureFormat(4, 8, "fp32")

    def __init__(self) -> None:
        self.num_encoded = 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.num_encoded += len(pixels)
        time.sleep(random.random() * 0.002 * len(pixels))
        numbers = pixels[:, 0, 0, :1].float()
        return self.format.pack(numbers[:, None].expand(-1, 4, 8))

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        return self.format.unpack(rows, torch.float32)

    def measure_s(self) -> float:
        return 1.0

    def describe(self) -> dict[str, Any]:
        return {"encoder": "toy"}


class Machine:
    """The processes of one machine, as `Ranks` shows them; a barrier stands for a collective."""

    def __init__(self, size: int, folder: Path, *, num_machines: int = 1) -> None:
        self.local_size, self.size = size, size * num_machines
        self.rank = self.local_rank = 0
        self.launch = f"{folder} {time.time_ns()}"
        self.told = folder / "told.json"
        self.barrier = multiprocessing.get_context("fork").Barrier(size)

    def from_machine(self, value: Any) -> Any:
        if self.local_rank == 0:
            self.told.write_text(json.dumps(value))
        self.barrier.wait(TIMEOUT_S)
        told = json.loads(self.told.read_text())
        self.barrier.wait(TIMEOUT_S)
        return told

    def check(self) -> None:
        pass

    def run(self, function: Callable[["Machine"], Any]) -> list[Any]:
        """What `function` returns in each process."""
        context = multiprocessing.get_context("fork")
        processes, ends = [], []
        for rank in range(self.local_size):
            end, child_end = context.Pipe(duplex=False)
            process = context.Process(target=self._run, args=(function, rank, child_end))
            process.start()
            child_end.close()
            processes.append(process)
            ends.append(end)
        results = []
        try:
            for end in ends:
                assert end.poll(TIMEOUT_S), "a process hangs"
                results.append(end.recv())
        finally:
            for process in processes:
                process.join(5)
                process.kill()
        return results

    def _run(self, function, rank, end) -> None:
        torch.set_num_threads(1)
        self.rank = self.local_rank = rank
        random.seed(rank)
        end.send(function(self))


@pytest.fixture(autouse=True)
def _image_files(monkeypatch) -> None:
    """Images that are encoded again; there are no files."""
    monkeypatch.setattr(
        source_module, "read_image",
        lambda table, n, pixels: (np.full((3, 1, 1), n, np.uint8), None, digest_of(n)),
    )


@pytest.fixture(autouse=True)
def shared_memory(tmp_path, monkeypatch) -> Path:
    """A folder in place of /dev/shm, which containers may lack."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(machine, "SHARED_MEMORY", folder)
    monkeypatch.setattr(placement, "SHARED_MEMORY", folder)
    monkeypatch.setattr(placement, "read_rate", lambda folder: 1e12)
    return folder


def steps(epoch: int, size: int, num_captions: int) -> list[list[list[int]]]:
    """For each step, the images of each process's batch."""
    images = [n for n in range(NUM_IMAGES) for _ in range(num_captions)]
    random.Random(epoch).shuffle(images)
    width = BATCH * size
    return [
        [images[i + rank * BATCH :][:BATCH] for rank in range(size)]
        for i in range(0, len(images) - width + 1, width)
    ]


def batches(source: FeatureSource, numbers: list[list[int]], images: ImageList):
    """What the loader yields: pixels of those images whose features are not kept."""
    none = torch.empty(0)
    for of_batch in numbers:
        fresh = [n for n in of_batch if not source.has(images, n)]
        pixels = torch.tensor(fresh, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        loaded = [Identified(n, None, digest_of(n)) for n in fresh]
        yield PixelBatch(none, none, none, 0, of_batch, of_batch, [], pixels, loaded)


def image_list() -> ImageList:
    images = ImageList(ImageTable.of_files([f"image {n}" for n in range(NUM_IMAGES)]))
    for number in range(NUM_IMAGES):
        images.record(number, None, digest_of(number))
    return images


@contextmanager
def source_in(cache_dir: Path, ranks: Any, **settings: Any) -> Iterator[FeatureSource]:
    cache, encoder = FeatureCache(CPU, ranks), ToyEncoder()
    cache.store = FeatureStore(
        cache_dir, encoder.describe(), row_bytes=encoder.format.row_bytes, limit_bytes=10**9,
        ranks=ranks, **settings,
    )
    with FeatureSource(encoder, cache) as source:
        yield source


def train(source: FeatureSource, ranks: Any, *, num_captions: int = 1, num_epochs: int = 2):
    """Epochs of steps that end together -> how many images were encoded in each."""
    encoded, images = [], image_list()
    source.has = lambda images, n: digest_of(n) in source.cache  # their files do not exist
    for epoch in range(num_epochs):
        before = source.encoder.num_encoded
        mine = [step[ranks.local_rank] for step in steps(epoch, ranks.local_size, num_captions)]
        for batch in source.attach(batches(source, mine, images), images):
            expected = torch.tensor(batch.images).float()[:, None, None].expand(-1, 4, 8)
            assert torch.equal(batch.features, expected)
            time.sleep(random.random() * 0.002)
            ranks.barrier.wait(TIMEOUT_S)
        encoded.append(source.encoder.num_encoded - before)
    return encoded


# --- claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_captions", [1, 5])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group_size, num_ahead", [(1, 0), (4, 1)])
def test_each_image_is_encoded_by_one_process(
    tmp_path, size, num_captions, group_size, num_ahead
):
    def run(ranks):
        with source_in(tmp_path / "cache", ranks) as source:
            source.group_size, source.num_ahead = group_size, num_ahead
            return train(source, ranks, num_captions=num_captions)

    encoded = np.array(Machine(size, tmp_path).run(run))
    assert encoded.sum(axis=0).tolist() == [NUM_IMAGES, 0]
    assert (encoded[:, 0] > 0).all()  # the work is divided


@contextmanager
def one_of_two(tmp_path: Path, **changes: Any) -> Iterator[FeatureSource]:
    """A process whose peer, which this test plays, has claimed image 3."""
    given = {"local_size": 2, "local_rank": 0, "launch": "now", "check": lambda: None}
    with source_in(tmp_path / "cache", SimpleNamespace(**given | changes)) as source:
        source.has = lambda images, n: digest_of(n) in source.cache
        claim = "INSERT OR IGNORE INTO claims VALUES (?, 'now')"
        source.cache.store._reader.execute(claim, (digest_of(3),))
        yield source


def test_claims_of_other_launches_count_for_nothing(tmp_path):
    with one_of_two(tmp_path) as source:
        assert source.cache.claim([digest_of(n) for n in (2, 3, 4)]) == [digest_of(2), digest_of(4)]
    with one_of_two(tmp_path, launch="next") as source:
        store, digest = source.cache.store, digest_of(3)
        assert not store.is_claimed(digest)
        assert store.claim([digest]) == [digest] and store.is_claimed(digest)
        assert store.claim([digest]) == []


def test_a_process_that_waits_for_a_row_notices_that_the_other_one_has_died(tmp_path, monkeypatch):
    def check():
        raise RuntimeError("process 1 has died")

    monkeypatch.setattr(cache_module, "_CHECK_EVERY_S", 0.0)
    with one_of_two(tmp_path, check=check) as source:
        images = image_list()
        attached = source.attach(batches(source, [[1, 2], [3, 4]], images), images)
        assert next(attached).images == [1, 2]
        with pytest.raises(RuntimeError, match="process 1 has died"):
            next(attached)


@pytest.mark.parametrize("end", ["given up", "too late"])
def test_an_image_whose_claim_ends_without_a_row_is_encoded_here(tmp_path, monkeypatch, end):
    if end == "too late":
        monkeypatch.setattr(cache_module, "_MAX_WAIT_S", 0.02)
    with one_of_two(tmp_path) as source:
        images, store = image_list(), source.cache.store
        give_up = threading.Timer(0.05, store._reader.execute, ["DELETE FROM claims"])
        if end == "given up":
            give_up.start()
        batch, = source.attach(batches(source, [[3, 4]], images), images)
        assert batch.features[:, 0, 0].tolist() == [3, 4] and source.encoder.num_encoded == 2
        wait_until(lambda: store.num_rows == 2)


def test_claims_end_when_writing_stops_and_when_the_store_is_closed(tmp_path):
    def claims() -> int:
        return other._ask("SELECT count(*) FROM claims")[0]

    description, row_bytes = ToyEncoder().describe(), ToyEncoder.format.row_bytes
    other = FeatureStore(tmp_path / "cache", description, row_bytes=row_bytes, limit_bytes=10**9)
    digests = [digest_of(n) for n in range(5)]
    with closing(other):
        with one_of_two(tmp_path) as source:
            store = source.cache.store
            assert len(store.claim(digests)) == 4 and claims() == 5
            assert store.offer(digests[0], np.zeros(row_bytes, np.uint8))
            wait_until(lambda: claims() == 4 and digests[0] in other)
            store._stop("the disk is full")
            assert claims() == 1
            store._claimed.add(digest_of(3))  # claimed while it stopped
            assert not store.offer(digests[3], np.zeros(row_bytes, np.uint8)) and claims() == 0
        with one_of_two(tmp_path) as source:
            assert source.cache.claim(digests) == [digests[n] for n in (1, 2, 4)]
        assert claims() == 1


def test_one_process_makes_no_claims(tmp_path):
    with source_in(tmp_path / "cache", OneProcess()) as source:
        digests = [digest_of(n) for n in range(5)]
        assert source.cache.claim(digests) == digests
        assert source.cache.store._ask("SELECT * FROM claims") is None


# --- one decision, shared memory ------------------------------------------------------------


def place(mode: str, ranks: Any, folder: Path, *, limit_rows: int = 1000) -> Any:
    settings = CacheSettings(mode, folder, limit_rows * ToyEncoder.format.row_bytes)
    return place_features(ToyEncoder(), NUM_IMAGES, settings, ranks)


@pytest.mark.parametrize("mode, limit_rows", [("memory", 0), ("auto", 20)])
def test_processes_share_what_is_kept_in_memory(
    tmp_path, shared_memory, monkeypatch, mode, limit_rows
):
    """With auto, what the disk does not take."""
    def run(ranks):
        placement = place(mode, ranks, tmp_path / "cache", limit_rows=limit_rows)
        with FeatureSource(ToyEncoder(), placement.cache) as source:
            encoded = train(source, ranks, num_epochs=5)
            num_files = len(list(shared_memory.iterdir()))
            ranks.barrier.wait(TIMEOUT_S)
            stopped = source.cache.shared_memory.stopped_because
        return encoded, num_files, placement.plan, stopped

    results = Machine(2, tmp_path).run(run)
    encoded = np.array([result[0] for result in results]).sum(axis=0).tolist()
    assert encoded[-1] == 0, results
    if mode == "memory":
        assert encoded[:2] == [NUM_IMAGES, 0], results
        assert not (tmp_path / "cache").exists()
    assert {result[1] for result in results} == {1}
    assert not list(shared_memory.iterdir())
    most = "up to 28" if limit_rows else "48"
    assert all(f"{most} in memory" in plan and "shm-size" not in plan for _, _, plan, _ in results)


@pytest.mark.parametrize("free_bytes", [0, None, 2**30 + 5 * 128])
def test_the_plan_says_how_many_images_fit_into_shared_memory(
    tmp_path, shared_memory, monkeypatch, free_bytes
):
    ranks = SimpleNamespace(
        local_size=2, size=2, local_rank=0, launch="a", from_machine=lambda value: value
    )
    if free_bytes is None:
        shared_memory.rmdir()
    else:
        disk = SimpleNamespace(total=2**20, free=free_bytes)
        monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
    placed = place("memory", ranks, tmp_path)
    num_fitting = 5 if free_bytes else 0
    assert f"kept {num_fitting} in memory of 48: " in placed.plan
    assert placed.num_kept == num_fitting and "--shm-size" in placed.plan
    placed.cache.close(1)


@pytest.mark.parametrize("is_used_once", [False, True])
def test_the_first_process_measures_for_all(tmp_path, monkeypatch, is_used_once):
    """Encoding takes longer than reading for one process only."""
    def run(ranks):
        encoder = ToyEncoder()
        encoder.measure_s = lambda: 1.0 if ranks.local_rank == 0 else 0.0
        settings = CacheSettings("auto", tmp_path / "cache", 1e9)
        if is_used_once:
            cache = place_features_used_once(encoder, NUM_IMAGES, settings, ranks)
        else:
            cache = place_features(encoder, NUM_IMAGES, settings, ranks).cache
        is_on_disk = cache.store is not None
        cache.close(1)
        return is_on_disk

    assert Machine(2, tmp_path).run(run) == [True, True]


def test_all_processes_raise_if_the_folder_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def run(ranks):
        with pytest.raises(ValueError, match="--cache disk: no such disk"):
            place("disk", ranks, tmp_path / "file")
        return True

    def fail(folder):
        raise FeatureStoreError("no such disk")

    monkeypatch.setattr(placement, "read_rate", fail)
    assert Machine(2, tmp_path).run(run) == [True, True]


def test_the_folder_of_killed_processes_is_removed_by_the_next_launch(tmp_path, shared_memory):
    def run(ranks):
        MachineFolder("killed").path.joinpath("rows").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EOFError):
        Machine(1, tmp_path).run(run)
    stale, = shared_memory.iterdir()
    one, other = MachineFolder("now"), MachineFolder("now")
    assert one.path == other.path and list(shared_memory.iterdir()) == [one.path] != [stale]
    assert one.path.stat().st_mode & 0o777 == 0o700
    one.close()
    assert other.path.exists()
    MachineFolder("another launch").close()
    assert list(shared_memory.iterdir()) == [other.path]
    other.close()
    assert not list(shared_memory.iterdir())


def test_a_folder_that_is_removed_while_it_is_opened_is_made_again(shared_memory, monkeypatch):
    """By another process, which takes it for one that is left over."""
    opened, moments = os.open, iter(["before opening", "before locking"])

    def open_and_lose(path, *flags):
        if path.parent != shared_memory or (moment := next(moments, None)) is None:
            return opened(path, *flags)
        if moment == "before opening":
            path.rmdir()
        file = opened(path, *flags)
        path.rmdir()
        return file

    monkeypatch.setattr(os, "open", open_and_lose)
    folder = MachineFolder("a")
    assert folder.path.is_dir() and next(moments, None) is None
    folder.close()


# --- network file systems -------------------------------------------------------------------


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 0:30 / / rw,relatime shared:1 - {root} / rw
30 27 0:50 / /home rw,relatime shared:7 master:2 - nfs4 server:/home rw,vers=4.2
31 30 0:51 / /home/me/my\\040disk rw,relatime - xfs /dev/sda1 rw
32 27 0:52 / /buckets rw - fuse.gcsfuse data rw
33 27 0:53 / /host rw - 9p host rw
34 27 0:54 / /homes rw - ext4 /dev/sdb rw
"""


@pytest.mark.parametrize("path, root, is_network", [
    ("/home/me/.cache/x", "ext4", True),
    ("/home/me/my disk/x", "ext4", False),
    ("/homes/me", "ext4", False),
    ("/buckets", "ext4", True),
    ("/host/x", "ext4", True),
    ("/data", "9p", False),
    ("/data", "overlay", False),
    ("/data", "fuse.fuse-overlayfs", False),
    ("/data", "nfs", True),
])
def test_network_file_systems_are_recognized(tmp_path, monkeypatch, path, root, is_network):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(root=root))
    monkeypatch.setattr(machine, "_MOUNTS", mounts)
    assert machine.is_on_network(Path(path)) == is_network


def on_machine(tmp_path: Path, name: str, **settings: Any):
    """A store of one launch on one of several machines."""
    return open_store(tmp_path / "shared", index_folder=tmp_path / name, **settings)


def test_machines_share_rows_through_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_IMPORT_EVERY_S", 0.01)
    with on_machine(tmp_path, "a") as a, on_machine(tmp_path, "b") as b:
        write(a, range(10))
        write(b, range(15, 20))
        wait_until(lambda: a.num_rows == b.num_rows == 15)
        write(b, range(5, 25))
        wait_until(lambda: a.num_rows == 25)
        for store in (a, b):
            assert found(store, range(30)) == list(range(25))
        segments = a.folder / "segments"
        assert {path.suffix for path in segments.iterdir()} == {".rows", ".index"}
        assert len(list(segments.iterdir())) == 4 and not list(a.folder.glob("*.sqlite*"))
        assert sum(path.stat().st_size for path in segments.glob("*.rows")) == 25 * ROW_BYTES
    (a.folder / "features.bin").touch()  # of an earlier version
    with on_machine(tmp_path, "c") as c:  # another launch, on a third machine
        assert found(c, range(30)) == list(range(25)) and c.num_rows == 25
    assert len(list(segments.iterdir())) == 4 and (a.folder / "features.bin").exists()


def test_a_damaged_row_of_a_segment_is_encoded_again_once(tmp_path):
    with on_machine(tmp_path, "a") as store:
        write(store, range(6))
        path, = (store.folder / "segments").glob("*.rows")
    rows = np.memmap(path, np.uint8, "r+").reshape(6, ROW_BYTES)
    rows[2, 1000] ^= 1
    rows.flush()
    with on_machine(tmp_path, "b") as store:
        assert found(store, [0, 1, 3]) == [0, 1, 3]
        assert not store.read(digest_of(2), np.zeros(ROW_BYTES, np.uint8))
        assert store.num_damaged == 1
        write(store, [2])
        assert found(store, range(7)) == list(range(6))
    with on_machine(tmp_path, "c") as store:
        assert found(store, range(7)) == list(range(6)) and store.num_damaged == 0


def test_segments_that_are_cut_or_removed_lose_their_rows_only(tmp_path):
    for name, begin in (("a", 0), ("b", 10), ("c", 20)):
        with on_machine(tmp_path, name) as store:
            write(store, range(begin, begin + 10))
    paths = sorted((store.folder / "segments").glob("*.rows"), key=lambda path: path.stat().st_ino)
    os.truncate(paths[0], 3 * ROW_BYTES + 7)
    os.truncate(paths[1].with_suffix(".index"), 4 * 32 + 5)
    with on_machine(tmp_path, "d") as store:
        held = found(store, range(30))
        assert len(held) == store.num_rows == 17 and store.num_damaged == 0
        paths[2].unlink()
        assert len(found(store, range(30))) == 7
        assert store.stopped_because is None
    with on_machine(tmp_path, "e") as store:
        write(store, range(30))
        assert found(store, range(31)) == list(range(30))


def test_processes_of_a_machine_encode_each_image_once_on_a_network_disk(tmp_path):
    def run(ranks):
        with source_in(tmp_path / "cache", ranks, index_folder=tmp_path / "index") as source:
            return train(source, ranks, num_captions=5)

    assert np.array(Machine(4, tmp_path).run(run)).sum(axis=0).tolist() == [NUM_IMAGES, 0]


@pytest.mark.parametrize("is_network", [False, True])
def test_the_plan_says_what_several_machines_share(
    tmp_path, shared_memory, monkeypatch, is_network
):
    monkeypatch.setattr(placement, "is_on_network", lambda folder: is_network)
    ranks = SimpleNamespace(
        local_size=2, size=8, local_rank=0, launch="a", from_machine=lambda value: value
    )
    placed = place("disk", ranks, tmp_path / "cache")
    with FeatureSource(ToyEncoder(), placed.cache) as source:
        if is_network:
            assert "; the 4 machines share the disk: each image" in placed.plan
            assert not list((tmp_path / "cache").rglob("*.sqlite"))
            assert len(list(shared_memory.rglob("identities.sqlite"))) == 1
        else:
            expected = "each of the 4 machines encodes the images that it meets first: up to 4 "
            assert expected in placed.plan
            assert (tmp_path / "cache" / "identities.sqlite").exists()
        source.cache.claim([digest_of(1)])
    assert not list(shared_memory.iterdir())


# --- reading ahead --------------------------------------------------------------------------


def test_kept_rows_are_read_while_the_previous_batch_is_in_use(tmp_path):
    with source_in(tmp_path / "cache", OneProcess()) as source:
        images, source.group_size = image_list(), 1
        source.has = lambda images, n: digest_of(n) in source.cache
        for _ in source.attach(batches(source, [[0, 1], [2, 3], [4, 5]], images), images):
            pass
        store, readers = source.cache.store, []
        wait_until(lambda: store.num_rows == 6)
        read = store.read
        store.read = lambda digest, out: [
            readers.append((digest, threading.current_thread().name)), read(digest, out)
        ][1]
        orders = [[0, 1], [2, 3, 2], [4, 5]]
        for number, batch in enumerate(source.attach(batches(source, orders, images), images)):
            assert batch.features[:, 0, 0].tolist() == orders[number]
            if number == 0:
                wait_until(lambda: len(readers) == 4)  # those of two batches, each once
        assert len(readers) == 6 and source.encoder.num_encoded == 6
        assert all(name.startswith("features_") for _, name in readers)


def test_an_error_of_the_loader_comes_after_the_batches_before_it(tmp_path):
    def failing():
        yield from batches(source, [[0, 1], [2, 3]], images)
        raise ValueError("no more")

    with source_in(tmp_path / "cache", OneProcess()) as source:
        images, source.group_size = image_list(), 1
        source.has = lambda images, n: digest_of(n) in source.cache
        for _ in ("fresh rows", "kept rows"):
            attached = source.attach(failing(), images)
            assert [next(attached).images, next(attached).images] == [[0, 1], [2, 3]]
            with pytest.raises(ValueError, match="no more"):
                next(attached)


def test_images_without_features_are_not_loaded_before_their_turn(tmp_path):
    def counted():
        for batch in batches(source, [[n] for n in range(5)], images):
            loaded.append(batch.images)
            yield batch

    with source_in(tmp_path / "cache", OneProcess()) as source:
        images, source.group_size = image_list(), 1
        source.has = lambda images, n: digest_of(n) in source.cache
        for num_ahead in (0, 1):
            loaded = []
            for number, _ in enumerate(source.attach(counted(), images), 1):
                assert len(loaded) == min(number + num_ahead, 5)
