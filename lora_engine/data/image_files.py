"""Folders and patterns -> image files."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm".split()
)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Expand folders, recursively and sorted, to their image files; files are kept as given.

    In folders, files with one of SUFFIXES are images, and hidden files and folders are skipped. A
    path that does not exist may be a pattern, in which ** stands for any number of folders.
    Raises ValueError for a path that does not exist or cannot be listed, and for a folder without
    images.
    """
    found: list[Path] = []
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

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)
