"""HTML and SVG elements: text is escaped when it is added, so that no text becomes markup."""

import html
from collections.abc import Iterable
from dataclasses import dataclass

VOID = frozenset(("img", "link", "meta"))  # elements without content


@dataclass(frozen=True)
class Markup:
    """Finished markup. A plain `str` is text, and is escaped."""

    source: str


def tag(name: str, /, *content: Markup | str, **attributes: str | int | float) -> Markup:
    """An element. Attributes are spelled as Python allows: `class_`, `aria_label`, `viewBox`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(content).source}</{name}>")


def join(parts: Iterable[Markup | str]) -> Markup:
    """All parts as one piece of markup."""
    return Markup("".join(
        part.source if isinstance(part, Markup) else html.escape(part) for part in parts
    ))
