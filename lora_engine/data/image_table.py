"""Where images are stored: files, byte ranges of shards, cells of Parquet files, Python objects.

Images are numbered. Everything else asks an `ImageTable` for an image's name, its bytes and the
stamp of its file by this number, and need not know where it is stored.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, overload

import numpy as np

from lora_engine.data.columns import Columns
from lora_engine.data.formats.parquet_images import ParquetImages, RowGroups
from lora_engine.data.image_identity import FileStamp, content_digest, identity, stamp
from lora_engine.data.images import MAX_FILE_BYTES, ImageError, read_image_file
from lora_engine.data.packed_strings import PackedStrings
from lora_engine.data.python_rows import PythonImages, image_column
from lora_engine.data.rows import SourceOptions

ReadOrder = Literal["random", "blocks", "measured"]


class Container(Protocol):
    """What images are in; messages name an image by `path` and its name in the container.

    `read_order` is the order in which images should be read; "measured" where it depends on the
    speed of the disk (read_order.py).
    """

    path: str
    read_order: ReadOrder

    def read(self, name: str, offset: int, size: int) -> bytes:
        """An image's bytes; raises ImageError."""
        ...

    def stamp(self, name: str, offset: int, size: int) -> FileStamp | None:
        """A stamp of an image and the file that holds it; None if it would not be reliable."""
        ...


class Folder:
    """Images that are files of a folder."""

    read_order: ReadOrder = "random"

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, name: str, offset: int, size: int) -> bytes:
        return read_image_file(os.path.join(self.path, name))

    def stamp(self, name: str, offset: int, size: int) -> FileStamp | None:
        return stamp(os.path.join(self.path, name))


class Shard:
    """Images that are byte ranges of one file, such as the members of a tar.

    `identity` is the file's when its members were listed: a file that has changed since then has
    other offsets, so its images are refused.
    """

    read_order: ReadOrder = "measured"

    def __init__(self, path: str, identity: bytes) -> None:
        self.path = path
        self.identity = identity

    def read(self, name: str, offset: int, size: int) -> bytes:
        path = os.path.join(self.path, name)
        if size > MAX_FILE_BYTES:
            raise ImageError(path, f"too large: {size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        if not size:
            raise ImageError(path, "the file is empty")
        # Opened for each image, as image files are: hundreds of shards may exceed the limit of open
        # files, and this takes microseconds where decoding takes milliseconds.
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._check(os.fstat(file.fileno()), path)
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise ImageError(path, f"the shard cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise ImageError(path, f"the shard ends after {len(data):,} of its {size:,} bytes")
        return data

    def _check(self, status: os.stat_result, path: str) -> None:
        if not stat.S_ISREG(status.st_mode) or identity(status) != self.identity:
            raise ImageError(path, _CHANGED)

    def stamp(self, name: str, offset: int, size: int) -> FileStamp | None:
        found = stamp(self.path)
        return _stamp_in(found, offset, size) if found == self.identity else None


_CHANGED = "the shard has changed since it was indexed; restore it, or rerun the command"


def _stamp_in(file: FileStamp, *location: str | int) -> FileStamp:
    """The stamp of one of the images in a file; its name alone may be that of several."""
    return content_digest(file + repr(location).encode())


class ParquetFile:
    """Images that are cells of a column of a Parquet file: row `size` of row group `offset`."""

    read_order: ReadOrder = "blocks"

    def __init__(self, path: str, column: str, identity: bytes, row_groups: RowGroups) -> None:
        self.path = path
        self.column = column
        self.images = ParquetImages(path, column, row_groups)
        self.identity = identity

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            if identity(os.stat(self.path)) != self.identity:
                raise ImageError(os.path.join(self.path, name), _CHANGED)
            return self.images.read(offset, size)
        except ImageError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            raise ImageError(os.path.join(self.path, name), reason) from None

    def stamp(self, name: str, offset: int, size: int) -> FileStamp | None:
        found = stamp(self.path)
        return _stamp_in(found, self.column, offset, size) if found == self.identity else None


class PythonRows:
    """Images that were given from Python, which do not change."""

    read_order: ReadOrder = "random"

    def __init__(self, data: Any, options: SourceOptions) -> None:
        self.path = ""
        self.images = PythonImages(data, image_column(data, options))

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            return self.images.read(offset)
        except ImageError:
            raise
        except (OSError, ValueError) as error:
            raise ImageError(name, str(error)) from None
        except (LookupError, TypeError) as error:  # such as a list that became shorter
            raise ImageError(name, f"the rows have changed: {error!r}") from None

    def stamp(self, name: str, offset: int, size: int) -> FileStamp | None:
        return b"given in Python!"  # 16 bytes, like all stamps; the images do not change


class ImageTable(Sequence[str]):
    """Images as columns; an item is an image's name: its path, or that of its shard and its own.

    `columns`: "container" (N,) are numbers of `containers`, "name" and "name_end" PackedStrings,
    "offset" and "size" what `Container.read` takes. `chosen` are numbers of the images to use, in
    their order; None for all.
    `digests` V16, one for each image of the columns, outlive the run and are shared with other
    processes; zeros where they are not known. They are used for images in shards.
    """

    def __init__(
        self,
        containers: Sequence[Container],
        columns: Columns,
        *,
        chosen: np.ndarray | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        self.containers = containers
        self.columns = columns
        self.names = PackedStrings(columns["name"], columns["name_end"])
        self.chosen = chosen
        self.digests = digests

    @classmethod
    def of_files(cls, paths: Iterable[str]) -> "ImageTable":
        """Image files by their paths."""
        folders: dict[str, int] = {}
        names, numbers = [], []
        for path in paths:
            folder, name = os.path.split(path)
            names.append(name)
            numbers.append(folders.setdefault(folder, len(folders)))
        packed = PackedStrings.pack(names)
        zeros = np.zeros(len(names), dtype=np.uint8)
        return cls([Folder(folder) for folder in folders], {
            "container": np.array(numbers, dtype=np.uint32),
            "name": packed.data,
            "name_end": packed.ends,
            "offset": zeros,
            "size": zeros,
        })

    def choose(self, images: np.ndarray | None) -> "ImageTable":
        """The table of some of the images, by their numbers in this table; None for all."""
        if images is None:
            return self
        chosen = images if self.chosen is None else self.chosen[images]
        return ImageTable(self.containers, self.columns, chosen=chosen, digests=self.digests)

    def __len__(self) -> int:
        return len(self.names) if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.row(range(len(self))[index])
        return os.path.join(self.container(row).path, self.names[row])

    def read(self, image: int) -> bytes:
        """The bytes of an image's file; raises ImageError."""
        row = self.row(image)
        return self.container(row).read(self.names[row], *self._offset_and_size(row))

    def stamp(self, image: int) -> FileStamp | None:
        """A stamp of an image and the file that holds it; None if it would not be reliable."""
        row = self.row(image)
        return self.container(row).stamp(self.names[row], *self._offset_and_size(row))

    def has_file(self, image: int) -> bool:
        """Whether an image file exists; true for images that are not files."""
        row = self.row(image)
        folder = self.container(row)
        return not isinstance(folder, Folder) or os.path.isfile(
            os.path.join(folder.path, self.names[row])
        )

    def byte_range(self, image: int) -> tuple[str, int, int]:
        """The file that holds an image, its offset and its size; 0 and 0 if it is the whole file.

        Not for Parquet, whose images have no bytes of their own in the file.
        """
        row = self.row(image)
        container = self.container(row)
        if isinstance(container, Folder):
            return os.path.join(container.path, self.names[row]), 0, 0
        return container.path, *self._offset_and_size(row)

    def kept_digest(self, image: int) -> bytes | None:
        """The digest kept for an image, zeros if it is not known yet; None if none can be kept."""
        row = self.row(image)
        if self.digests is None or isinstance(self.container(row), Folder):
            return None
        return self.digests[row].tobytes()

    def keep_digest(self, image: int, digest: bytes) -> bool:
        """Keep a digest for later runs and other processes; return whether it was kept.

        Only those of images in indexed shards are; the digests of image files are kept by path.
        """
        row = self.row(image)
        if self.digests is None or isinstance(self.container(row), Folder):
            return False
        self.digests[row] = np.void(digest)
        return True

    def row(self, image: int) -> int:
        """The number of an image in the columns."""
        return image if self.chosen is None else int(self.chosen[image])

    def _offset_and_size(self, row: int) -> tuple[int, int]:
        return int(self.columns["offset"][row]), int(self.columns["size"][row])

    def container(self, row: int) -> Container:
        return self.containers[int(self.columns["container"][row])]


class JoinedImages(Sequence[str]):
    """The images of several tables, one after the other."""

    def __init__(self, *tables: ImageTable) -> None:
        self.tables = tables

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def __getitem__(self, index):
        table, image = self._find(index)
        return table[image]

    def read(self, index: int) -> bytes:
        """The bytes of an image's file; raises ImageError."""
        table, image = self._find(index)
        return table.read(image)

    def _find(self, index: int) -> tuple[ImageTable, int]:
        index = range(len(self))[index]
        for table in self.tables:
            if index < len(table):
                break
            index -= len(table)
        return table, index
