"""A row comes back exactly as it was offered or not at all, whatever happens to its writer."""

import errno
import fcntl
import hashlib
import os
import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from feature_rows import (
    MOMENTS,
    ROW_BYTES,
    digest_of,
    found,
    is_queued,
    offer_at_once,
    open_store,
    row_number,
    row_of,
    wait_until,
    write,
    writing,
)

from lora_engine.features import store as store_module
from lora_engine.features.store import FeatureStore, FeatureStoreError, read_rate


def features_size(store):
    return (store.folder / "features.bin").stat().st_size


@pytest.fixture
def stuck_disk(monkeypatch):
    """A disk on which writes block until it is released."""
    disk, pwrite = SimpleNamespace(reached=threading.Event(), released=threading.Event()), os.pwrite

    def wait(*arguments):
        disk.reached.set()
        disk.released.wait(20)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", wait)
    yield disk
    disk.released.set()


def test_rows_come_back_as_they_were_offered(tmp_path):
    with open_store(tmp_path) as store:
        write(store, range(20))
        assert found(store, range(25)) == list(range(20))
        assert store.num_rows == 20
        assert digest_of(99) not in store and digest_of(7) in store
        assert store.stopped_because is None


def test_closing_writes_the_queue_for_the_next_store(tmp_path):
    for begin, end in [(0, 10), (10, 15)]:
        with open_store(tmp_path) as store:
            assert found(store, range(20)) == list(range(begin))
            for number in range(end):
                assert store.offer(digest_of(number), row_of(number))
        assert not store.offer(digest_of(90), row_of(90))
    with open_store(tmp_path) as store:
        assert found(store, range(20)) == list(range(15))
        assert features_size(store) == 15 * ROW_BYTES  # no row is written twice


def test_a_queued_row_can_be_read(tmp_path, stuck_disk):
    with open_store(tmp_path) as store:
        assert store.offer(digest_of(1), row_of(1))
        assert is_queued(store, 1) and found(store, [1, 2]) == [1] and store.num_rows == 0
        stuck_disk.released.set()
        wait_until(lambda: not is_queued(store, 1))
        assert found(store, [1]) == [1] and store.num_rows == 1


def test_a_row_on_its_way_from_the_gpu_is_waited_for(tmp_path):
    row, events = np.zeros(ROW_BYTES, dtype=np.uint8), []

    def arrive():
        events.append(threading.current_thread().name)
        row[:] = row_of(1)

    with open_store(tmp_path) as store:
        assert store.offer(digest_of(1), row, arrive)
        wait_until(lambda: not is_queued(store, 1))
        assert events == ["features"] and found(store, [1]) == [1]


@pytest.mark.parametrize("queue_rows", [3, 0.1])
def test_a_full_queue_makes_the_producer_wait_and_drops_nothing(
    tmp_path, stuck_disk, monkeypatch, caplog, queue_rows
):
    monkeypatch.setattr(store_module, "QUEUE_BYTES", int(queue_rows * ROW_BYTES))
    monkeypatch.setattr(store_module, "WRITE_BYTES", 1)
    monkeypatch.setattr(store_module, "_LONG_WAIT_S", 0.01)
    caplog.set_level("INFO")
    num_checks = 0

    def check():
        nonlocal num_checks
        num_checks += 1
        stuck_disk.released.set()

    ranks = SimpleNamespace(local_size=1, local_rank=0, check=check)
    with open_store(tmp_path, ranks=ranks) as store:
        monkeypatch.setattr(
            store._changed, "wait", lambda _, wait=store._changed.wait: wait(0.01)
        )
        for number in range(20):
            assert store.offer(digest_of(number), row_of(number))
            assert store.offer(digest_of(number), row_of(number))  # already in the queue
            assert len(store._queue) <= max(queue_rows, 1)
    assert num_checks > 0
    assert len(caplog.messages) == 1 and "slower than encoding" in caplog.text
    with open_store(tmp_path) as store:
        assert found(store, range(25)) == list(range(20))


def test_a_producer_that_waits_goes_on_when_writing_stops(tmp_path, stuck_disk, monkeypatch):
    monkeypatch.setattr(store_module, "QUEUE_BYTES", 1)
    with open_store(tmp_path) as store:
        assert store.offer(digest_of(0), row_of(0)) and stuck_disk.reached.wait(20)
        stopping = threading.Timer(0.05, store._stop, ["no more"])
        stopping.start()
        assert not store.offer(digest_of(1), row_of(1))
        stopping.join()
        stuck_disk.released.set()


def test_closing_does_not_wait_for_a_stuck_disk(tmp_path, stuck_disk):
    with open_store(tmp_path) as store:
        store.offer(digest_of(0), row_of(0))
        assert stuck_disk.reached.wait(20)
        store.close(timeout_s=0.01)
        assert "writing the last rows took more than 0.01 s" in store.stopped_because
        assert store._thread.is_alive() and not is_queued(store, 0)
        stuck_disk.released.set()
    assert not store._thread.is_alive()


def test_rows_of_another_store_are_found(tmp_path):
    with open_store(tmp_path) as one, open_store(tmp_path) as other:
        write(one, range(10))
        write(other, range(5, 15))
        write(one, range(10, 20))
        for store in (one, other):
            assert found(store, range(20)) == list(range(20))
            assert store.num_rows == 20
        assert features_size(one) == 20 * ROW_BYTES


def test_a_row_is_found_when_it_is_written_and_not_before(tmp_path, monkeypatch):
    pwrite, seen = os.pwrite, []

    def look(file, data, offset):
        monkeypatch.setattr(os, "pwrite", pwrite)
        with open_store(tmp_path) as other:
            write(other, [3])  # the file now extends beyond the offsets of the others
            seen.append(found(other, range(4)))
        return pwrite(file, data, offset)

    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "pwrite", look)
        offer_at_once(store, [0, 1, 2])
        wait_until(lambda: not is_queued(store, 0))
        assert seen == [[3]]
        assert found(store, range(4)) == [0, 1, 2, 3]


def test_reserving_row_numbers_excludes_other_processes(tmp_path):
    seen = []

    def look(statement):
        if statement.startswith("UPDATE counter"):  # between reading and updating the counter
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                seen.append(str(error))

    with open_store(tmp_path) as store:
        other = sqlite3.connect(
            store.folder / "index.sqlite", timeout=0, check_same_thread=False
        )
        store._writer.set_trace_callback(look)
        write(store, [0])
        other.close()
    assert seen == ["database is locked"]


def test_the_files_are_opened_by_one_process_at_a_time(tmp_path, monkeypatch):
    def is_locked():
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(folder)
        return False

    seen, open_database = [], store_module.open_database
    monkeypatch.setattr(
        store_module,
        "open_database",
        lambda *args, **kwargs: [seen.append(is_locked()), open_database(*args, **kwargs)][1],
    )
    with open_store(tmp_path):
        assert seen == [True, True] and not is_locked()


def test_an_unused_row_number_is_used_for_the_next_row(tmp_path, monkeypatch):
    fdatasync = os.fdatasync

    def be_overtaken(file):
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        with open_store(tmp_path) as faster:
            write(faster, [1, 2])
        fdatasync(file)

    with open_store(tmp_path) as store:
        monkeypatch.setattr(os, "fdatasync", be_overtaken)
        offer_at_once(store, [1, 2])
        wait_until(lambda: not is_queued(store, 2))
        assert sorted(row_number(store, n) for n in (1, 2)) == [2, 3]
        write(store, [3])
        write(store, [4])
        write(store, [5])
        assert [row_number(store, n) for n in (3, 4, 5)] == [0, 1, 4]
        assert found(store, range(9)) == [1, 2, 3, 4, 5]


def test_processes_write_into_one_folder_at_once(tmp_path):
    with writing(tmp_path, 0, 300) as one, writing(tmp_path, 150, 450) as other:
        with open_store(tmp_path) as store:
            assert one.stdout.readline() == other.stdout.readline() == b"ready\n"
            for number in (440, 150, 10):  # the ends of both, and what both write
                store.offer(digest_of(number), row_of(number))
            while one.poll() is None or other.poll() is None:
                found(store, range(450))  # every row that is there is right
            assert one.returncode == other.returncode == 0
            assert found(store, range(460)) == list(range(450))
            rows = [row_number(store, number) for number in range(450)]
            assert len(set(rows)) == store.num_rows == 450  # no duplicates


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_leaves_only_right_rows(tmp_path, moment):
    per_row = moment in ("reserved, nothing written", "half a row written", "while making entries")
    with writing(tmp_path, 0, 100, moment, 21 if per_row else 4) as process:
        process.stdout.read()
        assert process.wait() == -9
    with open_store(tmp_path) as store:
        held = found(store, range(100))
        assert 0 < len(held) < 100  # some of the batches
        write(store, range(100))
        assert found(store, range(100)) == list(range(100))
        assert store.num_rows == 100


@pytest.mark.parametrize("num_lines", [40, 700])
def test_a_kill_from_outside_leaves_only_right_rows(tmp_path, num_lines):
    with writing(tmp_path, 0, 2000) as process:
        for _ in range(num_lines):
            process.stdout.readline()
        process.kill()
    with open_store(tmp_path) as store:
        held = found(store, range(2000))
        write(store, range(1980, 2050))
        assert found(store, range(2050)) == sorted({*held, *range(1980, 2050)})


def test_partial_reads_and_writes_are_completed(tmp_path, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:999], at))
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:777]], at))
    with open_store(tmp_path) as store:
        write(store, range(5))
        assert found(store, range(6)) == [0, 1, 2, 3, 4]


def test_a_full_disk_stops_writing_and_nothing_else(tmp_path, monkeypatch):
    pwrite, left_bytes = os.pwrite, 5 * ROW_BYTES // 2

    def small_disk(file, data, offset):
        nonlocal left_bytes
        if left_bytes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = pwrite(file, data[:left_bytes], offset)
        left_bytes -= count
        return count

    monkeypatch.setattr(os, "pwrite", small_disk)
    with open_store(tmp_path) as store:
        write(store, [0])
        write(store, [1])
        write(store, [2])
        wait_until(lambda: store.stopped_because is not None)
        assert "No space left on device" in store.stopped_because
        assert not store.offer(digest_of(3), row_of(3))
        assert found(store, range(5)) == [0, 1]
        assert store.num_rows == 2
    monkeypatch.undo()
    with open_store(tmp_path) as store:
        write(store, [2, 3])
        assert found(store, range(5)) == [0, 1, 2, 3]


def test_an_index_that_fails_stops_writing_and_nothing_else(tmp_path):
    with open_store(tmp_path) as store:
        write(store, [0])
        index = sqlite3.connect(store.folder / "index.sqlite")
        index.execute("DROP TABLE counter")
        index.close()
        write(store, [1])
        wait_until(lambda: store.stopped_because is not None)
        assert "no such table: counter" in store.stopped_because
        assert found(store, range(3)) == [0]


def test_an_index_that_cannot_be_read_has_no_rows(tmp_path):
    with open_store(tmp_path) as store:
        write(store, [0])
        store._reader.execute("DROP TABLE rows")
        assert digest_of(0) not in store and found(store, [0, 1]) == []
        assert store.num_rows == 0
        assert "the index cannot be read: no such table: rows" in store.stopped_because
        assert not store.offer(digest_of(1), row_of(1))


def test_the_limit_counts_all_keys(tmp_path):
    with open_store(tmp_path, encoder="b") as store:
        write(store, range(6))
    with open_store(tmp_path, limit_bytes=10 * ROW_BYTES + 1) as store:
        for number in range(20):
            store.offer(digest_of(number), row_of(number))
        wait_until(lambda: store.stopped_because is not None)
        assert "has reached its limit of 0.0 GB" in store.stopped_because
        assert not store.offer(digest_of(20), row_of(20))
        assert found(store, range(20)) == [0, 1, 2, 3]
        assert not is_queued(store, 9)
    with open_store(tmp_path, limit_bytes=7 * ROW_BYTES) as store:  # 10 rows are there already
        offer_at_once(store, range(4, 20))
        wait_until(lambda: store.stopped_because is not None)
        assert store.num_rows == 4


@pytest.mark.parametrize("disk_gib, free_gib", [(10, 1), (500, 10)])
def test_some_of_the_disk_is_left_free(tmp_path, monkeypatch, disk_gib, free_gib):
    disk = SimpleNamespace(total=disk_gib * 2**30, free=free_gib * 2**30 + 4 * 4096)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
    with open_store(tmp_path) as store:  # 3 rows fit in 4 blocks
        offer_at_once(store, range(5))
        wait_until(lambda: store.stopped_because is not None)
        assert f"the disk has no more than {free_gib * 2**30 / 1e9:.1f} GB" in store.stopped_because
        assert found(store, range(5)) == [0, 1, 2]


def test_the_key_is_the_hash_of_the_description(tmp_path):
    text = '{"crop":null,"encoder":"a","row_bytes":8}'
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    for description in ({"encoder": "a", "crop": None}, {"crop": None, "encoder": "a"}):
        store = FeatureStore(tmp_path, description, row_bytes=8, limit_bytes=10**6)
        with closing(store):
            assert store.folder == tmp_path / key
    with open_store(tmp_path, encoder="a") as a, open_store(tmp_path, encoder="b") as b:
        write(a, range(3))
        assert a.folder != b.folder and found(b, range(3)) == []
    store = FeatureStore(tmp_path, {"encoder": "a"}, row_bytes=8, limit_bytes=10**6)
    with closing(store):
        assert store.num_rows == 0


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe{", b"[1]", b'{"encoder": "b", "row_bytes": 5000}']
)
def test_a_folder_with_another_description_is_refused(tmp_path, text):
    with open_store(tmp_path) as store:
        write(store, [0])
    (store.folder / "about.json").write_bytes(text)
    with pytest.raises(FeatureStoreError, match="Remove the folder .* only a cache") as caught:
        open_store(tmp_path)
    assert str(store.folder) in str(caught.value)


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGE = {
    "garbage": lambda index, features: overwrite(index, 0, bytes(range(256)) * 64),
    "garbage inside": lambda index, features: overwrite(index, 4096, b"\x5a" * 8192),
    "a cut index": lambda index, features: os.truncate(index, 4096),
    "an empty index": lambda index, features: os.truncate(index, 0),
    "no index": lambda index, features: index.unlink(),
    "no features": lambda index, features: features.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_starts_empty(tmp_path, damage):
    with open_store(tmp_path) as store:
        write(store, range(300))
    DAMAGE[damage](store.folder / "index.sqlite", store.folder / "features.bin")
    with open_store(tmp_path) as store:
        assert store.num_rows == 0 and found(store, range(300)) == []
        write(store, range(50, 60))
        assert found(store, range(300)) == list(range(50, 60))


@pytest.mark.parametrize("damage", ["an empty index", "no index", "no features"])
def test_a_store_with_the_old_files_open_continues_to_use_them(tmp_path, damage):
    with open_store(tmp_path) as old:
        write(old, range(10))
        DAMAGE[damage](old.folder / "index.sqlite", old.folder / "features.bin")
        with open_store(tmp_path) as new:
            write(new, range(5, 30))
            assert found(old, range(40)) == list(range(10))
            write(old, range(30, 35))
            assert found(old, range(40)) == [*range(10), *range(30, 35)]
            assert found(new, range(40)) == list(range(5, 30))
    with open_store(tmp_path) as store:
        assert found(store, range(40)) == list(range(5, 30))


def test_rows_of_a_truncated_file_are_not_found_and_can_be_written_again(tmp_path):
    with open_store(tmp_path) as store:
        write(store, range(10))
        os.truncate(store.folder / "features.bin", 4 * ROW_BYTES + 17)
        kept = found(store, range(10))
        assert len(kept) == store.num_rows == 4
        assert store.num_damaged == 0
        write(store, [20])  # the file grows beyond the offsets of the others
        assert found(store, range(30)) == [*kept, 20]
        write(store, range(10))
        assert found(store, range(30)) == [*range(10), 20]


def test_a_row_is_verified_even_if_the_file_is_truncated_during_the_read(tmp_path, monkeypatch):
    with open_store(tmp_path) as store:
        write(store, range(3))
        os.truncate(store.folder / "features.bin", 2 * ROW_BYTES)
        monkeypatch.setattr(store, "_is_in_file", lambda number: True)
        content = np.zeros(ROW_BYTES, dtype=np.uint8)
        assert [store.read(digest_of(n), content) for n in range(3)] == [True, True, False]


# --- damaged rows ---------------------------------------------------------------------------


def flip(places, bit):
    def wrong(row, rows):
        row[places] ^= bit

    return wrong


def zero_a_sector(row, rows):
    row[512:1024] = 0


def swap_two_numbers(row, rows):
    row[:16] = np.roll(row[:16], 8)


def swap_two_rows(row, rows):
    rows[[3, 4]] = rows[[4, 3]]


def stick_a_bit(row, rows):
    row[7::8] |= 0x80


WRONG = {
    "a bit": flip(4321, 0x10),
    "the last bit": flip(-1, 0x80),
    "two bits that cancel in the sum of a page": flip([7, 15], 0x80),
    "zeros": lambda row, rows: row.fill(0),
    "ones": lambda row, rows: row.fill(0xFF),
    "a sector of zeros": zero_a_sector,
    "two numbers swapped": swap_two_numbers,
    "a neighbour's row": lambda row, rows: np.copyto(row, rows[4]),
    "two rows swapped": swap_two_rows,
    "a stuck bit": stick_a_bit,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_row_is_removed_counted_and_can_be_written_again(tmp_path, wrong):
    with open_store(tmp_path) as store:
        for number in range(6):
            write(store, [number])  # in this order
        rows = np.memmap(store.folder / "features.bin", np.uint8, "r+").reshape(6, ROW_BYTES)
        WRONG[wrong](rows[3], rows)
        rows.flush()
        damaged = [3, 4] if wrong == "two rows swapped" else [3]
        content = np.zeros(ROW_BYTES, dtype=np.uint8)
        with open_store(tmp_path) as other:
            for _ in range(2):
                seen = [number for number in range(6) if store.read(digest_of(number), content)]
                assert seen == [number for number in range(6) if number not in damaged]
            assert store.num_damaged == len(damaged) and store.stopped_because is None
            assert found(other, range(6)) == seen and other.num_damaged == 0
            write(other, damaged)
            assert found(store, range(6)) == found(other, range(6)) == list(range(6))
    with open_store(tmp_path) as store:
        assert found(store, range(6)) == list(range(6))


def test_any_wrong_byte_changes_the_checksum():
    rng = np.random.default_rng(0)
    for num_bytes in (8, 16, 4096, 4104, 5000, 3 * 4096 + 16):
        row = rng.integers(0, 256, num_bytes, dtype=np.uint8)
        digest = digest_of(0)
        expected = store_module._checksum(digest, row)
        assert len(expected) == 16
        assert store_module._checksum(digest, row.copy()) == expected
        assert store_module._checksum(digest_of(1), row) != expected
        for place in range(0, num_bytes, 1 + num_bytes // 500):
            wrong = row.copy()
            wrong[place] ^= 1 << int(rng.integers(8))
            assert store_module._checksum(digest, wrong) != expected


def test_a_damaged_row_that_cannot_be_removed_still_counts_as_missing(tmp_path):
    with open_store(tmp_path) as store:
        write(store, range(2))
        overwrite(store.folder / "features.bin", 0, bytes(2 * ROW_BYTES))
        store._reader.execute("PRAGMA query_only = ON")
        content = np.zeros(ROW_BYTES, dtype=np.uint8)
        assert not store.read(digest_of(0), content)
        assert "a damaged row cannot be removed from the index" in store.stopped_because


def test_rows_of_a_store_without_checksums_are_not_trusted(tmp_path):
    """As an earlier version wrote them; their space is used again."""
    with open_store(tmp_path) as store:
        pass
    (store.folder / "features.bin").write_bytes(row_of(0).tobytes())
    (store.folder / "index.sqlite").unlink()
    index = sqlite3.connect(store.folder / "index.sqlite")
    with index:
        index.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE)")
        index.execute("CREATE TABLE counter (next_number INTEGER NOT NULL)")
        index.execute("INSERT INTO rows VALUES (0, ?)", (digest_of(0),))
        index.execute("INSERT INTO counter VALUES (1)")
    index.close()
    with open_store(tmp_path) as store:
        assert found(store, range(3)) == [] and features_size(store) == 0
        write(store, range(3))
        assert found(store, range(3)) == [0, 1, 2]


def test_an_unusable_folder_is_an_error_with_a_reason(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FeatureStoreError, match="file/.* cannot be kept here: .*Not a directory"):
        open_store(tmp_path / "file")
    with pytest.raises(FeatureStoreError, match="file: .* cannot be kept here: .*exists"):
        read_rate(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error_with_a_reason(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FeatureStoreError, match="Permission denied"):
        open_store(tmp_path)
    with pytest.raises(FeatureStoreError, match="Permission denied"):
        read_rate(tmp_path)


def test_measuring_a_disk_leaves_no_file(tmp_path, monkeypatch):
    assert read_rate(tmp_path / "new", num_bytes=2**20 + 5) > 0
    monkeypatch.setattr(os, "preadv", lambda *_: os.stat("/no/such/file"))
    with pytest.raises(FeatureStoreError, match="No such file"):
        read_rate(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
