"""Image-caption pairs given from Python: lists of rows, and datasets of Hugging Face.

A row is (image, caption or captions) or a dictionary with the fields of rows.py. An image is a
path, the bytes of an image file, a PIL image, or an array of uint8, (height, width, 3) or
(height, width).
"""

import io
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lora_engine.data.formats.arrow_columns import choose_columns, items
from lora_engine.data.formats.parquet import bytes_column
from lora_engine.data.images import apply_orientation, read_image_file
from lora_engine.data.rows import (
    IMAGE_FIELDS,
    PYTHON_ROWS,
    AnnotationError,
    Item,
    Member,
    Problem,
    SourceOptions,
    as_item,
)
from lora_engine.terminal import counted

EXPECTED_ROW = '(image, caption) or {"image": ..., "text": ...}'
EXPECTED_IMAGE = (
    "a path, the bytes of an image file, a PIL image or an array of uint8, (height, width, 3)"
)
ROWS_AT_ONCE = 1024
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})


def read(data: Any, options: SourceOptions) -> Iterator[Item | Problem]:
    """The rows of a sequence or of a Hugging Face dataset, counted from 1.

    Images are paths, or Member(name, offset=index of the row, size=0), which PythonImages reads.
    Raises AnnotationError if `data` is neither, is empty, or is a dataset without usable columns.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise AnnotationError(
            f"{PYTHON_ROWS}: found {shown_type(data)}, expected a list of {EXPECTED_ROW}, or a "
            f"dataset that is not streamed"
        )
    if isinstance(data, (str, bytes, dict)):  # also a DatasetDict
        raise AnnotationError(
            f"{PYTHON_ROWS}: found {shown_type(data)}, expected a list of {EXPECTED_ROW}, or a "
            f"dataset of one split"
        )
    if hasattr(data, "iloc"):
        raise AnnotationError(
            f'{PYTHON_ROWS}: found a pandas table, expected a list: give table.to_dict("records")'
        )
    if len(data) == 0:
        raise AnnotationError(f"{PYTHON_ROWS}: empty, expected a list of {EXPECTED_ROW}")
    if is_dataset(data):
        yield from _dataset_rows(data, options)
        return
    for index in range(len(data)):
        yield _row(data[index], index, options)


class PythonImages:
    """The images of rows given from Python, as bytes of image files.

    column: the dataset's image column, as `image_column` gives it; a list's dictionaries are read
    by that key, or by the first of IMAGE_FIELDS if it is "".
    """

    def __init__(self, data: Any, column: str) -> None:
        self.column = column
        self.data = data.with_format("arrow") if is_dataset(data) else data

    def read(self, number: int) -> bytes:
        """The image of the row at an index, counted from 0.

        Raises OSError or ValueError, with the reason, if there is none or it cannot be used.
        """
        row = self.data[number]
        if is_dataset(self.data):
            value = bytes_column(row.column(self.column))[0].as_py()
            if value is None:
                raise ValueError("the image is missing")
            return value
        image = row[0] if isinstance(row, (tuple, list)) else _image_of(row, self.column)
        if isinstance(image, (str, os.PathLike)):
            return read_image_file(os.fspath(image))
        return image_bytes(image)


def image_column(data: Any, options: SourceOptions) -> str:
    """The image column of a dataset, the key that the options name for a list, or ""."""
    if is_dataset(data):
        return choose_columns(data.features.arrow_schema, options, PYTHON_ROWS).image
    return options.image_field or ""


def is_dataset(data: Any) -> bool:
    """Whether this is a dataset of Hugging Face, without importing that package."""
    return hasattr(data, "features") and hasattr(data, "column_names")


def image_bytes(image: Any) -> bytes:
    """An image as an image file: bytes as they are, others as a PNG without compression.

    `open_image` gives the pixels that it gives for the image saved as a PNG, upright by its EXIF.
    Raises ValueError for an image that cannot be used, OSError if its file cannot be decoded.
    """
    complaint = _image_complaint(image)
    if complaint is not None:
        raise ValueError(complaint)
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        picture = Image.fromarray(np.ascontiguousarray(image))
    else:
        picture = _as_png_mode(image)
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def _as_png_mode(image: Image.Image) -> Image.Image:
    """An upright copy in a mode that PNG has; `image` is not changed, other than being loaded."""
    picture = image.copy()
    apply_orientation(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(picture).astype(np.uint16))
    if picture.mode in PNG_MODES:
        return picture
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _row(row: Any, index: int, options: SourceOptions) -> Item | Problem:
    where = index + 1
    if isinstance(row, (tuple, list)) and len(row) == 2:
        captions = list(row[1]) if isinstance(row[1], (list, tuple)) else row[1]
        item = as_item({"image": row[0], "text": captions}, where, SourceOptions())
    elif isinstance(row, dict):
        item = as_item(row, where, options)
    else:
        found = shown_type(row)
        if isinstance(row, (tuple, list)):
            found = counted(len(row), "value")
        return Problem(where, f"found {found}, expected {EXPECTED_ROW}")
    if isinstance(item, Problem):
        return item
    image = item.image
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        return item._replace(image=os.fsdecode(path) if isinstance(path, bytes) else path)
    complaint = _image_complaint(image)
    if complaint is not None:
        return Problem(where, complaint)
    return item._replace(image=Member(f"row {where}", index, 0))


def _image_of(row: dict[str, Any], column: str) -> Any:
    """The image of a row, from the field that `as_item` reads."""
    return row[column or next((name for name in IMAGE_FIELDS if name in row), "image")]


def _image_complaint(image: Any) -> str | None:
    """What makes an image unusable, without decoding it; None for a usable one."""
    if isinstance(image, (bytes, bytearray)):
        return None
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F"):
            return (
                f"the image has 32-bit pixels (mode {image.mode}) without a defined white level: "
                f"convert it to L or RGB"
            )
        return None if image.width and image.height else "the image has no pixels"
    if not isinstance(image, np.ndarray):
        return f"the image is {shown_type(image)}, expected {EXPECTED_IMAGE}"
    found = f"the image is an array of {image.dtype}, {image.shape}, expected uint8"
    if image.dtype != np.uint8:
        return f"{found}, 0 to 255: scale the values and convert them"
    if image.size == 0 or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3):
        is_first = image.ndim == 3 and image.shape[0] in (1, 3)
        advice = ": move the channels to the end, array.transpose(1, 2, 0)" if is_first else ""
        return f"{found}, (height, width, 3) or (height, width){advice}"
    return None


def _dataset_rows(data: Any, options: SourceOptions) -> Iterator[Item | Problem]:
    """The rows of a dataset, as its Arrow tables: no image is decoded, or copied."""
    columns = choose_columns(data.features.arrow_schema, options, PYTHON_ROWS)
    names = list(dict.fromkeys([columns.image, *columns.texts()]))
    first_row = 1
    for table in data.with_format("arrow").select_columns(names).iter(ROWS_AT_ONCE):
        has_bytes: Sequence[bool] = [False] * table.num_rows
        if columns.bytes_field is not None:
            has_bytes = bytes_column(table.column(columns.image)).is_valid().to_pylist()

        def member(index: int, name: str, first_row: int = first_row) -> Member:
            return Member(name, first_row - 1 + index, 0)

        yield from items(table, columns, first_row=first_row, has_bytes=has_bytes, member=member)
        first_row += table.num_rows


def shown_type(value: Any) -> str:
    """A value for a message: short ones as Python shows them, others by their type."""
    if value is None or isinstance(value, (str, int, float)):
        return reprlib.repr(value)
    return f"an object of the type {type(value).__name__}"
