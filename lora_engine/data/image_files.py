"""Folders and patterns -> image files."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .heic .heif".split()
)
ABOUT_LINKS = (
    "download the file first (curl -LO ...), and give its path; lora-engine download downloads a "
    "list of links"
)
CAPTION_SUFFIXES = (".txt", ".caption")  # of the file beside an image, in the order of precedence


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Expand folders, recursively and sorted, to their image files; files are kept as given.

    In folders, files with one of SUFFIXES are images, and hidden files and folders are skipped. A
    path that does not exist may be a pattern, in which ** stands for any number of folders.
    Raises ValueError for a path that does not exist or cannot be listed, and for a folder without
    images.
    """
    found: list[Path] = []
    link = next(filter(is_link, map(str, paths)), None)
    if link is not None:
        raise ValueError(f"{link} is a web address: {ABOUT_LINKS}")
    for path in map(Path, paths):
        if not os.path.exists(path):
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise ValueError(f"{path}: no such file or folder")
            found.extend(find_images(matches))
        elif path.is_dir():
            found.extend(_images_in(path))
        else:
            found.append(path)
    return found


def _images_in(folder: Path) -> list[Path]:
    images = sorted(_images_below(folder))
    if not images:
        suffixes = " ".join(sorted(SUFFIXES))
        raise ValueError(f"{folder}: no images in this folder (looked for {suffixes})")
    return images


def _images_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot list this folder: {error.strerror}")

    for parent, files in walk(folder, refuse):
        for name in files:
            if is_image(name):
                yield Path(parent, name)


def is_link(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def walk(
    folder: str | Path, onerror: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str]]]:
    """(path, names of the files) of a folder and each below it, without hidden ones.

    Folders are sorted, files are not. A link to a folder elsewhere is followed, once. `onerror` is
    called for a folder that cannot be listed.
    """
    top = os.path.realpath(folder)
    linked: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        kept = []
        for name in sorted(folders):
            if name.startswith("."):
                continue
            path = os.path.join(parent, name)
            if os.path.islink(path):
                target = os.path.realpath(path)
                if target in linked or os.path.commonpath([top, target]) in (top, target):
                    continue  # it is walked anyway, or it would lead around in a circle
                linked.add(target)
            kept.append(name)
        folders[:] = kept
        yield parent, [name for name in files if not name.startswith(".")]


def folders_in(folder: str) -> list[str]:
    """The paths of the folders in a folder, sorted, without hidden ones. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir()
        )
