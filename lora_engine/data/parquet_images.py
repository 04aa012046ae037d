"""The images of a Parquet file, by row group and row."""

import os
from collections import OrderedDict
from functools import partial
from typing import Any

from lora_engine.data.arrow_columns import import_pyarrow
from lora_engine.data.formats.parquet import (
    IMAGES_AT_ONCE,
    bytes_column,
    column_chunks,
    open_parquet,
)

MAX_CACHE_BYTES = 2**28


class ParquetImages:
    """Reads images from an image column, one row group at a time.

    A row group is the smallest unit of Parquet that can be read. The latest ones stay in memory, up
    to `max_cache_bytes` (and at least one), in each process that reads: after a fork the child
    opens the file anew, because processes must not share a position in it.
    """

    def __init__(self, path: str, column: str, *, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.path = path
        self.column = column
        self.max_cache_bytes = max_cache_bytes
        self._process = 0
        self._file: Any = None
        self._row_groups: OrderedDict[int, Any] = OrderedDict()  # least recently used first

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process gets an empty cache, and opens the file itself.
        make = partial(ParquetImages, max_cache_bytes=self.max_cache_bytes)
        return make, (self.path, self.column)

    def read(self, row_group: int, row: int) -> bytes:
        """The bytes of the image file in a row of a row group, both counted from 0.

        Raises OSError if the file cannot be read, ValueError if it is damaged or the image is null.
        """
        pyarrow = import_pyarrow(self.path)
        try:
            values = self._values(row_group)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path}: row group {row_group} is damaged: {error}") from error
        if not 0 <= row < len(values):
            raise ValueError(
                f"{self.path}: no row {row} in row group {row_group} of {len(values)} rows: has "
                f"the file changed?"
            )
        value = values[row].as_py()
        if value is None:
            raise ValueError(f"{self.path}: row {row} of row group {row_group} has no image (null)")
        return value

    def _values(self, row_group: int) -> Any:
        """The bytes of a row group's images."""
        if self._process != os.getpid():
            self._row_groups.clear()
            self._file = open_parquet(self.path)
            self._process = os.getpid()
        if row_group in self._row_groups:
            self._row_groups.move_to_end(row_group)
            return self._row_groups[row_group]
        if not 0 <= row_group < self._file.metadata.num_row_groups:
            raise ValueError(f"{self.path}: no row group {row_group}: has the file changed?")
        (chunk,) = column_chunks(self._file, row_group, self.column)
        self._make_room(chunk.total_uncompressed_size)
        # In batches, because pyarrow refuses nested columns of more than 2 GiB at once.
        batches = self._file.iter_batches(
            IMAGES_AT_ONCE,
            row_groups=[row_group],
            columns=[chunk.path_in_schema],
            use_threads=False,
        )
        columns = [bytes_column(batch.column(0)) for batch in batches]
        values = import_pyarrow(self.path).chunked_array(columns)
        self._row_groups[row_group] = values
        return values

    def _make_room(self, size: int) -> None:
        """Drop row groups before one of `size` bytes is read, not after: memory holds both then."""
        used = sum(values.nbytes for values in self._row_groups.values())
        while self._row_groups and used + size > self.max_cache_bytes:
            _, values = self._row_groups.popitem(last=False)
            used -= values.nbytes
