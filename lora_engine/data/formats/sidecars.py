"""Images with their captions in files beside them: x.jpg with x.txt or x.caption.

img2dataset's output "files" has them, in folders 00000/, 00001/, ...; its KEY.json is not needed.
"""

import os
import stat
from collections.abc import Iterator, Sequence

from lora_engine.data.image_files import CAPTION_SUFFIXES, SUFFIXES, is_image, walk
from lora_engine.data.rows import AnnotationError, Item, Problem, SourceOptions

MAX_CAPTION_BYTES = 1 << 20
ABOUT_THE_DATA = frozenset({"readme", "license", "licence", "notice"})  # texts, but no captions


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """One item per image in a folder, then in those below it; `where` is its relative path.

    Within a folder, images are sorted by name. An image without a caption file has no captions.
    --caption_field caption prefers .caption files. Only the names of one folder are in memory.
    Raises AnnotationError if there are no images, or if the folder cannot be listed.
    """
    suffixes = _preferred(path, options)
    errors: list[OSError] = []
    num_images = 0
    for folder, names in walk(path, errors.append):
        yield from _unlisted(path, errors)
        images = sorted(filter(is_image, names))
        num_images += len(images)
        yield from _in_folder(path, folder, images, names, suffixes)
    yield from _unlisted(path, errors)
    if not num_images:
        raise AnnotationError(f"{path}: no images (looked for {' '.join(sorted(SUFFIXES))})")


def _preferred(path: str, options: SourceOptions) -> Sequence[str]:
    field = "." + (options.caption_field or "txt").removeprefix(".")
    if field not in CAPTION_SUFFIXES:
        raise AnnotationError(
            f"{path}: --caption_field is {options.caption_field}, but the captions of a folder of "
            f"images are in files that end with .txt (txt) or .caption (caption)"
        )
    return sorted(CAPTION_SUFFIXES, key=lambda suffix: suffix != field)


def _unlisted(path: str, errors: list[OSError]) -> Iterator[Problem]:
    """A problem for each folder that could not be listed, once."""
    while errors:
        error = errors.pop(0)
        folder = os.path.relpath(error.filename, path)
        if folder == ".":
            raise AnnotationError(f"{path}: cannot list this folder: {error.strerror}")
        yield Problem(folder, f"cannot list this folder: {error.strerror}")


def _in_folder(
    path: str, folder: str, images: list[str], names: list[str], suffixes: Sequence[str]
) -> Iterator[Item | Problem]:
    """The images of one folder, then its caption files without an image."""
    captions: dict[str, dict[str, str]] = {suffix: {} for suffix in suffixes}  # stem: name
    for name in names:
        if name.lower().endswith(CAPTION_SUFFIXES):
            stem, suffix = os.path.splitext(name)
            captions[suffix.lower()][stem] = name
    relative = "" if folder == path else os.path.relpath(folder, path)
    stems = set()
    for name in images:
        stem = os.path.splitext(name)[0]
        stems.add(stem)
        where = os.path.join(relative, name)
        found = [captions[suffix][stem] for suffix in suffixes if stem in captions[suffix]]
        yield _item(where, os.path.join(folder, found[0])) if found else Item(where, where, ())
    orphans = sorted(
        name
        for names_by_stem in captions.values()
        for stem, name in names_by_stem.items()
        if stem not in stems and stem.lower() not in ABOUT_THE_DATA
    )
    for name in orphans:
        yield Problem(
            os.path.join(relative, name),
            "a caption file without an image of that name: add the image or remove the file",
        )


def _item(where: str, caption_path: str) -> Item | Problem:
    name = os.path.basename(caption_path)
    try:
        data = _read(caption_path)
    except OSError as error:
        return Problem(where, f"its caption file {name} cannot be read: {error.strerror}")
    if data is None:
        return Problem(where, f"its caption file {name} is not a regular file")
    if len(data) > MAX_CAPTION_BYTES:
        return Problem(where, f"its caption file {name} is larger than 1 MiB: is it a caption?")
    # with or without a byte order mark; caption_complaint finds bytes that are not UTF-8
    return Item(where, where, (data.decode("utf-8-sig", errors="surrogateescape"),))


# Windows has no pipes that may never end, but would translate line ends.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _read(path: str) -> bytes | None:
    """Up to MAX_CAPTION_BYTES + 1 bytes of a regular file; None for a pipe, which may never end.

    Takes 7 us of processor time, open() and read() 20 us.
    """
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        return os.read(descriptor, min(status.st_size, MAX_CAPTION_BYTES + 1))
    finally:
        os.close(descriptor)
