"""The images of a Parquet file, by row group and row."""

import os
from collections import OrderedDict
from typing import Any

from lora_engine.data.formats.arrow_columns import import_pyarrow
from lora_engine.data.formats.parquet import (
    IMAGES_AT_ONCE,
    bytes_column,
    column_chunks,
    open_parquet,
)

MAX_CACHE_BYTES = 2**28


class RowGroups:
    """The row groups that were read last, of all files of a data set.

    They take up to `max_bytes`, and there is at least one.
    """

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._values: OrderedDict[tuple[str, int], Any] = OrderedDict()  # least recently used first

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.max_bytes,)  # another process gets none of them

    def __len__(self) -> int:
        return len(self._values)

    def get(self, path: str, row_group: int) -> Any:
        values = self._values.get((path, row_group))
        if values is not None:
            self._values.move_to_end((path, row_group))
        return values

    def make_space(self, size: int) -> None:
        """Drop row groups before one of `size` bytes is read, not after: memory holds both then."""
        used = sum(values.nbytes for values in self._values.values())
        while self._values and used + size > self.max_bytes:
            _, values = self._values.popitem(last=False)
            used -= values.nbytes

    def keep(self, path: str, row_group: int, values: Any) -> None:
        self._values[path, row_group] = values


class ParquetImages:
    """Reads images from an image column, one row group at a time.

    A row group is the smallest unit of Parquet that can be read. Those that were read last stay in
    `row_groups`, in each process that reads: after a fork the child opens the file anew, because
    processes must not share a position in it.
    """

    def __init__(self, path: str, column: str, row_groups: RowGroups) -> None:
        self.path = path
        self.column = column
        self.row_groups = row_groups
        self._process = 0
        self._file: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetImages, (self.path, self.column, self.row_groups)

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
        values = self.row_groups.get(self.path, row_group)
        if values is not None:
            return values
        if self._process != os.getpid():
            self._file = open_parquet(self.path)
            self._process = os.getpid()
        if not 0 <= row_group < self._file.metadata.num_row_groups:
            raise ValueError(f"{self.path}: no row group {row_group}: has the file changed?")
        (chunk,) = column_chunks(self._file, row_group, self.column)
        self.row_groups.make_space(chunk.total_uncompressed_size)
        # In batches, because pyarrow refuses nested columns of more than 2 GiB at once.
        batches = self._file.iter_batches(
            IMAGES_AT_ONCE,
            row_groups=[row_group],
            columns=[chunk.path_in_schema],
            use_threads=False,
        )
        columns = [bytes_column(batch.column(0)) for batch in batches]
        values = import_pyarrow(self.path).chunked_array(columns)
        self.row_groups.keep(self.path, row_group, values)
        return values
