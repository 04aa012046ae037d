"""Annotation files -> rows, with file:line in every complaint.

The format is a JSON list of {"text": caption, "image": path}; paths are absolute or relative to
the annotation file. Other keys are passed over.
"""

import json
import os
import random
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXPECTED_ROW = '{"text": "a caption", "image": "path/of/its/image.jpg"}'
MAX_ROWS_SHOWN = 5
MAX_KEYS_SHOWN = 8
DECODER = json.JSONDecoder()
WHITESPACE = re.compile(r"[ \t\n\r]*")  # JSON's
SURROGATE = re.compile("[\ud800-\udfff]")


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message starts with path: or path:line:."""


class Row(NamedTuple):
    """One caption and its image; a picture with five captions is five rows."""

    text: str
    image: str


class CheckedRow(NamedTuple):
    """A row with its place in the file, counted from 1, or why it cannot be used."""

    number: int
    line: int
    row: Row | str


class BadRow(NamedTuple):
    """A row that is skipped: its place in the file, as path:line, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_annotations(path: str | Path) -> list[Row]:
    """`usable_rows` of a file in which every row must be usable."""
    return usable_rows(path, max_bad_share=0.0)[0]


def usable_rows(path: str | Path, *, max_bad_share: float) -> tuple[list[Row], list[BadRow]]:
    """Read all rows in the file's order: stripped captions, absolute image paths; and those that
    cannot be used.

    Images are not opened. Raises AnnotationError if the file cannot be read, is not a JSON list,
    or is empty, and where all rows, or more than `max_bad_share` of them, cannot be used: it names
    the first MAX_ROWS_SHOWN by line, with the number of all.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for checked in checked_rows(path):
        if isinstance(checked.row, Row):
            rows.append(checked.row)
        else:
            bad.append(bad_row(path, checked))
    num_rows = len(rows) + len(bad)
    if not rows or len(bad) > max_bad_share * num_rows:
        raise AnnotationError(_bad_rows_message(path, bad, num_rows, max_bad_share))
    return rows, bad


def bad_row(path: str | Path, checked: CheckedRow) -> BadRow:
    return BadRow(f"{path}:{checked.line}", f"row {checked.number}: {checked.row}")


def places_of(path: str | Path, rows: Collection[Row]) -> list[str]:
    """path:line of each row of a file that is one of `rows`, which do not know their lines."""
    return [f"{path}:{checked.line}" for checked in checked_rows(path) if checked.row in rows]


def checked_rows(path: str | Path) -> Iterator[CheckedRow]:
    """All rows of a file, good and bad ones. Raises AnnotationError where it has none to give."""
    document = read_text(path)
    folder = os.path.realpath(os.path.dirname(path))
    images: dict[str, str] = {}  # the captions of an image share one string
    line, counted, number = 1, 0, 0
    for number, (offset, value) in enumerate(_items(document, path), start=1):
        line += document.count("\n", counted, offset)
        counted = offset
        complaint = _complaint(value)
        if complaint is None:
            image = os.path.normpath(os.path.join(folder, value["image"]))
            row = Row(value["text"].strip(), images.setdefault(image, image))
            yield CheckedRow(number, line, row)
        else:
            yield CheckedRow(number, line, complaint)
    if not number:
        raise AnnotationError(f"{path}: an empty list, expected at least one {EXPECTED_ROW}")


def hold_out(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (training, validation) by image, so that no image is on both sides.

    About `fraction` of the images, drawn from their sorted names by `seed` alone, and at least
    one, are held out; rows keep their order. Raises ValueError for a fraction outside (0, 1) and
    for fewer than two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--val_fraction is {fraction}, expected a number between 0 and 1")
    images = sorted({row.image for row in rows})
    if len(images) < 2:
        raise ValueError(
            f"cannot hold out validation images: the rows name {len(images)} image(s), expected "
            "at least 2; add images, or pass a validation file with --val_data_path"
        )
    count = min(max(round(fraction * len(images)), 1), len(images) - 1)
    held_out = set(random.Random(seed).sample(images, count))
    train = [row for row in rows if row.image not in held_out]
    validation = [row for row in rows if row.image in held_out]
    return train, validation


def read_text(path: str | Path) -> str:
    """An annotation file's text; raises AnnotationError where there is none in UTF-8."""
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


def _items(document: str, path: str | Path) -> Iterator[tuple[int, Any]]:
    """(offset, value) of each item of the list.

    One at a time: a million rows as dicts would take more memory than the file and the rows.
    """
    position = _skip_whitespace(document, 0)
    if not document.startswith("[", position):
        raise AnnotationError(_not_a_list_message(document, path))
    position = _skip_whitespace(document, position + 1)
    is_open = not document.startswith("]", position)
    while is_open:
        value, end = _decode(document, position, path)
        yield position, value
        position = _skip_whitespace(document, end)
        is_open = document.startswith(",", position)
        if is_open:
            position = _skip_whitespace(document, position + 1)
        elif not document.startswith("]", position):
            raise _not_json(json.JSONDecodeError("Expecting ',' or ']'", document, position), path)
    position = _skip_whitespace(document, position + 1)
    if position != len(document):
        raise _not_json(json.JSONDecodeError("Extra data after the list", document, position), path)


def _decode(document: str, position: int, path: str | Path) -> tuple[Any, int]:
    """The JSON value at a position, and where it ends."""
    try:
        return DECODER.raw_decode(document, position)
    except json.JSONDecodeError as error:
        raise _not_json(error, path) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
        line = _line(document, position)
        raise AnnotationError(f"{path}:{line}: JSON that cannot be read: {error}") from None


def _skip_whitespace(document: str, position: int) -> int:
    match = WHITESPACE.match(document, position)
    assert match is not None  # it also matches nothing at all
    return match.end()


def _line(document: str, offset: int) -> int:
    return document.count("\n", 0, offset) + 1


def _complaint(value: Any) -> str | None:
    """What is wrong with a row, what was expected and what to do; None if nothing is."""
    if not isinstance(value, dict):
        return f"found {describe(value)}, expected an object like {EXPECTED_ROW}"
    for key in Row._fields:
        if key not in value:
            return f'no "{key}" among its keys ({_keys(value)}): add it, or rename what holds it'
        content = value[key]
        if not isinstance(content, str):
            return f'"{key}" is {describe(content)}, expected one string'
        if not content.strip():
            return f'"{key}" is empty: fill it in or remove the row'
    if "://" in value["image"]:
        return '"image" is a web address: download the image and give the path of the file'
    if not value["text"].isascii() and SURROGATE.search(value["text"]):
        return '"text" holds half of a UTF-16 pair (\\ud800 to \\udfff alone): mend the caption'
    return None


def describe(value: Any) -> str:
    """A JSON value as it is written, cut to a few words."""
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(map(describe, list(value)[:MAX_KEYS_SHOWN])) or "none"


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


def _not_json(error: json.JSONDecodeError, path: str | Path) -> AnnotationError:
    return AnnotationError(
        f"{path}:{error.lineno}: not JSON (column {error.colno}): {error.msg}; expected a list "
        f"of {EXPECTED_ROW}"
    )


def _not_a_list_message(document: str, path: str | Path) -> str:
    """Why a document that does not begin with "[" is refused; raises if it is not JSON either."""
    start = _skip_whitespace(document, 0)
    if start == len(document):
        return f"{path}: the file is empty, expected a JSON list of {EXPECTED_ROW}"
    value, end = _decode(document, start, path)
    if not isinstance(value, dict):
        return f"{path}: found {describe(value)}, expected a JSON list of {EXPECTED_ROW}"
    if document.startswith("{", _skip_whitespace(document, end)):
        return (
            f"{path}: one object after another (JSON Lines), expected one JSON list: put [ before "
            "the first and ] after the last, and commas between them"
        )
    if {"images", "annotations"} <= value.keys():
        return (
            f"{path}: this looks like COCO's format, expected a JSON list: write one row "
            f'{EXPECTED_ROW} for each of "annotations", with its "caption" as the text and the '
            '"file_name" of its image'
        )
    return f"{path}: an object with the keys {_keys(value)}, expected a JSON list of {EXPECTED_ROW}"
