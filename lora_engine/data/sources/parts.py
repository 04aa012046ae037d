"""Paths as a person gives them -> the parts to read, each with its format.

A part is a file, or a folder where the folder is the unit. The module of its format, in formats/,
reads it.
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lora_engine.data.rows import AnnotationError, BadRow, SourceOptions
from lora_engine.data.sources.file_formats import (
    FORMAT_NAMES,
    FORMATS,
    TAR_SUFFIXES,
    format_of,
    reader,
)
from lora_engine.data.sources.folder_contents import (
    ARROW_FILES,
    TEXT_SUFFIXES,
    contents,
    without_reports,
)
from lora_engine.data.sources.image_roots import find_image_root, first_image_names
from lora_engine.data.sources.path_patterns import expand, gap_notices, shown_names
from lora_engine.data.sources.split_names import split_of


class Part(NamedTuple):
    """What is read at once: a file, or a folder; both paths are absolute.

    `image_root` is None until `with_image_root` has looked for it; `split` is what the path says.
    """

    format: str
    path: str
    image_root: str | None = None
    split: str = ""


class Sources(NamedTuple):
    """The parts in their order, shards that are missing, and notices to log."""

    parts: list[Part]
    bad: list[BadRow]
    notices: list[str]


def find_parts(paths: str | Sequence[str], options: SourceOptions) -> Sources:
    """Find what files, folders and patterns hold, in their order and, within each, by name.

    Raises AnnotationError for a path that does not exist or whose format is unknown, and ValueError
    for an unknown `options.format`.
    """
    _check(options)
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths or not all(paths):
        raise ValueError("the path of the data is empty: give a file, a folder or a pattern")
    found = Sources([], [], [])
    files: dict[tuple[str, str], str] = {}  # (format, path without links): path
    repeated: list[str] = []
    for path in paths:
        matches = expand(path)
        found.bad.extend(matches.missing)
        for name, file in _files(matches.paths, options, found):
            key = (name, os.path.realpath(file))
            if key in files:
                repeated.append(file)
            else:
                files[key] = os.path.abspath(file)
    root = os.path.commonpath([os.path.dirname(path) for path in files.values()] or ["/"])
    found.parts.extend(
        Part(name, path, split=split_of(path, root)) for (name, _), path in files.items()
    )
    if repeated:
        found.notices.append(f"named more than once, read once: {shown_names(repeated)}")
    shards = [part.path for part in found.parts if FORMATS[part.format].unit == "binary"]
    found.notices.extend(gap_notices(shards, [os.path.abspath(bad.location) for bad in found.bad]))
    return found


def describe(parts: Sequence[Part]) -> str:
    """What was found, for one line: "12 WebDataset tars"; "COCO captions, images in ../val2017"."""
    phrases = []
    units = dict.fromkeys((part.format, _unit(part)) for part in parts)
    for name, count in Counter(format for format, _ in units).items():
        phrase = FORMATS[name].one if count == 1 else f"{count:,} {FORMATS[name].many}"
        roots = {
            os.path.relpath(part.image_root, os.path.realpath(os.path.dirname(part.path))): None
            for part in parts
            if part.format == name and FORMATS[name].unit == "text" and part.image_root is not None
        }
        roots.pop(".", None)
        phrases.append(f"{phrase}, images in {shown_names(list(roots))}" if roots else phrase)
    return "; ".join(phrases)


def _unit(part: Part) -> str:
    """What is counted: files, or the folders of Hugging Face datasets."""
    return os.path.dirname(part.path) if part.format == "arrow" else part.path


def is_source(path: str) -> bool:
    """Whether a path names a data set, not an image or a folder of images."""
    shards = (*TAR_SUFFIXES, ".parquet")
    if not os.path.isdir(path):
        return path.lower().endswith((*shards, *TEXT_SUFFIXES))
    names = os.listdir(path)
    return not set(names).isdisjoint(ARROW_FILES) or any(
        name.lower().endswith(shards) for name in names
    )


def _check(options: SourceOptions) -> None:
    if options.format not in FORMAT_NAMES:
        near = difflib.get_close_matches(options.format, FORMAT_NAMES, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"there is no format {options.format}; {advice}--data_format is one of "
            f"{', '.join(FORMAT_NAMES)}"
        )
    if options.image_root is not None and not os.path.isdir(options.image_root):
        raise AnnotationError(f"{options.image_root}: no such folder, given as --image_root")


def with_image_root(part: Part, options: SourceOptions) -> Part:
    """The part with the folder of its images, which may be found by looking for the first ones."""
    return part._replace(image_root=_image_root(part.format, part.path, options))


def _image_root(name: str, path: str, options: SourceOptions) -> str:
    if FORMATS[name].unit == "folder" and (name != "image_folder" or options.image_root is None):
        return os.path.realpath(path if os.path.isdir(path) else os.path.dirname(path))
    if options.image_root is not None:
        return os.path.realpath(options.image_root)
    if FORMATS[name].unit == "binary":
        return os.path.realpath(os.path.dirname(path))
    return find_image_root(path, first_image_names(reader(name).read(path, options)))


def _files(
    paths: Iterable[str], options: SourceOptions, found: Sources
) -> Iterator[tuple[str, str]]:
    """(format, path) of files, and of what folders hold."""
    for path in without_reports(paths):
        if os.path.isdir(path):
            inside = contents(path, options.format)
            found.bad.extend(inside.bad)
            found.notices.extend(inside.notices)
            for name, file in inside.files:
                if name == "arrow":
                    yield from ((name, part) for part, _ in reader(name).parts(file))
                else:
                    yield name, file
        elif options.format == "auto":
            yield format_of(path), path
        elif FORMATS[options.format].unit == "folder":
            raise AnnotationError(
                f"{path}: is a file, but --data_format {options.format} reads folders"
            )
        else:
            yield options.format, path
