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

from lora_engine.annotations import AnnotationError, read_annotations, read_text


@dataclass(frozen=True)
class Referenced:
    """An image, what the annotation file calls it, and the captions that people wrote of it."""

    id: Any
    image: str
    references: list[str] = field(default_factory=list)


def read_references(
    path: str | Path, *, image_folder: str | Path | None = None
) -> list[Referenced]:
    """Every image of a file once, in the file's order, with all of its captions.

    `image_folder` is where COCO's file names lie; by default beside the file. Our own format has no
    ids: there the image's path is one, relative to the file where it lies below that.

    Raises AnnotationError for a file that cannot be used, and in COCO's format for an image without
    a caption, a caption of an unknown image and an empty one.
    """
    document = _coco_document(path)
    if document is not None:
        return _read_coco(document, path, image_folder or os.path.dirname(path))
    if image_folder is not None:
        raise AnnotationError(f"{path}: an image folder is for COCO's format; this file has paths")
    folder = os.path.realpath(os.path.dirname(path))
    found: dict[str, Referenced] = {}
    for row in read_annotations(path):
        name = os.path.relpath(row.image, folder)
        name = row.image if name.startswith(os.pardir) else name
        found.setdefault(row.image, Referenced(name, row.image)).references.append(row.text)
    return list(found.values())


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
) -> list[Referenced]:
    folder = os.path.realpath(folder)
    found: dict[Any, Referenced] = {}
    for number, image in enumerate(_objects(document, "images", ("id", "file_name"), path)):
        name = image["file_name"]
        if not isinstance(name, str) or not isinstance(image["id"], (int, str)):
            raise AnnotationError(
                f"{path}: image {number} of \"images\" has the id {image['id']!r} and the "
                f"file_name {name!r}; expected a number and a text"
            )
        if image["id"] in found:
            raise AnnotationError(f"{path}: two of \"images\" have the id {image['id']!r}")
        found[image["id"]] = Referenced(image["id"], os.path.normpath(os.path.join(folder, name)))
    for number, row in enumerate(_objects(document, "annotations", ("image_id", "caption"), path)):
        text = row["caption"]
        if row["image_id"] not in found:
            raise AnnotationError(
                f"{path}: annotation {number} is of image_id {row['image_id']!r}, which is not "
                f"among the \"images\""
            )
        if not isinstance(text, str) or not text.strip():
            raise AnnotationError(
                f"{path}: the caption of annotation {number} is {text!r}: fill it in or remove it"
            )
        found[row["image_id"]].references.append(text.strip())
    bare = [image.image for image in found.values() if not image.references]
    if bare or not found:
        what = f"{len(bare):,} images have no caption, first {bare[0]}" if bare else "no images"
        raise AnnotationError(f"{path}: {what}; each image needs one to be scored against")
    return list(found.values())


def _objects(
    document: Mapping[str, Any], name: str, keys: tuple[str, str], path: str | Path
) -> list[Mapping[str, Any]]:
    values = document[name]
    if not isinstance(values, list):
        raise AnnotationError(f"{path}: \"{name}\" is no list")
    for number, value in enumerate(values):
        if not isinstance(value, dict) or not value.keys() >= set(keys):
            raise AnnotationError(
                f"{path}: item {number} of \"{name}\" lacks {' or '.join(map(repr, keys))}"
            )
    return values
