"""Features of images on disk: one row of bytes per image, kept between epochs and between runs.

    <cache_dir>/<key>/features.bin    rows back to back
    <cache_dir>/<key>/index.sqlite    digest of an image -> number and checksum of its row
    <cache_dir>/<key>/about.json      description of the encoder; the key is its hash

A thread writes, so callers wait for the disk only when its queue is full. It reserves row numbers,
writes the rows, and only then adds them to the index. A process that is killed leaves at worst
unused space in the file, and processes that write at the same time never write to the same place.

SQLite does not work on network file systems. There each process appends to a segment of its own,
and the index is local to each machine: it is made from the segments' lists of entries.

    <cache_dir>/<key>/segments/<host>-<pid>-<random>.rows     rows back to back
    <cache_dir>/<key>/segments/<host>-<pid>-<random>.index    digest and checksum of each row; zeros
                                                              for a row that was found damaged
    <index_folder>/<key>.sqlite                               digest -> number and checksum
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_engine.data.image_identity import content_digest
from lora_engine.data.shared_database import folder_lock, is_current, open_database, remove_database
from lora_engine.files import replaced_file
from lora_engine.ranks import OneProcess, Ranks

logger = logging.getLogger(__name__)

QUEUE_BYTES = 256 * 2**20  # of rows that wait to be written, in all processes of the machine
WRITE_BYTES = 64 * 2**20  # of rows that are written and indexed together
MIN_FREE_BYTES = 2**30  # left free on the disk, or 2 % of the disk if that is more

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, checksum BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS counter (next_number INTEGER NOT NULL);
INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT * FROM counter);
CREATE TABLE IF NOT EXISTS claims (digest BLOB PRIMARY KEY, launch TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, num_entries INTEGER NOT NULL DEFAULT 0
);
"""
_VERSION = 1  # version 0 had no checksums, so damaged rows could not be detected
_PAGE = 512  # numbers of 8 bytes each
_SEGMENT = 2**32  # row n of segment s has number s * _SEGMENT + n; features.bin is segment 0
_ENTRY = struct.Struct("16s16s")  # of a segment's index: digest and checksum
_IMPORT_EVERY_S = 5.0  # what other machines have written
_LONG_WAIT_S = 5.0  # for the disk, in all: worth a line in the log


class FeatureStoreError(RuntimeError):
    """A folder in which features cannot be kept."""


class _Queued(NamedTuple):
    """A row that waits to be written; `arrive` waits until it has come from the GPU."""

    row: np.ndarray
    arrive: Callable[[], object] | None

    def arrived(self) -> np.ndarray:
        if self.arrive is not None:
            self.arrive()
        return self.row


class FeatureStore:
    """The features of one encoder: `read` existing rows, and `offer` new ones.

    description: everything that the features depend on, as JSON; its hash is the key.
    limit_bytes: for all keys in `cache_dir` together, not counting what other processes are
    writing at the moment. 1 GiB of the disk, or 2 % of it if that is more, is always left free.
    ranks: among those of one machine, the process that `claim`s an image encodes it.
    index_folder: for a `cache_dir` on a network file system, a folder of this machine that the
    processes of this launch share.

    A damaged row counts as missing; `num_damaged` counts them. After a failed write nothing more is
    written, and `stopped_because` gives the reason in one sentence; reading continues. Any number
    of processes on one machine may use a folder, and any number of machines with an
    `index_folder`. Any thread may read. Raises FeatureStoreError.
    """

    def __init__(
        self,
        cache_dir: Path,
        description: dict[str, Any],
        *,
        row_bytes: int,
        limit_bytes: int,
        ranks: Ranks = OneProcess(),
        index_folder: Path | None = None,
    ) -> None:
        self.cache_dir = cache_dir
        self.row_bytes = row_bytes
        self.limit_bytes = limit_bytes
        self.ranks = ranks
        self.index_folder = index_folder
        description = {**description, "row_bytes": row_bytes}
        self.folder = cache_dir / _key(description)
        self.stopped_because: str | None = None
        self.num_damaged = 0
        self._closing = False
        self._queue: dict[bytes, _Queued] = {}  # in order; rows leave it once they are indexed
        self._changed = threading.Condition()  # guards _queue, _closing and stopped_because
        self._asking = threading.RLock()  # guards _reader, _claimed and num_damaged
        self._claimed: set[bytes] = set()
        self._waited_s = 0.0  # by `offer`
        self._written_bytes, self._writing_s = 0, 0.0
        self._unused: list[int] = []  # reserved row numbers without a row
        self._file = -1  # where this process writes rows, and
        self._entries_file = -1  # their entries, in a segment with number
        self._segment = 0
        try:
            self._open(description)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(self.folder, error) from error
        self._thread = threading.Thread(target=self._write_queue, name="features", daemon=True)
        self._thread.start()

    def _open(self, description: dict[str, Any]) -> None:
        _check_system()
        features = self.folder / "features.bin"
        if self.index_folder is None:
            index, locked = self.folder / "index.sqlite", self.cache_dir
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            index, locked = self.index_folder / f"{self.folder.name}.sqlite", self.index_folder
            self.index_folder.mkdir(parents=True, exist_ok=True)
            self._segments.mkdir(parents=True, exist_ok=True)
        with folder_lock(locked):
            _check_description(self.folder / "about.json", description)
            # Replace both files or neither: an index that does not belong to the rows would give
            # wrong rows. A process that has the old files open continues to use them.
            if self.index_folder is None and not features.exists():
                remove_database(index)
            if not is_current(index, version=_VERSION):
                remove_database(index)
                if self.index_folder is None:
                    features.unlink(missing_ok=True)
            self._reader = open_database(index, _SCHEMA, version=_VERSION)
            # Moving the log into the database waits for the disk: the writing thread does it.
            self._reader.execute("PRAGMA wal_autocheckpoint = 0")
            self._writer = open_database(index, _SCHEMA, version=_VERSION)
            if self.index_folder is None:
                self._file = os.open(features, os.O_RDWR | os.O_CREAT, 0o666)
            else:
                self._import_segments()

    @property
    def num_rows(self) -> int:
        """The number of rows in the store, including those of other processes."""
        (last,) = self._ask("SELECT coalesce(max(number), 0) FROM segments") or (0,)
        query = "SELECT count(*) FROM rows WHERE number >= ? AND number < ?"
        firsts = range(0, (last + 1) * _SEGMENT, _SEGMENT)
        ends = (first + self._rows_in(first // _SEGMENT) for first in firsts)
        return sum((self._ask(query, *span) or (0,))[0] for span in zip(firsts, ends))

    def num_free_rows(self) -> int:
        """How many more rows may be written now."""
        return max(0, self._free_rows()[0])

    def __contains__(self, digest: bytes) -> bool:
        """Whether an image's row is in the store, or in its queue."""
        # In this order: a row leaves the queue only after it has been added to the index.
        with self._changed:
            if digest in self._queue:
                return True
        found = self._ask("SELECT number FROM rows WHERE digest = ?", digest)
        return found is not None and self._is_in_file(found[0])

    def read(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy an image's row into `out`, uint8 (row_bytes,) -> whether it exists and is intact.

        A damaged row is removed from the index, so that it can be offered again.
        """
        with self._changed:
            queued = self._queue.get(digest)
        if queued is not None:
            out[:] = queued.arrived()
            return True
        found = self._ask("SELECT number, checksum FROM rows WHERE digest = ?", digest)
        if found is None or not self._is_in_file(found[0]):
            return False
        number, expected = found
        if self._read_bytes(number, out) and _checksum(digest, out) == expected:
            return True
        self._forget(number)
        return False

    def _read_bytes(self, number: int, out: np.ndarray) -> bool:
        # A memory map is no faster, and kills the process (SIGBUS) if the file is truncated in the
        # meantime or the disk fails.
        segment, row = divmod(number, _SEGMENT)
        rest, offset = out.data, row * self.row_bytes
        try:
            with self._rows_file(segment) as file:
                while rest:
                    count = os.preadv(file, [rest], offset)
                    if count == 0:
                        return False
                    rest, offset = rest[count:], offset + count
        except OSError:
            return False
        return True

    def _forget(self, number: int) -> None:
        """Remove a damaged row from the index; its space in the file stays unused."""
        segment, row = divmod(number, _SEGMENT)
        with self._asking:
            try:
                query = "DELETE FROM rows WHERE number = ?"
                self.num_damaged += self._reader.execute(query, (number,)).rowcount
                if segment:
                    with open(self._segment_path(segment, ".index"), "r+b") as entries:
                        entries.seek(row * _ENTRY.size)
                        entries.write(bytes(_ENTRY.size))
            except (OSError, sqlite3.Error) as error:
                self._stop(f"a damaged row cannot be removed from the index: {error}")

    def offer(
        self, digest: bytes, row: np.ndarray, arrive: Callable[[], object] | None = None
    ) -> bool:
        """Queue a row, uint8 (row_bytes,), for writing; it must not change from now on.

        `arrive` waits until the row has its content, if that is still on its way. Waits while the
        queue is full. Returns False if the row is dropped, because writing has stopped.
        """
        assert row.dtype == np.uint8 and row.shape == (self.row_bytes,) and row.flags.c_contiguous
        max_rows = max(1, QUEUE_BYTES // self.ranks.local_size // self.row_bytes)
        with self._changed:
            while not self._is_ending and digest not in self._queue:
                if len(self._queue) < max_rows:
                    self._queue[digest] = _Queued(row, arrive)
                    self._changed.notify_all()
                    return True
                self._wait_for_space()
            if not self._is_ending:
                return True
        self._release()
        return False

    @property
    def _is_ending(self) -> bool:
        return self._closing or self.stopped_because is not None

    def _wait_for_space(self) -> None:
        """Wait a moment for the disk. Raises as `Ranks.check`."""
        begin_s, was_long = time.monotonic(), self._waited_s >= _LONG_WAIT_S
        self._changed.wait(1.0)
        self._waited_s += time.monotonic() - begin_s
        if not was_long and self._waited_s >= _LONG_WAIT_S:
            rate = self._written_bytes / max(self._writing_s, 1e-9)
            logger.info(
                f"{self.cache_dir}: writing at {rate / 1e6:.0f} MB/s is slower than encoding, so "
                f"the first epoch runs at the speed of the disk"
            )
        self.ranks.check()

    def close(self, timeout_s: float = 30.0) -> None:
        """Write the queue, as far as that is possible in time, and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._stop(f"writing the last rows took more than {timeout_s:g} s")
            return  # the thread still uses the files; it ends with the process at the latest
        self._release()
        self._reader.close()
        self._writer.close()
        for file in (self._file, self._entries_file):
            if file >= 0:
                os.close(file)
        self._file = self._entries_file = -1

    def _ask(self, query: str, *values: bytes | int | str) -> tuple[Any, ...] | None:
        """The first row of the query's result; None without one, or if the index is unreadable."""
        with self._asking:
            try:
                return self._reader.execute(query, values).fetchone()
            except sqlite3.Error as error:
                self._stop(f"the index cannot be read: {error}")
                return None

    def _stop(self, reason: object) -> None:
        with self._changed:
            if self.stopped_because is None:
                self.stopped_because = f"{self.folder}: no more features are kept: {reason}"
            self._queue.clear()
            self._changed.notify_all()
        self._release()

    # --- claims -----------------------------------------------------------------------------

    def claim(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of the digests that this process must encode and offer at once.

        The others are in the store by now, or another process of this machine is encoding them. A
        claim ends when the row is in the index, or dropped.
        """
        digests = list(digests)
        if self.ranks.local_size == 1 or not digests:
            return digests
        mine = []
        # Claims of other launches count for nothing.
        claim = (
            "INSERT INTO claims VALUES (?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET launch = excluded.launch WHERE launch != excluded.launch"
        )
        try:
            with self._asking, self._reader as index:
                index.execute("BEGIN IMMEDIATE")
                for digest in digests:
                    is_free = digest not in self
                    if is_free and index.execute(claim, (digest, self.ranks.launch)).rowcount:
                        mine.append(digest)
                self._claimed.update(mine)
        except sqlite3.Error as error:
            self._stop(f"images cannot be claimed: {error}")
            return digests
        return mine

    def is_claimed(self, digest: bytes) -> bool:
        """Whether a process of this machine is encoding the image."""
        query = "SELECT 1 FROM claims WHERE digest = ? AND launch = ?"
        return self._ask(query, digest, self.ranks.launch) is not None

    def _release(self) -> None:
        """Give up all claims of this process."""
        with self._asking:
            mine, self._claimed = self._claimed, set()
            if not mine:
                return
            try:
                with self._reader as index:
                    self._end_claims(index, mine)
            except sqlite3.Error:
                pass  # others wait for a limited time

    def _end_claims(self, index: sqlite3.Connection, digests: Iterable[bytes]) -> None:
        query = "DELETE FROM claims WHERE digest = ? AND launch = ?"
        index.executemany(query, ((digest, self.ranks.launch) for digest in digests))

    # --- files ------------------------------------------------------------------------------

    @property
    def _segments(self) -> Path:
        return self.folder / "segments"

    def _segment_path(self, segment: int, suffix: str) -> Path:
        found = self._ask("SELECT name FROM segments WHERE number = ?", segment)
        return self._segments / f"{found[0] if found else 'unknown'}{suffix}"

    @contextmanager
    def _rows_file(self, segment: int) -> Iterator[int]:
        """A segment's rows, opened for reading; raises OSError."""
        if segment == self._segment:
            yield self._file
            return
        # There may be more segments than a process may have open files.
        file = os.open(self._segment_path(segment, ".rows"), os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)

    def _rows_in(self, segment: int) -> int:
        try:
            with self._rows_file(segment) as file:
                return os.fstat(file).st_size // self.row_bytes
        except OSError:
            return 0

    def _is_in_file(self, number: int) -> bool:
        """Whether the file has the row; it may have been truncated, or removed."""
        segment, row = divmod(number, _SEGMENT)
        return row < self._rows_in(segment)

    # --- the writing thread -----------------------------------------------------------------

    def _write_queue(self) -> None:
        imports = self.index_folder is not None and self.ranks.local_rank == 0
        try:
            while (batch := self._next_batch(_IMPORT_EVERY_S if imports else None)) is not None:
                if batch:
                    rows = {digest: queued.arrived() for digest, queued in batch.items()}
                    begin_s = time.monotonic()
                    self._write(rows)
                    self._writing_s += time.monotonic() - begin_s
                    self._written_bytes += len(rows) * self.row_bytes
                    with self._changed:
                        for digest in batch:
                            self._queue.pop(digest, None)
                        self._changed.notify_all()
                if imports:
                    self._import_segments()
        except Exception as error:  # whatever it is, training must not fail
            self._stop(error)

    def _next_batch(self, timeout_s: float | None) -> dict[bytes, _Queued] | None:
        """The next rows to write, none after `timeout_s`; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_ending, timeout_s)
            if not self._queue and self._is_ending:
                return None
            return dict(islice(self._queue.items(), max(1, WRITE_BYTES // self.row_bytes)))

    def _write(self, batch: dict[bytes, np.ndarray]) -> None:
        if self.index_folder is not None and not self._segment:
            self._begin_segment()
        first = self._segment * _SEGMENT
        num_fitting, what_is_full = self._free_rows()
        with self._writer as index:
            index.execute("BEGIN IMMEDIATE")
            # Rows of a truncated file would come back as zeros when it grows again.
            index.execute(
                "DELETE FROM rows WHERE number >= ? AND number < ?",
                (first + self._rows_in(self._segment), first + _SEGMENT),
            )
            query = "SELECT * FROM rows WHERE digest = ?"
            new = [digest for digest in batch if not index.execute(query, (digest,)).fetchone()]
            fitting = new[: max(0, num_fitting)]
            numbers = self._reserve(index, len(fitting))
        entries = [
            (number, digest, _checksum(digest, batch[digest]))
            for number, digest in zip(numbers, fitting, strict=True)
        ]
        for number, digest, _ in entries:
            _write_at(self._file, batch[digest].data, (number - first) * self.row_bytes)
        _sync(self._file)
        if self._segment and entries:
            data = b"".join(digest + checksum for _, digest, checksum in entries)
            _write_at(self._entries_file, memoryview(data), (numbers[0] - first) * _ENTRY.size)
            _sync(self._entries_file)
        self._add_to_index(entries, batch)
        if len(fitting) < len(new):
            raise FeatureStoreError(what_is_full)

    def _add_to_index(
        self, entries: Iterable[tuple[int, bytes, bytes]], batch: Mapping[bytes, np.ndarray]
    ) -> None:
        """Add rows that are on the disk to the index, and end this process' claims of the batch."""
        with self._asking:  # not within the transaction: `claim` takes both in this order
            claimed = self._claimed.intersection(batch)
        with self._writer as index:
            index.execute("BEGIN IMMEDIATE")
            query = "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (digest) DO NOTHING"
            for entry in entries:
                # Another process may have written this image's row. In a segment its place stays
                # used, because it has an entry.
                if index.execute(query, entry).rowcount == 0 and not self._segment:
                    self._unused.append(entry[0])
            self._end_claims(index, claimed)
        with self._asking:
            self._claimed -= claimed

    def _reserve(self, index: sqlite3.Connection, count: int) -> list[int]:
        """Reserve row numbers for this process, within a transaction."""
        if self._segment:
            begin = self._segment * _SEGMENT + self._rows_in(self._segment)
            return list(range(begin, begin + count))
        numbers, self._unused = self._unused[:count], self._unused[count:]
        (begin,) = index.execute("SELECT next_number FROM counter").fetchone()
        end = begin + count - len(numbers)
        index.execute("UPDATE counter SET next_number = ?", (end,))
        return [*numbers, *range(begin, end)]

    def _free_rows(self) -> tuple[int, str]:
        """How many more rows may be written, and which limit is reached then."""
        files = [*self.cache_dir.glob("*/features.bin"), *self.cache_dir.glob("*/segments/*.rows")]
        kept_bytes = sum(path.stat().st_size for path in files if path.exists())
        disk = shutil.disk_usage(self.cache_dir)
        left_bytes = max(MIN_FREE_BYTES, disk.total // 50)
        full_cache = f"{self.cache_dir} has reached its limit of {self.limit_bytes / 1e9:.1f} GB"
        full_disk = f"the disk has no more than {left_bytes / 1e9:.1f} GB left"
        return min(
            ((self.limit_bytes - kept_bytes) // self.row_bytes, full_cache),
            ((disk.free - left_bytes) // self.row_bytes, full_disk),
        )

    def _begin_segment(self) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._file = os.open(self._segments / f"{name}.rows", flags, 0o666)
        self._entries_file = os.open(self._segments / f"{name}.index", flags, 0o666)
        insert = "INSERT INTO segments (name) VALUES (?)"
        self._segment = self._writer.execute(insert, (name,)).lastrowid or 0

    def _import_segments(self) -> None:
        """Add what all processes, also of other machines, have written to segments since."""
        known = dict(self._writer.execute("SELECT name, num_entries FROM segments"))
        for path in sorted(self._segments.glob("*.index")):
            begin = known.get(path.stem, 0)
            try:
                if path.stat().st_size < (begin + 1) * _ENTRY.size:
                    continue
                with open(path, "rb") as file:  # opening asks the server for the current size
                    file.seek(begin * _ENTRY.size)
                    data = file.read()
                with open(path.with_suffix(".rows"), "rb") as file:
                    num_rows = os.fstat(file.fileno()).st_size // self.row_bytes
            except FileNotFoundError:  # someone is emptying the cache
                continue
            end = min(begin + len(data) // _ENTRY.size, num_rows)
            data = data[: max(end - begin, 0) * _ENTRY.size]
            with self._writer as index:
                index.execute("BEGIN IMMEDIATE")
                index.execute("INSERT OR IGNORE INTO segments (name) VALUES (?)", (path.stem,))
                query = "SELECT number FROM segments WHERE name = ?"
                (segment,) = index.execute(query, (path.stem,)).fetchone()
                index.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", (
                    (segment * _SEGMENT + row, digest, checksum)
                    for row, (digest, checksum) in enumerate(_ENTRY.iter_unpack(data), begin)
                    if any(digest)
                ))
                query = "UPDATE segments SET num_entries = max(num_entries, ?) WHERE number = ?"
                index.execute(query, (end, segment))


def _check_system() -> None:
    if not hasattr(os, "preadv"):
        raise OSError("this operating system has no preadv and pwrite")


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _sync(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)  # macOS has no fdatasync


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
        _check_system()
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
