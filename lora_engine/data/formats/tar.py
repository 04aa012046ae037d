"""A shard in WebDataset's format, as img2dataset writes it: an uncompressed tar, read in place.

A sample is the members with the same key that follow each other: 0012.jpg, 0012.txt, 0012.json. The
key is the path up to the first dot of the file name; the rest is the field.
https://github.com/webdataset/webdataset
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_engine.data.formats.tar_headers import Archive, Gap, NotAFile, check_is_tar, members
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

IMAGE_FIELDS = frozenset(suffix[1:] for suffix in SUFFIXES)
TEXT_FIELDS = ("txt", "text", "caption")  # in the order of precedence
PICKLE_FIELDS = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
IGNORED_KINDS = frozenset({"directory", "volume label"})
MAX_TEXT_BYTES = 1 << 20
MAX_JSON_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"  # some editors write it before UTF-8


@dataclasses.dataclass(slots=True)
class Sample:
    """The members with one key, by their fields.

    `images`: the fields that are images; `texts`: the data of the text fields and of json, without
    those in `large`, which have more than is accepted.
    """

    key: str
    members: dict[str, tuple[str, int, int]]
    images: list[str]
    texts: dict[str, bytes]
    large: list[str]


class Wanted(NamedTuple):
    """The fields to read; `of_json` chooses the key of a field "json"."""

    images: frozenset[str]
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
    images = IMAGE_FIELDS if image is None else frozenset({image})
    texts = TEXT_FIELDS if text is None else (text,)
    wanted = Wanted(
        images=images,
        texts=tuple(field for field in texts if field != "json" and field not in images),
        of_json=dataclasses.replace(options, image_field="image"),
    )
    seen: set[int] = set()  # hashes of keys
    with Archive(path) as archive:
        check_is_tar(archive)
        for sample in _samples(archive, wanted):
            if isinstance(sample, Problem):
                yield sample
            elif hash(sample.key) in seen:
                yield _duplicate(sample)
            else:
                seen.add(hash(sample.key))
                item = _item(sample, wanted)
                if item is not None:
                    yield item


def _samples(archive: Archive, wanted: Wanted) -> Iterator[Sample | Problem]:
    """Group members by key; a problem for each member that is refused, and for each gap."""
    limits = {field: _max_bytes(field) for field in (*wanted.texts, "json")}
    sample = Sample("", {}, [], {}, [])
    num_members, num_samples, has_pickle = 0, 0, False
    for member in members(archive):
        if not isinstance(member, tuple):
            if isinstance(member, Gap):  # what follows may be of another sample
                if sample.members:
                    yield sample
                sample = Sample("", {}, [], {}, [])
            problem = _refusal(member, archive, num_samples)
            if problem is not None:
                yield problem
            continue
        num_members += 1
        name, offset, size = member
        key, _, field = name.partition(".")
        if "/" in name or not key or not field:
            if name.startswith("/") or ".." in name.split("/"):
                yield Problem(
                    name,
                    "its path leads out of the archive: store it under a relative path without ..",
                )
                continue
            key, field = _split(name)
            if not field:
                continue
        field = field.lower()
        if key != sample.key or field in sample.members:
            if sample.members:
                yield sample
            sample = Sample(key, {}, [], {}, [])
            num_samples += 1
        sample.members[field] = member
        if field in wanted.images:
            sample.images.append(field)
        elif field in limits:
            if size <= limits[field]:
                sample.texts[field] = archive.read(offset, size)
            else:
                sample.large.append(field)
        elif not has_pickle and field.rpartition(".")[2] in PICKLE_FIELDS:
            has_pickle = True  # one problem for all of them: each sample may have one
            yield Problem(
                name,
                "may hold code, so nothing is unpickled: this member and others like it are "
                "ignored, the rest of their samples is used",
            )
    if sample.members:
        yield sample
    if num_members and not num_samples:
        yield Problem(
            "", f"none of its {num_members:,} members is named like 0012.jpg, 0012.txt, 0012.json"
        )


def _max_bytes(field: str) -> int:
    return MAX_JSON_BYTES if field == "json" else MAX_TEXT_BYTES


def _refusal(member: NotAFile | Gap, archive: Archive, num_samples: int) -> Problem | None:
    """Why a member is not used; the samples in a gap are estimated from the size of those before.
    """
    if isinstance(member, Gap):
        is_cut_off = member.end == archive.size
        sample_bytes = max(member.start // max(num_samples, 1), 1)
        return Problem(
            f"byte {member.start}",
            f"bytes {member.start:,} to {member.end:,} are lost ({member.reason}), and all samples "
            f"in them: the archive is {'cut off' if is_cut_off else 'damaged'}, download or copy "
            f"it again",
            num_rows=max((member.end - member.start) // sample_bytes, 1) if num_samples else 1,
            is_cut_off=is_cut_off,
        )
    if member.kind in IGNORED_KINDS:
        return None
    return Problem(member.name, f"is a {member.kind}, expected a file: store a copy of the file")


def _split(name: str) -> tuple[str, str]:
    """A member's key and field; no field for hidden files (macOS writes ._NAME beside NAME)."""
    folder, slash, file = name.rpartition("/")
    if any(part[:1] == "." and part != "." for part in name.split("/")):
        return "", ""
    key, _, field = file.partition(".")
    return folder + slash + key, field


def _duplicate(sample: Sample) -> Problem:
    return Problem(
        next(iter(sample.members.values()))[0],
        f"another sample before it has the key {shown_value(sample.key)}: rename one of them; if "
        f"both are the same sample, its members must follow each other (tar --sort=name)",
    )


def _item(sample: Sample, wanted: Wanted) -> Item | Problem | None:
    """None for a sample without an image if img2dataset states that its download failed."""
    if len(sample.images) != 1:
        return _image_problem(sample, wanted)
    image = Member(*sample.members[sample.images[0]])
    for text in wanted.texts:
        if text in sample.members:
            break
    else:
        text = "json"
    for field in sample.large:
        if field in (text, "json"):
            name, _, size = sample.members[field]
            limit = _max_bytes(field)
            return Problem(
                name, f"has {size:,} bytes, at most {limit:,} are accepted: is it the right field?"
            )
    data, name = sample.texts.get("json", b"{}"), image.name
    if text != "json" and data.find(b'split"') < 0:  # twice as fast as "in"
        return Item(name, image, (_decoded(sample.texts[text]),))
    metadata = _metadata(data)
    if isinstance(metadata, str):
        return Problem(sample.members["json"][0], metadata)
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
            f"{', '.join(sample.members)} and {shown_keys(metadata)}: correct --caption_field",
        )
    return as_item({**metadata, "image": image}, name, wanted.of_json)


def _image_problem(sample: Sample, wanted: Wanted) -> Problem | None:
    first = next(iter(sample.members.values()))[0]
    if sample.images:
        names = " and ".join(sample.images)
        return Problem(first, f"{names} could both be the image; choose one with --image_field")
    metadata = _metadata(sample.texts.get("json", b"{}"))
    if isinstance(metadata, dict) and metadata.get("status") not in (None, "success"):
        return None
    if wanted.images is IMAGE_FIELDS:
        reason = "is known to be an image; name it with --image_field"
    else:
        reason = f"is {', '.join(wanted.images)}, as --image_field says"
    return Problem(first, f"none of its fields ({', '.join(sample.members)}) {reason}")


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
