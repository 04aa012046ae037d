"""Tables as text: the delimiter of a header, and lines -> cells, quoted or not."""

import csv
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

DELIMITERS = (",", "\t", ";", "|")
QUOTED = (",", ";")  # between tabs or pipes, a quote is part of the text (Flickr30k, CC3M)
QUOTED_CELL = re.compile(r'\s*"((?:[^"]|"")*)"\s*')
MAX_CELL_CHARS = 1 << 20


class Cells(NamedTuple):
    """The cells of a row, which has the lines from `first_line` to `last_line`.

    If the lines cannot be split into cells, `error` says why.
    """

    first_line: int
    last_line: int
    cells: list[str]
    error: str | None = None


def find_delimiter(header: str, known: Collection[str]) -> str:
    """The delimiter that splits a header into the most known names, then into the most cells."""

    def num_names(delimiter: str) -> tuple[int, int]:
        names = split_line(header, delimiter)
        return sum(name.strip().lower() in known for name in names), len(names)

    return max(DELIMITERS, key=num_names)


def split_line(line: str, delimiter: str) -> list[str]:
    """The cells of one line; none for a line that cannot be split."""
    return next(split_lines([line], delimiter), Cells(1, 1, [])).cells


def split_lines(lines: Iterable[str], delimiter: str, *, first_line: int = 1) -> Iterator[Cells]:
    """The cells of each row that is not blank, counting lines from `first_line`."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARS))
    is_quoted = delimiter in QUOTED
    # strict: a quote that is not closed must not hide the rows after it
    rows = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        strict=True,
    )
    first_line -= 1
    while True:
        start = first_line + rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Cells(start, first_line + rows.line_num, [], str(error).partition(" - ")[0])
            continue
        if "".join(cells).strip():
            if not is_quoted:
                cells = list(map(unquoted, cells))
            yield Cells(start, first_line + rows.line_num, cells)


def unquoted(cell: str) -> str:
    """A cell without the quotes that pandas and csv write around a text with quotes in it."""
    match = QUOTED_CELL.fullmatch(cell)
    return match[1].replace('""', '"') if match else cell
