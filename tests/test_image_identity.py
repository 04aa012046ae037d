"""A digest is recalled for the very file that was read, and for no other."""

import hashlib
import os
import sqlite3
import time

import pytest

from lora_engine import image_identity
from lora_engine.image_identity import FileStamp, Identities, content_digest, stamp

ONE, OTHER = content_digest(b"one"), content_digest(b"other")


def write_file(path, data=b"one", *, age_s=10.0):
    """A file last changed this long ago -> its stamp."""
    with open(path, "wb") as file:
        file.write(data)
    mtime_ns = time.time_ns() - int(age_s * 1e9)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return stamp(path)


@pytest.fixture(params=["on disk", "in memory"])
def identities(request, tmp_path):
    with Identities(tmp_path / "cache" if request.param == "on disk" else None) as identities:
        yield identities


def test_a_digest_is_16_bytes_of_blake2b():
    assert content_digest(b"abc") == hashlib.blake2b(b"abc", digest_size=16).digest()
    assert len(ONE) == 16 and ONE != OTHER


def test_a_stamp_is_size_and_time(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    assert stamp(path) == stamp(str(path)) == FileStamp(5, 1_600_000_000_123_456_789)


@pytest.mark.parametrize("name", ["missing.jpg", "nul\0.jpg", "half of a pair \ud800.jpg"])
def test_what_cannot_be_looked_at_has_no_stamp(tmp_path, name):
    assert stamp(tmp_path / name) is None


def test_a_file_that_just_changed_has_no_stamp(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.touch()
    mtime_ns = path.stat().st_mtime_ns
    for age_ns in (-(10**9), 0, 2 * 10**9 - 1):
        monkeypatch.setattr(time, "time_ns", lambda: mtime_ns + age_ns)
        assert stamp(path) is None
    monkeypatch.setattr(time, "time_ns", lambda: mtime_ns + 2 * 10**9)
    assert stamp(path) == FileStamp(0, mtime_ns)


def test_a_digest_is_recalled_under_its_path_and_stamp_only(tmp_path, identities):
    path = tmp_path / "a.jpg"
    first = write_file(path)
    assert identities.recall(path, first) is None
    identities.remember(path, first, ONE)
    assert identities.recall(path, first) == ONE
    assert identities.recall(tmp_path / "b.jpg", first) is None
    assert identities.recall(path, first._replace(size=first.size + 1)) is None
    assert identities.recall(path, first._replace(mtime_ns=first.mtime_ns + 1)) is None


def test_a_changed_file_is_remembered_anew(tmp_path, identities):
    path = tmp_path / "a.jpg"
    first = write_file(path, b"one")
    identities.remember(path, first, ONE)
    second = write_file(path, b"other", age_s=5)
    assert identities.recall(path, second) is None
    identities.remember(path, second, OTHER)
    assert identities.recall(path, second) == OTHER
    assert identities.recall(path, first) is None


def test_the_next_run_recalls_it_from_any_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    first = write_file(path)
    with Identities(tmp_path / "cache") as identities:
        identities.remember(path, first, OTHER)
        identities.remember(path, first, ONE)
    monkeypatch.chdir(tmp_path)
    with Identities(tmp_path / "cache") as identities:
        assert identities.recall("a.jpg", first) == ONE
        assert identities.recall("./x/../a.jpg", first) == ONE
        second = write_file(path, b"other", age_s=5)
        assert identities.recall(path, second) is None
        identities.remember("a.jpg", second, OTHER)
    with Identities(tmp_path / "cache") as identities:
        assert identities.recall(path, second) == OTHER


@pytest.mark.parametrize("name", ["new\nline", "quote'\"", b"latin-1 \xe9.jpg", "日本 🖼.jpg", " "])
def test_unusual_names(tmp_path, name):
    path = os.path.join(tmp_path, os.fsdecode(name))
    first = write_file(path)
    for expected in (None, ONE):
        with Identities(tmp_path / "cache") as identities:
            assert identities.recall(path, first) == expected
            identities.remember(path, first, ONE)


def test_entries_are_kept_before_closing_and_seen_by_others(tmp_path, monkeypatch):
    first = write_file(tmp_path / "a.jpg")
    with Identities(tmp_path / "cache") as one, Identities(tmp_path / "cache") as other:
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
    with Identities(tmp_path / "cache") as identities:
        identities.remember(tmp_path / "a.jpg", first, ONE)
    database.write_bytes((b"garbage " * 20_000)[:size])
    for expected in (None, OTHER):
        with Identities(tmp_path / "cache") as identities:
            assert identities.recall(tmp_path / "a.jpg", first) == expected
            identities.remember(tmp_path / "a.jpg", first, OTHER)


def test_a_folder_that_cannot_be_used_leaves_the_memory(tmp_path):
    first = write_file(tmp_path / "file")
    with Identities(tmp_path / "file") as identities:
        identities.remember("/a.jpg", first, ONE)
        assert identities.recall("/a.jpg", first) == ONE
    assert (tmp_path / "file").read_bytes() == b"one"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_leaves_the_memory(tmp_path):
    first = write_file(tmp_path / "a.jpg")
    tmp_path.chmod(0o500)
    with Identities(tmp_path) as identities:
        identities.remember("/a.jpg", first, ONE)
        assert identities.recall("/a.jpg", first) == ONE


def test_a_database_that_fails_on_the_way_leaves_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_identity, "_COMMIT_EVERY_S", 0.0)
    first = write_file(tmp_path / "a.jpg")
    for drop_before_remember in (True, False):
        with Identities(tmp_path / "cache") as identities:
            if not drop_before_remember:
                identities.remember("/a.jpg", first, ONE)
            database = sqlite3.connect(tmp_path / "cache" / "identities.sqlite")
            database.execute("DROP TABLE files")
            database.close()
            assert drop_before_remember or identities.recall("/a.jpg", first) is None
            identities.remember("/a.jpg", first, ONE)
            assert identities.recall("/a.jpg", first) == ONE
            assert identities.recall("/b.jpg", first) is None
