"""Which text format a file has, by its first 64 KiB; by its suffix only if they do not tell."""

import os
import re
from collections.abc import Collection, Sequence

from lora_engine.data.formats.cells import find_delimiter, split_line, split_lines
from lora_engine.data.image_files import SUFFIXES
from lora_engine.data.rows import CAPTION_FIELDS, IMAGE_FIELDS

KNOWN_FIELDS = frozenset((*CAPTION_FIELDS, *IMAGE_FIELDS))
FORMATS_BY_SUFFIX = {
    ".json": "json_list", ".jsonl": "json_lines", ".ndjson": "json_lines",
    ".csv": "table", ".tsv": "table",
}
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}\[\]]', re.DOTALL)
KARPATHY_FIELDS = frozenset(("sentences", "sentids", "filename"))
FLICKR_ROW = re.compile(r"([^\t\n]*[^\t\n#])#\d+\t(.*)", re.DOTALL)
URL_FIELDS = ("url", "image_url", "img_url")  # in JSON; a table shows its URLs
URL_CELL = re.compile(r'(?:^|[\t,;|"])\s*[a-z][a-z0-9+.-]*://', re.IGNORECASE)


def text_format(path: str, head: str) -> str | None:
    """The name of the text format of a file that begins with `head`; None if it has none."""
    suffix = os.path.splitext(path)[1].lower()
    head = head.removeprefix("\ufeff")
    by_content = _json_format(head.lstrip(), suffix) or _line_format(head)
    return by_content or FORMATS_BY_SUFFIX.get(suffix)


def _json_format(head: str, suffix: str) -> str | None:
    if re.match(r"\[\s*(?:[{\]]|$)", head):
        return "url_list" if _has_only_urls(_object_keys(head[1:].lstrip())[0]) else "json_list"
    if not re.match(r'{\s*(?:["}]|$)', head):
        return None
    keys, rest = _object_keys(head)
    if _has_only_urls(keys):
        return "url_list"
    if rest.lstrip().startswith("{"):
        return "json_lines"
    images, annotations = keys.get("images"), keys.get("annotations")
    if images is not None and annotations is None and images & KARPATHY_FIELDS:
        return "karpathy"
    if images is not None and (annotations is not None or "file_name" in images):
        return "coco"
    if annotations is not None and "image_id" in annotations:  # "images" may come later
        return "coco"
    return "json_list" if suffix == ".json" else "json_lines"


def _has_only_urls(keys: Collection[str]) -> bool:
    names = {key.lower() for key in keys}
    return not names.isdisjoint(URL_FIELDS) and names.isdisjoint(IMAGE_FIELDS)


def _object_keys(head: str) -> tuple[dict[str, set[str]], str]:
    """The keys of the object that a text begins with, each with the keys of the objects that its
    list has; and the text after the object, which may not end within `head`.
    """
    keys: dict[str, set[str]] = {}
    key = ""
    nesting: list[str] = []
    for token in JSON_TOKEN.finditer(head):
        if token[0] in ("{", "["):
            nesting.append(token[0])
        elif token[0] in ("}", "]"):
            del nesting[-1:]
            if not nesting:
                return keys, head[token.end():]
        elif token[1] and len(nesting) == 1:
            key = token[0][1:].rpartition('"')[0]
            keys[key] = set()
        elif token[1] and nesting == ["{", "[", "{"]:
            keys.setdefault(key, set()).add(token[0][1:].rpartition('"')[0])
    return keys, ""


def _line_format(head: str) -> str | None:
    lines = [line for line in re.split("[\r\n]+", head) if line.strip()]
    if not lines:
        return None
    if URL_CELL.search(lines[0]):
        return "url_list"
    if FLICKR_ROW.match(lines[0]):
        return "flickr"
    delimiter = find_delimiter(lines[0], KNOWN_FIELDS)
    names = [name.strip().lower() for name in split_line(lines[0], delimiter)]
    row = next(split_lines(lines[1:], delimiter), None)
    if row is not None and _has_urls(names, row.cells):
        return "url_list"
    has_header = not KNOWN_FIELDS.isdisjoint(names)
    # A table without a header: its reader asks for one.
    has_images = any(os.path.splitext(name)[1] in SUFFIXES for name in names)
    return "table" if len(names) > 1 and (has_header or has_images) else None


def _has_urls(names: Sequence[str], cells: Sequence[str]) -> bool:
    """Whether the images of a table with these names are URLs, by the cells of its first row."""
    images = [cell for name, cell in zip(names, cells) if name in IMAGE_FIELDS]
    if images:
        return all(map(URL_CELL.match, images))
    return any(map(URL_CELL.match, cells))
