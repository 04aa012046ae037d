"""Files and folders that are replaced whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new file name beside `path`, which takes the place of `path` on success.

    On an error what was written is removed and `path` stays as it was.
    """
    path = Path(path)
    # A name that Path.suffix-minded writers (savefig) still understand.
    new = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`, which takes the place of `path` on success.

    On an error what was written is removed and `path` stays as it was. A reader never sees a
    folder with files of both; between two renames it may see none. What a kill leaves is put in
    order by `clear_leftovers`; the power may fail, too: all is on the disk before it is renamed.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.iterdir():
            sync(file)
        sync(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Put in order what a kill within `replaced_folder` or `replaced_file` has left in `parent`.

    For a time when no other process writes there.
    """
    for old in parent.glob(".*.old"):
        path = parent / old.name[1:].rsplit(".", 2)[0]
        if not path.exists():
            old.rename(path)
    for left in [*parent.glob(".*.old"), *parent.glob(".*.new")]:
        shutil.rmtree(left, ignore_errors=True)
    for left in parent.glob(".*.*"):
        if left.is_file() and re.fullmatch(r"\..+\.\d+(\.\w+)?", left.name):
            left.unlink()


def free_bytes(folder: Path) -> int:
    """What may still be written to the disk of a folder that is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(folder: Path, *, needed: int) -> None:
    """Raises OSError where less than `needed` bytes are free."""
    free = free_bytes(folder)
    if free < needed:
        raise OSError(
            f"{free / 1e6:,.0f} MB are free in {folder.resolve()}, {needed / 1e6:,.0f} MB are "
            f"needed: free space there"
        )


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
