"""A digest is recalled for exactly the file that was read."""

import hashlib
import os
import shutil
import sqlite3
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from lora_engine.data import image_identity
from lora_engine.data.image_identity import Identities, content_digest, stamp

ONE, OTHER = content_digest(b"one"), content_digest(b"other")


@pytest.fixture(autouse=True)
def _a_minute_later(monkeypatch):
    """Files of these tests are old enough to have a stamp."""
    set_clock(monkeypatch, time.time_ns() + 60 * 10**9)


def set_clock(monkeypatch, now_ns):
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)


def write_file(path, data=b"one"):
    """Write a file -> its stamp."""
    with open(path, "wb") as file:
        file.write(data)
    return stamp(path)


def let_the_clock_tick(path):
    """Until a change has another time than that of the file's last one."""
    before_ns, probe = path.stat().st_ctime_ns, path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > before_ns:
            return


def open_identities(folder):
    """A context that opens them and closes them at the end."""
    return closing(Identities(folder))


@pytest.fixture(params=["on disk", "in memory"])
def identities(request, tmp_path):
    with open_identities(tmp_path / "cache" if request.param == "on disk" else None) as identities:
        yield identities


def test_a_digest_is_16_bytes_of_blake2b():
    assert content_digest(b"abc") == hashlib.blake2b(b"abc", digest_size=16).digest()
    assert len(ONE) == 16 and ONE != OTHER


def test_a_stamp_is_16_bytes_and_stays_while_the_file_does(tmp_path):
    first = write_file(tmp_path / "a.jpg")
    assert len(first) == 16
    assert stamp(tmp_path / "a.jpg") == stamp(str(tmp_path / "a.jpg")) == first


def overwrite(path):
    path.write_bytes(b"two")


def copy_over(path):
    (path.parent / "new").write_bytes(b"two")
    shutil.copy2(path.parent / "new", path)


def rename_over(path):
    (path.parent / "new").write_bytes(b"two")
    (path.parent / "new").rename(path)


def link_over(path):
    (path.parent / "new").write_bytes(b"two")
    path.unlink()
    os.link(path.parent / "new", path)


@pytest.mark.parametrize("replace", [overwrite, copy_over, rename_over, link_over])
def test_a_replaced_file_of_the_same_size_and_modification_time_has_another_stamp(
    tmp_path, replace
):
    path = tmp_path / "a.jpg"
    first, before = write_file(path), path.stat()
    let_the_clock_tick(path)
    replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert stamp(path) not in (None, first)


@pytest.mark.parametrize("what", ["st_size", "st_ino", "st_mtime_ns", "st_ctime_ns"])
@pytest.mark.parametrize("value", [5, -(10**20), 2**64])
def test_each_part_counts_however_large_a_file_system_makes_it(
    tmp_path, identities, monkeypatch, what, value
):
    """Inodes of 64 bits, and times before 1677 or after 2262, do not fit sqlite's integers."""
    status = SimpleNamespace(st_size=3, st_ino=3, st_mtime_ns=3, st_ctime_ns=3)
    fake_os = SimpleNamespace(stat=lambda path: status, path=os.path, fsencode=os.fsencode)
    monkeypatch.setattr(image_identity, "os", fake_os)
    set_clock(monkeypatch, 2**65)
    first = stamp("a.jpg")
    setattr(status, what, value)
    assert stamp("a.jpg") != first
    identities.remember("a.jpg", stamp("a.jpg"), ONE)
    identities.close()
    assert identities.recall("a.jpg", first) is None


@pytest.mark.parametrize("name", ["missing.jpg", "nul\0.jpg", "half of a pair \ud800.jpg"])
def test_a_file_without_a_readable_status_has_no_stamp(tmp_path, name):
    assert stamp(tmp_path / name) is None


@pytest.mark.parametrize("what", ["content", "modification time"])
def test_a_file_that_just_changed_has_no_stamp(tmp_path, monkeypatch, what):
    path = tmp_path / "a.jpg"
    path.touch()
    later_ns = path.stat().st_ctime_ns
    if what == "modification time":  # which was set to long ago just now
        os.utime(path, ns=(0, 0))
        later_ns = path.stat().st_ctime_ns
    for age_ns in (-(10**9), 0, 2 * 10**9 - 1):
        set_clock(monkeypatch, later_ns + age_ns)
        assert stamp(path) is None
    set_clock(monkeypatch, later_ns + 2 * 10**9)
    assert stamp(path) is not None


def test_a_file_from_the_future_has_no_stamp(tmp_path):
    path = tmp_path / "a.jpg"
    path.touch()
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    assert stamp(path) is None


def test_a_digest_is_recalled_under_its_path_and_stamp_only(tmp_path, identities):
    path = tmp_path / "a.jpg"
    first = write_file(path)
    assert identities.recall(path, first) is None
    identities.remember(path, first, ONE)
    assert identities.recall(path, first) == ONE
    assert identities.recall(tmp_path / "b.jpg", first) is None
    assert identities.recall(path, bytes(16)) is None


def test_a_changed_file_is_remembered_again(tmp_path, identities):
    path = tmp_path / "a.jpg"
    first = write_file(path, b"one")
    identities.remember(path, first, ONE)
    second = write_file(path, b"other")
    assert identities.recall(path, second) is None
    identities.remember(path, second, OTHER)
    assert identities.recall(path, second) == OTHER
    assert identities.recall(path, first) is None


def test_the_next_run_recalls_it_from_any_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    first = write_file(path)
    with open_identities(tmp_path / "cache") as identities:
        identities.remember(path, first, OTHER)
        identities.remember(path, first, ONE)
    monkeypatch.chdir(tmp_path)
    with open_identities(tmp_path / "cache") as identities:
        assert identities.recall("a.jpg", first) == ONE
        assert identities.recall("./x/../a.jpg", first) == ONE
        second = write_file(path, b"other")
        assert identities.recall(path, second) is None
        identities.remember("a.jpg", second, OTHER)
    with open_identities(tmp_path / "cache") as identities:
        assert identities.recall(path, second) == OTHER


@pytest.mark.parametrize("name", ["new\nline", "quote'\"", b"latin-1 \xe9.jpg", "日本 🖼.jpg", " "])
def test_unusual_names(tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(name))
    first = write_file(path)
    for expected in (None, ONE):
        with open_identities(tmp_path / "cache") as identities:
            assert identities.recall(path, first) == expected
            identities.remember(path, first, ONE)


def test_entries_are_kept_before_closing_and_seen_by_others(tmp_path, monkeypatch):
    first = write_file(tmp_path / "a.jpg")
    with open_identities(tmp_path / "cache") as one, open_identities(tmp_path / "cache") as other:
        monkeypatch.setattr(image_identity, "_COMMIT_EVERY_S", 1e9)
        for number in range(255):
            one.remember(f"/{number}.jpg", first, ONE)
        assert other.recall("/0.jpg", first) is None
        one.remember("/255.jpg", first, ONE)
        assert all(other.recall(f"/{number}.jpg", first) == ONE for number in range(256))
        one.remember("/256.jpg", first, ONE)
        assert other.recall("/256.jpg", first) is None
        monkeypatch.setattr(image_identity, "_COMMIT_EVERY_S", 0.0)
        one.remember("/257.jpg", first, ONE)
        assert other.recall("/256.jpg", first) == other.recall("/257.jpg", first) == ONE


@pytest.mark.parametrize("size", [0, 50, 4096, 100_000])
def test_a_damaged_database_is_replaced(tmp_path, size):
    first = write_file(tmp_path / "a.jpg")
    database = tmp_path / "cache" / "identities.sqlite"
    with open_identities(tmp_path / "cache") as identities:
        identities.remember(tmp_path / "a.jpg", first, ONE)
    database.write_bytes((b"garbage " * 20_000)[:size])
    for expected in (None, OTHER):
        with open_identities(tmp_path / "cache") as identities:
            assert identities.recall(tmp_path / "a.jpg", first) == expected
            identities.remember(tmp_path / "a.jpg", first, OTHER)


def test_a_database_of_an_earlier_version_is_replaced(tmp_path):
    """Its stamps of size and modification time alone are not trusted."""
    (tmp_path / "cache").mkdir()
    database = sqlite3.connect(tmp_path / "cache" / "identities.sqlite")
    database.execute(
        "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, "
        "mtime_ns INTEGER NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID"
    )
    path = tmp_path / "a.jpg"
    first = write_file(path)
    entry = os.fsencode(path), 3, path.stat().st_mtime_ns, OTHER
    with database:
        database.execute("INSERT INTO files VALUES (?, ?, ?, ?)", entry)
    database.close()
    for expected in (None, ONE):
        with open_identities(tmp_path / "cache") as identities:
            assert identities.recall(path, first) == expected
            identities.remember(path, first, ONE)


def test_a_folder_that_cannot_be_used_leaves_the_entries_in_memory(tmp_path):
    first = write_file(tmp_path / "file")
    with open_identities(tmp_path / "file") as identities:
        identities.remember("/a.jpg", first, ONE)
        assert identities.recall("/a.jpg", first) == ONE
    assert (tmp_path / "file").read_bytes() == b"one"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_leaves_the_entries_in_memory(tmp_path):
    first = write_file(tmp_path / "a.jpg")
    tmp_path.chmod(0o500)
    with open_identities(tmp_path) as identities:
        identities.remember("/a.jpg", first, ONE)
        assert identities.recall("/a.jpg", first) == ONE


def test_a_database_that_fails_on_the_way_leaves_the_entries_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_identity, "_COMMIT_EVERY_S", 0.0)
    first = write_file(tmp_path / "a.jpg")
    for drop_before_remember in (True, False):
        with open_identities(tmp_path / "cache") as identities:
            if not drop_before_remember:
                identities.remember("/a.jpg", first, ONE)
            database = sqlite3.connect(tmp_path / "cache" / "identities.sqlite")
            database.execute("DROP TABLE files")
            database.close()
            assert drop_before_remember or identities.recall("/a.jpg", first) is None
            identities.remember("/a.jpg", first, ONE)
            assert identities.recall("/a.jpg", first) == ONE
            assert identities.recall("/b.jpg", first) is None
