"""Opening files; reading text as a whole, line by line, or as JSON. Errors name file and line."""

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from lora_engine.data.rows import AnnotationError

DECODER = json.JSONDecoder()
WHITESPACE = re.compile(r"[ \t\n\r]*")  # JSON's
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
COMPRESSIONS = {  # how a file begins: name and command
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"\x04\x22\x4d\x18": ("LZ4", "unlz4"),
}


def read_text(path: str) -> str:
    """The text of a file. Raises AnnotationError if it cannot be read or is not UTF-8."""
    with open_file(path) as file:
        try:
            data = file.read()
        except OSError as error:
            raise AnnotationError(f"{path}: cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AnnotationError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from None


def read_lines(path: str) -> Iterator[str]:
    """The lines of a file with their line ends, one at a time.

    A byte that is not UTF-8 becomes a surrogate, which `caption_complaint` finds: one such line
    does not spoil the others. Raises AnnotationError if the file cannot be read, is UTF-16, or has
    only blank lines.
    """
    is_blank = True
    with open_file(path) as file:
        try:
            if file.peek(2)[:2] in UTF_16_MARKS:
                raise AnnotationError(f"{path}: is UTF-16: save the file as UTF-8")
            # newline="": a line break inside a quoted cell stays as it is
            text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
            for line in text:
                is_blank = is_blank and not line.strip()
                yield line
        except OSError as error:
            raise AnnotationError(f"{path}: cannot be read: {error}") from None
    if is_blank:
        raise AnnotationError(f"{path}: the file is empty, expected one caption per line")


def open_file(path: str) -> io.BufferedReader:
    """Open a regular file. Raises AnnotationError."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AnnotationError(f"{path}: cannot be read: {error}") from None
    if stat.S_ISDIR(mode):
        raise AnnotationError(f"{path}: is a folder, give the file in it")
    raise AnnotationError(f"{path}: is not a regular file")  # a pipe or a device may never end


# --- JSON -----------------------------------------------------------------------------------


def read_json(path: str, *, expected: str) -> Any:
    """The JSON value that a file holds. Raises AnnotationError, with the line of an error."""
    document = read_text(path)
    value, end = decode_json(document, skip_whitespace(document, 0), path, expected=expected)
    end = skip_whitespace(document, end)
    if end < len(document):
        raise not_json(json.JSONDecodeError("Extra data", document, end), path, expected=expected)
    return value


def decode_json(document: str, position: int, path: str, *, expected: str) -> tuple[Any, int]:
    """The JSON value at a position, and where it ends. Raises AnnotationError, with the line."""
    try:
        return DECODER.raw_decode(document, position)
    except json.JSONDecodeError as error:
        raise not_json(error, path, expected=expected) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
        line = document.count("\n", 0, position) + 1
        raise AnnotationError(f"{path}:{line}: JSON that cannot be read: {error}") from None


def skip_whitespace(document: str, position: int) -> int:
    """The position of the next character that is not JSON's whitespace."""
    match = WHITESPACE.match(document, position)
    assert match is not None  # it also matches nothing at all
    return match.end()


def not_json(error: json.JSONDecodeError, path: str, *, expected: str) -> AnnotationError:
    """The error for a file that is not JSON, with line and column."""
    return AnnotationError(
        f"{path}:{error.lineno}: not JSON (column {error.colno}): {error.msg}; expected {expected}"
    )
