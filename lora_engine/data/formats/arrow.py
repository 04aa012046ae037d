"""Folders of Hugging Face's `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.

A dataset's folder has state.json, which names its Arrow stream files; a DatasetDict's has
dataset_dict.json and a folder per split. The files are not compressed, so that each image is a
range of bytes in its file.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine.data.formats.arrow_columns import (
    Columns,
    arrow_errors,
    choose_columns,
    import_pyarrow,
    items,
)
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Member,
    Problem,
    SourceOptions,
    shown_value,
)

EXPECTED = "an Arrow stream file of save_to_disk"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parts(folder: str) -> list[tuple[str, str]]:
    """(Arrow file, split) of each file of a save_to_disk folder; the split of a Dataset is "".

    Raises AnnotationError if the folder is not one, or its rows are selected by an index.
    """
    if not os.path.exists(os.path.join(folder, "dataset_dict.json")):
        return [(file, "") for file in _files(folder)]
    splits = _json(os.path.join(folder, "dataset_dict.json"), "splits")
    return [(file, split) for split in splits for file in _files(_child(folder, split))]


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """The rows of one Arrow file, counted from 1; images are ranges of its bytes, or paths.

    Raises AnnotationError if pyarrow is not installed, the file is damaged or compressed, or its
    columns of images and captions are missing or ambiguous.
    """
    pyarrow = import_pyarrow(path)
    folder = Path(os.path.abspath(path)).parent
    split = folder.name if (folder.parent / "dataset_dict.json").exists() else ""
    if not os.path.isfile(path):
        raise AnnotationError(f"{path}: no such file")
    with arrow_errors(path, EXPECTED), pyarrow.memory_map(path) as source:
        whole = source.read_buffer()
        first_row = 1
        with pyarrow.ipc.open_stream(pyarrow.BufferReader(whole)) as batches:
            columns = choose_columns(batches.schema, options, path)
            for batch in batches:
                yield from _batch(batch, whole, columns, first_row, split, path)
                first_row += batch.num_rows
        if whole.slice(max(0, whole.size - len(END_OF_STREAM))).to_pybytes() != END_OF_STREAM:
            reason = "the file has no end mark, so it is cut off: download or copy it again"
            yield Problem("", reason, is_cut_off=True)


def _batch(
    batch: Any, whole: Any, columns: Columns, first_row: int, split: str, path: str
) -> Iterator[Item | Problem]:
    has_bytes = [False] * batch.num_rows
    offsets = np.zeros(batch.num_rows + 1, np.int64)
    if columns.bytes_field is not None and batch.num_rows:
        column = batch.column(columns.image)
        is_valid = np.asarray(column.is_valid())
        if columns.bytes_field != columns.image:
            column = column.field("bytes")
            is_valid = is_valid & np.asarray(column.is_valid())
        has_bytes = is_valid.tolist()
        offsets = _offsets(column, whole, path)

    def member(index: int, name: str) -> Member:
        return Member(name, int(offsets[index]), int(offsets[index + 1] - offsets[index]))

    yield from items(
        batch, columns, first_row=first_row, has_bytes=has_bytes, member=member, split=split
    )


def _offsets(column: Any, whole: Any, path: str) -> np.ndarray:
    """Where the values of a binary column begin in the file, and where the last one ends."""
    _, ends, values = column.buffers()
    width = np.int64 if str(column.type) == "large_binary" else np.int32
    relative = np.frombuffer(ends, width)[column.offset : column.offset + len(column) + 1]
    if values is None or values.size == 0:  # all are null or empty
        return relative.astype(np.int64)
    begin = values.address - whole.address
    if not 0 <= begin <= whole.size - values.size:  # decompressed to another place
        raise AnnotationError(
            f"{path}: its images are compressed (Arrow IPC compression), expected the files of "
            f"save_to_disk as they are: load the dataset and save it again"
        )
    if relative[0] < 0 or relative[-1] > values.size or np.any(np.diff(relative) < 0):
        raise AnnotationError(f"{path}: damaged: images lie outside of the file")
    return relative.astype(np.int64) + begin


def _files(folder: str) -> list[str]:
    """The Arrow files of a Dataset's folder."""
    state = os.path.join(folder, "state.json")
    if _json(state, "_indices_files", None):
        raise AnnotationError(
            f"{folder}: its rows are selected by an index (select, shuffle or filter): call "
            f"flatten_indices() on the dataset, then save_to_disk() again"
        )
    return [
        _child(folder, part.get("filename") if isinstance(part, dict) else part)
        for part in _json(state, "_data_files")
    ]


def _json(path: str, key: str, *default: Any) -> Any:
    """The list at a key of a JSON object in a file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        found = value.get(key, *default) if default else value[key]
    except OSError as error:
        raise AnnotationError(
            f"{path}: expected the folder of a dataset's save_to_disk: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AnnotationError(f'{path}: expected an object with "{key}", as save_to_disk writes')
    if not isinstance(found, list) and not default:
        raise AnnotationError(f'{path}: "{key}" is not a list, as save_to_disk writes')
    return found


def _child(folder: str, name: Any) -> str:
    """The path of a file or folder directly in a folder."""
    if not isinstance(name, str) or not name or os.path.basename(name) != name or name == "..":
        raise AnnotationError(
            f"{folder}: found {shown_value(name)}, expected the name of a file or folder in this "
            f"one, as save_to_disk writes"
        )
    return os.path.join(folder, name)
