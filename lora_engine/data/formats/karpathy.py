"""Karpathy's splits of COCO, Flickr8k and Flickr30k (https://arxiv.org/abs/1412.2306).

One object: "images", each with a "filename", perhaps a "filepath" (its folder), a "split", and
"sentences", each with its text as "raw".
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lora_engine.data.formats.text_files import read_json
from lora_engine.data.formats.text_heads import text_format
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    as_item,
    shown_value,
)

EXPECTED = 'an object with "images", each with "filename" and "sentences"'


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "karpathy"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per image, with all its captions, its split, and "cocoid" or "imgid" as its id.

    `where` is the position in the list, counted from 0: item 3 of "images". Raises AnnotationError
    where "images" is not a list, or empty.
    """
    document = read_json(path, expected=EXPECTED)
    images = document.get("images") if isinstance(document, dict) else document
    if not isinstance(images, list) or not images:
        raise AnnotationError(f"{path}: found {shown_value(images)} as images, expected {EXPECTED}")
    options = dataclasses.replace(
        options,
        image_field=options.image_field or "filename",
        caption_field=options.caption_field or "sentences",
    )
    for number, image in enumerate(images):
        item = as_item(image, f'item {number} of "images"', options)
        yield _with_folder(item, image) if isinstance(item, Item) else item


def _with_folder(item: Item, image: dict[str, Any]) -> Item:
    """An item with its folder before the file name, and with its id."""
    folder, name = image.get("filepath"), item.image
    if folder and isinstance(folder, str) and isinstance(name, str):
        name = f"{folder}/{name}"
    number = image.get("cocoid", image.get("imgid"))
    return item._replace(image=name, id=number if isinstance(number, (int, str)) else None)
