"""Paths with wildcards and braces -> files and folders: photos/**/*.json, {00000..00575}.tar."""

import difflib
import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from lora_engine.data.image_files import ABOUT_LINKS, is_link
from lora_engine.data.rows import AnnotationError, BadRow

MAX_NAMES = 1_000_000  # of one pattern; more is a slip of the pen: {0..99999999}
NUM_SHOWN = 5
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
SHARD = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(\D*)", re.DOTALL)


class Matches(NamedTuple):
    """What a path stands for, and which names of a brace pattern do not exist."""

    paths: list[str]
    missing: list[BadRow]


def expand(path: str) -> Matches:
    """The files and folders that a path or a pattern stands for.

    A path that exists is never a pattern. Names in braces keep their order; matches of wildcards
    (* ? [] and ** for any number of folders) are in natural order, without hidden files. Raises
    AnnotationError if there is nothing, with similar names.
    """
    for literal in (path, os.path.expanduser(path)):
        if _exists(literal):
            return Matches([literal], [])
    if is_link(path):
        raise AnnotationError(f"{path} is a web address: {ABOUT_LINKS}")
    pattern = os.path.expanduser(path)
    names = list(islice(expand_braces(pattern), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:
        raise AnnotationError(
            f"{path}: the pattern stands for more than {MAX_NAMES:,} names; is a number in its "
            f"braces too large?"
        )
    paths: list[str] = []
    missing: list[BadRow] = []
    for name in names:
        found = [name] if _exists(name) else _matches(name)
        paths += found
        if not found:
            missing.append(BadRow(name, f"no such file, named by the pattern {path}"))
    if not paths:
        raise AnnotationError(_nothing_message(path, names))
    return Matches(paths, missing)


def expand_braces(pattern: str) -> Iterator[str]:
    """All names of a pattern with {a,b} and {00..12}, nested or one after another, as in bash.

    Ranges may have a step ({0..10..5}) and are padded with zeros as their limits are. Braces with
    neither a comma nor a range are text.
    """
    for start, end in _braces(pattern):
        inner = pattern[start + 1 : end]
        alternatives = _alternatives(inner)
        if alternatives is not None:
            break
    else:
        yield pattern
        return
    for alternative in alternatives:
        for rest in expand_braces(pattern[end + 1 :]):
            yield pattern[:start] + alternative + rest


def _braces(pattern: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the braces that are not inside others, and then of those inside."""
    starts: list[int] = []
    pairs: list[tuple[int, int]] = []
    for position, character in enumerate(pattern):
        if character == "{":
            starts.append(position)
        elif character == "}" and starts:
            pairs.append((starts.pop(), position))
    return iter(sorted(pairs))


def _alternatives(inner: str) -> Iterator[str] | None:
    """What braces with this content stand for; None if they are text."""
    match = RANGE.fullmatch(inner)
    if match is not None:
        return _numbers(*match.groups())
    parts = _split_at_commas(inner)
    if len(parts) == 1:
        return None
    return (name for part in parts for name in expand_braces(part))


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    is_padded = any(re.match(r"-?0\d", limit) for limit in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    start, stop = int(first), int(last)
    size = abs(int(step or 1)) or 1
    direction = 1 if stop >= start else -1
    for number in range(start, stop + direction, direction * size):
        yield f"{number:0{width}d}" if width else str(number)


def _split_at_commas(inner: str) -> list[str]:
    """Split at the commas that are not inside further braces."""
    parts, depth = [""], 0
    for character in inner:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)  # the reader of a broken link says what is wrong with it
    except ValueError:  # a NUL in the name
        return False


def _matches(name: str) -> list[str]:
    """What matches a name with wildcards, without what lies in a folder that matches, too."""
    if not glob.has_magic(name) or "\0" in name:
        return []
    found = sorted(glob.glob(name, recursive=True), key=natural_key)
    folders = {os.path.normpath(path) for path in found if os.path.isdir(path)}
    return [path for path in found if folders.isdisjoint(_parents(os.path.normpath(path)))]


def _parents(path: str) -> Iterator[str]:
    parent = os.path.dirname(path)
    while parent and parent != path:
        yield parent
        path, parent = parent, os.path.dirname(parent)


def natural_key(path: str) -> tuple[list[str | int], str]:
    """Sorts shard2.tar before shard10.tar."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path


# --- messages -------------------------------------------------------------------------------


def shown_names(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more


def _nothing_message(path: str, names: Sequence[str]) -> str:
    """How far the first name leads, and what there is instead of the rest of it."""
    is_pattern = len(names) > 1 or glob.has_magic(names[0])
    what = "nothing matches this pattern" if is_pattern else "no such file or folder"
    folder, wanted = _existing_folder(names[0])
    try:
        there = sorted(
            (name for name in os.listdir(folder) if not name.startswith(".")), key=natural_key
        )
    except OSError as error:
        return f"{path}: {what}: {folder} cannot be listed: {error.strerror}"
    near = difflib.get_close_matches(wanted.split("/")[0], there, n=3, cutoff=0.6)
    if near and not glob.has_magic(wanted):
        return f"{path}: {what}; did you mean {' or '.join(near)} in {folder}?"
    holds = f"has {shown_names(there)}" if there else "is empty"
    return f"{path}: {what}: looked for {wanted} in {folder}, which {holds}"


def _existing_folder(name: str) -> tuple[str, str]:
    """The deepest folder that a path or a pattern leads to, and the rest of the path."""
    folder, rest = ("/" if os.path.isabs(name) else "."), name.strip("/").split("/")
    while len(rest) > 1 and rest[0] != "**":
        pattern = os.path.join(glob.escape(folder), rest[0])
        try:
            below = [path for path in sorted(glob.glob(pattern)) if os.path.isdir(path)]
        except ValueError:  # a NUL in the name
            break
        if not below:
            break
        folder, rest = below[0], rest[1:]
    return os.path.abspath(folder), "/".join(rest)


def gap_notices(paths: Collection[str], missing: Collection[str] = ()) -> list[str]:
    """A sentence about each series of numbered files in which numbers are missing.

    00000.tar, 00001.tar, 00003.tar are a series; so are a-00000-of-00003.parquet and its like, for
    which the last number is known. `missing`: files that were already reported.
    """
    series: dict[tuple[str, str, str | None, str], set[int]] = {}
    widths: dict[tuple[str, str, str | None, str], int] = {}
    for path in [*paths, *missing]:
        folder, name = os.path.split(path)
        match = SHARD.fullmatch(name)
        if match is not None:
            key = (folder, match[1], match[3], match[4])
            series.setdefault(key, set()).add(int(match[2]))
            widths[key] = len(match[2])
    notices = []
    for key, numbers in series.items():
        total = key[2]
        last = max(numbers) if total is None else max(int(total) - 1, *numbers)
        first = min(numbers) if total is None else 0
        num_missing = last + 1 - first - len(numbers)
        if 0 < num_missing and (num_missing <= 2 * len(numbers) or total is not None):
            absent = (number for number in range(first, last + 1) if number not in numbers)
            shown = [f"{number:0{widths[key]}d}" for number in islice(absent, NUM_SHOWN)]
            more = f" and {num_missing - NUM_SHOWN:,} more" if num_missing > NUM_SHOWN else ""
            notices.append(
                f"{key[0]}: shard numbers have gaps: {', '.join(shown)}{more} "
                f"{'is' if num_missing == 1 else 'are'} missing; img2dataset leaves such gaps, "
                f"otherwise check the copy"
            )
    return notices
