"""Validation images beside their captions, as cards of the report."""

import base64
import io
import os
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from lora_engine.data.images import ImageError, open_image
from lora_engine.report.markup import Markup, join, tag
from lora_engine.report.run_record import CaptionedImage

# Together these bound a report: 48 images of 40 kB are 2.6 MB as text.
MAX_IMAGES = 48
MAX_THUMBNAIL_BYTES = 40_000
THUMBNAIL_SIZE = 320  # longer edge, in pixels
MAX_REFERENCES = 5
MAX_LETTERS = 400

T = TypeVar("T")


def gallery(names: Sequence[Markup], runs: Sequence[Sequence[CaptionedImage]]) -> list[Markup]:
    """Cards of the images that all `runs` captioned, some MAX_IMAGES of them.

    By CIDEr-D: the best and the worst captions of a single run, and where several differ most;
    beside them others, spread over all. Without scores the others are all.
    """
    by_path = [{image.image: image for image in images} for images in runs]
    rows = [
        [images[path] for images in by_path]
        for path in by_path[0] if all(path in images for images in by_path)
    ]
    scored = [row for row in rows if all(image.cider_d_after is not None for image in row)]
    if len(runs) == 1:
        ranked = sorted(scored, key=lambda row: _scores(row)[0], reverse=True)
        count = min(MAX_IMAGES // 4, len(scored) // 3)
        groups = {
            "Best captions by CIDEr-D": ranked[:count],
            "Worst captions by CIDEr-D": ranked[::-1][:count],
        }
    else:
        ranked = sorted(scored, key=lambda row: np.ptp(_scores(row)), reverse=True)
        groups = {"Where CIDEr-D differs most": ranked[: min(MAX_IMAGES // 2, len(scored) // 2)]}
    special = {row[0].image for group in groups.values() for row in group}
    others = [row for row in rows if row[0].image not in special]
    groups["Other images" if special else ""] = _spread(others, MAX_IMAGES - len(special))
    parts = []
    for title, group in groups.items():
        if title and group:
            parts.append(tag("h3", title))
        if group:
            parts.append(tag("div", *(_card(names, row) for row in group), class_="cards"))
    return parts


def thumbnail(path: str) -> Markup:
    """The image, small and within the page; of one that cannot be read, its name and why."""
    name = os.path.basename(path) or path
    try:
        image = open_image(path)
    except ImageError as error:
        return tag("div", tag("span", name), tag("span", error.reason), class_="missing")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.info.clear()  # a JPEG's comment would travel along
    encoded = base64.b64encode(_jpeg(image)).decode()
    return tag("img", src=f"data:image/jpeg;base64,{encoded}", alt=name)


def _jpeg(image: Image.Image) -> bytes:
    for quality in (80, 60, 40, 20):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return file.getvalue()


def _scores(row: Sequence[CaptionedImage]) -> list[float]:
    return [image.cider_d_after for image in row if image.cider_d_after is not None]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly over all."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[index] for index in chosen]


def _card(names: Sequence[Markup], row: Sequence[CaptionedImage]) -> Markup:
    """One image as every run captioned it."""
    image = row[0]
    references = image.references[:MAX_REFERENCES]
    spoken = [tag("dt", "Reference" if len(references) == 1 else "References")]
    spoken += [_caption(reference) for reference in references]
    if len({other.before for other in row}) == 1:  # runs that start from the same captioner
        spoken += _said("Before", image.before, image.cider_d_before)
    else:
        for name, other in zip(names, row):
            spoken += _said(join([name, ", before"]), other.before, other.cider_d_before)
    for name, other in zip(names, row):
        by = "After" if len(row) == 1 else name
        spoken += _said(by, other.after, other.cider_d_after)
    return tag(
        "article",
        thumbnail(image.image),
        tag("p", os.path.basename(image.image) or image.image, class_="name"),
        tag("dl", *spoken),
        class_="card",
    )


def _said(by: Markup | str, caption: str | None, score: float | None) -> list[Markup]:
    if caption is None:
        return []
    told = [] if score is None else [tag("span", f"CIDEr-D {score:.2f}", class_="score")]
    return [tag("dt", by, *told), _caption(caption)]


def _caption(text: str) -> Markup:
    """Text of a data set: its direction is its own, and its length is bounded."""
    cut = text if len(text) <= MAX_LETTERS else text[:MAX_LETTERS] + " …"
    return tag("dd", cut, dir="auto")
