"""What is shown on a terminal: log records, and foreign text with its control characters escaped.

Captions, file names, tensor names and JSON values may contain escape sequences, and may be as long
as the file that they come from. Files that are written keep all of it.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

MAX_LINE = 4_000
MAX_TEXT = 100_000

# C0, DEL, C1, line and paragraph separators, and all that Unicode calls Bidi_Control.
_CONTROL = "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
_IN_A_VALUE = re.compile(_CONTROL)
_IN_A_MESSAGE = re.compile(rf"(?![\n\t]){_CONTROL}")

# How a message is worded: a function of the public API names its keywords in place of flags.
wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


def printable(text: str) -> str:
    """A message, with control characters escaped and what is too long cut in the middle.

    Its newlines and tabs stay: they are the message's own.
    """
    lines = _IN_A_MESSAGE.sub(_shown, text).split("\n")
    return _shortened("\n".join(_shortened(line, MAX_LINE) for line in lines), MAX_TEXT)


def escaped(text: str) -> str:
    r"""A value within a message, on one line: all control characters written as \x1b or \u202e."""
    return _IN_A_VALUE.sub(_shown, text)


class ConsoleHandler(logging.Handler):
    """Shows log records to people: information on stdout, warnings on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = printable(wording.get()(record.getMessage()))
        self.write(
            f"warning: {text}" if is_warning else text, sys.stderr if is_warning else sys.stdout
        )

    def write(self, text: str, stream: TextIO) -> None:
        """Print `text`; raises OSError where the stream cannot take it."""
        print(text, file=stream, flush=True)


@contextmanager
def logging_to(handler: ConsoleHandler) -> Iterator[None]:
    """Within the context the package's log records are shown by `handler`.

    It takes the place of another ConsoleHandler. Handlers of other kinds, which the caller has
    given to the logger "lora_engine", stay.
    """
    logger = logging.getLogger("lora_engine")
    before = logger.handlers, logger.level, logger.propagate
    others = [other for other in logger.handlers if not isinstance(other, ConsoleHandler)]
    logger.handlers, logger.propagate = [*others, handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def counted(number: int, noun: str) -> str:
    """A number of things: "1 image", "1,200 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line, cut to `limit` characters; its type where it is empty."""
    text = " ".join(str(error).split())
    return (text if len(text) <= limit else f"{text[:limit]}...") or type(error).__name__
