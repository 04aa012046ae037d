"""COCO's captions (https://cocodataset.org/#format-data).

One object: "images", each with an "id" and a "file_name", and "annotations", each with an
"image_id" and a "caption".
"""

from collections.abc import Collection, Iterator
from typing import Any

from lora_engine.data.formats.text_files import read_json
from lora_engine.data.formats.text_heads import text_format
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    shown_keys,
    shown_value,
)

EXPECTED = 'an object with "images" and "annotations"'


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "coco"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per image, with all its captions (there may be none) and its id.

    `where` is the position in the list, counted from 0: item 3 of "images". Raises AnnotationError
    where "images" or "annotations" is not a list, and for annotations without captions.
    """
    document = read_json(path, expected=EXPECTED)
    images = _list(document, "images", path)
    annotations = _list(document, "annotations", path)
    if not images:
        raise AnnotationError(f'{path}: "images" is an empty list, expected at least one image')
    file_field = options.image_field or "file_name"
    caption_field = options.caption_field or "caption"
    _check_captions(annotations, caption_field, path)
    captions: dict[int | str, list[Any]] = {}  # by the id of the image
    items: list[Item] = []
    for number, image in enumerate(images):
        where = f'item {number} of "images"'
        reason = _image_complaint(image, file_field, captions)
        if reason is None:
            texts = captions[image["id"]] = []
            items.append(Item(where, image[file_field], texts, id=image["id"]))
        else:
            yield Problem(where, reason)
    for number, row in enumerate(annotations):
        reason = _annotation_complaint(row, caption_field, captions)
        if reason is None:
            captions[row["image_id"]].append(row[caption_field])
        else:
            yield Problem(f'item {number} of "annotations"', reason)
    yield from items


def _list(document: Any, name: str, path: str) -> list[Any]:
    if not isinstance(document, dict):
        raise AnnotationError(f"{path}: found {shown_value(document)}, expected {EXPECTED}")
    if not isinstance(document.get(name), list):
        found = shown_value(document[name]) if name in document else "missing"
        raise AnnotationError(f'{path}: "{name}" is not a list but {found}; expected {EXPECTED}')
    return document[name]


def _check_captions(annotations: list[Any], field: str, path: str) -> None:
    """Raises AnnotationError for boxes, keypoints, questions: COCO's other annotation files."""
    first = annotations[0] if annotations else None
    if isinstance(first, dict) and not any(
        isinstance(row, dict) and field in row for row in annotations
    ):
        raise AnnotationError(
            f'{path}: none of "annotations" has a "{field}" (the keys are {shown_keys(first)}): '
            f"give the file with the captions, such as captions_train2017.json, or the name of the "
            f"key with --caption_field"
        )


def _image_complaint(image: Any, field: str, ids: Collection[Any]) -> str | None:
    if not isinstance(image, dict) or not image.keys() >= {"id", field}:
        return f"lacks 'id' or '{field}'"
    if not isinstance(image["id"], (int, str)):
        return f"has the id {shown_value(image['id'])}, expected a number or a string"
    return f"has the id {shown_value(image['id'])} of another image" if image["id"] in ids else None


def _annotation_complaint(row: Any, field: str, ids: Collection[Any]) -> str | None:
    if not isinstance(row, dict) or not row.keys() >= {"image_id", field}:
        return f"lacks 'image_id' or '{field}'"
    if not isinstance(row["image_id"], (int, str)) or row["image_id"] not in ids:
        return f"has the image_id {shown_value(row['image_id'])}, which is not among the \"images\""
    return None
