"""Arrays that grow by appending, in memory or in files that are later mapped into memory.

    FOLDER/columns.json    {"text_end": ["<u4", 2900954], ...}: dtype and length
    FOLDER/NAME.bin        one array each, without a header

A folder is written completely or not at all. Mapped arrays are shared by all processes that open
them, and their pages can be dropped from memory at any time.
"""

import json
from pathlib import Path

import numpy as np

from lora_engine.files import read_limited

DESCRIPTION = "columns.json"
_MAX_DESCRIPTION_BYTES = 2**20
_CHUNK = 2**22  # numbers that are converted at a time

Columns = dict[str, np.ndarray]


class ColumnsError(ValueError):
    """A folder of columns that is incomplete, damaged, or of another version."""


class ColumnWriter:
    """Appends to named arrays: in files of `folder`, or in memory if it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._parts: dict[str, list[np.ndarray]] = {}
        self._lengths: dict[str, int] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append to an array; all parts of an array have the dtype of the first."""
        dtype = self._dtypes.setdefault(name, values.dtype)
        assert values.dtype == dtype, f"{name} is {dtype}, not {values.dtype}"
        self._lengths[name] = self._lengths.get(name, 0) + len(values)
        if self.folder is None:
            self._parts.setdefault(name, []).append(values)
        else:
            with open(self.folder / f"{name}.bin", "ab") as file:
                file.write(np.ascontiguousarray(values).data)

    def finish(self) -> Columns:
        """The arrays, unsigned integers in the smallest dtype that holds them."""
        if self.folder is None:
            return {name: _narrow(np.concatenate(parts)) for name, parts in self._parts.items()}
        for name, dtype in self._dtypes.items():
            if dtype.kind == "u" and dtype.itemsize > 1:
                self._dtypes[name] = _narrow_file(self.folder / f"{name}.bin", dtype)
        description = {
            name: [dtype.str, self._lengths[name]] for name, dtype in self._dtypes.items()
        }
        (self.folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
        return read_columns(self.folder)


def read_columns(folder: Path) -> Columns:
    """Map the arrays of a folder, read-only. Raises ColumnsError, OSError."""
    try:
        description = json.loads(read_limited(folder / DESCRIPTION, _MAX_DESCRIPTION_BYTES))
        return {
            name: _mapped(folder / f"{name}.bin", np.dtype(dtype), length)
            for name, (dtype, length) in description.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ColumnsError(f"{folder}: {error}") from None


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise ColumnsError(f"{path} has {size:,} bytes, not {length * dtype.itemsize:,}")
    if not length:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # indexing a memmap itself is slow


def _narrow(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "u" or not len(values):
        return values
    return values.astype(np.min_scalar_type(int(values.max())), copy=False)


def _narrow_file(path: Path, dtype: np.dtype) -> np.dtype:
    """Rewrite a file in the smallest dtype that holds its numbers; return it."""
    values = _mapped(path, dtype, path.stat().st_size // dtype.itemsize)
    narrow = np.min_scalar_type(int(values.max())) if len(values) else dtype
    if narrow.itemsize < dtype.itemsize:
        new = path.with_suffix(".narrow")
        with open(new, "wb") as file:
            for begin in range(0, len(values), _CHUNK):
                file.write(values[begin : begin + _CHUNK].astype(narrow).data)
        new.replace(path)
    return narrow
