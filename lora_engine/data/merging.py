"""Chunks of source files -> columns, in which each image has one number."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_engine.data.chunks import Chunk
from lora_engine.data.columns import Columns, ColumnWriter
from lora_engine.data.packed_strings import encoded
from lora_engine.data.rows import AnnotationError, BadRow
from lora_engine.data.sources.parts import Part


@dataclass
class Index:
    """Everything about a source besides its columns, as it is stored in index.json."""

    parts: list[list[Any]] = field(default_factory=list)  # PartRows
    containers: list[list[str]] = field(default_factory=list)  # kind, path, identity, column
    splits: list[str] = field(default_factory=list)
    num_lost_parts: int = 0
    description: str = ""  # of the sources, for people


class Merger:
    """Appends chunks to columns; images that are named twice get one number."""

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
        number = None
        for chunk in chunks:
            if number is None and any(chunk.names):
                number = len(self.index.containers)
                self.index.containers.append(container)
            self._add(chunk, number)
        self.index.parts.append([part.path, self.num_rows])

    def lose_part(self, part: Part, error: AnnotationError) -> None:
        reason = str(error).removeprefix(f"{part.path}: ")
        self.bad.append(BadRow(part.path, reason))
        self.index.num_lost_parts += 1

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
