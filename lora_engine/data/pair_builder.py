"""Build the columns of pairs from source files; an image that is named twice gets one number."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from lora_engine.data.chunks import Chunk, read_chunks
from lora_engine.data.columns import Columns, ColumnWriter
from lora_engine.data.formats.parquet_images import RowGroups
from lora_engine.data.image_identity import identity
from lora_engine.data.image_table import Container, Folder, ImageTable, ParquetFile, Shard
from lora_engine.data.packed_strings import encoded
from lora_engine.data.pairs import PairColumns, PartRows
from lora_engine.data.rows import MAX_ROWS_SHOWN, AnnotationError, BadRow, SourceOptions
from lora_engine.data.sources.file_formats import reader
from lora_engine.data.sources.parts import Part, describe, with_image_root
from lora_engine.data.workers import load
from lora_engine.devices import num_processors


@dataclass
class Index:
    """Everything about a source besides its columns, as it is stored in index.json."""

    parts: list[list[Any]] = field(default_factory=list)  # PartRows
    containers: list[list[str]] = field(default_factory=list)  # kind, path, identity, column
    splits: list[str] = field(default_factory=list)
    num_unreadable_parts: int = 0
    description: str = ""  # of the sources, for people


class PairBuilder:
    """Appends chunks of source files to columns, and numbers rows, images and splits."""

    def __init__(self, writer: ColumnWriter) -> None:
        self.writer = writer
        self.index = Index()
        self.bad: list[BadRow] = []
        self.num_rows = self.num_images = self.text_bytes = self.name_bytes = self.id_bytes = 0
        self.folders: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.splits: dict[str, int] = {}

    def add_part(self, part: Part, chunks: Iterable[Chunk], container: list[str]) -> None:
        """Append a source file; images inside it are in `container`."""
        number, is_cut_off = None, False
        for chunk in chunks:
            is_cut_off = chunk.is_cut_off
            if number is None and any(chunk.names):
                number = len(self.index.containers)
                self.index.containers.append(container)
            self._add(chunk, number)
        self.index.parts.append([part.path, self.num_rows])
        self.index.num_unreadable_parts += is_cut_off

    def skip_part(self, part: Part, error: AnnotationError) -> None:
        """Record a source file that cannot be read."""
        reason = str(error).removeprefix(f"{part.path}: ")
        self.bad.append(BadRow(part.path, reason))
        self.index.num_unreadable_parts += 1

    def _add(self, chunk: Chunk, container: int | None) -> None:
        append = self.writer.append
        self.bad += chunk.bad
        append("text", chunk.text)
        append("text_end", self.text_bytes + np.cumsum(chunk.text_size, dtype=np.uint64))
        self.text_bytes += len(chunk.text)
        append("line", chunk.line)
        splits = [self.splits.setdefault(split, len(self.splits)) for split in chunk.splits]
        append("split", np.array(splits, dtype=np.uint64)[chunk.split.astype(np.int64)])
        self.num_rows += len(chunk.line)

        numbers, new = self._number(chunk.paths)
        append("image", np.array(numbers, dtype=np.uint64)[chunk.item_of_row.astype(np.int64)])
        names = [
            chunk.names[i] or encoded(os.path.basename(chunk.paths[i])) for i in new
        ]
        append("name", np.frombuffer(b"".join(names), dtype=np.uint8))
        sizes = np.array([len(name) for name in names], dtype=np.uint64)
        append("name_end", self.name_bytes + np.cumsum(sizes, dtype=np.uint64))
        self.name_bytes += int(sizes.sum())
        append("container", np.array(
            [
                self._folder(os.path.dirname(chunk.paths[i])) if chunk.paths[i] else container
                for i in new
            ],
            dtype=np.uint64,
        ))
        append("offset", chunk.offset[new])
        append("size", chunk.size[new])
        self._add_ids([chunk.ids[i] for i in new])

    def _number(self, paths: Sequence[str]) -> tuple[list[int], list[int]]:
        """The numbers of a chunk's images, and which of its items are new images."""
        numbers, new = [], []
        for item, path in enumerate(paths):
            known = self.files.setdefault(path, self.num_images) if path else self.num_images
            numbers.append(known)
            if known == self.num_images:
                self.num_images += 1
                new.append(item)
        return numbers, new

    def _folder(self, path: str) -> int:
        if path not in self.folders:
            self.folders[path] = len(self.index.containers)
            self.index.containers.append(["folder", path, "", ""])
        return self.folders[path]

    def _add_ids(self, ids: Sequence[Any]) -> None:
        texts = [b"" if id is None else json.dumps(id).encode() for id in ids]
        ends = self.id_bytes + np.cumsum([len(text) for text in texts], dtype=np.uint64)
        self.writer.append("id", np.frombuffer(b"".join(texts), dtype=np.uint8))
        self.writer.append("id_end", ends.astype(np.uint64))
        self.id_bytes += sum(map(len, texts))

    def finish(self) -> tuple[Columns, Index]:
        self.index.splits = list(self.splits) or [""]
        return self.writer.finish(), self.index


def pair_columns(
    columns: Columns,
    index: Index,
    containers: Sequence[Container],
    *,
    digests: np.ndarray | None = None,
    folder: Path | None = None,
) -> PairColumns:
    return PairColumns(
        columns,
        ImageTable(containers, columns, digests=digests),
        [PartRows(*part) for part in index.parts],
        index.splits,
        folder,
    )


def read_parts(
    parts: Sequence[Part],
    options: SourceOptions,
    writer: ColumnWriter,
    *,
    needs_captions: bool,
    num_workers: int | None,
) -> tuple[Columns, Index, list[BadRow]]:
    """Read all source files, several at a time; an unreadable one of several becomes a bad row."""
    builder = PairBuilder(writer)
    parts = [with_image_root(part, options) for part in parts]
    builder.index.description = describe(parts)
    dataset = _Parts(parts, options, needs_captions)
    if len(parts) == 1:
        container = dataset.container(0)
        builder.add_part(parts[0], dataset.chunks(0), container)
    else:
        num_workers = min(num_workers or num_processors(), len(parts) // 4)
        found = load(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers if num_workers > 1 else 0,
        )
        bar = tqdm(found, total=len(parts), unit="file", disable=not sys.stderr.isatty())
        for part, (chunks, container) in zip(parts, bar):
            if isinstance(chunks, AnnotationError):
                builder.skip_part(part, chunks)
            else:
                builder.add_part(part, chunks, container)
        if builder.index.num_unreadable_parts == len(parts):
            raise AnnotationError(_nothing_readable_message(parts, builder.bad))
    columns, index = builder.finish()
    return columns, index, builder.bad


def _nothing_readable_message(parts: Sequence[Part], bad: Sequence[BadRow]) -> str:
    shown = list(map(str, bad[:MAX_ROWS_SHOWN]))
    first = f"; the first {len(shown)}" if len(bad) > len(shown) else ""
    folder = os.path.commonpath([part.path for part in parts])
    summary = f"{folder}: none of the {len(parts):,} source files can be read{first}:"
    return "\n  ".join([summary, *shown])


class _Parts(Dataset):
    """Source files -> (their chunks, their container), or (why they cannot be read, None)."""

    def __init__(
        self, parts: Sequence[Part], options: SourceOptions, needs_captions: bool
    ) -> None:
        self.parts = parts
        self.options = options
        self.needs_captions = needs_captions

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Any, list[str] | None]:
        try:
            container = self.container(number)  # before the file is read, lest it change meanwhile
            return list(self.chunks(number)), container
        except AnnotationError as error:
            return error, None

    def chunks(self, number: int) -> Iterator[Chunk]:
        return read_chunks(self.parts[number], self.options, needs_captions=self.needs_captions)

    def container(self, number: int) -> list[str]:
        """The container of images inside a source file: kind, path, identity, and column."""
        part = self.parts[number]
        try:
            found = identity(os.stat(part.path)).hex()
        except OSError as error:
            raise AnnotationError(f"{part.path}: cannot be read: {error.strerror}") from None
        if part.format != "parquet":
            return ["shard", part.path, found, ""]
        column = reader("parquet").image_column(part.path, self.options)
        return ["parquet", part.path, found, column]


def _as_it_is(value: Any) -> Any:
    """DataLoader's default collate function would turn arrays into tensors."""
    return value


def containers_of(index: Index) -> list[Container]:
    row_groups = RowGroups()

    def opened(kind: str, path: str, found: str, column: str) -> Container:
        if kind == "folder":
            return Folder(path)
        if kind == "parquet":
            return ParquetFile(path, column, bytes.fromhex(found), row_groups)
        return Shard(path, bytes.fromhex(found))

    return [opened(*container) for container in index.containers]
