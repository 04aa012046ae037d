"""The images of an annotation file with their reference captions: our JSON list, or COCO's."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.data.annotations import bad_row, checked_rows, read_text
from lora_engine.data.formats.coco import coco_document, read_coco
from lora_engine.data.rows import AnnotationError, BadRow, shown_value


@dataclass(frozen=True)
class Referenced:
    """An image, its id in the annotation file, and the captions that people wrote for it."""

    id: Any
    image: str
    references: list[str] = field(default_factory=list)


def read_references(
    path: str | Path, *, image_folder: str | Path | None = None
) -> tuple[list[Referenced], list[BadRow]]:
    """Read a file -> (images in the file's order, each once with all its captions; bad rows).

    Rows are bad if they cannot be used, or have no words to score against. `image_folder` is what
    COCO's file names are relative to; by default the file's folder. Our own format has no ids: its
    images are identified by their paths, relative to the file's folder for images below it.

    Raises AnnotationError for a file that cannot be used, or has no usable row.
    """
    document = coco_document(read_text(path))
    if document is not None:
        images, bad = _from_coco(document, path, image_folder or os.path.dirname(path))
    elif image_folder is not None:
        raise AnnotationError(
            f"{path}: an image folder is for COCO's format; this file has image paths"
        )
    else:
        images, bad = _from_rows(path)
    if not images:
        first = f", first {bad[0]}" if bad else ""
        raise AnnotationError(f"{path}: no image with a caption to score against{first}")
    return images, bad


def _from_rows(path: str | Path) -> tuple[list[Referenced], list[BadRow]]:
    folder = os.path.realpath(os.path.dirname(path))
    found: dict[str, Referenced] = {}
    bad: list[BadRow] = []
    for checked in checked_rows(path):
        row = checked.row
        if row is None:
            bad.append(bad_row(path, checked))
        elif not has_words(row.text):
            bad.append(bad_row(path, checked._replace(complaint='"text" has no words to compare')))
        else:
            name = os.path.relpath(row.image, folder)
            name = row.image if name.startswith(os.pardir) else name
            found.setdefault(row.image, Referenced(name, row.image)).references.append(row.text)
    return list(found.values()), bad


def _from_coco(
    document: Mapping[str, Any], path: str | Path, folder: str | Path
) -> tuple[list[Referenced], list[BadRow]]:
    coco = read_coco(document, path, folder)
    found = {id: Referenced(id, image.path) for id, image in coco.images.items()}
    bad = list(coco.bad)
    for caption in coco.captions:
        if has_words(caption.text):
            found[caption.image_id].references.append(caption.text.strip())
        else:
            bad.append(BadRow(caption.location, f"has no words: {shown_value(caption.text)}"))
    bad += [
        BadRow(coco.images[image.id].location, f"{image.image} has no caption to score against")
        for image in found.values() if not image.references
    ]
    return [image for image in found.values() if image.references], bad
