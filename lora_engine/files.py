"""Atomic replacement of files and folders, safe appending, and limits for untrusted files."""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import takewhile
from pathlib import Path


class UnusableFileError(ValueError):
    """A file that cannot be read: not a regular file, too large, or damaged."""


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new file name beside `path`; on success that file replaces `path`.

    On an error the new file is removed and `path` is unchanged.
    """
    path = Path(path)
    # With the same suffix, from which some writers (savefig) take the format.
    new = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`; on success its files replace those in `path`.

    Files in `path` whose names the new folder does not have are kept. On an error the new folder is
    removed and `path` is unchanged. A reader never sees new and old files together; between two
    renames it may see no folder. Everything is synced to the disk before it is renamed, in case of
    a power failure; `clear_leftovers` repairs what a killed process leaves behind. Missing parents
    are created, and on an error removed again.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    parent = existing_parent(path.parent)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
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
        with suppress(OSError):  # not empty
            for created in takewhile(parent.__ne__, path.parents):
                created.rmdir()


def _retire(old: Path, path: Path) -> None:
    """Remove a folder that `path` has replaced; files that `path` lacks are moved there."""
    for entry in old.iterdir():
        if not os.path.lexists(path / entry.name):
            entry.rename(path / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(parent: Path, is_ours: Callable[[str], object]) -> None:
    """Repair what a process killed in `replaced_folder` or `replaced_file` has left in `parent`.

    Only affects files and folders whose final name `is_ours` accepts. No other process may be
    writing there.
    """
    for leftover in sorted(parent.glob(".*.*")):
        name = replaced_name(leftover.name)
        if name is None or not is_ours(name):
            continue
        mode = leftover.lstat().st_mode
        if stat.S_ISREG(mode):
            leftover.unlink()
        elif stat.S_ISDIR(mode) and leftover.name.endswith(".new"):
            shutil.rmtree(leftover, ignore_errors=True)
        elif stat.S_ISDIR(mode) and (parent / name).exists():
            _retire(leftover, parent / name)
        elif stat.S_ISDIR(mode):
            leftover.rename(parent / name)


def replaced_name(name: str) -> str | None:
    """The final name for a temporary name of `replaced_folder` or `replaced_file`, else None."""
    match = re.fullmatch(r"\.(.+)\.\d+\.(?:new|old)", name)
    if match:
        return match[1]
    match = re.fullmatch(r"\.(.+)\.\d+(\.\w+)?", name)
    return match[1] + (match[2] or "") if match else None


def unused_name(path: Path) -> Path:
    """`path`, or if it exists the first of `path`.2, `path`.3, ... that does not."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def open_to_append(path: Path) -> FileIO:
    """Open a file for unbuffered appending, without following symbolic links. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return open(  # type: ignore[return-value]
        path, "ab", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666)
    )


def append_line(file: FileIO, line: bytes) -> None:
    """Append a line to an unbuffered file, all of it or nothing. Raises OSError."""
    end = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line):]  # a full disk may take a part
    except OSError as error:
        os.truncate(file.fileno(), end)  # else the next line would follow half a line
        raise OSError(error.errno, error.strerror, file.name) from None


def is_still_at(file: FileIO, path: Path) -> bool:
    """Whether `path` is still that of an open file: nothing was removed or renamed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def existing_parent(path: Path) -> Path:
    """`path`, or if it does not exist the nearest folder above it that does."""
    while not path.exists():
        path = path.parent
    return path


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def check_space(folder: Path, *, needed: int) -> None:
    """Raises OSError if less than `needed` bytes are free."""
    free = free_bytes(folder)
    if free < needed:
        raise OSError(
            f"{free / 1e6:,.0f} MB are free in {folder.resolve()}, {needed / 1e6:,.0f} MB are "
            f"needed: free space there"
        )


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and wait until it is on the disk (fsync)."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk (fsync)."""
    is_windows = not hasattr(os, "O_DIRECTORY")
    if is_windows and path.is_dir():  # it cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_limited(path: Path, max_bytes: int) -> str:
    """Read a text file. Raises OSError, and ValueError if it is too large or not UTF-8."""
    size = check_file(path, max_bytes=max_bytes)
    with open(path, "rb") as file:
        return file.read(size).decode()


def check_file(path: Path, *, max_bytes: int) -> int:
    """The size of a regular file; links are followed.

    Raises OSError, and UnusableFileError for other kinds of files (reading a pipe or a device may
    never end) and for a file of more than `max_bytes`.
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
