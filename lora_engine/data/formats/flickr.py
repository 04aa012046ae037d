"""The captions of Flickr8k and Flickr30k as they are published: name.jpg#0, a tab, a caption."""

from collections.abc import Iterator

from lora_engine.data.formats.text_files import read_lines
from lora_engine.data.formats.text_heads import FLICKR_ROW, text_format
from lora_engine.data.rows import Item, Problem, SourceOptions, shown_value


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "flickr"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per line that is not blank; `where` is its number.

    Raises AnnotationError if the file cannot be read or is empty.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        match = FLICKR_ROW.fullmatch(line.rstrip("\r\n"))
        if match is None:
            reason = f"found {shown_value(line)}, expected name.jpg#0, a tab and the caption"
            yield Problem(number, reason)
        else:
            yield Item(number, match[1], (match[2],))
