"""Check the items of one source file, and turn them into chunks of columns."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_engine.data.packed_strings import encoded
from lora_engine.data.rows import (
    PYTHON_ROWS,
    BadRow,
    Item,
    Member,
    Problem,
    SourceOptions,
    caption_complaint,
    image_complaint,
    location,
)
from lora_engine.data.sources.file_formats import reader
from lora_engine.data.sources.parts import Part
from lora_engine.data.sources.split_names import normal_split

_CHUNK = 16_384  # items that become arrays at a time


class Chunk(NamedTuple):
    """Some items of a source file, as arrays, and their problems.

    For each row (caption): `text_size`, `item_of_row`, `line` (0 without one) and `split`, a number
    in `splits`; `text` uint8 is all captions as UTF-8. For each item (image): `paths` of image
    files, "" for members of the source file; `names`, `offset` and `size` of members, else b"", 0
    and 0; and `ids`.
    """

    text: np.ndarray
    text_size: np.ndarray
    item_of_row: np.ndarray
    line: np.ndarray
    split: np.ndarray
    splits: list[str]
    paths: list[str]
    names: list[bytes]
    offset: np.ndarray
    size: np.ndarray
    ids: list[Any]
    bad: list[BadRow]
    is_cut_off: bool


def read_chunks(part: Part, options: SourceOptions, *, needs_captions: bool) -> Iterator[Chunk]:
    """The usable items of a source file, in chunks; raises AnnotationError if it cannot be read."""
    items = reader(part.format).read(part.path, options)
    return chunks_of(items, part, needs_captions=needs_captions)


def chunks_of(
    items: Iterable[Item | Problem], part: Part, *, needs_captions: bool
) -> Iterator[Chunk]:
    collected = _Collector(part, needs_captions)
    for number, item in enumerate(items, start=1):
        collected.add(number, item)
        if number % _CHUNK == 0:
            yield collected.take()
    yield collected.take()


class _Collector:
    """Checks items and collects them as lists, until they are taken as a chunk."""

    def __init__(self, part: Part, needs_captions: bool) -> None:
        self.part = part
        self.needs_captions = needs_captions
        self.complaint = caption_complaint if needs_captions else _complaint_unless_blank
        self.splits: dict[str, int] = {}
        self.is_cut_off = False
        self._clear()

    def _clear(self) -> None:
        self.texts: list[bytes] = []
        self.rows: list[tuple[int, int, int]] = []  # (item, line, split) of each row
        self.paths: list[str] = []
        self.members: list[tuple[bytes, int, int]] = []  # (name, offset, size)
        self.ids: list[Any] = []
        self.bad: list[BadRow] = []

    def take(self) -> Chunk:
        rows = np.array(self.rows, dtype=np.uint64).reshape(-1, 3)
        places = np.array([member[1:] for member in self.members], dtype=np.uint64).reshape(-1, 2)
        chunk = Chunk(
            np.frombuffer(b"".join(self.texts), dtype=np.uint8),
            np.array([len(text) for text in self.texts], dtype=np.uint64),
            rows[:, 0], rows[:, 1], rows[:, 2], list(self.splits),
            self.paths, [member[0] for member in self.members], places[:, 0], places[:, 1],
            self.ids, self.bad, self.is_cut_off,
        )
        self._clear()
        return chunk

    def add(self, number: int, item: Item | Problem) -> None:
        if isinstance(item, Problem):
            self.complain(number, item.where, item.reason)
            also = self.bad[-1]._replace(reason="lost with the row above")
            self.bad += (item.num_rows - 1) * [also]
            self.is_cut_off = self.is_cut_off or item.is_cut_off
            return
        reason = image_complaint(item.image)
        captions = item.captions
        if reason is None and not captions:
            reason = "has no caption" if self.needs_captions else None
            captions = [""]
        elif reason is None and len(captions) == 1:
            reason = self.complaint(captions[0])
        if reason is not None:
            self.complain(number, item.where, reason)
            return
        usable = []
        for caption in captions:
            reason = self.complaint(caption) if len(captions) > 1 else None
            if reason is None:
                usable.append(caption.strip())
            else:
                self.complain(number, item.where, reason)
        if not usable:
            return
        line = item.where if isinstance(item.where, int) else 0
        split = self.splits.setdefault(
            normal_split(item.split) or self.part.split, len(self.splits)
        )
        for caption in usable:
            self.texts.append(encoded(caption))
            self.rows.append((len(self.paths), line, split))
        self.ids.append(item.id)
        if isinstance(item.image, Member):
            self.paths.append("")
            self.members.append((encoded(item.image.name), item.image.offset, item.image.size))
        else:
            root = self.part.image_root or ""
            self.paths.append(os.path.normpath(os.path.join(root, item.image)))
            self.members.append((b"", 0, 0))

    def complain(self, number: int, where: int | str, reason: str) -> None:
        path = self.part.path
        if isinstance(where, int):
            found = location(path, where)
            reason = reason if path == PYTHON_ROWS else f"row {number}: {reason}"
        elif os.path.isdir(path) or self.part.format == "tar":
            found = f"{path}/{where}" if where else path  # also of a name that is absolute
        else:
            found = f"{path}: {where}" if where else path
        self.bad.append(BadRow(found, reason))


def _complaint_unless_blank(caption: Any) -> str | None:
    is_blank = isinstance(caption, str) and not caption.strip()
    return None if is_blank else caption_complaint(caption)
