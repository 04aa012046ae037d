"""Read the pairs of any data source: paths, or rows given from Python."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.data import python_rows
from lora_engine.data.chunks import chunks_of
from lora_engine.data.columns import ColumnWriter
from lora_engine.data.image_table import Container, Folder, PythonRows
from lora_engine.data.images import ImageError, read_image_file
from lora_engine.data.pair_builder import PairBuilder, pair_columns
from lora_engine.data.pair_index import open_or_read
from lora_engine.data.pairs import PairColumns, Pairs
from lora_engine.data.rows import (
    MAX_ROWS_SHOWN,
    PYTHON_ROWS,
    AnnotationError,
    BadRow,
    SourceOptions,
)
from lora_engine.data.sources.parts import Part, find_parts

logger = logging.getLogger(__name__)


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

    Raises AnnotationError if a source cannot be read, if no row can be used, or if more than
    `max_bad_share` of the rows or of the source files are bad; the message lists the first
    MAX_ROWS_SHOWN. With a `max_bad_share` of 1, all rows may be bad.
    """
    name, unreadable_share = name_of(data), 0.0
    if not paths_of(data):
        source, bad = _read_python(data, options, needs_captions)
        description = "rows from Python"
    else:
        found = find_parts(paths_of(data), options)
        for notice in found.notices:
            logger.warning(notice)
        source, bad, index = open_or_read(
            found.parts, options, index_folder, needs_captions, num_workers
        )
        bad = [*found.bad, *bad]
        num_files = len(found.parts) + len(found.bad)
        unreadable_share = (index.num_unreadable_parts + len(found.bad)) / max(num_files, 1)
        description = index.description
    num_rows = len(source.columns["image"])
    may_be_empty = bad and max_bad_share >= 1
    if (
        not (num_rows or may_be_empty)
        or unreadable_share > max_bad_share
        or len(bad) > max_bad_share * (num_rows + len(bad))
    ):
        raise AnnotationError(_bad_rows_message(name, bad, source, max_bad_share))
    return Pairs(
        source, source.images, source.columns["image"], bad=bad, unreadable_share=unreadable_share,
        name=f"{name}: {description}",
    )


def paths_of(data: Any) -> list[str]:
    """The paths of a source, given as one or several; empty for rows from Python."""
    if isinstance(data, (str, os.PathLike)):
        return [os.fspath(data)]
    if isinstance(data, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in data):
        return list(map(os.fspath, data))
    return []


def name_of(data: Any) -> str:
    """What messages call a source."""
    return ", ".join(paths_of(data)) or PYTHON_ROWS


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
    part = Part("python", PYTHON_ROWS, os.getcwd())
    builder = PairBuilder(ColumnWriter(None))
    builder.add_part(
        part,
        chunks_of(python_rows.read(data, options), part, needs_captions=needs_captions),
        ["python", PYTHON_ROWS, "", ""],
    )
    columns, index = builder.finish()
    containers: list[Container] = [
        PythonRows(data, options) if kind == "python" else Folder(path)
        for kind, path, *_ in index.containers
    ]
    digests = np.zeros(builder.num_images, dtype="V16")
    return pair_columns(columns, index, containers, digests=digests), builder.bad


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
    """For each image in a shard, by name, a function that reads it."""
    images = read_pairs(shard, max_bad_share=1.0, needs_captions=False).images
    return {name: partial(images.read, number) for number, name in enumerate(images)}
