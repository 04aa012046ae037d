"""The report's gallery: validation images with their captions, as cards."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from PIL import Image

from lora_engine.data.images import ImageError, open_image
from lora_engine.data.read_pairs import read_by_name
from lora_engine.data.sampling import evenly_spaced
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.run_facts import figure
from lora_engine.report.run_record import CaptionedImage

# Together these bound the size of a report: 48 images of 40 kB are 2.6 MB in base64.
MAX_IMAGES = 48
GROUP_SIZE = 8
MAX_THUMBNAIL_BYTES = 40_000
THUMBNAIL_SIZE = 320  # longer edge, in pixels
MAX_REFERENCES = 5
MAX_CAPTION_LENGTH = 400  # characters


def gallery(
    names: Sequence[Markup],
    runs: Sequence[Sequence[CaptionedImage]],
    thumbnail: Callable[[str], Markup],
) -> list[Markup]:
    """Cards of images that all `runs` captioned, at most MAX_IMAGES of them.

    First come the captions of a single run whose CIDEr-D has changed most, or the images on which
    several runs differ most; then, folded, a sample of all others. Without them the sample is
    shown. `thumbnail` gives an image's `<img>`, and raises ImageError.
    """
    by_path = [{image.image: image for image in images} for images in runs]
    rows = [
        [images[path] for images in by_path]
        for path in by_path[0] if all(path in images for images in by_path)
    ]

    def cards(rows: Sequence[Sequence[CaptionedImage]]) -> Markup:
        return tag("div", *(_card(names, row, thumbnail) for row in rows), class_="cards")

    groups = _most_changed(rows) if len(runs) == 1 else _most_different(rows)
    parts = []
    for title, group in groups.items():
        parts += [tag("h3", title), cards(group)] if group else []
    shown = {row[0].image for group in groups.values() for row in group}
    others = [row for row in rows if row[0].image not in shown]
    sample = [others[i] for i in evenly_spaced(len(others), MAX_IMAGES - len(shown))]
    if not shown and sample:
        parts.append(cards(sample[:GROUP_SIZE]))
        sample = sample[GROUP_SIZE:]
    if sample:
        title = f"{len(sample)} other images"
        if MAX_IMAGES < len(rows):
            title += f", a sample of all {len(rows):,}"
        parts.append(tag("details", tag("summary", title), cards(sample)))
    return parts


def _most_changed(rows: list[list[CaptionedImage]]) -> dict[str, list[list[CaptionedImage]]]:
    changes = sorted(
        (change, index) for index, (image,) in enumerate(rows)
        if (change := image.change) is not None
    )
    return {
        "Most improved": [rows[i] for change, i in changes[::-1] if change > 0][:GROUP_SIZE],
        "Most worsened": [rows[i] for change, i in changes if change < 0][:GROUP_SIZE],
    }


def _most_different(rows: list[list[CaptionedImage]]) -> dict[str, list[list[CaptionedImage]]]:
    found = []
    for row in rows:
        scores = [image.cider_d_after for image in row if image.cider_d_after is not None]
        if len(scores) == len(row) and min(scores) < max(scores):
            found.append((max(scores) - min(scores), row))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return {"Where CIDEr-D differs most": [row for _, row in found[: 2 * GROUP_SIZE]]}


def thumbnail(path: str, read: Callable[[str], bytes] = read_by_name) -> Markup:
    """An embedded thumbnail of the image with this name; raises ImageError."""
    image = open_image(read(path))
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.info.clear()  # a JPEG's comment would be saved, too
    encoded = base64.b64encode(_jpeg(image)).decode()
    return tag("img", src=f"data:image/jpeg;base64,{encoded}", alt=_name(path))


def _jpeg(image: Image.Image) -> bytes:
    for quality in (80, 60, 40, 20):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return file.getvalue()


def _card(
    names: Sequence[Markup],
    row: Sequence[CaptionedImage],
    thumbnail: Callable[[str], Markup],
) -> Markup:
    """One image with the captions of every run."""
    image, name = row[0], _name(row[0].image)
    try:
        picture = thumbnail(image.image)
    except ImageError as error:
        picture = tag("div", tag("span", name), tag("span", error.reason), class_="missing")
    references = image.references[:MAX_REFERENCES]
    entries = [tag("dt", "Reference" if len(references) == 1 else "References")]
    entries += [tag("dd", _shortened(reference), dir="auto") for reference in references]
    if len({other.before for other in row}) == 1:  # runs that start from the same captioner
        entries += _entry("Before training", image.before, image.cider_d_before, image.after)
    else:
        for label, other in zip(names, row):
            entries += _entry(
                join([label, ", before"]), other.before, other.cider_d_before, other.after
            )
    for label, other in zip(names, row):
        entries += _entry(label, other.after, other.cider_d_after, other.before, is_new=True)
    return tag(
        "article", picture, tag("p", name, class_="name"), tag("dl", *entries), class_="card"
    )


def _entry(
    label: Markup | str,
    caption: str | None,
    score: float | None,
    other: str | None,
    *,
    is_new: bool = False,
) -> list[Markup]:
    """A caption, with the words marked that the `other` one lacks."""
    if caption is None:
        return []
    shown = [] if score is None else [tag("span", f"CIDEr-D {figure(score)}", class_="score")]
    text = _marked(caption, other, "new" if is_new else "old")
    return [tag("dt", label, *shown), tag("dd", text, dir="auto")]


def _marked(caption: str, other: str | None, style: str) -> Markup | str:
    if other is None:
        return _shortened(caption)
    words, others = _shortened(caption).split(), _shortened(other).split()
    parts: list[Markup | str] = []
    for kind, _, _, begin, end in SequenceMatcher(None, others, words, False).get_opcodes():
        if begin < end:
            text = " ".join(words[begin:end])
            parts += [" ", text if kind == "equal" else tag("mark", text, class_=style)]
    return join(parts[1:])


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CAPTION_LENGTH else text[:MAX_CAPTION_LENGTH] + " …"


def _name(path: str) -> str:
    return os.path.basename(path) or path
