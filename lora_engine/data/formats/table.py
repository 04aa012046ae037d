"""CSV and TSV with a header: Flickr8k's captions.txt, Flickr30k's results.csv, open_clip's files.

The delimiter (comma, tab, semicolon or pipe) is found from the header.
"""

import json
from collections.abc import Iterator, Sequence

from lora_engine.data.formats.cells import Cells, find_delimiter, split_line, split_lines, unquoted
from lora_engine.data.formats.text_files import read_lines
from lora_engine.data.formats.text_heads import KNOWN_FIELDS, text_format
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    find_fields,
    shown_value,
)

MAX_LINES_PER_ROW = 100  # before a row that cannot be read is taken for the rest of the file


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "table"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per row; `where` is the line in which the row begins.

    Raises AnnotationError for a file without a header, without rows, or with columns among which
    `find_fields` cannot choose, and where a quote that is not closed hides many rows.
    """
    lines = read_lines(path)
    number, line = next((number, line) for number, line in enumerate(lines, 1) if line.strip())
    delimiter, names = _header(line, path, options)
    fields = find_fields(names, options, path=path)
    image, caption = names.index(fields.image), names.index(fields.caption)
    split = None if fields.split is None else names.index(fields.split)
    row = None
    for row in split_lines(lines, delimiter, first_line=number + 1):
        cells = _joined(row, names, caption, delimiter)
        reason = _complaint(row, cells, names)
        if reason is None:
            yield Item(
                row.first_line,
                cells[image].strip(),
                _captions(cells[caption]),
                "" if split is None else cells[split].strip(),
            )
        elif row.last_line - row.first_line >= MAX_LINES_PER_ROW:
            raise AnnotationError(f"{path}:{row.first_line}: {reason}")
        else:
            yield Problem(row.first_line, reason, num_rows=row.last_line - row.first_line + 1)
    if row is None:
        raise AnnotationError(f"{path}: a header ({', '.join(names)}) but no rows")


def _header(line: str, path: str, options: SourceOptions) -> tuple[str, list[str]]:
    """The delimiter and the names of the columns."""
    known = KNOWN_FIELDS | {
        name.lower() for name in (options.image_field, options.caption_field) if name is not None
    }
    delimiter = find_delimiter(line, known)
    names = [name.strip() for name in split_line(line, delimiter)]
    if known.isdisjoint(name.lower() for name in names):
        raise AnnotationError(
            f"{path}: the first line is {shown_value(line.rstrip())}, expected a header such as "
            f"image,caption: add one, or if it is one, name its columns with --image_field and "
            f"--caption_field"
        )
    for name in names:
        if name and names.count(name) > 1:
            raise AnnotationError(f"{path}: two columns are called {name}: rename one of them")
    return delimiter, names


def _joined(row: Cells, names: Sequence[str], caption: int, delimiter: str) -> list[str]:
    """Cells with those joined that an unquoted delimiter in a caption at the end has split."""
    cells = row.cells
    while len(cells) > len(names) and not cells[-1].strip():
        cells = cells[:-1]
    is_one_line = row.first_line == row.last_line  # else a quote may be missing
    if len(cells) > len(names) and caption == len(names) - 1 and is_one_line:
        return [*cells[:caption], unquoted(delimiter.join(cells[caption:]))]
    return cells


def _captions(cell: str) -> Sequence[str]:
    """The captions of a cell: one, or a JSON list of them, as on the Hub for Flickr30k."""
    if cell.startswith('["') and cell.endswith('"]'):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return (cell,)


def _complaint(row: Cells, cells: Sequence[str], names: Sequence[str]) -> str | None:
    lines = f"lines {row.first_line} to {row.last_line}: " if row.last_line > row.first_line else ""
    if row.error is not None:
        return (
            f"{lines}cannot be split into cells ({row.error}): write a cell that contains quotes "
            f'as "a ""quoted"" word"'
        )
    if len(cells) == len(names):
        return None
    advice = ": quote cells that contain the delimiter" if len(cells) > len(names) else ""
    return f"{lines}expected {len(names)} cells ({', '.join(names)}), found {len(cells)}{advice}"
