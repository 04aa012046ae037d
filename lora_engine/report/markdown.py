"""Markdown from any text: escaping, and tables."""

import re
from collections.abc import Iterable, Sequence

# Character references cannot be used for structure (CommonMark 0.31, section 2.5), so they work in
# tables and in HTML alike. Characters that are special only at the start of a line are kept, to
# keep the source readable. A dot within a word could make it a link.
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~$&:@^=]|\.(?=\S)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def escape_markdown(text: str) -> str:
    """Any text on one line, which Markdown, and HTML within it, shows literally."""
    line = _CONTROL.sub("", " ".join(text.split()))
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
