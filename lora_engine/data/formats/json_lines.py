"""JSON Lines: one object per line. The engine's own captions.jsonl is such a file."""

import json
from collections.abc import Iterator

from lora_engine.data.formats.text_files import read_lines
from lora_engine.data.formats.text_heads import text_format
from lora_engine.data.rows import EXPECTED_ROW, Item, Problem, SourceOptions, as_item


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "json_lines"


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per line that is not blank; `where` is its number.

    Raises AnnotationError if the file cannot be read or is empty.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield Problem(number, _reason(line, error))
        except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
            yield Problem(number, f"JSON that cannot be read: {error}")
        else:
            yield as_item(value, number, options)


def _reason(line: str, error: json.JSONDecodeError) -> str:
    if not line.endswith(("\n", "\r")):  # only the last line can lack its end
        return "the last line is cut off: complete or remove it"
    return (
        f"not JSON (column {error.colno}): {error.msg}; expected one object like {EXPECTED_ROW} "
        f"per line"
    )
