"""Features of images on disk: one row of bytes an image, kept between epochs and between runs.

    <cache_dir>/<key>/features.bin    rows back to back
    <cache_dir>/<key>/index.sqlite    digest of an image -> number and checksum of its row
    <cache_dir>/<key>/about.json      what the features were made by; the key is its hash

Nobody waits for the disk: a thread writes. It reserves row numbers, writes the rows, and last makes
them valid by entries in the index. A kill at any moment leaves at worst places that no entry points
to, and processes that write at once never write to the same place.
"""

import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.data.image_identity import content_digest
from lora_engine.data.shared_database import folder_lock, is_current, open_database, remove_database
from lora_engine.files import replaced_file

QUEUE_BYTES = 256 * 2**20  # rows that wait for the disk; what comes on top is dropped
WRITE_BYTES = 64 * 2**20  # rows that become valid at once
MIN_FREE_BYTES = 2**30  # of the disk, or 2 % of it if that is more

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, checksum BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS counter (next_number INTEGER NOT NULL);
INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT * FROM counter);
"""
_VERSION = 1  # 0 had no checksums: nothing tells which of its rows are damaged
_PAGE = 512  # numbers of 8 bytes


class FeatureStoreError(RuntimeError):
    """A folder that cannot keep features."""


class FeatureStore:
    """The features of one encoder: `find` and `read` what is there, `offer` what is new.

    A damaged row is treated as missing; `num_damaged` counts them.

    description: all that the features depend on, as JSON; another description has another key.
    limit_bytes: for all keys in `cache_dir` together, but for what other processes are just
    writing. The last 1 GiB of the disk, or 2 % of it if that is more, is left free too.

    Where writing fails it stops for good: `stopped_because` says why in one sentence, and reading
    goes on. Any number of processes of one machine may use a folder. Raises FeatureStoreError.
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
        self._queue: dict[bytes, np.ndarray] = {}  # in order; a row leaves it when it is valid
        self._changed = threading.Condition()  # guards the queue and both reasons to stop
        self._unused: list[int] = []  # reserved row numbers that no entry points to
        try:
            self._open(description)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(self.folder, error) from error
        self._thread = threading.Thread(target=self._write_queue, name="features", daemon=True)
        self._thread.start()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, description: dict[str, Any]) -> None:
        if not hasattr(os, "preadv"):
            raise OSError("this operating system cannot read and write at a place of a file")
        index, features = self.folder / "index.sqlite", self.folder / "features.bin"
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.cache_dir):
            _check_description(self.folder / "about.json", description)
            # Both or none: a new one beside an old one would give wrong rows. A process that has
            # the old ones open goes on with them.
            if not (features.exists() and is_current(index, version=_VERSION)):
                features.unlink(missing_ok=True)
                remove_database(index)
            self._reader = open_database(index, _SCHEMA, version=_VERSION)
            self._writer = open_database(index, _SCHEMA, version=_VERSION)
            self._file = os.open(features, os.O_RDWR | os.O_CREAT, 0o666)

    @property
    def num_rows(self) -> int:
        """How many rows `find` would find, those of other processes among them."""
        counted = self._ask("SELECT count(*) FROM rows WHERE number < ?", [self._rows_in_file()])
        return counted[0][0] if counted else 0

    def room(self) -> int:
        """How many more rows may be written now."""
        return max(0, self._room()[0])

    def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """int64 row numbers (B,), -1 where there is no row. Ask `pending` before, not after."""
        found = self._ask("SELECT number FROM rows WHERE digest = ?", digests)
        end = self._rows_in_file()  # beyond it someone has cut the file
        rows = [hit[0] if hit is not None and hit[0] < end else -1 for hit in found]
        return np.array(rows or [-1] * len(digests), dtype=np.int64)

    def read(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy an image's row into `out`, uint8 (row_bytes,); return whether it is there and whole.

        A damaged row is removed from the index, so that it can be offered again.
        """
        found = self._ask("SELECT number, checksum FROM rows WHERE digest = ?", [digest])
        if not (found and found[0]) or found[0][0] >= self._rows_in_file():
            return False
        number, expected = found[0]
        if self._read_bytes(number * self.row_bytes, out) and _checksum(digest, out) == expected:
            return True
        self.num_damaged += 1
        self._forget(number)
        return False

    def _read_bytes(self, offset: int, out: np.ndarray) -> bool:
        # Not by a memory map: it is no faster, and where the file is cut meanwhile, or the disk
        # fails, it kills the process (SIGBUS).
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
        """Remove a row's entry; its place in the file stays unused."""
        try:
            self._reader.execute("DELETE FROM rows WHERE number = ?", (number,))
        except sqlite3.Error as error:
            self._stop(f"a damaged row cannot be removed from the index: {error}")

    def pending(self, digest: bytes) -> np.ndarray | None:
        """A row that was offered and is not in the index yet."""
        with self._changed:
            return self._queue.get(digest)

    def offer(self, digest: bytes, row: np.ndarray) -> bool:
        """Hand over a row, uint8 (row_bytes,), which nobody changes from now on; never waits.

        Returns False where it was dropped: too many wait already, or writing has stopped.
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
        """Write what waits, as far as that is done in time, and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._stop(f"writing the last rows took more than {timeout_s:g} s")
            return  # the thread still has the files; it ends with the process, if not before
        self._reader.close()
        self._writer.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _ask(self, query: str, values: Sequence[Any]) -> list[Any]:
        """The answer to the query for each value; none at all where the index is broken."""
        try:
            return [self._reader.execute(query, (value,)).fetchone() for value in values]
        except sqlite3.Error as error:
            self._stop(f"the index cannot be read: {error}")
            return []

    def _rows_in_file(self) -> int:
        return os.fstat(self._file).st_size // self.row_bytes

    def _stop(self, reason: object) -> None:
        with self._changed:
            if self.stopped_because is None:
                self.stopped_because = f"{self.folder}: no more features are kept: {reason}"
            self._queue.clear()
            self._changed.notify()

    # What follows runs in the thread.

    def _write_queue(self) -> None:
        try:
            while batch := self._next_batch():
                self._write(batch)
                with self._changed:
                    for digest in batch:
                        self._queue.pop(digest, None)
        except Exception as error:  # whatever it is, it must not cost the training
            self._stop(error)

    def _next_batch(self) -> dict[bytes, np.ndarray]:
        with self._changed:
            while not (self._queue or self._closing or self.stopped_because is not None):
                self._changed.wait()
            return dict(islice(self._queue.items(), max(1, WRITE_BYTES // self.row_bytes)))

    def _write(self, batch: dict[bytes, np.ndarray]) -> None:
        with self._writer as index:
            index.execute("BEGIN IMMEDIATE")
            # What was cut off would come back as zeros when the file grows again.
            index.execute("DELETE FROM rows WHERE number >= ?", (self._rows_in_file(),))
            query = "SELECT * FROM rows WHERE digest = ?"
            new = [digest for digest in batch if not index.execute(query, (digest,)).fetchone()]
            num_fitting, what_is_full = self._room()
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
                    self._unused.append(entry[0])  # another process was first
        if len(fitting) < len(new):
            raise FeatureStoreError(what_is_full)

    def _reserve(self, index: sqlite3.Connection, count: int) -> list[int]:
        """Row numbers for this process alone; within a transaction."""
        numbers, self._unused = self._unused[:count], self._unused[count:]
        (begin,) = index.execute("SELECT next_number FROM counter").fetchone()
        end = begin + count - len(numbers)
        index.execute("UPDATE counter SET next_number = ?", (end,))
        return [*numbers, *range(begin, end)]

    def _room(self) -> tuple[int, str]:
        """How many more rows may be written, and what is full then."""
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


def read_rate(cache_dir: Path, *, num_bytes: int = 32 * 2**20) -> float:
    """Bytes per second at which features come back from this disk when none is in memory.

    Raises FeatureStoreError if nothing can be written there.
    """
    buffer = bytearray(2**20)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir) as file:
            file.write(os.urandom(num_bytes))  # noise: no file system makes it smaller
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # elsewhere the rate is that of the memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin_s = time.perf_counter()
            # Backwards: rows are read in random order, where no read-ahead helps.
            for offset in reversed(range(0, num_bytes, len(buffer))):
                os.preadv(file.fileno(), [buffer], offset)
            return num_bytes / (time.perf_counter() - begin_s)
    except OSError as error:
        raise _unusable(cache_dir, error) from error


def _unusable(folder: Path, error: Exception) -> FeatureStoreError:
    return FeatureStoreError(
        f"{folder}: features cannot be kept here: {error}. Choose another cache folder, on a disk "
        "of this machine, or go on without one"
    )


def _checksum(digest: bytes, row: np.ndarray) -> bytes:
    """16 bytes that tell an image's row, uint8 (row_bytes,), from any other.

    They are the BLAKE2b of the image's digest and of sums modulo 2**64: of each page of 4 KiB, and
    of each number of 8 bytes over all pages. A wrong byte changes two sums; numbers or pages that
    have changed places change two or more. It takes a third of CRC-32's time (0.3 ms for BLIP's
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
            f"folder {path.parent}: it is only a cache"
        )
