"""The images of a data set with the reference captions that people wrote for them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.data.image_table import ImageTable
from lora_engine.data.pairs import Pairs
from lora_engine.data.rows import AnnotationError, BadRow


@dataclass(frozen=True)
class Referenced:
    """An image, its id in results, and its reference captions."""

    id: Any
    image: str
    references: list[str] = field(default_factory=list)


def references_of(
    pairs: Pairs, name: str, folder: str
) -> tuple[list[Referenced], ImageTable, Sequence[BadRow]]:
    """The images with references, in order of appearance; the table of them; and bad rows.

    Captions without words cannot be scored against and are bad rows, in the source's order. The id
    of an image is the source's own (COCO), else its path, relative to `folder` for images below it.

    Raises AnnotationError if there is no image to score; `name` is that of the source.
    """
    found = [
        Referenced(_id(pairs, image, path, folder), path)
        for image, path in enumerate(pairs.images)
    ]
    bad = list(pairs.bad)
    for row, image in enumerate(pairs.image_of_row.tolist()):
        text = pairs.text(row)
        if has_words(text):
            found[image].references.append(text)
        else:
            reason = f"has no words to compare: {text[:40]!r}" if text else "has no caption"
            bad.append(BadRow(pairs.location(row), reason))
    bad = pairs.in_order(bad)
    chosen = np.flatnonzero([bool(image.references) for image in found])
    if not len(chosen):
        first = f", first {bad[0]}" if bad else ""
        raise AnnotationError(f"{name}: no image with a caption to score against{first}")
    return [found[number] for number in chosen], pairs.images.choose(chosen), bad


def _id(pairs: Pairs, image: int, path: str, folder: str) -> Any:
    number = pairs.image_id(image)
    if number is not None:
        return number
    name = os.path.relpath(path, folder)
    return path if name.startswith(os.pardir) else name
