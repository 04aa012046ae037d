"""A small SQLite database that several processes on one machine use at the same time.

Its content can be computed again, so a database that is damaged, or of another version, is removed
instead of being repaired or migrated.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BUSY_TIMEOUT_S = 5.0


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock while opening or replacing files of this folder.

    The lock ends with the process that holds it, even if it is killed. Windows has no such lock:
    there, processes must not begin at the same time. Raises OSError.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_database(path: Path, schema: str, *, version: int) -> sqlite3.Connection:
    """Open or create a database in autocommit mode, for use by one thread at a time.

    `version` is the version of the schema, which `is_current` checks. Raises sqlite3.Error.
    """
    database = _connect(path)
    # With a write-ahead log readers never wait for a writer, and commits do not wait for the disk:
    # a power failure may lose the last commits, but leaves the earlier ones intact.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.executescript(f"{schema} PRAGMA user_version = {version};")
    return database


def is_current(path: Path, *, version: int) -> bool:
    """Whether the file exists and is an intact database with this version of the schema.

    Raises sqlite3.Error, OSError.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    database = _connect(path)
    try:
        if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            return False
        return database.execute("PRAGMA user_version").fetchone() == (version,)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return False
        raise
    finally:
        database.close()


def remove_database(path: Path) -> None:
    """Remove a database and its log. A process that has it open continues with the removed one."""
    for suffix in ("-wal", "-shm", ""):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
