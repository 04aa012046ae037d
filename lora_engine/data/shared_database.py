"""A small sqlite database that several processes of one machine use at the same time.

Its content can always be computed again, so a database that is damaged, or of another version, is
removed, not repaired or migrated.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BUSY_TIMEOUT_S = 5.0


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Makes processes open or replace files of this folder one after the other.

    The lock ends with the process that holds it, killed or not. Raises OSError.
    """
    import fcntl  # not on Windows, where the rest of the package should still import

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_database(path: Path, schema: str, *, version: int) -> sqlite3.Connection:
    """Open or create a database: in autocommit mode, for one thread at a time.

    `version` is that of the schema, for `is_current`. Raises sqlite3.Error.
    """
    database = _connect(path)
    # With a write-ahead log readers never wait for a writer, and commits do not wait for the disk:
    # a power failure may lose the last commits, but damages nothing.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.executescript(f"{schema} PRAGMA user_version = {version};")
    return database


def is_current(path: Path, *, version: int) -> bool:
    """Whether the file exists and is an undamaged database of this version of its schema.

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
    """Remove a database with its log. A process that has it open keeps using the removed one."""
    for ending in ("-wal", "-shm", ""):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
