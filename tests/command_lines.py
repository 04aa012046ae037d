"""Running command lines in tests, and what their output is compared as."""

import re


def plain(text: str) -> str:
    """Text without the boxes and line breaks of the command line's help and errors."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)
