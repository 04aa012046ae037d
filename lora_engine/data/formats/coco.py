"""COCO's captions (https://cocodataset.org/#format-data), which `lora_engine evaluate` reads.

One object: "images", each with an "id" and a "file_name", and "annotations", each with an
"image_id" and a "caption".
"""

import json
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_engine.data.rows import AnnotationError, BadRow, shown_value


class CocoImage(NamedTuple):
    """An image file, and its location in the annotation file for messages."""

    location: str
    path: str


class CocoCaption(NamedTuple):
    """A caption as it is written, and its location in the annotation file for messages."""

    location: str
    image_id: int | str
    text: str


class CocoCaptions(NamedTuple):
    """What a file holds: images by id, captions in the file's order, and unusable items."""

    images: dict[int | str, CocoImage]
    captions: list[CocoCaption]
    bad: list[BadRow]


def coco_document(text: str) -> Mapping[str, Any] | None:
    """The object of a COCO file; None for other files, whose own reader names their errors."""
    if not re.match(r"\s*{", text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if {"images", "annotations"} <= value.keys() else None


def read_coco(
    document: Mapping[str, Any], path: str | Path, image_folder: str | Path
) -> CocoCaptions:
    """Read the object of the file `path`, whose file names are relative to `image_folder`.

    Raises AnnotationError where "images" or "annotations" is not a list.
    """
    folder = os.path.realpath(image_folder)
    found = CocoCaptions({}, [], [])
    for location, image in _items(document, "images", path):
        reason = _image_complaint(image, found.images)
        if reason is None:
            name = os.path.normpath(os.path.join(folder, image["file_name"]))
            found.images[image["id"]] = CocoImage(location, name)
        else:
            found.bad.append(BadRow(location, reason))
    for location, row in _items(document, "annotations", path):
        reason = _caption_complaint(row, found.images)
        if reason is None:
            found.captions.append(CocoCaption(location, row["image_id"], row["caption"]))
        else:
            found.bad.append(BadRow(location, reason))
    return found


def _items(document: Mapping[str, Any], name: str, path: str | Path) -> list[tuple[str, Any]]:
    """(location, value) of each item of a list, counted from 0."""
    values = document[name]
    if not isinstance(values, list):
        raise AnnotationError(f"{path}: \"{name}\" is not a list")
    return [(f'{path}: item {number} of "{name}"', value) for number, value in enumerate(values)]


def _image_complaint(image: Any, ids: Container[Any]) -> str | None:
    if not isinstance(image, dict) or not image.keys() >= {"id", "file_name"}:
        return "lacks 'id' or 'file_name'"
    if not isinstance(image["file_name"], str) or not isinstance(image["id"], (int, str)):
        return (
            f"has the id {shown_value(image['id'])} and the file_name "
            f"{shown_value(image['file_name'])}; expected a number and a string"
        )
    return f"has the id {shown_value(image['id'])} of another image" if image["id"] in ids else None


def _caption_complaint(row: Any, ids: Container[Any]) -> str | None:
    if not isinstance(row, dict) or not row.keys() >= {"image_id", "caption"}:
        return "lacks 'image_id' or 'caption'"
    if not isinstance(row["image_id"], (int, str)) or row["image_id"] not in ids:
        return f"has the image_id {shown_value(row['image_id'])}, which is not among the \"images\""
    if not isinstance(row["caption"], str):
        return f"has the caption {shown_value(row['caption'])}; expected a string"
    return None
