"""The columns of Arrow tables (Parquet, save_to_disk folders, datasets) -> items.

Image columns hold the bytes of image files, as binary or as Hugging Face's struct<bytes, path>, or
strings that are paths. Caption columns hold strings or lists of strings.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from lora_engine.data.rows import (
    IMAGE_FIELDS,
    AnnotationError,
    Item,
    Member,
    Problem,
    SourceOptions,
    find_fields,
)

MAX_COLUMNS_SHOWN = 20


class Columns(NamedTuple):
    """The columns to read.

    `bytes_field` and `path_field`: the dotted names of the image's bytes and path, None without.
    `key`, `status`, `error`: img2dataset's name of an image, and whether and why it is missing.
    """

    image: str
    bytes_field: str | None
    path_field: str | None
    caption: str
    split: str | None = None
    key: str | None = None
    status: str | None = None
    error: str | None = None

    def texts(self) -> list[str]:
        """The columns of short values."""
        names = (self.caption, self.split, self.key, self.status, self.error)
        return list(dict.fromkeys(name for name in names if name is not None))


def import_pyarrow(path: str) -> ModuleType:
    """pyarrow with its Parquet part; raises AnnotationError with the command that installs it."""
    try:
        import pyarrow
        import pyarrow.compute  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise AnnotationError(
            f"{path}: needs pyarrow to be read; install it: pip install 'lora_engine[parquet]'"
        ) from None
    return pyarrow


@contextmanager
def arrow_errors(path: str, expected: str) -> Iterator[None]:
    """Within the context pyarrow's errors become an AnnotationError that starts with the path."""
    pyarrow = import_pyarrow(path)
    try:
        yield
    except AnnotationError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, EOFError) as error:
        detail = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise AnnotationError(
            f"{path}: expected {expected}; the file is damaged, truncated or another format: "
            f"{detail}"
        ) from error


def choose_columns(schema: Any, options: SourceOptions, path: str) -> Columns:
    """Choose the columns of images and captions by their types and names.

    Raises AnnotationError if there are none, if several are possible, or if a column that the
    options name has another type.
    """
    images = [field.name for field in schema if _is_image(field.type)]
    texts = [field.name for field in schema if _is_text(field.type) or _is_texts(field.type)]
    asked = (options.image_field, options.caption_field)
    _check_types(schema, options, images, texts, path)
    if images:  # beside these, "path" and "file_name" are only notes
        structs = [name for name in images if _bytes_index(schema.field(name).type) >= 0]
        if len(structs) == 1 and options.image_field is None:
            options = dataclasses.replace(options, image_field=structs[0])
        texts = [name for name in texts if name.lower() not in IMAGE_FIELDS or name in asked]
    elif options.image_field is None and not any(name.lower() in IMAGE_FIELDS for name in texts):
        raise AnnotationError(f"{path}: {_no_image_reason(schema)}")
    fields = find_fields([*images, *texts], options, path=path)
    if fields.caption in images:
        raise AnnotationError(
            f"{path}: the column {fields.caption} has the type "
            f"{schema.field(fields.caption).type}, expected captions (string or list of strings); "
            f"choose a column with --caption_field"
        )
    kind = schema.field(fields.image).type
    is_struct = _bytes_index(kind) >= 0
    columns = Columns(
        fields.image,
        f"{fields.image}.bytes" if is_struct else fields.image if fields.image in images else None,
        f"{fields.image}.path" if is_struct and kind.get_field_index("path") >= 0 else None,
        fields.caption,
        fields.split if fields.split and _is_text(schema.field(fields.split).type) else None,
    )
    if {"key", "status"} <= set(texts):
        error = "error_message" if "error_message" in texts else None
        return columns._replace(key="key", status="status", error=error)
    return columns


def _check_types(
    schema: Any, options: SourceOptions, images: Sequence[str], texts: Sequence[str], path: str
) -> None:
    """Refuse a column that was asked for and has a type that cannot be used."""
    for kind, name, usable, expected in (
        ("image", options.image_field, [*images, *texts], "binary, struct<bytes, path> or string"),
        ("caption", options.caption_field, texts, "string or list of strings"),
    ):
        if name in schema.names and name not in usable:
            raise AnnotationError(
                f"{path}: --{kind}_field is {name}, a column of the type "
                f"{schema.field(name).type}; expected {expected}"
            )


def _no_image_reason(schema: Any) -> str:
    shown = ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:MAX_COLUMNS_SHOWN])
    for field in schema:
        if _is_list(field.type) and _is_image(field.type.value_type):
            return (
                f"the column {field.name} holds a list of images in each row, expected one image: "
                f"write a table with one row per image"
            )
    reason = (
        f"no column of images (binary, struct<bytes, path>, or strings that are paths) among its "
        f"columns ({shown or 'none'})"
    )
    if any("url" in name.lower() for name in schema.names):
        return f"{reason}: download the images of its web addresses with `lora-engine download`"
    return f"{reason}: name a column of image paths with --image_field"


# --- types ------------------------------------------------------------------------------------


def _is_image(kind: Any) -> bool:
    return _is_binary(kind) or _bytes_index(kind) >= 0


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary")


def _bytes_index(kind: Any) -> int:
    """The position of the bytes in a struct<bytes, path>; -1 for other types."""
    if not str(kind).startswith("struct<"):
        return -1
    index: int = kind.get_field_index("bytes")
    return index if index >= 0 and _is_binary(kind.field(index).type) else -1


def _is_text(kind: Any) -> bool:
    if str(kind).startswith("dictionary<"):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<"))


def _is_texts(kind: Any) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


# --- values -----------------------------------------------------------------------------------


def items(
    table: Any,
    columns: Columns,
    *,
    first_row: int,
    has_bytes: Sequence[bool],
    member: Callable[[int, str], Member],
    split: str = "",
) -> Iterator[Item | Problem]:
    """The rows of a table or record batch, whose first one is row `first_row` of its file.

    has_bytes: for each row, whether the image's bytes are there (not null).
    member: (index within the table, name) -> where the bytes are.
    split: of rows without a split of their own.
    """
    values = {name: _strings(table.column(name)) for name in columns.texts()}
    paths = _paths(table, columns)
    for index in range(table.num_rows):
        where = first_row + index
        row = {name: column[index] for name, column in values.items()}
        if columns.status and row[columns.status] != "success":
            error = row[columns.error] if columns.error else None
            detail = f": {error}" if error else ""
            yield Problem(where, f"img2dataset's status is {row[columns.status]}{detail}")
            continue
        captions = row[columns.caption]
        image: Member | str | None = paths[index]
        if has_bytes[index]:
            name = row[columns.key] if columns.key else None
            image = member(index, name or f"row {where}")
        if image is None:
            yield Problem(where, f'"{columns.image}" is null, expected an image: remove the row')
        elif captions == []:
            yield Problem(
                where, f'"{columns.caption}" is an empty list: fill it in or remove the row'
            )
        else:
            captions = captions if isinstance(captions, list) else [captions]
            own = row[columns.split] if columns.split else None
            yield Item(where, image, captions, own or split)


def _paths(table: Any, columns: Columns) -> list[str | None]:
    """The path of each row's image, None for those without one."""
    import pyarrow.compute as compute

    if columns.bytes_field is None:
        return _strings(table.column(columns.image))
    if columns.path_field is None:
        return [None] * table.num_rows
    return _strings(compute.struct_field(table.column(columns.image), "path"))


def _strings(column: Any) -> list[Any]:
    """The values; bytes that are not UTF-8 become surrogates, which are no valid captions."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        is_list = _is_list(column.type)
        rows = column.cast(pyarrow.list_(pyarrow.binary()) if is_list else pyarrow.binary())
        return [_decoded(value) for value in rows.to_pylist()]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return None if value is None else value.decode("utf-8", errors="surrogateescape")
