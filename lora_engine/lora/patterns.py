"""Regular expressions from adapters and flags, matched within limits of size and time."""

import math
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from reprlib import repr as shortened

import regex

MAX_CHARACTERS = 10_000
MAX_SECONDS = 2.0
MAX_REPEATS = 10_000

_BRACES = re.compile(r"\{([^}]*)")
_COUNT = re.compile(r"(\d{0,3})(,\d{0,3})?")


class PatternError(ValueError):
    """A regular expression that is invalid, or too expensive to match."""


def first_matches(
    patterns: Iterable[str], paths: Sequence[str], *, or_tail: bool = False
) -> dict[str, str]:
    """For every path that is matched as a whole, the first of `patterns` that matches it.

    With `or_tail`, what follows any dot in the path may match instead. The syntax is that of `re`.

    Raises PatternError for a pattern that is not a regular expression, is too long or repeats too
    often, and if matching takes longer than MAX_SECONDS in total.
    """
    deadline = time.monotonic() + MAX_SECONDS
    found: dict[str, str] = {}
    for pattern in patterns:
        compiled = _compile(pattern, or_tail)
        for path in paths:
            try:
                # regex checks the time only while it backtracks.
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError
                if path not in found and compiled.fullmatch(path, timeout=left):
                    found[path] = pattern
            except TimeoutError:
                raise PatternError(
                    f"matching {shortened(pattern)} takes more than {MAX_SECONDS:g} s; expected a "
                    f"simpler regular expression"
                ) from None
    return found


def _compile(pattern: str, or_tail: bool) -> regex.Pattern:
    if len(pattern) > MAX_CHARACTERS:
        raise PatternError(
            f"the regular expression {shortened(pattern)} has {len(pattern):,} characters; "
            f"expected at most {MAX_CHARACTERS:,}"
        )
    # regex unrolls repeats in memory, and parses anything else in braces as its own extension.
    counts = [_COUNT.fullmatch(braces) for braces in _BRACES.findall(pattern)]
    repeats = math.prod(max(int(count[1] or 0), 1) for count in counts if count)
    if None in counts or repeats > MAX_REPEATS:
        raise PatternError(
            f"the regular expression {shortened(pattern)} repeats too often; expected counts below "
            f"1,000 in braces, whose product is at most {MAX_REPEATS:,}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # re warns of future changes of its syntax
            re.compile(pattern)  # refuses regex's other extensions, such as recursion
        return regex.compile(rf"(.*\.)?({pattern})" if or_tail else pattern)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise PatternError(
            f"{shortened(pattern)} is not a regular expression: {error}"
        ) from None
