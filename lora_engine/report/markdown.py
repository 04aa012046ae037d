"""Markdown out of text that is not: escaping, and tables."""

import re
from collections.abc import Iterable, Sequence

# Character references cannot be used for structure (CommonMark 0.31, section 2.5), so that they
# serve in tables and in HTML alike. What means something only at the start of a line is left
# alone, for people who read the source; a dot within a word could make a link of it.
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~$&:@^=]|\.(?=\S)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def escaped(text: str) -> str:
    """Any text as one line that Markdown, and HTML within it, shows as it stands."""
    line = _CONTROL.sub("", " ".join(text.split()))
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
