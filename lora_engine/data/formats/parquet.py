"""Parquet files: Hugging Face datasets, img2dataset's output, plain tables of images or paths.

Indexing reads the captions and other small columns, one row group after the other; the bytes of the
images are read in training (parquet_images.py).
"""

import os
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

from lora_engine.data.formats.arrow_columns import (
    Columns,
    arrow_errors,
    choose_columns,
    import_pyarrow,
    items,
)
from lora_engine.data.rows import Item, Member, Problem, SourceOptions

EXPECTED = "a Parquet file"
ROWS_AT_ONCE = 1024  # of small columns: below a megabyte
IMAGES_AT_ONCE = 16  # where the images themselves must be read


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """The rows of a file, counted from 1; images are `Member`s, or paths in columns of strings.

    Raises AnnotationError if pyarrow is not installed, the file is damaged, or its columns of
    images and captions are missing or ambiguous.
    """
    with arrow_errors(path, EXPECTED), open_parquet(path) as file:
        columns = choose_columns(file.schema_arrow, options, path)
        first_row = 1
        for row_group in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(row_group).num_rows
            yield from _row_group(file, row_group, num_rows, first_row, columns)
            first_row += num_rows


def image_column(path: str, options: SourceOptions) -> str:
    """The name of the column of images; raises AnnotationError as `read` does."""
    with arrow_errors(path, EXPECTED), open_parquet(path) as file:
        return choose_columns(file.schema_arrow, options, path).image


def open_parquet(path: str) -> Any:
    """A pyarrow ParquetFile that starts no threads and maps no memory, as is safe after a fork."""
    pyarrow = import_pyarrow(path)
    if not os.path.isfile(path):  # opening a named pipe would wait forever
        raise OSError(f"{path}: no such file")
    return pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False)


def _row_group(
    file: Any, row_group: int, num_rows: int, first_row: int, columns: Columns
) -> Iterator[Item | Problem]:
    image = columns.path_field or (columns.image if columns.bytes_field is None else None)
    names = [*columns.texts(), *([image] if image else [])]
    # Rows whose image has bytes, in step with the batches below: either few or no values are read.
    has_bytes = _has_bytes(file, row_group, num_rows, columns)
    begin = 0
    for batch in file.iter_batches(
        ROWS_AT_ONCE, row_groups=[row_group], columns=names, use_threads=False
    ):

        def member(index: int, name: str, begin: int = begin) -> Member:
            return Member(name, row_group, begin + index)

        yield from items(
            batch,
            columns,
            first_row=first_row + begin,
            has_bytes=[next(has_bytes) for _ in range(batch.num_rows)],
            member=member,
        )
        begin += batch.num_rows


def _has_bytes(file: Any, row_group: int, num_rows: int, columns: Columns) -> Iterator[bool]:
    """Whether the bytes of each row's image are not null, from the file's statistics if they tell.

    Only where some are null (or without statistics) are the images read.
    """
    if columns.bytes_field is None:
        return repeat(False, num_rows)
    (chunk,) = column_chunks(file, row_group, columns.bytes_field)
    statistics = chunk.statistics
    if statistics is not None and statistics.has_null_count:
        if statistics.null_count in (0, num_rows):
            return repeat(statistics.null_count == 0, num_rows)
    return chain.from_iterable(
        bytes_column(batch.column(0)).is_valid().to_pylist()
        for batch in file.iter_batches(
            IMAGES_AT_ONCE, row_groups=[row_group], columns=[columns.bytes_field], use_threads=False
        )
    )


def bytes_column(column: Any) -> Any:
    """The bytes of an image column, which is binary or struct<bytes, ...>; null where either is."""
    import pyarrow.compute as compute

    is_struct = str(column.type).startswith("struct<")
    return compute.struct_field(column, "bytes") if is_struct else column


def column_chunks(file: Any, row_group: int, column: str) -> Sequence[Any]:
    """The column chunks of a column, or of the bytes of a struct<bytes, path>."""
    metadata = file.metadata.row_group(row_group)
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]
