"""One row of an annotation file: its fields, what makes it unusable, and how errors show it."""

import json
import re
from typing import Any, NamedTuple

EXPECTED_ROW = '{"text": "a caption", "image": "path/of/its/image.jpg"}'
MAX_ROWS_SHOWN = 5
MAX_KEYS_SHOWN = 8
SURROGATE = re.compile("[\ud800-\udfff]")


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message starts with path: or path:line:."""


class Row(NamedTuple):
    """One caption and its image; an image with five captions has five rows."""

    text: str
    image: str


class BadRow(NamedTuple):
    """A row that is skipped: its location, as path:line, and the reason."""

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


class CheckedRow(NamedTuple):
    """A row and its location, counted from 1; `row` is None if there is a `complaint`."""

    number: int
    line: int
    row: Row | None
    complaint: str = ""


def row_complaint(value: Any) -> str | None:
    """What is wrong with a row, what was expected and how to fix it; None for a usable row."""
    if not isinstance(value, dict):
        return f"found {shown_value(value)}, expected an object like {EXPECTED_ROW}"
    for key in Row._fields:
        if key not in value:
            found = shown_keys(value)
            return f'no "{key}" among its keys ({found}): add it, or rename the key that holds it'
        content = value[key]
        if not isinstance(content, str):
            return f'"{key}" is {shown_value(content)}, expected one string'
        if not content.strip():
            return f'"{key}" is empty: fill it in or remove the row'
    if "://" in value["image"]:
        return '"image" is a web address: download the image and give the path of the file'
    if not value["text"].isascii() and SURROGATE.search(value["text"]):
        return '"text" holds half of a UTF-16 pair (\\ud800 to \\udfff alone): fix the caption'
    return None


def shown_value(value: Any) -> str:
    """A value as JSON, cut to 40 characters."""
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def shown_keys(value: dict[str, Any]) -> str:
    """An object's first few keys, for an error message."""
    return ", ".join(map(shown_value, list(value)[:MAX_KEYS_SHOWN])) or "none"
