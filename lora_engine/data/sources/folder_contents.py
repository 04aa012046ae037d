"""What a folder holds: shards, metadata, images with caption files, or an annotation file."""

import heapq
import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_engine.data.image_files import CAPTION_SUFFIXES, SUFFIXES, folders_in, walk
from lora_engine.data.rows import AnnotationError, BadRow
from lora_engine.data.sources.file_formats import FORMATS, TAR_SUFFIXES, read_head, text_format
from lora_engine.data.sources.path_patterns import NUM_SHOWN, natural_key, shown_names
from lora_engine.data.sources.split_names import normal_split

MAX_SUFFIXES = 8  # in a message
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
ARROW_FILES = ("dataset_dict.json", "state.json")


class Contents(NamedTuple):
    """(format, path) of files and folders, folders that cannot be listed, and notices to log."""

    files: list[tuple[str, str]]
    bad: list[BadRow]
    notices: list[str]


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


def contents(folder: str, asked: str) -> Contents:
    """What a folder holds of the format `asked` for, or of any ("auto").

    Raises AnnotationError if the folder cannot be listed, and if it holds none, or is ambiguous.
    """
    for name, files in (("arrow", ARROW_FILES), ("image_folder", METADATA_FILES)):
        if asked in ("auto", name):
            having, notices = _folders_with(files, folder)
            if having:
                return Contents([(name, path) for path in having], [], notices)
    if asked == "sidecars":
        return Contents([(asked, folder)], [], [])
    survey = _survey(folder, asked)
    for name, shards in survey.shards.items():
        if shards and asked in ("auto", name):
            shards.sort(key=natural_key)
            return Contents(
                [(name, path) for path in shards],
                survey.unreadable,
                _ignored(folder, name, survey),
            )
    if asked == "auto" and survey.has_captions:
        return Contents([("sidecars", folder)], [], [])
    texts = _annotation_files(survey, asked)
    if len(texts) == 1 and (survey.has_images or asked != "auto"):
        return Contents(texts, [], [])
    raise AnnotationError(_nothing_message(folder, survey, texts, asked))


def _ignored(folder: str, name: str, survey: Survey) -> list[str]:
    """A sentence if a folder of shards also has other data, which is not read."""
    others = [other for other, shards in survey.shards.items() if shards and other != name]
    found = ["Parquet files" for other in others if other == "parquet"]
    found += ["images with caption files"] if survey.has_captions else []
    if not found:
        return []
    return [
        f"{folder}: reads the {name} files and not the {' and '.join(found)} beside them; to read "
        f"all, name their folders or files one by one"
    ]


def _annotation_files(survey: Survey, asked: str) -> list[tuple[str, str]]:
    """(format, path) of the text files in a folder that may be annotation files."""
    found = []
    for path in sorted(survey.texts, key=natural_key):
        name = text_format(path, read_head(path)) if asked == "auto" else asked
        if name is not None and FORMATS[name].unit == "text":
            found.append((name, path))
    # A list of the images' addresses may lie beside their captions.
    return [file for file in found if file[0] != "url_list"] or found


def _folders_with(names: Sequence[str], folder: str) -> tuple[list[str], list[str]]:
    """The folder itself if it has one of these files, else the folders in it that have one; and a
    sentence about each folder of a split that has none.
    """

    def has_one(path: str) -> bool:
        return any(os.path.isfile(os.path.join(path, name)) for name in names)

    if has_one(folder):
        return [folder], []
    try:
        inner = folders_in(folder)
    except OSError as error:
        raise AnnotationError(f"{folder}: cannot list this folder: {error.strerror}") from None
    having = [path for path in inner if has_one(path)]
    return having, [
        f"{path}: not read: it has no {' or '.join(names)}"
        for path in inner
        if path not in having and normal_split(os.path.basename(path)) in ("train", "val", "test")
    ]


def _survey(folder: str, asked: str) -> Survey:
    survey = Survey()

    def note(error: OSError) -> None:
        reason = f"cannot list this folder: {error.strerror}"
        if error.filename == folder:
            raise AnnotationError(f"{folder}: {reason}")
        survey.unreadable.append(BadRow(error.filename, reason))

    for parent, files in walk(folder, note):
        split = [os.path.splitext(name) for name in files]
        suffixes = Counter(suffix.lower() for _, suffix in split)
        survey.suffixes += suffixes
        survey.has_captions = survey.has_captions or _has_captions(split, suffixes)
        # In a folder with caption files, millions of them would be collected.
        has_texts = parent == folder and not (asked == "auto" and survey.has_captions)
        wanted = (*TAR_SUFFIXES, ".parquet", *(TEXT_SUFFIXES if has_texts else ()))
        paths = [os.path.join(parent, name) for name in files if name.lower().endswith(wanted)]
        for path in without_reports(paths):
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


def _has_captions(files: Sequence[tuple[str, str]], suffixes: Container[str]) -> bool:
    """Whether an image is among the (stem, suffix) of a folder's files, and its caption file."""
    if not any(suffix in suffixes for suffix in CAPTION_SUFFIXES):
        return False
    stems = {stem for stem, suffix in files if suffix.lower() in SUFFIXES}
    return any(stem in stems and suffix.lower() in CAPTION_SUFFIXES for stem, suffix in files)


def _nothing_message(
    folder: str, survey: Survey, texts: Sequence[tuple[str, str]], asked: str
) -> str:
    """What was looked for in a folder, what is there, and what to do."""
    if len(texts) > 1:
        names = shown_names([os.path.basename(path) for _, path in texts])
        return f"{folder}: has {len(texts):,} annotation files ({names}): name the ones to use"
    by_count = sorted(survey.suffixes.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(
        f"{count:,} {suffix or 'without a suffix'}" for suffix, count in by_count[:MAX_SUFFIXES]
    )
    holds = f"{counts} ({', '.join(survey.names)})" if counts else "no files"
    if asked != "auto":
        return (
            f"{folder}: no {FORMATS[asked].one} (--data_format {asked}) in this folder; it has "
            f"{holds}"
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


def without_reports(paths: Iterable[str]) -> list[str]:
    """Leave out the 00000.parquet and 00000_stats.json that img2dataset writes beside 00000.tar
    (or beside the folder 00000).
    """
    paths = list(paths)
    known = set(paths)

    def is_report(path: str) -> bool:
        shard = path.removesuffix(".parquet").removesuffix("_stats.json")
        return shard != path and (f"{shard}.tar" in known or os.path.isdir(shard))

    return [path for path in paths if not is_report(path)]
