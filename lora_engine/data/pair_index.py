"""Data sources -> pairs, as columns in memory or in an index on disk that is built once.

    CACHE/index/KEY/columns.json, rows.text.bin, ...    the columns (columns.py)
                    index.json                          sources, containers, splits
                    bad_rows.jsonl                      rows that cannot be used
                    digests.bin                         of images in shards, as they become known
                    tokens-KEY/, rows-KEY/, ...         what follows from them (Pairs.derived)
    CACHE/index/KEY.lock/                               held by the process that builds it

The key is made of the identity of each source file (path, size, times) and of the options, so that
a changed source gets another index. An index is only a cache: deleted, it is built again, with the
same rows in the same order.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from lora_engine.data import python_rows
from lora_engine.data.chunks import Chunk, chunks_of, read_chunks
from lora_engine.data.columns import Columns, ColumnsError, ColumnWriter, read_columns
from lora_engine.data.formats.parquet_images import RowGroups
from lora_engine.data.image_files import SUFFIXES
from lora_engine.data.image_identity import identity, stamp
from lora_engine.data.image_table import (
    Container,
    Folder,
    ImageTable,
    ParquetFile,
    PythonRows,
    Shard,
)
from lora_engine.data.images import ImageError, read_image_file
from lora_engine.data.merging import Index, Merger
from lora_engine.data.pairs import PairColumns, Pairs, PartRows
from lora_engine.data.python_rows import NAME
from lora_engine.data.rows import MAX_ROWS_SHOWN, AnnotationError, BadRow, SourceOptions
from lora_engine.data.sampling import evenly_spaced
from lora_engine.data.shared_database import folder_lock
from lora_engine.data.sources.file_formats import reader
from lora_engine.data.sources.parts import Part, describe, find_parts, with_image_root
from lora_engine.data.workers import load
from lora_engine.files import clear_leftovers, read_limited, replaced_folder

logger = logging.getLogger(__name__)

VERSION = 1
INDEX_FILE, BAD_FILE, DIGESTS_FILE = "index.json", "bad_rows.jsonl", "digests.bin"
MIN_ROWS_ON_DISK = 50_000
_ROW_BYTES = {"tar": 30_000, "parquet": 30_000, "arrow": 30_000}  # to guess the number of rows
_TEXT_ROW_BYTES = 150
_UNUSED_S = 60 * 86_400  # an index that was not opened for so long is removed
_MAX_INDEX_BYTES = 2**28
_CHUNK = 2**20  # digests that are written at a time
_NUM_SAMPLED = 20  # images whose files must exist for an index to be used


def read_pairs(
    data: Any,
    options: SourceOptions = SourceOptions(),
    *,
    index_folder: Path | None = None,
    max_bad_share: float = 0.05,
    needs_captions: bool = True,
    num_workers: int | None = None,
) -> Pairs:
    """Read the image-caption pairs of a source: paths, or rows given from Python.

    Captions are stripped and image paths absolute; images are not opened. Large sources are indexed
    in a folder below `index_folder`, by `num_workers` processes (default: one per processor).
    Without `needs_captions`, images without a caption have an empty one.

    Raises AnnotationError if a source cannot be read, and if no row, or too few rows, can be used:
    at most `max_bad_share` of the rows, and of the source files, may be bad (if it is 1, all the
    rows). The message lists the first MAX_ROWS_SHOWN.
    """
    name, lost_share = name_of(data), 0.0
    if not paths_of(data):
        source, bad = _read_python(data, options, needs_captions)
        description = "rows from Python"
    else:
        found = find_parts(paths_of(data), options)
        for notice in found.notices:
            logger.warning(notice)
        source, bad, index = _open_or_read(
            found.parts, options, index_folder, needs_captions, num_workers
        )
        bad = [*found.bad, *bad]
        num_files = len(found.parts) + len(found.bad)
        lost_share = (index.num_lost_parts + len(found.bad)) / max(num_files, 1)
        description = index.description
    num_rows = len(source.columns["image"])
    may_be_empty = bad and max_bad_share >= 1
    if (
        not (num_rows or may_be_empty)
        or lost_share > max_bad_share
        or len(bad) > max_bad_share * (num_rows + len(bad))
    ):
        raise AnnotationError(_bad_rows_message(name, bad, source, max_bad_share))
    return Pairs(
        source, source.images, source.columns["image"], bad=bad, lost_share=lost_share,
        name=f"{name}: {description}",
    )


def paths_of(data: Any) -> list[str]:
    """The paths of a source that is given as one or several; none for rows from Python."""
    if isinstance(data, (str, os.PathLike)):
        return [os.fspath(data)]
    if isinstance(data, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in data):
        return list(map(os.fspath, data))
    return []


def name_of(data: Any) -> str:
    """What messages call a source."""
    return ", ".join(paths_of(data)) or NAME


def _bad_rows_message(
    name: str, bad: Sequence[BadRow], source: PairColumns, max_share: float
) -> str:
    num_rows = len(source.columns["image"]) + len(bad)
    if not num_rows:
        return f"{name}: no image-caption pairs in it"
    shown = list(map(str, bad[:MAX_ROWS_SHOWN]))
    more = f", more than --max_bad_share {max_share:g}" if 0 < max_share < 1 else ""
    if num_rows == 1 or len(bad) == 1 and not more:
        return shown[0]
    first = f"; the first {len(shown)}" if len(bad) > len(shown) else ""
    summary = f"{name}: {len(bad):,} of {num_rows:,} rows cannot be used{more}{first}:"
    return "\n  ".join([summary, *shown])


def _read_python(
    data: Any, options: SourceOptions, needs_captions: bool
) -> tuple[PairColumns, list[BadRow]]:
    part = Part("python", NAME, os.getcwd())
    merger = Merger(ColumnWriter(None))
    merger.add_part(
        part,
        chunks_of(python_rows.read(data, options), part, needs_captions=needs_captions),
        ["python", NAME, "", ""],
    )
    columns, index = merger.finish()
    containers: list[Container] = [
        PythonRows(data, options) if kind == "python" else Folder(path)
        for kind, path, *_ in index.containers
    ]
    digests = np.zeros(merger.num_images, dtype="V16")
    return _source(columns, index, containers, digests=digests), merger.bad


def read_by_name(name: str) -> bytes:
    """The bytes of an image by the name that an `ImageTable` gives it; raises ImageError."""
    shard = name
    while not os.path.lexists(shard) and os.path.dirname(shard) != shard:
        shard = os.path.dirname(shard)
    if shard == name or not os.path.isfile(shard):
        return read_image_file(name)
    try:
        images = _images_in(shard)
    except (OSError, ValueError) as error:
        raise ImageError(name, str(error)) from None
    if name not in images:
        raise ImageError(name, f"no longer in {shard}")
    return images[name]()


@lru_cache(maxsize=4)
def _images_in(shard: str) -> dict[str, Callable[[], bytes]]:
    """A function that reads it for each image in a shard."""
    images = read_pairs(shard, max_bad_share=1.0, needs_captions=False).images
    return {name: partial(images.read, number) for number, name in enumerate(images)}


# --- an index on disk -----------------------------------------------------------------------------


def _open_or_read(
    parts: Sequence[Part],
    options: SourceOptions,
    index_folder: Path | None,
    needs_captions: bool,
    num_workers: int | None,
) -> tuple[PairColumns, list[BadRow], Index]:
    """The columns of source files, what is bad in them, and what else is known of them."""
    reading: dict[str, Any] = {"needs_captions": needs_captions, "num_workers": num_workers}
    num_expected, stamps = _survey(parts)
    if index_folder is not None and num_expected >= MIN_ROWS_ON_DISK and stamps is not None:
        key = _key([VERSION, *parts], stamps, options, needs_captions)
        folder = index_folder / "index" / key
        try:
            opened = _open_valid(folder)
            if opened is None:
                with _building(folder):  # another process may be building it: wait for it
                    opened = _open_valid(folder)
                    if opened is None:
                        shutil.rmtree(folder, ignore_errors=True)  # with what followed from it
                        logger.info(f"indexing {len(parts):,} source files in {folder}")
                        _build(folder, parts, options, **reading)
                        opened = _open(folder)
            return opened
        except (OSError, ColumnsError) as error:
            logger.warning(f"no index is kept in {folder}: {error}")
    columns, index, bad = _read(parts, options, ColumnWriter(None), **reading)
    return _source(columns, index, _containers(index)), bad, index


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Hold the lock of an index; it ends with the process that holds it."""
    lock = folder.with_name(f"{folder.name}.lock")
    lock.mkdir(parents=True, exist_ok=True)
    with folder_lock(lock):
        clear_leftovers(folder.parent, lambda name: name == folder.name)
        yield


def _open_valid(folder: Path) -> tuple[PairColumns, list[BadRow], Index] | None:
    """Open an index; None if there is none, it is damaged, or its images are elsewhere now."""
    if not folder.exists():
        return None
    try:
        opened = _open(folder)
    except ColumnsError as error:
        logger.warning(f"a damaged index is not used: {error}")
        return None
    return opened if _has_its_images(opened[0].images) else None


def _has_its_images(images: ImageTable) -> bool:
    """Whether most of a few images are where the index says; they may have been moved since."""
    sample = evenly_spaced(len(images), _NUM_SAMPLED)
    return 2 * sum(map(images.has_file, sample)) >= len(sample)


def _survey(parts: Sequence[Part]) -> tuple[int, list[str] | None]:
    """About how many rows there are, and the stamps of all source files, None if not reliable."""
    num_rows, stamps = 0, []
    for part in parts:
        for path in _files_of(part):
            found = stamp(path)
            if found is None:
                return 0, None
            stamps.append(f"{os.path.relpath(path, part.path)} {found.hex()}")
            num_bytes = os.path.getsize(path)
            num_rows += num_bytes // _ROW_BYTES.get(part.format, _TEXT_ROW_BYTES)
    return num_rows, stamps


def _files_of(part: Part) -> Iterator[str]:
    """The files that tell the rows of a part."""
    if not os.path.isdir(part.path):
        yield part.path
        return
    for folder, folders, files in os.walk(part.path):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() not in SUFFIXES:
                yield os.path.join(folder, name)


def _key(*values: Any) -> str:
    text = json.dumps(values, default=asdict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _build(folder: Path, parts: Sequence[Part], options: SourceOptions, **reading: Any) -> None:
    with replaced_folder(folder) as new:
        columns, index, bad = _read(parts, options, ColumnWriter(new), **reading)
        with open(new / BAD_FILE, "w", encoding="utf-8", errors="surrogatepass") as file:
            for row in bad:
                file.write(json.dumps(row) + "\n")
        with open(new / DIGESTS_FILE, "wb") as file:
            # Written, not a hole: to write to a mapped hole of a full disk would end the process.
            for begin in range(0, len(columns["container"]), _CHUNK):
                file.write(bytes(16 * min(_CHUNK, len(columns["container"]) - begin)))
        (new / INDEX_FILE).write_text(json.dumps(asdict(index)), encoding="utf-8")
    _remove_unused(folder.parent)


def _open(folder: Path) -> tuple[PairColumns, list[BadRow], Index]:
    """Raises ColumnsError for an incomplete or damaged index, OSError."""
    try:
        index = Index(**json.loads(read_limited(folder / INDEX_FILE, _MAX_INDEX_BYTES)))
        columns = read_columns(folder)
        num_images = len(columns["container"])
        for name, known in (("container", index.containers), ("split", index.splits)):
            if len(columns[name]) and int(columns[name].max()) >= len(known):
                raise ColumnsError(f"{folder / INDEX_FILE} lacks a {name} of the columns")
        digests = _map_digests(folder / DIGESTS_FILE, num_images)
        with open(folder / BAD_FILE, encoding="utf-8", errors="surrogatepass") as file:
            bad = [BadRow(*json.loads(line)) for line in file]
        source = _source(
            columns, index, _containers(index), digests=digests, folder=folder
        )
    except ColumnsError:
        raise
    except (LookupError, TypeError, ValueError, FileNotFoundError) as error:
        raise ColumnsError(f"{folder}: {error!r}") from None
    with suppress(OSError):  # another user's
        os.utime(folder)
    return source, bad, index


def _map_digests(path: Path, num_images: int) -> np.ndarray | None:
    """The digests, writable and shared; None if they may not be written."""
    if path.stat().st_size != 16 * num_images:
        raise ColumnsError(f"{path} has {path.stat().st_size:,} bytes, not {16 * num_images:,}")
    if not num_images:  # an empty file cannot be mapped
        return None
    try:
        return np.memmap(path, "V16", mode="r+", shape=num_images).view(np.ndarray)
    except FileNotFoundError:
        raise
    except OSError:
        return None


def _remove_unused(folder: Path) -> None:
    """Remove indexes that were not opened for a long time: their sources have changed, or gone."""
    for index in folder.iterdir():
        with suppress(OSError):  # another process removes it
            if time.time() - index.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(index)


def _source(
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


# --- reading all source files ---------------------------------------------------------------------


def _read(
    parts: Sequence[Part],
    options: SourceOptions,
    writer: ColumnWriter,
    *,
    needs_captions: bool,
    num_workers: int | None,
) -> tuple[Columns, Index, list[BadRow]]:
    """Read all source files, several at a time; one of several that cannot be read is a bad row."""
    merger = Merger(writer)
    parts = [with_image_root(part, options) for part in parts]
    merger.index.description = describe(parts)
    dataset = _Parts(parts, options, needs_captions)
    if len(parts) == 1:
        container = dataset.container(0)
        merger.add_part(parts[0], dataset.chunks(0), container)
    else:
        num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(parts) // 4)
        found = load(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers if num_workers > 1 else 0,
        )
        bar = tqdm(found, total=len(parts), unit="file", disable=not sys.stderr.isatty())
        for part, (chunks, container) in zip(parts, bar):
            if isinstance(chunks, AnnotationError):
                merger.lose_part(part, chunks)
            else:
                merger.add_part(part, chunks, container)
        if merger.index.num_lost_parts == len(parts):
            raise AnnotationError(_nothing_readable_message(parts, merger.bad))
    columns, index = merger.finish()
    return columns, index, merger.bad


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
    """DataLoader's own function would turn arrays into tensors."""
    return value


def _containers(index: Index) -> list[Container]:
    row_groups = RowGroups()

    def opened(kind: str, path: str, found: str, column: str) -> Container:
        if kind == "folder":
            return Folder(path)
        if kind == "parquet":
            return ParquetFile(path, column, bytes.fromhex(found), row_groups)
        return Shard(path, bytes.fromhex(found))

    return [opened(*container) for container in index.containers]
