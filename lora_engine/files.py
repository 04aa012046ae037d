"""Files and folders that are replaced whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a new file name beside `path`, which takes the place of `path` on success.

    On an error what was written is removed and `path` stays as it was.
    """
    path = Path(path)
    # A name that Path.suffix-minded writers (savefig) still understand.
    new = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`, which takes the place of `path` on success.

    On an error what was written is removed and `path` stays as it was. A reader never sees a
    folder with files of both; between two renames it may see none.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
