"""Digests of image files, remembered so that unchanged files are not read again."""

import hashlib
import os
import sqlite3
import time
from pathlib import Path

from lora_engine.data.shared_database import folder_lock, is_current, open_database, remove_database

# The coarsest timestamps of common file systems (FAT) have 2 s.
_CLOCK_TICK_NS = 2 * 10**9

# These bound what a kill may lose; commits are cheap, because they do not wait for the disk.
_COMMIT_EVERY_S = 1.0
_COMMIT_EVERY = 256  # entries

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, stamp BLOB NOT NULL, digest BLOB NOT NULL
) WITHOUT ROWID;
"""
_VERSION = 1  # 0 had stamps of size and modification time alone

FileStamp = bytes  # 16 bytes, different for a changed file


def content_digest(data: bytes) -> bytes:
    """The BLAKE2b of 16 bytes that identifies this content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def stamp(path: str | Path) -> FileStamp | None:
    """The stamp of a file, to be taken before it is read; None if it would not be reliable.

    It covers size, inode, modification time and status change time. Size and modification time of a
    replaced file can be set to the old values, inode and status change time cannot.

    There is no stamp for a file whose status cannot be read, nor for one that changed in the last
    2 s: changed again within one tick of the file system's clock, it would keep its stamp (git
    calls this racy).
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL, or half of a surrogate pair
        return None
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _CLOCK_TICK_NS:
        return None
    return identity(status)


def identity(status: os.stat_result) -> FileStamp:
    """What a file's stamp is made of; not reliable for one that changed in the last 2 s."""
    # Not the numbers themselves: some file systems have larger ones than sqlite can store.
    values = status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    return content_digest(repr(values).encode())


class Identities:
    """Remembers the digests of files by path and stamp, for one thread at a time.

    `identities.sqlite` in the folder outlives the run and is shared with other processes. It is
    only a cache: if it is damaged, or of another version, it is replaced; if it cannot be used, or
    `folder` is None, digests are remembered as long as this object lives. A lost entry costs
    reading a file again.
    """

    def __init__(self, folder: Path | None) -> None:
        self._fresh: dict[bytes, tuple[FileStamp, bytes]] = {}  # not in the database (yet)
        self._database = None if folder is None else _open(folder)
        self._committed_s = time.monotonic()

    def recall(self, path: str | Path, stamp: FileStamp) -> bytes | None:
        """The digest of the file's content, if it was remembered with exactly this stamp."""
        name = _absolute(path)
        known = self._fresh.get(name) or self._look_up(name)
        return known[1] if known is not None and known[0] == stamp else None

    def remember(self, path: str | Path, stamp: FileStamp, digest: bytes) -> None:
        """Store the digest of content that was read after the stamp was taken."""
        self._fresh[_absolute(path)] = (stamp, digest)
        is_due = time.monotonic() - self._committed_s >= _COMMIT_EVERY_S
        if is_due or len(self._fresh) >= _COMMIT_EVERY:
            self._commit()

    def close(self) -> None:
        """Write new entries and close the database; later entries stay in memory."""
        self._commit()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _look_up(self, name: bytes) -> tuple[FileStamp, bytes] | None:
        if self._database is None:
            return None
        query = "SELECT stamp, digest FROM files WHERE path = ?"
        try:
            return self._database.execute(query, (name,)).fetchone()
        except sqlite3.Error:
            self._database = None
            return None

    def _commit(self) -> None:
        if self._database is None:
            return
        rows = [(name, *entry) for name, entry in self._fresh.items()]
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
            self._fresh.clear()
        except sqlite3.Error:
            self._database = None
        self._committed_s = time.monotonic()


def _absolute(path: str | Path) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _open(folder: Path) -> sqlite3.Connection | None:
    path = folder / "identities.sqlite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            if not is_current(path, version=_VERSION):
                remove_database(path)
            database = open_database(path, _SCHEMA, version=_VERSION)
        # Moving the log into the database waits for the disk: every 64 MiB, and when closing.
        database.execute("PRAGMA wal_autocheckpoint = 16384")
        return database
    except (OSError, sqlite3.Error):
        return None
