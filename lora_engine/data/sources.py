"""Paths as a person gives them -> the parts to read, each with its format.

A part is a file, or a folder where the folder is the unit. Which format a file has is found from
its content; reading it is the business of the format's module in formats/.
"""

import difflib
import heapq
import os
import stat
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

from lora_engine.data.image_files import CAPTION_SUFFIXES, SUFFIXES, folders_in, is_image, walk
from lora_engine.data.image_roots import find_image_root, first_image_names
from lora_engine.data.path_patterns import (
    NUM_SHOWN,
    expand,
    gap_notices,
    natural_key,
    shown_names,
)
from lora_engine.data.rows import AnnotationError, BadRow, SourceOptions, shown_value
from lora_engine.data.split_names import normal_split

HEAD_BYTES = 64 * 1024
MAX_SUFFIXES = 8  # in a message
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
ARROW_FILES = ("dataset_dict.json", "state.json")
COMPRESSED = {b"\x1f\x8b": "gunzip -k", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2 -k",
              b"\xfd7zXZ": "unxz -k"}


class Format(NamedTuple):
    """What people call a file of a format, and several; `unit`: what a part of it is."""

    one: str
    many: str
    unit: Literal["text", "binary", "folder"]


# The names are those of the modules in formats/.
FORMATS = {
    "json_list": Format("JSON list", "JSON lists", "text"),
    "json_lines": Format("JSON Lines file", "JSON Lines files", "text"),
    "coco": Format("COCO captions", "files of COCO captions", "text"),
    "karpathy": Format("Karpathy splits", "files of Karpathy splits", "text"),
    "table": Format("CSV or TSV table", "CSV or TSV tables", "text"),
    "flickr": Format("Flickr captions (name.jpg#0)", "files of Flickr captions", "text"),
    "url_list": Format("list of web addresses", "lists of web addresses", "text"),
    "tar": Format("WebDataset tar", "WebDataset tars", "binary"),
    "parquet": Format("Parquet file", "Parquet files", "binary"),
    "arrow": Format(
        "Hugging Face dataset (save_to_disk)", "Hugging Face datasets (save_to_disk)", "folder"
    ),
    "image_folder": Format("image folder with metadata", "image folders with metadata", "folder"),
    "sidecars": Format(
        "folder of images with caption files", "folders of images with caption files", "folder"
    ),
}
FORMAT_NAMES = ("auto", *FORMATS)


class Part(NamedTuple):
    """What is read at once: a file, or a folder; both paths are absolute."""

    format: str
    path: str
    image_root: str


class Sources(NamedTuple):
    """The parts in their order, shards that are missing, and sentences for people."""

    parts: list[Part]
    bad: list[BadRow]
    notices: list[str]


def find_parts(paths: str | Sequence[str], options: SourceOptions) -> Sources:
    """Find what files, folders and patterns hold, in their order and, within each, by name.

    Raises AnnotationError for what does not exist or cannot be told, and ValueError for an unknown
    format.
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
    found.parts.extend(
        Part(name, path, _image_root(name, path, options)) for (name, _), path in files.items()
    )
    if repeated:
        found.notices.append(f"named more than once, read once: {shown_names(repeated)}")
    shards = [part.path for part in found.parts if FORMATS[part.format].unit == "binary"]
    found.notices.extend(gap_notices(shards, [os.path.abspath(bad.location) for bad in found.bad]))
    return found


def describe(parts: Sequence[Part]) -> str:
    """What was found, for one line: "12 WebDataset tars"; "COCO captions, images in ../val2017"."""
    phrases = []
    for name, count in Counter(part.format for part in parts).items():
        phrase = FORMATS[name].one if count == 1 else f"{count:,} {FORMATS[name].many}"
        roots = {
            os.path.relpath(part.image_root, os.path.realpath(os.path.dirname(part.path))): None
            for part in parts
            if part.format == name and FORMATS[name].unit == "text"
        }
        roots.pop(".", None)
        phrases.append(f"{phrase}, images in {shown_names(list(roots))}" if roots else phrase)
    return "; ".join(phrases)


def reader(name: str) -> ModuleType:
    """The module of a format, imported when it is needed: some need further packages."""
    return import_module(f"lora_engine.data.formats.{name}")


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


def _image_root(name: str, path: str, options: SourceOptions) -> str:
    if FORMATS[name].unit == "folder" and (name != "image_folder" or options.image_root is None):
        return os.path.realpath(path)
    if options.image_root is not None:
        return os.path.realpath(options.image_root)
    if FORMATS[name].unit == "binary":
        return os.path.realpath(os.path.dirname(path))
    return find_image_root(path, first_image_names(reader(name).read(path, options)))


def _files(
    paths: Iterable[str], options: SourceOptions, found: Sources
) -> Iterator[tuple[str, str]]:
    """(format, path) of files, and of what folders hold."""
    for path in _without_reports(paths):
        if os.path.isdir(path):
            yield from _in_folder(path, options, found)
        elif options.format == "auto":
            yield format_of(path), path
        elif FORMATS[options.format].unit == "folder":
            raise AnnotationError(
                f"{path}: is a file, but --data_format {options.format} reads folders"
            )
        else:
            yield options.format, path


def _without_reports(paths: Iterable[str]) -> list[str]:
    """Leave out the 00000.parquet and 00000_stats.json that img2dataset writes beside 00000.tar
    (or beside the folder 00000).
    """
    paths = list(paths)
    known = set(paths)

    def is_report(path: str) -> bool:
        shard = path.removesuffix(".parquet").removesuffix("_stats.json")
        return shard != path and (f"{shard}.tar" in known or os.path.isdir(shard))

    return [path for path in paths if not is_report(path)]


# --- files ----------------------------------------------------------------------------------


def format_of(path: str) -> str:
    """The format of a file, from its first bytes, except for tars, which end with .tar.

    Raises AnnotationError if it cannot be read or told.
    """
    if path.lower().endswith(TAR_SUFFIXES):
        return "tar"
    head = _head(path)
    for magic, command in COMPRESSED.items():
        if head.startswith(magic):
            raise AnnotationError(f"{path}: is compressed; unpack it first: {command} {path}")
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(b"PAR1") or path.lower().endswith(".parquet"):
        return "parquet"
    if head.startswith(b"ARROW1") or path.lower().endswith(".arrow"):
        raise AnnotationError(
            f"{path}: is one file of a Hugging Face dataset; give the folder of save_to_disk"
        )
    if head.startswith(b"PK\x03\x04"):
        raise AnnotationError(f"{path}: is a zip archive; unpack it and give the folder")
    if is_image(path):
        raise AnnotationError(
            f"{path}: is an image; give an annotation file, or the folder of images with captions"
        )
    name = _text_format(path, head)
    if name is None:
        formats = ", ".join(known.one for known in FORMATS.values() if known.unit != "folder")
        raise AnnotationError(
            f"{path}: its format cannot be told: looked for {formats}; the file begins with "
            f"{shown_value(head[:200].decode(errors='replace'))}. If it is one of them, name it "
            f"with --data_format"
        )
    return name


def _text_format(path: str, head: bytes) -> str | None:
    text = head.decode("utf-8", errors="replace")
    names = (name for name, known in FORMATS.items() if known.unit == "text")
    return next((name for name in names if reader(name).recognizes(path, text)), None)


def _head(path: str) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            raise AnnotationError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from None


# --- folders --------------------------------------------------------------------------------


@dataclass
class Survey:
    """What is in a folder and below it.

    `names` are the first few, relative to the folder; `texts` may be annotation files, and are in
    the folder itself.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    shards: dict[str, list[str]] = field(default_factory=lambda: {"tar": [], "parquet": []})
    texts: list[str] = field(default_factory=list)
    has_captions: bool = False
    unreadable: list[BadRow] = field(default_factory=list)

    @property
    def has_images(self) -> bool:
        return not SUFFIXES.isdisjoint(self.suffixes)


def _in_folder(folder: str, options: SourceOptions, found: Sources) -> list[tuple[str, str]]:
    """(format, path) of what a folder holds. Raises AnnotationError if that cannot be told."""
    asked = options.format
    for name, files in (("arrow", ARROW_FILES), ("image_folder", METADATA_FILES)):
        folders = _folders_with(files, folder, found) if asked in ("auto", name) else []
        if folders:
            return [(name, path) for path in folders]
    if asked == "sidecars":
        return [(asked, folder)]
    survey = _survey(folder, asked)
    for name, shards in survey.shards.items():
        if shards and asked in ("auto", name):
            found.bad.extend(survey.unreadable)
            return [(name, path) for path in sorted(shards, key=natural_key)]
    if asked == "auto" and survey.has_captions:
        return [("sidecars", folder)]
    texts = _annotation_files(survey, asked)
    if len(texts) == 1 and (survey.has_images or asked != "auto"):
        return texts
    raise AnnotationError(_nothing_message(folder, survey, texts, options))


def _annotation_files(survey: Survey, asked: str) -> list[tuple[str, str]]:
    """(format, path) of the text files in a folder that may be annotation files."""
    found = []
    for path in sorted(survey.texts, key=natural_key):
        name = _text_format(path, _head(path)) if asked == "auto" else asked
        if name is not None and FORMATS[name].unit == "text":
            found.append((name, path))
    # A list of the images' addresses may lie beside their captions.
    return [file for file in found if file[0] != "url_list"] or found


def _folders_with(names: Sequence[str], folder: str, found: Sources) -> list[str]:
    """The folder itself if it has one of these files, else the folders in it that have one."""

    def has_one(path: str) -> bool:
        return any(os.path.isfile(os.path.join(path, name)) for name in names)

    if has_one(folder):
        return [folder]
    try:
        inner = folders_in(folder)
    except OSError as error:
        raise AnnotationError(f"{folder}: cannot list this folder: {error.strerror}") from None
    having = [path for path in inner if has_one(path)]
    for path in inner:
        is_split = normal_split(os.path.basename(path)) in ("train", "val", "test")
        if having and is_split and path not in having:
            found.notices.append(f"{path}: is not read, as it has no {' or '.join(names)}")
    return having


def _survey(folder: str, asked: str) -> Survey:
    survey = Survey()

    def note(error: OSError) -> None:
        reason = f"cannot list this folder: {error.strerror}"
        if error.filename == folder:
            raise AnnotationError(f"{folder}: {reason}")
        survey.unreadable.append(BadRow(error.filename, reason))

    for parent, files in walk(folder, note):
        suffixes = Counter(os.path.splitext(name)[1].lower() for name in files)
        survey.suffixes += suffixes
        survey.has_captions = survey.has_captions or _has_captions(files, suffixes)
        # In a folder with caption files, millions of them would be collected.
        has_texts = parent == folder and not (asked == "auto" and survey.has_captions)
        texts = TEXT_SUFFIXES if has_texts else ()
        wanted = (*TAR_SUFFIXES, ".parquet", *texts)
        paths = [os.path.join(parent, name) for name in files if name.lower().endswith(wanted)]
        for path in _without_reports(paths):
            if path.lower().endswith(TAR_SUFFIXES):
                survey.shards["tar"].append(path)
            elif path.lower().endswith(".parquet"):
                survey.shards["parquet"].append(path)
            else:
                survey.texts.append(path)
        if len(survey.names) < NUM_SHOWN:
            inner = os.path.relpath(parent, folder)
            first = heapq.nsmallest(NUM_SHOWN - len(survey.names), files)
            survey.names += [os.path.normpath(os.path.join(inner, name)) for name in first]
    return survey


def _has_captions(files: Sequence[str], suffixes: Container[str]) -> bool:
    """Whether there is an image with a caption file among the files of a folder."""
    if not any(suffix in suffixes for suffix in CAPTION_SUFFIXES):
        return False
    stems = {os.path.splitext(name)[0] for name in files if is_image(name)}
    return any(
        stem in stems and suffix.lower() in CAPTION_SUFFIXES
        for stem, suffix in map(os.path.splitext, files)
    )


def _nothing_message(
    folder: str, survey: Survey, texts: Sequence[tuple[str, str]], options: SourceOptions
) -> str:
    """What was looked for in a folder, what is there, and what to do."""
    if len(texts) > 1:
        names = shown_names([os.path.basename(path) for _, path in texts])
        return f"{folder}: has {len(texts):,} annotation files ({names}): name the ones to use"
    counts = ", ".join(
        f"{-count:,} {suffix or 'without a suffix'}"
        for count, suffix in sorted((-count, suffix) for suffix, count in survey.suffixes.items())[
            :MAX_SUFFIXES
        ]
    )
    holds = f"{counts} ({', '.join(survey.names)})" if counts else "no files"
    if options.format != "auto":
        return (
            f"{folder}: no {FORMATS[options.format].one} (--data_format {options.format}) in this "
            f"folder; it has {holds}"
        )
    if survey.has_images:
        advice = (
            "For captions in files beside the images, call them x.txt for x.jpg; else give the "
            "annotation file itself"
        )
    else:
        advice = "Give the folder with the images, or the annotation file itself"
    return (
        f"{folder}: no images with captions in this folder: looked for {' or '.join(ARROW_FILES)} "
        f"(save_to_disk), {' or '.join(METADATA_FILES)}, *.tar, *.parquet, images with .txt or "
        f".caption files, and one annotation file ({' '.join(TEXT_SUFFIXES)}) beside images; it "
        f"has {holds}. {advice}"
    )
