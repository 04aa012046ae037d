"""Files and folders that are replaced whole or not at all, and foreign files read with limits."""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


class UnusableFileError(ValueError):
    """A file that cannot be read: not a regular file, too large, or damaged."""


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
    """Yields a new, empty folder beside `path`, whose files take the place of those in `path`.

    Files in `path` under names that the new folder does not have stay. On an error what was written
    is removed and `path` stays as it was. A reader never sees a new file beside an old one of the
    same save; between two renames it may see no folder. `clear_leftovers` repairs what a kill
    leaves; everything is on the disk before it is renamed, in case the power fails.
    """
    path = Path(os.path.realpath(path))  # a link stays one: its target is what gets replaced
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
        if old.exists():
            if path.exists():
                _retire(old, path)
            else:
                old.rename(path)
        shutil.rmtree(new, ignore_errors=True)


def _retire(old: Path, path: Path) -> None:
    """Remove a folder that `path` has replaced; what `path` does not have moves there."""
    for entry in old.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.rename(path / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(parent: Path, is_ours: Callable[[str], object]) -> None:
    """Repair what a kill within `replaced_folder` or `replaced_file` has left in `parent`.

    Only for files and folders whose final name `is_ours` accepts, and only while no other process
    writes there.
    """
    for left in sorted(parent.glob(".*.*")):
        name = replaced_name(left.name)
        if name is None or not is_ours(name):
            continue
        mode = left.lstat().st_mode
        if stat.S_ISREG(mode):
            left.unlink()
        elif stat.S_ISDIR(mode) and left.name.endswith(".new"):
            shutil.rmtree(left, ignore_errors=True)
        elif stat.S_ISDIR(mode) and (parent / name).exists():
            _retire(left, parent / name)
        elif stat.S_ISDIR(mode):
            left.rename(parent / name)


def replaced_name(name: str) -> str | None:
    """What `replaced_folder` or `replaced_file` would have renamed `name` to; None for others."""
    match = re.fullmatch(r"\.(.+)\.\d+\.(?:new|old)", name)
    if match:
        return match[1]
    match = re.fullmatch(r"\.(.+)\.\d+(\.\w+)?", name)
    return match[1] + (match[2] or "") if match else None


def unused_name(path: Path) -> Path:
    """`path`, or where something has that name the first of `path`.2, `path`.3, ... that is free.
    """
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def open_to_append(path: Path) -> FileIO:
    """An unbuffered file, to write at its end; a symbolic link is never followed. Raises OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return open(  # type: ignore[return-value]
        path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666)
    )


def append_line(file: FileIO, line: bytes) -> None:
    """Write a line at the end of an unbuffered file, all of it or nothing. Raises OSError."""
    end = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line):]  # a disk that fills up takes a part
    except OSError as error:
        os.truncate(file.fileno(), end)  # the next line would follow half a line
        raise OSError(error.errno, error.strerror, file.name) from None


def is_still_at(file: FileIO, path: Path) -> bool:
    """Whether an open file has been neither removed nor renamed, nor its folder."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


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


def read_limited(path: Path, max_bytes: int) -> str:
    """A text file; raises OSError, and ValueError for one that is too large or not UTF-8."""
    size = check_file(path, max_bytes=max_bytes)
    with open(path, "rb") as file:
        return file.read(size).decode()


def check_file(path: Path, *, max_bytes: int) -> int:
    """The size of a regular file, or of one that a link leads to.

    Raises UnusableFileError for anything else (reading a pipe or a device may never end) and for a
    file of more than `max_bytes`, and OSError.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise UnusableFileError(f"{str(path)!r} is not a possible file name: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFileError(f"{path} is not a regular file")
    if status.st_size > max_bytes:
        raise UnusableFileError(
            f"{path} has {status.st_size:,} bytes; this engine reads no more than {max_bytes:,}"
        )
    return status.st_size
