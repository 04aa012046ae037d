"""Annotation files -> rows with absolute image paths, and path:line in every error.

Relative image paths are relative to the annotation file. What a row must hold: rows.py; how a
format is read: formats/.
"""

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from lora_engine.data.formats.json_list import json_list_items
from lora_engine.data.rows import (
    EXPECTED_ROW,
    MAX_ROWS_SHOWN,
    AnnotationError,
    BadRow,
    CheckedRow,
    Row,
    row_complaint,
)


def usable_rows(path: str | Path, *, max_bad_share: float) -> tuple[list[Row], list[BadRow]]:
    """Read a file -> (usable rows in the file's order, unusable rows).

    Captions are stripped and image paths absolute; images are not opened. Raises AnnotationError
    if the file cannot be read, is not a JSON list or is empty, and if no row, or too few rows, can
    be used: at most `max_bad_share` of them may be bad. The message lists the first MAX_ROWS_SHOWN
    bad rows and their number.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for checked in checked_rows(path):
        if checked.row is not None:
            rows.append(checked.row)
        else:
            bad.append(bad_row(path, checked))
    num_rows = len(rows) + len(bad)
    if not rows or len(bad) > max_bad_share * num_rows:
        raise AnnotationError(_bad_rows_message(path, bad, num_rows, max_bad_share))
    return rows, bad


def bad_row(path: str | Path, checked: CheckedRow) -> BadRow:
    return BadRow(f"{path}:{checked.line}", f"row {checked.number}: {checked.complaint}")


def locations_of(path: str | Path, rows: Collection[Row]) -> list[str]:
    """path:line of each row of a file that is one of `rows`, which do not know their lines."""
    return [f"{path}:{checked.line}" for checked in checked_rows(path) if checked.row in rows]


def checked_rows(path: str | Path) -> Iterator[CheckedRow]:
    """All rows of a file, usable or not. Raises AnnotationError for a file without rows."""
    items = json_list_items(read_text(path), path)
    folder = os.path.realpath(os.path.dirname(path))
    images: dict[str, str] = {}  # the captions of an image share one string
    number = 0
    for number, (line, value) in enumerate(items, start=1):
        reason = row_complaint(value)
        if reason is None:
            image = os.path.normpath(os.path.join(folder, value["image"]))
            row = Row(value["text"].strip(), images.setdefault(image, image))
            yield CheckedRow(number, line, row)
        else:
            yield CheckedRow(number, line, None, reason)
    if not number:
        raise AnnotationError(f"{path}: an empty list, expected at least one {EXPECTED_ROW}")


def read_text(path: str | Path) -> str:
    """The text of an annotation file. Raises AnnotationError if it is unreadable or not UTF-8."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AnnotationError(f"{path}: is a folder, give the JSON file in it")
        if not stat.S_ISREG(mode):  # a pipe or a device may never end
            raise AnnotationError(f"{path}: is not a regular file, give a JSON file")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file, expected a JSON list of rows") from None
    except AnnotationError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AnnotationError(f"{path}: cannot be read: {error}") from None
    try:
        return data.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise AnnotationError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from None


def _bad_rows_message(
    path: str | Path, bad: Sequence[BadRow], num_rows: int, max_share: float
) -> str:
    shown = list(map(str, bad[:MAX_ROWS_SHOWN]))
    more = f", more than --max_bad_share {max_share:g}" if 0 < max_share < 1 else ""
    if num_rows == 1 or len(bad) == 1 and not more:
        return shown[0]
    first = f"; the first {len(shown)}" if len(bad) > len(shown) else ""
    summary = f"{path}: {len(bad):,} of {num_rows:,} rows cannot be used{more}{first}:"
    return "\n  ".join([summary, *shown])
