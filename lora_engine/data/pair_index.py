"""The columns of source files: in memory, or in an index on disk that is built once.

    CACHE/index/KEY/columns.json, text.bin, ...    the columns (columns.py)
                    index.json                     source files, containers, splits
                    bad_rows.jsonl                 rows that cannot be used
                    digests.bin                    of images in shards, as they become known
                    tokens-KEY/, rows-KEY/, ...    computed from the columns (Pairs.derived)
    CACHE/index/KEY.lock/                          held by the process that builds the index

The key is a hash of the stamps of all source files (image_identity.py) and of the options, so a
changed source gets another index. An index is only a cache: deleted, it is built again, with the
same rows in the same order.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.data.columns import ColumnsError, ColumnWriter, read_columns
from lora_engine.data.image_files import is_image
from lora_engine.data.image_identity import stamp
from lora_engine.data.image_table import ImageTable
from lora_engine.data.pair_builder import Index, containers_of, pair_columns, read_parts
from lora_engine.data.pairs import PairColumns
from lora_engine.data.rows import BadRow, SourceOptions
from lora_engine.data.sampling import evenly_spaced
from lora_engine.data.shared_database import folder_lock
from lora_engine.data.sources.parts import Part
from lora_engine.files import clear_leftovers, read_limited, replaced_folder
from lora_engine.terminal import counted

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


def open_or_read(
    parts: Sequence[Part],
    options: SourceOptions,
    index_folder: Path | None,
    needs_captions: bool,
    num_workers: int | None,
) -> tuple[PairColumns, list[BadRow], Index]:
    """The columns of source files, their bad rows, and what else their index records."""
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
                        shutil.rmtree(folder, ignore_errors=True)
                        logger.info(f"indexing {counted(len(parts), 'source file')} in {folder}")
                        _build(folder, parts, options, **reading)
                        opened = _open(folder)
            return opened
        except (OSError, ColumnsError) as error:
            logger.warning(f"cannot keep an index in {folder}, reading into memory: {error}")
    columns, index, bad = read_parts(parts, options, ColumnWriter(None), **reading)
    return pair_columns(columns, index, containers_of(index)), bad, index


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
        logger.warning(f"ignoring a damaged index, which is built again: {error}")
        return None
    return opened if _has_its_images(opened[0].images) else None


def _has_its_images(images: ImageTable) -> bool:
    """Whether most of a few images are where the index says; they may have been moved since."""
    sample = evenly_spaced(len(images), _NUM_SAMPLED)
    return 2 * sum(map(images.has_file, sample)) >= len(sample)


def _survey(parts: Sequence[Part]) -> tuple[int, list[str] | None]:
    """An estimate of the number of rows, and the stamps of all source files; None if not reliable.
    """
    num_rows, stamps = 0, []
    for part in parts:
        for path in _files_of(part):
            name = os.path.relpath(path, part.path)
            if is_image(path):  # its name is part of a row, its content is not
                stamps.append(name)
                continue
            found = stamp(path)
            if found is None:
                return 0, None
            stamps.append(f"{name} {found.hex()}")
            num_bytes = os.path.getsize(path)
            num_rows += max(num_bytes // _ROW_BYTES.get(part.format, _TEXT_ROW_BYTES), 1)
    return num_rows, stamps


def _files_of(part: Part) -> Iterator[str]:
    """The files of a part, in a fixed order."""
    if not os.path.isdir(part.path):
        yield part.path
        return
    for folder, folders, files in os.walk(part.path):
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(files))


def _key(*values: Any) -> str:
    text = json.dumps(values, default=asdict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _build(folder: Path, parts: Sequence[Part], options: SourceOptions, **reading: Any) -> None:
    with replaced_folder(folder) as new:
        columns, index, bad = read_parts(parts, options, ColumnWriter(new), **reading)
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
        source = pair_columns(
            columns, index, containers_of(index), digests=digests, folder=folder
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
    """Remove indexes that were not opened for a long time; their sources may have changed."""
    for index in folder.iterdir():
        with suppress(OSError):  # another process removes it
            if time.time() - index.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(index)
