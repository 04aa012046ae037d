"""Lists of links to images: Google's CC3M TSV, tables, JSON Lines, Parquet, and plain URLs."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_engine.data.formats.arrow_columns import arrow_errors
from lora_engine.data.formats.cells import find_delimiter, split_line, split_lines
from lora_engine.data.formats.parquet import EXPECTED, open_parquet
from lora_engine.data.formats.text_files import read_lines
from lora_engine.data.rows import (
    CAPTION_FIELDS,
    MAX_KEYS_SHOWN,
    SURROGATE,
    AnnotationError,
    Problem,
    caption_complaint,
    find_field,
    shown_value,
)
from lora_engine.data.sources.file_formats import check_not_compressed, read_head

URL_FIELDS = ("url", "image_url", "img_url", "imageurl", "link")
LINK_CAPTION_FIELDS = (*CAPTION_FIELDS, "alt", "alt_text", "description")
CC3M = "captions and links without a header, as CC3M's"
_URL = re.compile(r"\s*(?:https?|ftp)://\S", re.IGNORECASE)  # not file://, of this machine
_WEB_PAGE = re.compile(r"<(?:!doctype|html|head|\?xml)", re.IGNORECASE)


class Link(NamedTuple):
    """The URL of an image, and its caption as it is written; None in a list without captions."""

    url: str
    caption: str | None


@dataclass(frozen=True)
class LinkFields:
    """The columns to read; None: found by their names."""

    url_field: str | None = None
    caption_field: str | None = None


class LinkList(NamedTuple):
    """What kind of list a file is, and its links, in order; a Problem for each unusable row."""

    kind: str
    rows: Iterator[Link | Problem]


class Columns(NamedTuple):
    """Where a row has its URL and its caption: names or positions."""

    url: Any
    caption: Any = None


def open_links(source: str | Path, fields: LinkFields = LinkFields()) -> LinkList:
    """Find out the format of a list from its content; the links are read as they are requested.

    Raises AnnotationError, whose message starts with the path.
    """
    path = str(source)
    head = read_head(path)
    check_not_compressed(path, head)
    if head.startswith(b"PAR1"):
        return LinkList("Parquet", _from_parquet(path, fields))
    text = head.decode("utf-8-sig", errors="replace").lstrip("\r\n ")
    _check_is_list(path, text)
    first = text.splitlines()[0].rstrip(" ")
    if first.startswith("{"):
        return LinkList("JSON Lines", _from_json_lines(path, fields))
    are_urls = [bool(_URL.match(cell)) for cell in first.split("\t")[:2]]
    if are_urls == [True] and not re.search(r"\s", first):
        return LinkList("links without captions", _from_lines(path, Columns(0)))
    if len(are_urls) == 2 and are_urls[0]:
        kind = "links and captions without a header, as CC12M's"
        return LinkList(kind, _from_lines(path, Columns(0, 1)))
    if len(are_urls) == 2 and are_urls[1]:
        return LinkList(CC3M, _from_lines(path, Columns(1, 0)))
    return LinkList("a table", _from_table(path, fields))


def _check_is_list(path: str, text: str) -> None:
    if "\0" in text:
        raise AnnotationError(
            f"{path}: is neither UTF-8 text nor Parquet; expected a list of links: TSV, CSV, JSON "
            f"Lines, Parquet or one URL per line"
        )
    if not text.strip():
        raise AnnotationError(f"{path}: the file is empty, expected one link per line")
    if _WEB_PAGE.match(text):
        raise AnnotationError(
            f"{path}: is a web page, not a list of links: the server may have answered with a form "
            f"or an error; open the address in a browser and save the file itself"
        )
    if text.startswith("["):
        raise AnnotationError(f"{path}: is a JSON list; write one object per line (JSON Lines)")


# --- formats ---------------------------------------------------------------------------------


def _from_lines(path: str, columns: Columns) -> Iterator[Link | Problem]:
    """Lines without a header; quotes are part of the text."""
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) > 1 or columns.caption is None and line.strip():
            yield _link(number, cells, columns)
        elif line.strip():
            yield Problem(number, f"found {shown_value(cells[0])}, expected a tab and a link")


def _from_table(path: str, fields: LinkFields) -> Iterator[Link | Problem]:
    lines = read_lines(path)
    number, header = next((number, line) for number, line in enumerate(lines, 1) if line.strip())
    delimiter = find_delimiter(header, (*URL_FIELDS, *LINK_CAPTION_FIELDS))
    names = [name.strip() for name in split_line(header, delimiter)]
    found = _columns(path, names, fields)
    columns = Columns(*(name and names.index(name) for name in found))
    for row in split_lines(lines, delimiter, first_line=number + 1):
        if row.error is not None:
            yield Problem(row.first_line, f"cannot be split into cells ({row.error})")
        elif len(row.cells) != len(names):
            yield Problem(
                row.first_line, f"{len(row.cells)} cells, the header has {len(names)}"
            )
        else:
            yield _link(row.first_line, row.cells, columns)


def _from_json_lines(path: str, fields: LinkFields) -> Iterator[Link | Problem]:
    columns: Columns | None = None
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Problem(number, f"not JSON: {error}")
            continue
        if not isinstance(value, dict):
            yield Problem(number, f"found {shown_value(value)}, expected an object with a url")
            continue
        columns = columns or _columns(path, list(value), fields)
        yield _link(number, dict.fromkeys(columns) | value, columns)


def _from_parquet(path: str, fields: LinkFields) -> Iterator[Link | Problem]:
    with arrow_errors(path, EXPECTED), open_parquet(path) as file:
        columns = _columns(path, file.schema_arrow.names, fields)
        number = 0
        for batch in file.iter_batches(columns=[name for name in columns if name is not None]):
            for number, row in enumerate(batch.to_pylist(), start=number + 1):
                yield _link(f"row {number}", row, columns)


def _columns(path: str, names: Collection[str], fields: LinkFields) -> Columns:
    """The names of the columns; None for a list without captions."""
    url = find_field("url", URL_FIELDS, names, fields.url_field, path=path)
    if url is None:
        shown = ", ".join(map(shown_value, list(names)[:MAX_KEYS_SHOWN]))
        raise AnnotationError(
            f"{path}: no column of links: found {shown}; expected a header with url and caption, "
            f"lines of caption<TAB>url, or one URL per line. Name the column with --url_field"
        )
    caption = find_field("caption", LINK_CAPTION_FIELDS, names, fields.caption_field, path=path)
    return Columns(url, caption)


def _link(where: int | str, row: Any, columns: Columns) -> Link | Problem:
    url, caption = row[columns.url], None
    if not isinstance(url, str) or not _URL.match(url) or SURROGATE.search(url):
        return Problem(where, f"found {shown_value(url)}, expected a link (http:// or https://)")
    if columns.caption is not None:
        caption = row[columns.caption]
        complaint = caption_complaint(caption)
        if complaint is not None:
            return Problem(where, complaint)
    return Link(url.strip(), caption)
