"""A shard in WebDataset's format, as img2dataset writes it: an uncompressed tar, read in place.

A sample is the members with the same key that follow each other: 0012.jpg, 0012.txt, 0012.json. The
key is the path up to the first dot of the file name; the rest is the field.
https://github.com/webdataset/webdataset
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_engine.data.image_files import SUFFIXES
from lora_engine.data.rows import (
    CAPTION_FIELDS,
    Item,
    Member,
    Problem,
    SourceOptions,
    as_item,
    shown_keys,
    shown_value,
)
from lora_engine.data.tar_headers import Archive, Gap, NotAFile, check_is_tar, members

IMAGE_FIELDS = frozenset(suffix[1:] for suffix in SUFFIXES) | {"heic", "heif"}
TEXT_FIELDS = ("txt", "text", "caption")  # in the order of precedence
PICKLE_FIELDS = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
IGNORED_KINDS = frozenset({"directory", "volume label"})
MAX_TEXT_BYTES = 1 << 20
MAX_JSON_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"  # some editors write it before UTF-8


class Sample(NamedTuple):
    """The members with one key by their fields, and the data of those that hold text."""

    key: str
    fields: dict[str, Member]
    texts: dict[str, bytes]


class Wanted(NamedTuple):
    """The fields to read; `of_json` chooses the key of a field "json"."""

    image: str | None
    texts: tuple[str, ...]
    of_json: SourceOptions


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """The samples of a shard. Images are not read.

    --image_field and --caption_field name fields of the samples; --caption_field may also name a
    key of the field "json". A sample without a caption is an item without captions. Raises
    AnnotationError.
    """
    image, text = (
        field and field.removeprefix(".").lower()
        for field in (options.image_field, options.caption_field)
    )
    texts = TEXT_FIELDS if text is None else (text,) if text != "json" else ()
    wanted = Wanted(image, texts, dataclasses.replace(options, image_field="image"))
    seen: set[int] = set()  # hashes of keys
    with Archive(path) as archive:
        check_is_tar(archive)
        for sample in _samples(archive, wanted):
            if isinstance(sample, Problem):
                yield sample
                continue
            key = hash(sample.key)
            if key in seen:
                yield Problem(
                    next(iter(sample.fields.values())).name,
                    f"another sample before it has the key {shown_value(sample.key)}: rename one "
                    f"of them; if both are the same sample, its members must follow each other "
                    f"(tar --sort=name)",
                )
                continue
            seen.add(key)
            item = _item(sample, wanted)
            if item is not None:
                yield item


def _samples(archive: Archive, wanted: Wanted) -> Iterator[Sample | Problem]:
    """Group members by key; a problem for each member that is refused, and for each gap."""
    limits = {field: _max_bytes(field) for field in (*wanted.texts, "json")}
    sample: Sample | None = None
    num_members, has_samples, has_pickle = 0, False, False
    for member in members(archive):
        num_members += 1
        if not isinstance(member, Member):
            if isinstance(member, Gap):
                if sample is not None:  # what follows may be of another sample
                    yield sample
                sample = None
            problem = _refusal(member, archive)
            if problem is not None:
                yield problem
            continue
        key, _, field = member.name.partition(".")
        if not field or "/" in field or key[-1:] in ("", "/") or key[0] == "/":
            if _leads_out(member.name):
                yield Problem(
                    member.name,
                    "its path leads out of the archive: store it under a relative path without ..",
                )
            key, field = _split(member.name)
            if not field:
                continue
        field = field.lower()
        if sample is None or sample.key != key or field in sample.fields:
            if sample is not None:
                yield sample
            sample, has_samples = Sample(key, {}, {}), True
        sample.fields[field] = member
        if field in limits and member.size <= limits[field]:
            sample.texts[field] = archive.read(member.offset, member.size)
        elif field.rpartition(".")[2] in PICKLE_FIELDS and not has_pickle:
            has_pickle = True  # one problem for all of them: each sample may have one
            yield Problem(
                member.name,
                "may hold code, so nothing is unpickled: this member and others like it are "
                "ignored, the rest of their samples is used",
            )
    if sample is not None:
        yield sample
    if num_members and not has_samples:
        yield Problem(
            "", f"none of its {num_members:,} members is named like 0012.jpg, 0012.txt, 0012.json"
        )


def _max_bytes(field: str) -> int:
    return MAX_JSON_BYTES if field == "json" else MAX_TEXT_BYTES


def _refusal(member: NotAFile | Gap, archive: Archive) -> Problem | None:
    if isinstance(member, Gap):
        damage = "cut off" if member.end == archive.size else "damaged"
        return Problem(
            f"byte {member.start}",
            f"bytes {member.start:,} to {member.end:,} are lost ({member.reason}), and all samples "
            f"in them: the archive is {damage}, download or copy it again",
        )
    if member.kind in IGNORED_KINDS:
        return None
    return Problem(member.name, f"is a {member.kind}, expected a file: store a copy of the file")


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _split(name: str) -> tuple[str, str]:
    """A member's key and field; no field for a hidden file, and for a path that leads out.

    macOS writes a hidden file ._NAME beside each file.
    """
    folder, slash, file = name.rpartition("/")
    is_hidden = any(part[:1] == "." and part != "." for part in name.split("/"))
    if is_hidden or name.startswith("/"):
        return "", ""
    key, _, field = file.partition(".")
    return folder + slash + key, field


def _item(sample: Sample, wanted: Wanted) -> Item | Problem | None:
    """None for a sample without an image if img2dataset states that its download failed."""
    images = [
        field for field in sample.fields
        if (field in IMAGE_FIELDS if wanted.image is None else field == wanted.image)
    ]
    if len(images) != 1:
        return _image_problem(sample, images, wanted)
    image = sample.fields[images[0]]
    name = image.name
    text = next((field for field in wanted.texts if field in sample.fields), "json")
    for field in (text, "json"):
        if field in sample.fields and field not in sample.texts:
            large, limit = sample.fields[field], _max_bytes(field)
            return Problem(
                large.name,
                f"has {large.size:,} bytes, at most {limit:,} are accepted: is it the right field?",
            )
    data = sample.texts.get("json", b"{}")
    if text != "json" and b'"split"' not in data:
        return Item(name, image, (_decoded(sample.texts[text]),))
    metadata = _metadata(data)
    if isinstance(metadata, str):
        return Problem(sample.fields["json"].name, metadata)
    split = metadata.get("split")
    split = split if isinstance(split, str) else ""
    if text != "json":
        return Item(name, image, (_decoded(sample.texts[text]),), split)
    caption_field = wanted.of_json.caption_field
    if caption_field is None and not any(field in metadata for field in CAPTION_FIELDS):
        return Item(name, image, (), split)
    if caption_field is not None and caption_field not in metadata:
        return Problem(
            name,
            f"neither a field nor a key of its json is {caption_field}; they are "
            f"{', '.join(sample.fields)} and {shown_keys(metadata)}: correct --caption_field",
        )
    return as_item({**metadata, "image": image}, name, wanted.of_json)


def _image_problem(sample: Sample, images: list[str], wanted: Wanted) -> Problem | None:
    first = next(iter(sample.fields.values())).name
    fields = ", ".join(sample.fields)
    if images:
        return Problem(
            first,
            f"its fields {' and '.join(images)} could both be the image; choose one with "
            f"--image_field",
        )
    metadata = _metadata(sample.texts.get("json", b"{}"))
    if isinstance(metadata, dict) and metadata.get("status") not in (None, "success"):
        return None
    if wanted.image is None:
        reason = "is known to be an image; name it with --image_field"
    else:
        reason = f"is {wanted.image}, as --image_field says"
    return Problem(first, f"none of its fields ({fields}) {reason}")


def _decoded(data: bytes) -> str:
    """Text as it is written; what is not UTF-8 becomes surrogates, which are refused later."""
    return data.removeprefix(BOM).decode("utf-8", "surrogateescape")


def _metadata(data: bytes) -> dict[str, Any] | str:
    """The object of a field "json", or what is wrong with it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return value if isinstance(value, dict) else f"found {shown_value(value)}, expected an object"
