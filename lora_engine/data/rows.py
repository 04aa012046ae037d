"""What a data source yields: items and problems, and how messages show them.

A format (formats/) yields an `Item` for each image with its captions as they are written, and a
`Problem` for what cannot be used. `as_item` and `find_fields` choose the fields of formats whose
records have names; `caption_complaint` and `image_complaint` say what makes an item unusable.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PYTHON_ROWS = "the rows"  # what messages call rows from Python, in place of a path
EXPECTED_ROW = '{"text": "a caption", "image": "path/of/its/image.jpg"}'
MAX_ROWS_SHOWN = 5
MAX_KEYS_SHOWN = 8
MAX_CAPTION_CHARS = 100_000
SURROGATE = re.compile("[\ud800-\udfff]")

# Names of fields, in the order of precedence within a list of names.
CAPTION_FIELDS = (
    "text", "caption", "captions", "texts", "title", "comment", "sentences", "raw", "references",
)
IMAGE_FIELDS = (
    "image", "file_name", "filename", "filepath", "file_path", "image_path", "image_name", "path",
    "jpg", "png",
)
SPLIT_FIELDS = ("split",)


class AnnotationError(ValueError):
    """A data source that cannot be used; the message starts with path: or path:line:."""


@dataclass(frozen=True)
class SourceOptions:
    """How to read a data source where its content does not determine it.

    format: the name of a format, or "auto".
    image_field, caption_field: names of the fields (columns, keys) to read.
    image_root: the folder that image paths are relative to; by default found from the source.
    """

    format: str = "auto"
    image_field: str | None = None
    caption_field: str | None = None
    image_root: str | None = None


class Member(NamedTuple):
    """An image inside its source file.

    `name` identifies it in the file, for messages: "000000012.jpg", "row 12". In tar and Arrow
    files, the image is `size` bytes at `offset`; in Parquet, row `size` of row group `offset`.
    """

    name: str
    offset: int
    size: int


class Item(NamedTuple):
    """An image and its captions as they are written.

    where: line or row number in the source file, counted from 1; or the name of a member.
    image: a path, absolute or relative to the folder of images, or a member of the source file.
    id: the image's number in the source, for results in the source's own format.
    """

    where: int | str
    image: Any  # str or Member; other values are a complaint
    captions: Sequence[Any]  # strings; other values are a complaint
    split: str = ""
    id: int | str | None = None


class Problem(NamedTuple):
    """What cannot be used, and why; `where` as in `Item`, or "" for the file as a whole.

    num_rows: how many rows are lost, as far as that can be told.
    is_cut_off: the file ends too early, so that nobody knows how many rows are lost.
    """

    where: int | str
    reason: str
    num_rows: int = 1
    is_cut_off: bool = False


class Row(NamedTuple):
    """One caption and the name of its image; an image with five captions has five rows."""

    text: str
    image: str


class BadRow(NamedTuple):
    """A row that is skipped: its location, as path:line, path/member or row N, and the reason."""

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


# --- choosing fields ------------------------------------------------------------------------


class Fields(NamedTuple):
    """The names of the fields to read; `split` is None if there is none."""

    image: str
    caption: str
    split: str | None


def find_fields(
    names: Collection[str], options: SourceOptions, *, path: str, what: str = "columns"
) -> Fields:
    """Choose the image, caption and split fields by their names.

    Raises AnnotationError, with the flag to give, if a field is missing, or if several columns may
    be the captions or the images; a column "image" is that of the images.
    """
    candidates = {
        "image": (("image",) if "image" in names else IMAGE_FIELDS, options.image_field),
        "caption": (CAPTION_FIELDS, options.caption_field),
    }
    found = {}
    for kind, (known, asked) in candidates.items():
        name = find_field(kind, known, names, asked, path=path, what=what)
        if name is None:
            shown = ", ".join(list(names)[:MAX_KEYS_SHOWN]) or "none"
            raise AnnotationError(
                f"{path}: none of the {what} ({shown}) is known to hold the {kind}s; name it with "
                f"--{kind}_field"
            )
        found[kind] = name
    return Fields(**found, split=next((name for name in SPLIT_FIELDS if name in names), None))


def find_field(
    kind: str,
    known: Collection[str],
    names: Collection[str],
    asked: str | None,
    *,
    path: str,
    what: str = "columns",
) -> str | None:
    """The one that is `asked` for or has a known name; None if there is none.

    Raises AnnotationError, with the flag to give, if what is asked for is missing, or if several
    have known names.
    """
    if asked is not None:
        if asked not in names:
            shown = ", ".join(list(names)[:MAX_KEYS_SHOWN]) or "none"
            raise AnnotationError(f"{path}: --{kind}_field is {asked}, but the {what} are {shown}")
        return asked
    found = [name for name in names if name.lower() in known]
    if len(found) > 1:
        raise AnnotationError(
            f"{path}: the {what} {' and '.join(found)} could both be the {kind}s; choose one with "
            f"--{kind}_field"
        )
    return found[0] if found else None


def as_item(value: Any, where: int | str, options: SourceOptions) -> Item | Problem:
    """The item of a JSON object; captions may be one string, a list of them, or of {"raw": ...}."""
    if not isinstance(value, dict):
        return Problem(where, f"found {shown_value(value)}, expected an object like {EXPECTED_ROW}")
    caption_field = options.caption_field or _first(value, CAPTION_FIELDS)
    image_field = options.image_field or _first(value, IMAGE_FIELDS)
    for field in (caption_field, image_field):
        if field not in value:
            return Problem(
                where,
                f'no "{field}" among its keys ({shown_keys(value)}): add it, or give the name of '
                f'the key that holds it with --{"image" if field == image_field else "caption"}'
                f"_field",
            )
    captions = value[caption_field]
    if not isinstance(captions, list):
        captions = [captions]
    elif not captions:
        return Problem(where, f'"{caption_field}" is an empty list: fill it in or remove the row')
    captions = [
        caption["raw"] if isinstance(caption, dict) and "raw" in caption else caption
        for caption in captions
    ]
    split = value.get("split", "")
    return Item(where, value[image_field], captions, split if isinstance(split, str) else "")


def _first(value: Mapping[str, Any], fields: Sequence[str]) -> str:
    for field in fields:
        if field in value:
            return field
    return fields[0]


# --- what makes an item unusable --------------------------------------------------------------


def caption_complaint(caption: Any) -> str | None:
    """What is wrong with a caption, and how to fix it; None for a usable one."""
    if caption is None:
        return "the caption is missing: fill it in or remove the row"
    if not isinstance(caption, str):
        return f"the caption is {shown_value(caption)}, expected a string"
    if not caption.strip():
        return "the caption is empty: fill it in or remove the row"
    if len(caption) > MAX_CAPTION_CHARS:
        return (
            f"the caption has {len(caption):,} characters, at most {MAX_CAPTION_CHARS:,} are "
            f"accepted: is it the right field?"
        )
    if not caption.isascii() and SURROGATE.search(caption):
        return "the caption is not valid Unicode (not UTF-8, or half of a UTF-16 pair)"
    return None


def image_complaint(image: Any) -> str | None:
    """What is wrong with the path of an image, and how to fix it; None for a usable one."""
    if isinstance(image, Member):
        return None
    if not isinstance(image, str):
        return f"the image is {shown_value(image)}, expected the path of a file"
    if not image.strip():
        return "the image is empty: fill it in or remove the row"
    if "://" in image:
        return (
            "the image is a web address: download it (lora_engine download), and give the path of "
            "the file"
        )
    return None


def location(path: str, line: int) -> str:
    """Where a row is, for messages."""
    return f"row {line}" if path == PYTHON_ROWS else f"{path}:{line}"


def shown_value(value: Any) -> str:
    """A value as JSON, cut to 40 characters."""
    shown = json.dumps(value, default=lambda other: f"<{type(other).__name__}>")
    return shown if len(shown) <= 40 else shown[:37] + "..."


def shown_keys(value: Mapping[str, Any]) -> str:
    """An object's first few keys, for an error message."""
    return ", ".join(map(shown_value, list(value)[:MAX_KEYS_SHOWN])) or "none"
