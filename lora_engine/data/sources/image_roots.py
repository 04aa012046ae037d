"""The folder that the image paths of an annotation file are relative to."""

import os
from collections.abc import Iterable, Sequence
from itertools import islice

from lora_engine.data.image_files import folders_in
from lora_engine.data.rows import Item, Problem

NUM_NAMES = 20
MAX_FOLDERS = 1_000  # that are looked into, each with NUM_NAMES calls of the file system


def first_image_names(items: Iterable[Item | Problem]) -> list[str]:
    """The relative paths among the first images of an annotation file."""
    names: dict[str, None] = {}
    for item in islice(items, 10 * NUM_NAMES):  # an image may have several rows
        if isinstance(item, Item) and isinstance(item.image, str):
            if "://" not in item.image and item.image.strip() and not os.path.isabs(item.image):
                names[item.image] = None
        if len(names) == NUM_NAMES:
            break
    return list(names)


def find_image_root(path: str, names: Sequence[str]) -> str:
    """The folder in which most of the images with these names are.

    This is the folder of the annotation file `path` if it has more than half of them: a copy of the
    data beside it may have all. Otherwise looks in the folders of that folder, in its parent, in
    the parent's folders and in the working folder, which `caption --out` writes paths relative to.
    The file's folder where none of them has more than half of the images.
    """
    home = os.path.realpath(os.path.dirname(path))
    if 2 * _num_found(home, names) > len(names):
        return home
    parent = os.path.dirname(home)
    near = [home, *_folders(home), parent, *_folders(parent), os.getcwd()]
    best = max(near, key=lambda folder: _num_found(folder, names))  # the first of several
    return best if 2 * _num_found(best, names) > len(names) else home


def _num_found(folder: str, names: Sequence[str]) -> int:
    return sum(os.path.exists(os.path.join(folder, name)) for name in names if "\0" not in name)


def _folders(folder: str) -> list[str]:
    """The folders in a folder that are looked into; none if it cannot be listed."""
    try:
        return folders_in(folder)[:MAX_FOLDERS]
    except OSError:
        return []
