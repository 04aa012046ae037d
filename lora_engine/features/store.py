"""Features of images on disk: one row of bytes per image, kept between epochs and between runs.

    <cache_dir>/<key>/features.bin    rows back to back
    <cache_dir>/<key>/index.sqlite    digest of an image -> number and checksum of its row
    <cache_dir>/<key>/about.json      description of the encoder; the key is its hash

A thread writes, so callers never wait for the disk. It reserves row numbers, writes the rows, and
only then adds them to the index. A process that is killed leaves at worst unused space in the file,
and processes that write at the same time never write to the same place.
"""

import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.data.image_identity import content_digest
from lora_engine.data.shared_database import folder_lock, is_current, open_database, remove_database
from lora_engine.files import replaced_file

QUEUE_BYTES = 256 * 2**20  # of rows that wait to be written; further ones are dropped
WRITE_BYTES = 64 * 2**20  # of rows that are written and indexed together
MIN_FREE_BYTES = 2**30  # left free on the disk, or 2 % of the disk if that is more

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, checksum BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS counter (next_number INTEGER NOT NULL);
INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT * FROM counter);
"""
_VERSION = 1  # version 0 had no checksums, so damaged rows could not be detected
_PAGE = 512  # numbers of 8 bytes each


class FeatureStoreError(RuntimeError):
    """A folder in which features cannot be kept."""


class FeatureStore:
    """The features of one encoder: `read` existing rows, and `offer` new ones.

    description: everything that the features depend on, as JSON; its hash is the key.
    limit_bytes: for all keys in `cache_dir` together, not counting what other processes are
    writing at the moment. 1 GiB of the disk, or 2 % of it if that is more, is always left free.

    A damaged row counts as missing; `num_damaged` counts them. After a failed write nothing more is
    written, and `stopped_because` gives the reason in one sentence; reading continues. Any number
    of processes on one machine may use a folder. Raises FeatureStoreError.
    """

    def __init__(
        self, cache_dir: Path, description: dict[str, Any], *, row_bytes: int, limit_bytes: int
    ) -> None:
        self.cache_dir = cache_dir
        self.row_bytes = row_bytes
        self.limit_bytes = limit_bytes
        description = {**description, "row_bytes": row_bytes}
        self.folder = cache_dir / _key(description)
        self.stopped_because: str | None = None
        self.num_damaged = 0
        self._closing = False
        self._queue: dict[bytes, np.ndarray] = {}  # in order; rows leave it once they are indexed
        self._changed = threading.Condition()  # guards _queue, _closing and stopped_because
        self._unused: list[int] = []  # reserved row numbers without a row
        try:
            self._open(description)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(self.folder, error) from error
        self._thread = threading.Thread(target=self._write_queue, name="features", daemon=True)
        self._thread.start()

    def _open(self, description: dict[str, Any]) -> None:
        if not hasattr(os, "preadv"):
            raise OSError("this operating system has no preadv and pwrite")
        index, features = self.folder / "index.sqlite", self.folder / "features.bin"
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.cache_dir):
            _check_description(self.folder / "about.json", description)
            # Replace both files or neither: an index that does not belong to the rows would give
            # wrong rows. A process that has the old files open continues to use them.
            if not (features.exists() and is_current(index, version=_VERSION)):
                features.unlink(missing_ok=True)
                remove_database(index)
            self._reader = open_database(index, _SCHEMA, version=_VERSION)
            self._writer = open_database(index, _SCHEMA, version=_VERSION)
            self._file = os.open(features, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def num_rows(self) -> int:
        """The number of rows in the store, including those of other processes."""
        counted = self._ask("SELECT count(*) FROM rows WHERE number < ?", self._rows_in_file())
        return counted[0] if counted else 0

    def num_free_rows(self) -> int:
        """How many more rows may be written now."""
        return max(0, self._free_rows()[0])

    def __contains__(self, digest: bytes) -> bool:
        found = self._ask("SELECT number FROM rows WHERE digest = ?", digest)
        # The file may have been truncated.
        return found is not None and found[0] < self._rows_in_file()

    def read(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy an image's row into `out`, uint8 (row_bytes,) -> whether it exists and is intact.

        A damaged row is removed from the index, so that it can be offered again.
        """
        found = self._ask("SELECT number, checksum FROM rows WHERE digest = ?", digest)
        if found is None or found[0] >= self._rows_in_file():
            return False
        number, expected = found
        if self._read_bytes(number * self.row_bytes, out) and _checksum(digest, out) == expected:
            return True
        self.num_damaged += 1
        self._forget(number)
        return False

    def _read_bytes(self, offset: int, out: np.ndarray) -> bool:
        # A memory map is no faster, and kills the process (SIGBUS) if the file is truncated in the
        # meantime or the disk fails.
        rest = out.data
        while rest:
            try:
                count = os.preadv(self._file, [rest], offset)
            except OSError:
                return False
            if count == 0:
                return False
            rest, offset = rest[count:], offset + count
        return True

    def _forget(self, number: int) -> None:
        """Remove a row from the index; its space in the file stays unused."""
        try:
            self._reader.execute("DELETE FROM rows WHERE number = ?", (number,))
        except sqlite3.Error as error:
            self._stop(f"a damaged row cannot be removed from the index: {error}")

    def pending(self, digest: bytes) -> np.ndarray | None:
        """A row that has been offered and is not in the index yet, if there is one."""
        with self._changed:
            return self._queue.get(digest)

    def offer(self, digest: bytes, row: np.ndarray) -> bool:
        """Queue a row, uint8 (row_bytes,), for writing; it must not change from now on.

        Never waits. Returns False if the row is dropped: the queue is full, or writing has stopped.
        """
        assert row.dtype == np.uint8 and row.shape == (self.row_bytes,) and row.flags.c_contiguous
        with self._changed:
            if self._closing or self.stopped_because is not None:
                return False
            if digest not in self._queue:
                if len(self._queue) >= max(1, QUEUE_BYTES // self.row_bytes):
                    return False
                self._queue[digest] = row
                self._changed.notify()
            return True

    def close(self, timeout_s: float = 30.0) -> None:
        """Write the queue, as far as that is possible in time, and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._stop(f"writing the last rows took more than {timeout_s:g} s")
            return  # the thread still uses the files; it ends with the process at the latest
        self._reader.close()
        self._writer.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _ask(self, query: str, value: bytes | int) -> tuple[Any, ...] | None:
        """The first row of the query's result; None without one, or if the index is unreadable."""
        try:
            return self._reader.execute(query, (value,)).fetchone()
        except sqlite3.Error as error:
            self._stop(f"the index cannot be read: {error}")
            return None

    def _rows_in_file(self) -> int:
        return os.fstat(self._file).st_size // self.row_bytes

    def _stop(self, reason: object) -> None:
        with self._changed:
            if self.stopped_because is None:
                self.stopped_because = f"{self.folder}: no more features are kept: {reason}"
            self._queue.clear()
            self._changed.notify()

    # --- the writing thread -----------------------------------------------------------------

    def _write_queue(self) -> None:
        try:
            while batch := self._next_batch():
                self._write(batch)
                with self._changed:
                    for digest in batch:
                        self._queue.pop(digest, None)
        except Exception as error:  # whatever it is, training must not fail
            self._stop(error)

    def _next_batch(self) -> dict[bytes, np.ndarray]:
        with self._changed:
            while not (self._queue or self._closing or self.stopped_because is not None):
                self._changed.wait()
            return dict(islice(self._queue.items(), max(1, WRITE_BYTES // self.row_bytes)))

    def _write(self, batch: dict[bytes, np.ndarray]) -> None:
        with self._writer as index:
            index.execute("BEGIN IMMEDIATE")
            # Rows of a truncated file would come back as zeros when it grows again.
            index.execute("DELETE FROM rows WHERE number >= ?", (self._rows_in_file(),))
            query = "SELECT * FROM rows WHERE digest = ?"
            new = [digest for digest in batch if not index.execute(query, (digest,)).fetchone()]
            num_fitting, what_is_full = self._free_rows()
            fitting = new[: max(0, num_fitting)]
            numbers = self._reserve(index, len(fitting))
        entries = [
            (number, digest, _checksum(digest, batch[digest]))
            for number, digest in zip(numbers, fitting, strict=True)
        ]
        for number, digest, _ in entries:
            rest, offset = batch[digest].data, number * self.row_bytes
            while rest:
                count = os.pwrite(self._file, rest, offset)
                rest, offset = rest[count:], offset + count
        getattr(os, "fdatasync", os.fsync)(self._file)  # macOS has no fdatasync
        with self._writer as index:
            index.execute("BEGIN IMMEDIATE")
            query = "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING"
            for entry in entries:
                if index.execute(query, entry).rowcount == 0:
                    self._unused.append(entry[0])  # another process has written this image's row
        if len(fitting) < len(new):
            raise FeatureStoreError(what_is_full)

    def _reserve(self, index: sqlite3.Connection, count: int) -> list[int]:
        """Reserve row numbers for this process, within a transaction."""
        numbers, self._unused = self._unused[:count], self._unused[count:]
        (begin,) = index.execute("SELECT next_number FROM counter").fetchone()
        end = begin + count - len(numbers)
        index.execute("UPDATE counter SET next_number = ?", (end,))
        return [*numbers, *range(begin, end)]

    def _free_rows(self) -> tuple[int, str]:
        """How many more rows may be written, and which limit is reached then."""
        files = self.cache_dir.glob("*/features.bin")
        kept_bytes = sum(path.stat().st_size for path in files if path.exists())
        disk = os.statvfs(self.cache_dir)
        left_bytes = max(MIN_FREE_BYTES, disk.f_blocks * disk.f_frsize // 50)
        full_cache = f"{self.cache_dir} has reached its limit of {self.limit_bytes / 1e9:.1f} GB"
        full_disk = f"the disk has no more than {left_bytes / 1e9:.1f} GB left"
        return min(
            ((self.limit_bytes - kept_bytes) // self.row_bytes, full_cache),
            ((disk.f_bavail * disk.f_frsize - left_bytes) // self.row_bytes, full_disk),
        )


def cache_folder(given: str | None) -> Path | None:
    """The given folder, by default $XDG_CACHE_HOME/lora_engine or ~/.cache/lora_engine.

    None for a user without a home folder, if none is given.
    """
    if given is not None:
        return Path(given)
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # expanduser keeps the "~" if HOME is not set and the user is not in the password database.
    return None if parent.startswith("~") else Path(parent, "lora_engine")


def read_rate(cache_dir: Path, *, num_bytes: int = 32 * 2**20) -> float:
    """Bytes per second at which this disk reads rows that the page cache does not hold.

    Raises FeatureStoreError if the folder cannot be written to.
    """
    buffer = bytearray(2**20)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir) as file:
            file.write(os.urandom(num_bytes))  # noise, which no file system can compress
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # otherwise this measures the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin_s = time.perf_counter()
            # Backwards, because read-ahead does not help with rows in random order either.
            for offset in reversed(range(0, num_bytes, len(buffer))):
                os.preadv(file.fileno(), [buffer], offset)
            return num_bytes / (time.perf_counter() - begin_s)
    except OSError as error:
        raise _unusable(cache_dir, error) from error


def _unusable(folder: Path, error: Exception) -> FeatureStoreError:
    return FeatureStoreError(
        f"{folder}: features cannot be kept here: {error}. Choose another cache folder on a local "
        "disk, or use none"
    )


def _checksum(digest: bytes, row: np.ndarray) -> bytes:
    """The checksum, 16 bytes, of an image's row, uint8 (row_bytes,).

    It is the BLAKE2b of the image's digest and of sums modulo 2**64: of each page of 4 KiB, and of
    the 8-byte numbers at each position over all pages. A wrong byte changes two sums; swapped
    numbers or pages change two or more. It takes a third of the time of CRC-32 (0.3 ms for BLIP's
    1.8 MB).
    """
    numbers = row.view(np.uint64)
    pages = numbers[: len(numbers) // _PAGE * _PAGE].reshape(-1, _PAGE)
    parts = pages.sum(axis=0), pages.sum(axis=1), numbers[pages.size :]
    return content_digest(digest + np.concatenate(parts).tobytes())


def _key(description: dict[str, Any]) -> str:
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _check_description(path: Path, description: dict[str, Any]) -> None:
    expected = json.dumps(description, sort_keys=True, indent=2) + "\n"
    if not path.exists():
        with replaced_file(path) as new:
            new.write_text(expected, encoding="utf-8")
    received = path.read_text(encoding="utf-8", errors="replace")
    if received != expected:
        raise FeatureStoreError(
            f"{path} describes other features: got {received!r}, expected {expected!r}. Remove the "
            f"folder {path.parent}, which is only a cache"
        )
