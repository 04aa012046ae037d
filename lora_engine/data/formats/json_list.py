"""A JSON list of {"text": caption, "image": path}; other keys are ignored."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_engine.data.rows import EXPECTED_ROW, AnnotationError, as_item, shown_keys, shown_value

DECODER = json.JSONDecoder()
WHITESPACE = re.compile(r"[ \t\n\r]*")  # JSON's


def json_list_items(document: str, path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item of the list, lines counted from 1; `path` is for messages.

    One item at a time: a million rows as dicts would take more memory than the file and the rows.
    Raises AnnotationError where the document is not a JSON list.
    """
    line, counted = 1, 0
    for offset, value in _items(document, path):
        line += document.count("\n", counted, offset)
        counted = offset
        yield line, value


def _items(document: str, path: str | Path) -> Iterator[tuple[int, Any]]:
    """(offset, value) of each item."""
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
        line = document.count("\n", 0, position) + 1
        raise AnnotationError(f"{path}:{line}: JSON that cannot be read: {error}") from None


def _skip_whitespace(document: str, position: int) -> int:
    match = WHITESPACE.match(document, position)
    assert match is not None  # it also matches nothing at all
    return match.end()


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
        return f"{path}: found {shown_value(value)}, expected a JSON list of {EXPECTED_ROW}"
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
    return (
        f"{path}: an object with the keys {shown_keys(value)}, expected a JSON list of "
        f"{EXPECTED_ROW}"
    )

def read(path, options):
    document = Path(path).read_text(encoding="utf-8-sig")
    n=0
    for line, value in json_list_items(document, path):
        n+=1
        yield as_item(value, line, options)
    if not n:
        raise AnnotationError(f"{path}: an empty list, expected at least one {EXPECTED_ROW}")
