"""The formats of image-caption pairs, and which of them a file has, from its first bytes."""

from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple

from lora_engine.data.formats.text_files import COMPRESSIONS, open_file
from lora_engine.data.image_files import is_image
from lora_engine.data.rows import AnnotationError, shown_value

HEAD_BYTES = 64 * 1024
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Format(NamedTuple):
    """A format's name in messages, for one and for many; `unit`: what one part of a source is."""

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


def reader(name: str) -> ModuleType:
    """The module of a format, imported when it is needed: some need further packages."""
    return import_module(f"lora_engine.data.formats.{name}")


def format_of(path: str) -> str:
    """The format of a file, from its first bytes, except for tars, which end with .tar.

    Raises AnnotationError if it cannot be read or the format is unknown.
    """
    if path.lower().endswith(TAR_SUFFIXES):
        return "tar"
    head = read_head(path)
    check_not_compressed(path, head)
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
    name = text_format(path, head)
    if name is None:
        formats = ", ".join(known.one for known in FORMATS.values() if known.unit != "folder")
        raise AnnotationError(
            f"{path}: unknown format: looked for {formats}; the file begins with "
            f"{shown_value(head[:200].decode(errors='replace'))}. If it is one of them, name it "
            f"with --data_format"
        )
    return name


def check_not_compressed(path: str, head: bytes) -> None:
    """Raises AnnotationError, with the command that unpacks the file."""
    for magic, (_, command) in COMPRESSIONS.items():
        if head.startswith(magic):
            raise AnnotationError(f"{path}: is compressed; unpack it first: {command} -k {path}")


def text_format(path: str, head: bytes) -> str | None:
    text = head.decode("utf-8", errors="replace")
    names = (name for name, known in FORMATS.items() if known.unit == "text")
    return next((name for name in names if reader(name).recognizes(path, text)), None)


def read_head(path: str) -> bytes:
    """The first bytes of a file. Raises AnnotationError."""
    with open_file(path) as file:
        try:
            return file.read(HEAD_BYTES)
        except OSError as error:
            raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from None
