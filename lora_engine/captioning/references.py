"""Images and all references that an annotation file has of them: our format, or COCO's.

COCO's captions (https://cocodataset.org/#format-data) are one object: "images", each with an "id"
and a "file_name", and "annotations", each with an "image_id" and a "caption".
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.data.annotations import (
    AnnotationError,
    BadRow,
    bad_row,
    checked_rows,
    describe,
    read_text,
)


@dataclass(frozen=True)
class Referenced:
    """An image, what the annotation file calls it, and the captions that people wrote of it."""

    id: Any
    image: str
    references: list[str] = field(default_factory=list)


def read_references(
    path: str | Path, *, image_folder: str | Path | None = None
) -> tuple[list[Referenced], list[BadRow]]:
    """Every image of a file once, in the file's order, with all of its captions; and the rows that
    cannot be used or have no words to score against.

    `image_folder` is where COCO's file names lie; by default beside the file. Our own format has no
    ids: there the image's path is one, relative to the file where it lies below that.

    Raises AnnotationError for a file that cannot be used, or has no row that can.
    """
    document = _coco_document(path)
    if document is not None:
        images, bad = _read_coco(document, path, image_folder or os.path.dirname(path))
    elif image_folder is not None:
        raise AnnotationError(f"{path}: an image folder is for COCO's format; this file has paths")
    else:
        images, bad = _read_rows(path)
    if not images:
        first = f", first {bad[0]}" if bad else ""
        raise AnnotationError(f"{path}: no image with a caption to score against{first}")
    return images, bad


def _read_rows(path: str | Path) -> tuple[list[Referenced], list[BadRow]]:
    folder = os.path.realpath(os.path.dirname(path))
    found: dict[str, Referenced] = {}
    bad: list[BadRow] = []
    for checked in checked_rows(path):
        row = checked.row
        if isinstance(row, str):
            bad.append(bad_row(path, checked))
        elif not has_words(row.text):
            bad.append(bad_row(path, checked._replace(row='"text" has no words to compare')))
        else:
            name = os.path.relpath(row.image, folder)
            name = row.image if name.startswith(os.pardir) else name
            found.setdefault(row.image, Referenced(name, row.image)).references.append(row.text)
    return list(found.values()), bad


def _coco_document(path: str | Path) -> Mapping[str, Any] | None:
    """The file's object if it is one of COCO's; what is wrong with others is said elsewhere."""
    text = read_text(path)
    if not re.match(r"\s*{", text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if {"images", "annotations"} <= value.keys() else None


def _read_coco(
    document: Mapping[str, Any], path: str | Path, folder: str | Path
) -> tuple[list[Referenced], list[BadRow]]:
    folder = os.path.realpath(folder)
    found: dict[Any, Referenced] = {}
    places: dict[Any, str] = {}
    bad: list[BadRow] = []
    for place, image in _items(document, "images", path):
        reason = _image_complaint(image, found)
        if reason is not None:
            bad.append(BadRow(place, reason))
            continue
        name = os.path.normpath(os.path.join(folder, image["file_name"]))
        found[image["id"]] = Referenced(image["id"], name)
        places[image["id"]] = place
    for place, row in _items(document, "annotations", path):
        reason = _caption_complaint(row, found)
        if reason is not None:
            bad.append(BadRow(place, reason))
            continue
        found[row["image_id"]].references.append(row["caption"].strip())
    bad += [
        BadRow(places[image.id], f"{image.image} has no caption to score against")
        for image in found.values() if not image.references
    ]
    return [image for image in found.values() if image.references], bad


def _items(document: Mapping[str, Any], name: str, path: str | Path) -> list[tuple[str, Any]]:
    """(place, value) of each item of a list, counted from 0."""
    values = document[name]
    if not isinstance(values, list):
        raise AnnotationError(f"{path}: \"{name}\" is no list")
    return [(f'{path}: item {number} of "{name}"', value) for number, value in enumerate(values)]


def _image_complaint(image: Any, found: Mapping[Any, Referenced]) -> str | None:
    if not isinstance(image, dict) or not image.keys() >= {"id", "file_name"}:
        return "lacks 'id' or 'file_name'"
    if not isinstance(image["file_name"], str) or not isinstance(image["id"], (int, str)):
        return (
            f"has the id {describe(image['id'])} and the file_name "
            f"{describe(image['file_name'])}; expected a number and a text"
        )
    return f"has the id {describe(image['id'])} of another" if image["id"] in found else None


def _caption_complaint(row: Any, found: Mapping[Any, Referenced]) -> str | None:
    if not isinstance(row, dict) or not row.keys() >= {"image_id", "caption"}:
        return "lacks 'image_id' or 'caption'"
    if not isinstance(row["image_id"], (int, str)) or row["image_id"] not in found:
        return f"is of image_id {describe(row['image_id'])}, which is not among the \"images\""
    if not isinstance(row["caption"], str):
        return f"has the caption {describe(row['caption'])}; expected a text"
    return None if has_words(row["caption"]) else f"has no words: {describe(row['caption'])}"
