"""Lists of links to images: Google's CC3M TSV, tables, JSON Lines, Parquet, and plain URLs."""

import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lora_engine.data.rows import (
    CAPTION_FIELDS,
    MAX_KEYS_SHOWN,
    SURROGATE,
    AnnotationError,
    Problem,
    caption_complaint,
    shown_value,
)
from lora_engine.files import check_file

URL_FIELDS = ("url", "image_url", "img_url", "imageurl", "link")
LINK_CAPTION_FIELDS = (*CAPTION_FIELDS, "alt", "alt_text", "description")
MAX_CELL_CHARS = 1 << 20
_HEAD_BYTES = 1 << 16
_URL = re.compile(r"(?:https?|ftp)://\S", re.IGNORECASE)  # not file://, which reads this machine
_WEB_PAGE = re.compile(r"\s*<(?:!doctype|html|head|\?xml)", re.IGNORECASE)
_QUOTED_CELL = re.compile(r'"((?:[^"]|"")*)"')
CC3M = "captions and links without a header, as CC3M's"


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


def open_links(path: str | Path, fields: LinkFields = LinkFields()) -> LinkList:
    """Find out the format of a list from its content; the links are read as they are requested.

    Raises AnnotationError, whose message starts with the path, and OSError.
    """
    head = _head(path)
    if head.startswith(b"PAR1"):
        return LinkList("Parquet", _from_parquet(path, fields))
    first = _first_line(path, head)
    if first.startswith("{"):
        return LinkList("JSON Lines", _from_json_lines(path, fields))
    cells = first.split("\t")
    if len(cells) > 1 and any(map(_URL.match, cells[:2])):
        url = 0 if _URL.match(cells[0]) else 1
        kind = CC3M if url else "links and captions without a header, as CC12M's"
        return LinkList(kind, _from_two_columns(path, url))
    if _URL.match(first) and not re.search(r"\s", first):
        return LinkList("links without captions", _from_plain_lines(path))
    delimiter = max("\t,;|", key=first.count)
    return LinkList("a table", _from_table(path, delimiter, fields))


# --- looking at the file ---------------------------------------------------------------------


def _head(path: str | Path) -> bytes:
    if os.path.isdir(path):
        raise AnnotationError(f"{path}: is a folder; give the file that lists the links")
    check_file(Path(path), max_bytes=1 << 62)
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _first_line(path: str | Path, head: bytes) -> str:
    """The first line that is not blank. Raises AnnotationError for what cannot be a list."""
    if head.startswith(b"\x1f\x8b"):
        raise AnnotationError(f"{path}: is compressed; unpack it first: gunzip --keep {path}")
    if b"\0" in head:
        raise AnnotationError(
            f"{path}: is neither UTF-8 text nor Parquet; expected a list of links: TSV, CSV, JSON "
            f"Lines, Parquet or one URL per line"
        )
    text = head.decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise AnnotationError(f"{path}: the file is empty, expected one link per line")
    if _WEB_PAGE.match(text):
        raise AnnotationError(
            f"{path}: is a web page, not a list of links: the server may have answered with a form "
            f"or an error; open the address in a browser and save the file itself"
        )
    if text.lstrip().startswith("["):
        raise AnnotationError(f"{path}: is a JSON list; write one object per line (JSON Lines)")
    return next(line for line in text.splitlines() if line.strip()).strip("\r\n ")


def _lines(path: str | Path) -> Iterator[str]:
    # surrogateescape: caption_complaint finds what is not UTF-8, and the other rows stay usable
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from file


# --- formats ---------------------------------------------------------------------------------


def _from_plain_lines(path: str | Path) -> Iterator[Link | Problem]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _link(number, line, None, has_captions=False)


def _from_two_columns(path: str | Path, url: int) -> Iterator[Link | Problem]:
    """Quotes are part of the text."""
    for number, line in enumerate(_lines(path), start=1):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) > 1:
            yield _link(number, cells[url], cells[1 - url])
        elif line.strip():
            yield Problem(number, f"found {shown_value(cells[0])}, expected a tab and a link")


def _from_table(
    path: str | Path, delimiter: str, fields: LinkFields
) -> Iterator[Link | Problem]:
    lines = _lines(path)
    header = next(line for line in lines if line.strip())
    names = [name.strip() for name in next(_rows([header], delimiter))]
    url, caption = _columns(path, names, fields)
    for number, cells in enumerate(_rows(lines, delimiter), start=2):
        if len(cells) == len(names):
            values = dict(zip(names, cells))
            yield _link(f"row {number}", values[url], values.get(caption or ""),
                        has_captions=caption is not None)
        elif cells:
            yield Problem(f"row {number}", f"{len(cells)} cells, the header has {len(names)}")


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """The cells of each row. Between tabs a quote is part of the text, unless the cell as a whole
    is quoted: CC3M's captions have single quotes, and pandas quotes cells that contain one."""
    if delimiter == "\t":
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            matches = [_QUOTED_CELL.fullmatch(cell) for cell in cells]
            yield [
                match[1].replace('""', '"') if match else cell
                for cell, match in zip(cells, matches)
            ] if line.strip() else []
        return
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARS))
    rows = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield [f"a row that cannot be read ({error})"]


def _from_json_lines(
    path: str | Path, fields: LinkFields
) -> Iterator[Link | Problem]:
    columns: tuple[str, str | None] | None = None
    for number, line in enumerate(_lines(path), start=1):
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
        url, caption = columns
        yield _link(number, value.get(url), value.get(caption), has_captions=caption is not None)


def _from_parquet(
    path: str | Path, fields: LinkFields
) -> Iterator[Link | Problem]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise AnnotationError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow"
        ) from None
    try:
        file = ParquetFile(path)
        url, caption = _columns(path, file.schema_arrow.names, fields)
        batches = file.iter_batches(columns=[url] if caption is None else [url, caption])
        values = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(values, start=1):
            yield _link(f"row {number}", row[url], row.get(caption),
                        has_captions=caption is not None)
    except (ArrowInvalid, OSError) as error:
        raise AnnotationError(f"{path}: Parquet that cannot be read: {error}") from None


def _columns(
    path: str | Path, names: Collection[str], fields: LinkFields
) -> tuple[str, str | None]:
    """The names of the columns of URLs and captions; None for a list without captions."""
    url = _column(path, "url", names, fields.url_field, URL_FIELDS)
    if url is None:
        shown = ", ".join(map(shown_value, list(names)[:MAX_KEYS_SHOWN]))
        raise AnnotationError(
            f"{path}: no column of links: found {shown}; expected a header with url and caption, "
            f"lines of caption<TAB>url, or one URL per line. Name the column with --url_field"
        )
    return url, _column(path, "caption", names, fields.caption_field, LINK_CAPTION_FIELDS)


def _column(
    path: str | Path,
    kind: str,
    names: Collection[str],
    asked: str | None,
    known: Collection[str],
) -> str | None:
    if asked is not None:
        if asked not in names:
            shown = ", ".join(list(names)[:MAX_KEYS_SHOWN])
            raise AnnotationError(f"{path}: --{kind}_field is {asked}, but the columns are {shown}")
        return asked
    found = [name for name in names if name.lower() in known]
    if len(found) > 1:
        raise AnnotationError(
            f"{path}: the columns {' and '.join(found)} could both be the {kind}s; choose one with "
            f"--{kind}_field"
        )
    return found[0] if found else None


def _link(where: int | str, url: Any, caption: Any, *, has_captions: bool = True) -> Link | Problem:
    if not isinstance(url, str) or not _URL.match(url.strip()) or SURROGATE.search(url):
        return Problem(where, f"found {shown_value(url)}, expected a link (http:// or https://)")
    complaint = caption_complaint(caption) if has_captions else None
    return Link(url.strip(), caption) if complaint is None else Problem(where, complaint)
