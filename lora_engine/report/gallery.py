"""The report's gallery: validation images with their captions, as cards."""

import base64
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lora_engine.data.images import ImageError, open_image
from lora_engine.data.read_pairs import read_by_name
from lora_engine.data.sampling import evenly_spaced
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.run_record import CaptionedImage

# Together these bound the size of a report: 48 images of 40 kB are 2.6 MB in base64.
MAX_IMAGES = 48
MAX_THUMBNAIL_BYTES = 40_000
THUMBNAIL_SIZE = 320  # longer edge, in pixels
MAX_REFERENCES = 5
MAX_CAPTION_LENGTH = 400  # characters


def gallery(names: Sequence[Markup], runs: Sequence[Sequence[CaptionedImage]]) -> list[Markup]:
    """Cards of images that all `runs` captioned, at most MAX_IMAGES of them.

    First come the best and the worst captions by CIDEr-D of a single run, or the images on which
    several runs differ most, then a sample of all others. Without scores there is only the sample.
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
    groups["Other images" if special else ""] = [
        others[i] for i in evenly_spaced(len(others), MAX_IMAGES - len(special))
    ]
    parts = []
    for title, group in groups.items():
        if title and group:
            parts.append(tag("h3", title))
        if group:
            parts.append(tag("div", *(_card(names, row) for row in group), class_="cards"))
    return parts


def thumbnail(path: str) -> Markup:
    """An embedded thumbnail, or the name of an image that cannot be read and the reason."""
    name = os.path.basename(path) or path
    try:
        image = open_image(read_by_name(path))
    except ImageError as error:
        return tag("div", tag("span", name), tag("span", error.reason), class_="missing")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.info.clear()  # a JPEG's comment would be saved, too
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


def _card(names: Sequence[Markup], row: Sequence[CaptionedImage]) -> Markup:
    """One image with the captions of every run."""
    image = row[0]
    references = image.references[:MAX_REFERENCES]
    entries = [tag("dt", "Reference" if len(references) == 1 else "References")]
    entries += [_caption(reference) for reference in references]
    if len({other.before for other in row}) == 1:  # runs that start from the same captioner
        entries += _entry("Before", image.before, image.cider_d_before)
    else:
        for name, other in zip(names, row):
            entries += _entry(join([name, ", before"]), other.before, other.cider_d_before)
    for name, other in zip(names, row):
        label = "After" if len(row) == 1 else name
        entries += _entry(label, other.after, other.cider_d_after)
    return tag(
        "article",
        thumbnail(image.image),
        tag("p", os.path.basename(image.image) or image.image, class_="name"),
        tag("dl", *entries),
        class_="card",
    )


def _entry(label: Markup | str, caption: str | None, score: float | None) -> list[Markup]:
    if caption is None:
        return []
    shown = [] if score is None else [tag("span", f"CIDEr-D {score:.2f}", class_="score")]
    return [tag("dt", label, *shown), _caption(caption)]


def _caption(text: str) -> Markup:
    """A caption in its own writing direction, shortened if it is very long."""
    shown = text if len(text) <= MAX_CAPTION_LENGTH else text[:MAX_CAPTION_LENGTH] + " …"
    return tag("dd", shown, dir="auto")
