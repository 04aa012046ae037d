"""Image-caption pairs as columns: nothing is a Python object per row.

A row is a caption and the number of its image; an image with five captions has five rows. The
columns are in memory, or mapped from an index on disk (pair_index.py).
"""

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from lora_engine.data.columns import Columns, ColumnsError, ColumnWriter, read_columns
from lora_engine.data.image_table import ImageTable
from lora_engine.data.packed_strings import PackedStrings, encoded
from lora_engine.data.rows import BadRow, Row, location
from lora_engine.files import replaced_folder

_CHUNK = 10_000  # captions that are decoded at a time


class PartRows(NamedTuple):
    """A source file, and the end of its rows, which begin at the end of the previous part."""

    path: str
    end: int


@dataclass(frozen=True, eq=False)
class PairColumns:
    """What a source holds, as columns.

    columns:
        "text", "text_end": the captions, as PackedStrings of N rows.
        "image": (N,) numbers in `images`.
        "line": (N,) line or row in the source file; 0 in formats without lines.
        "split": (N,) numbers in `splits`, as the source says, else as the name of its file does.
        "id", "id_end": the source's own ids of images, as PackedStrings of JSON; "" without one.
    folder: the index on disk, to which derived columns are added; None for columns in memory.
    """

    columns: Columns
    images: ImageTable
    parts: Sequence[PartRows]
    splits: Sequence[str] = ("",)
    folder: Path | None = None

    def derived(
        self, kind: str, settings: Any, compute: Callable[[ColumnWriter], None]
    ) -> Columns:
        """Columns computed from these and from `settings` (JSON), once per index."""
        if self.folder is not None:
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            path = self.folder / f"{kind}-{key}"
            found = _columns_in(path)
            if found is None and self.folder.is_dir():  # it may have been removed
                # No space, no permission, or another process was faster.
                with suppress(OSError, ColumnsError):
                    with replaced_folder(path) as new:
                        writer = ColumnWriter(new)
                        compute(writer)
                        writer.finish()
                found = _columns_in(path)
            if found is not None:
                return found
        writer = ColumnWriter(None)
        compute(writer)
        return writer.finish()


def _columns_in(folder: Path) -> Columns | None:
    try:
        return read_columns(folder)
    except (ColumnsError, OSError):
        return None


@dataclass(frozen=True, eq=False)
class Pairs(Sequence[Row]):
    """Some of the rows of a source, or all, in the source's order.

    chosen: (N,) the rows' numbers in `source`; None for all.
    images: the table of their images, in order of first appearance.
    image_of_row: (N,) each row's image, as a number in `images`.
    key: identifies the choice of rows, for derived columns.
    bad: the rows that cannot be used.
    unreadable_share: the share of the source files that cannot be read.
    name: where the rows are from, for messages.
    """

    source: PairColumns
    images: ImageTable
    image_of_row: np.ndarray
    chosen: np.ndarray | None = None
    key: tuple[Any, ...] = ()
    bad: Sequence[BadRow] = ()
    unreadable_share: float = 0.0
    name: str = ""

    def __len__(self) -> int:
        return len(self.image_of_row)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return Row(self.text(row), self.images[int(self.image_of_row[row])])

    @property
    def texts(self) -> PackedStrings:
        """The captions of all rows of the source."""
        return PackedStrings(self.source.columns["text"], self.source.columns["text_end"])

    def text(self, row: int) -> str:
        return self.texts[self.source_row(row)]

    def captions(self, begin: int = 0, end: int | None = None) -> Iterator[str]:
        """The captions of the rows from `begin` to before `end`, by default of all."""
        texts = self.texts
        for first in range(begin, len(self) if end is None else end, _CHUNK):
            rows = np.arange(first, min(first + _CHUNK, len(self) if end is None else end))
            chosen = rows if self.chosen is None else self.chosen[rows].astype(np.int64)
            yield from texts.take(chosen)

    def image_id(self, image: int) -> int | str | None:
        """The source's own number of an image, if it has one."""
        ids = PackedStrings(self.source.columns["id"], self.source.columns["id_end"])
        return json.loads(ids[self.images.row(image)] or "null")

    def location(self, row: int) -> str:
        """path:line of a row, or row N from Python; its image's name in formats without lines."""
        line = int(self.source.columns["line"][self.source_row(row)])
        if not line:
            return self[row].image
        ends = [part.end for part in self.source.parts]
        part = self.source.parts[bisect.bisect_right(ends, self.source_row(row))]
        return location(part.path, line)

    def in_order(self, bad: Iterable[BadRow]) -> list[BadRow]:
        """Sort bad rows by source file and line; those without a line come first, in this order.
        """
        numbers = {part.path: number for number, part in enumerate(self.source.parts)}

        def position(row: BadRow) -> tuple[int, int]:
            path, _, line = row.location.rpartition(":")
            return (numbers[path], int(line)) if path in numbers and line.isdigit() else (-1, 0)

        return sorted(bad, key=position)

    @property
    def split_numbers(self) -> np.ndarray:
        """The number of each row's split in `source.splits`, (N,)."""
        numbers = self.source.columns["split"]
        return numbers if self.chosen is None else numbers[self.chosen]

    def source_row(self, row: int) -> int:
        return row if self.chosen is None else int(self.chosen[row])

    def derived(
        self, kind: str, settings: Any, compute: Callable[[ColumnWriter], None]
    ) -> Columns:
        """Columns computed from these rows and from `settings` (JSON), once per index."""
        return self.source.derived(kind, [self.key, settings], compute)

    def choose(self, key: Any, rows: Callable[[], np.ndarray]) -> "Pairs":
        """The rows with the numbers `rows()`, ascending; `key` (JSON) must name this choice."""

        def compute(writer: ColumnWriter) -> None:
            chosen = np.asarray(rows(), dtype=np.int64)
            numbers, first, inverse = np.unique(
                self.image_of_row[chosen], return_index=True, return_inverse=True
            )
            order = np.argsort(first)  # of first appearance
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            base = chosen if self.chosen is None else self.chosen[chosen]
            writer.append("rows", base.astype(np.uint64))
            writer.append("images", numbers[order].astype(np.uint64))
            writer.append("image_of_row", rank[inverse].astype(np.uint64))

        columns = self.derived("rows", key, compute)
        return Pairs(
            self.source,
            self.images.choose(columns["images"]),
            columns["image_of_row"],
            chosen=columns["rows"],
            key=(*self.key, key),
            bad=self.bad,
            unreadable_share=self.unreadable_share,
            name=self.name,
        )

    def fingerprint(self) -> str:
        """SHA-256 over captions and names of image files, but not over the images' folders."""

        def compute(writer: ColumnWriter) -> None:
            digest = hashlib.sha256()
            for text, image in self:
                digest.update(encoded(f"{text}\0{os.path.basename(image)}\n"))
            writer.append("digest", np.frombuffer(digest.digest(), dtype=np.uint8))

        return self.derived("fingerprint", None, compute)["digest"].tobytes().hex()
