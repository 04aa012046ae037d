"""A JSON list of objects, such as {"text": caption, "image": path}; other keys are ignored."""

import json
from collections.abc import Iterator
from typing import Any

from lora_engine.data.formats.text_files import decode_json, not_json, read_text, skip_whitespace
from lora_engine.data.formats.text_heads import text_format
from lora_engine.data.rows import (
    EXPECTED_ROW,
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    as_item,
    shown_keys,
    shown_value,
)

EXPECTED = f"a list of {EXPECTED_ROW}"


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "json_list"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per object of the list; `where` is the line in which the object begins.

    Objects are decoded one at a time: a million of them would take more memory than the file.
    Raises AnnotationError where the file is not a JSON list, and for an empty list.
    """
    document = read_text(path)
    line, counted = 1, None
    for offset, value in _values(document, path):
        line += document.count("\n", counted or 0, offset)
        counted = offset
        yield as_item(value, line, options)
    if counted is None:
        raise AnnotationError(f"{path}: an empty list, expected at least one {EXPECTED_ROW}")


def _values(document: str, path: str) -> Iterator[tuple[int, Any]]:
    """(offset, value) of each element of the list."""
    position = skip_whitespace(document, 0)
    if not document.startswith("[", position):
        raise AnnotationError(_not_a_list_message(document, path))
    position = skip_whitespace(document, position + 1)
    is_open = not document.startswith("]", position)
    while is_open:
        value, end = decode_json(document, position, path, expected=EXPECTED)
        yield position, value
        position = skip_whitespace(document, end)
        is_open = document.startswith(",", position)
        if is_open:
            position = skip_whitespace(document, position + 1)
        elif not document.startswith("]", position):
            error = json.JSONDecodeError("Expecting ',' or ']'", document, position)
            raise not_json(error, path, expected=EXPECTED)
    position = skip_whitespace(document, position + 1)
    if position != len(document):
        error = json.JSONDecodeError("Extra data after the list", document, position)
        raise not_json(error, path, expected=EXPECTED)


def _not_a_list_message(document: str, path: str) -> str:
    """Why a document that does not begin with "[" is refused; raises if it is not JSON either."""
    start = skip_whitespace(document, 0)
    if start == len(document):
        return f"{path}: the file is empty, expected a JSON list of {EXPECTED_ROW}"
    value, _ = decode_json(document, start, path, expected=EXPECTED)
    found = shown_value(value)
    if isinstance(value, dict):
        found = f"an object with the keys {shown_keys(value)}"
    return f"{path}: found {found}, expected a JSON list of {EXPECTED_ROW}"
