"""Reading shards in blocks: for disks that are slow at random access, and for Parquet.

A block is a run of rows whose images lie next to each other in a shard, about 4 MB of them, or the
rows of one row group of a Parquet file. An epoch in blocks permutes the blocks, and permutes the
rows within each group of 64 blocks (batches.epoch_batches). So a disk reads each block once, from
begin to end, and rows of 64 random blocks are mixed at any time.
"""

import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Literal, TypeVar

import numpy as np

from lora_engine.data.formats.parquet_images import MAX_CACHE_BYTES
from lora_engine.data.image_table import ImageTable, Shard
from lora_engine.data.images import ImageError
from lora_engine.data.sampling import evenly_spaced

BLOCK_BYTES = 4 * 2**20
BLOCKS_PER_GROUP = 64
_SLOW_S = 2e-3  # to read an image: more than a GPU's encoder takes for one
_NUM_MEASURED = 32  # images
_AHEAD = 128  # batches whose blocks are read ahead of their use
_READ_BYTES = 2**20


def block_ends(images: ImageTable, image_of_row: np.ndarray) -> np.ndarray:
    """The numbers of the rows (M,) at which blocks end; the rows are in the source's order."""
    rows = np.asarray(image_of_row, dtype=np.int64)
    if images.chosen is not None:
        rows = images.chosen[rows].astype(np.int64)
    container = images.columns["container"][rows].astype(np.int64)
    # In Parquet the offset is the row group's number.
    divisors = np.array([BLOCK_BYTES if isinstance(c, Shard) else 1 for c in images.containers])
    place = images.columns["offset"][rows].astype(np.int64) // divisors[container]
    is_new = (np.diff(container) != 0) | (np.diff(place) != 0)
    return np.concatenate([np.flatnonzero(is_new) + 1, [len(rows)]]) if len(rows) else rows


def choose_read_order(images: ImageTable) -> tuple[Literal["random", "blocks"], str]:
    """The read order that suits the storage of the images, and the reason.

    Image files are read in random order; Parquet in blocks, unless all of it fits into the memory
    for decoded rows; shards in blocks where reading a random image takes more than 2 ms, which is
    measured.
    """
    orders = {container.read_order for container in images.containers}
    if "blocks" in orders and _parquet_bytes(images) > MAX_CACHE_BYTES:
        return "blocks", "Parquet is decoded in groups of rows"
    if "measured" not in orders:
        return "random", "each image is a file"
    seconds = _random_read_s(images)
    order: Literal["random", "blocks"] = "blocks" if seconds > _SLOW_S else "random"
    return order, f"reading a random image takes {1e3 * seconds:.2g} ms"


def _parquet_bytes(images: ImageTable) -> int:
    """The size of the Parquet files."""
    files = {c.path for c in images.containers if c.read_order == "blocks"}
    return sum(os.path.getsize(path) for path in files if os.path.exists(path))


def _random_read_s(images: ImageTable) -> float:
    """The median time to read an image that is not in memory."""
    seconds = [0.0]
    for image in evenly_spaced(len(images), _NUM_MEASURED):
        _forget(images, image)
        begin_s = time.perf_counter()
        try:
            images.read(image)
        except ImageError:
            continue
        seconds.append(time.perf_counter() - begin_s)
    return statistics.median(seconds)


def _forget(images: ImageTable, image: int) -> None:
    """Drop an image's bytes from the page cache."""
    if hasattr(os, "posix_fadvise"):
        path, offset, size = images.byte_range(image)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --- reading ahead --------------------------------------------------------------------------------

Batch = TypeVar("Batch")


def read_ahead(
    batches: Iterable[Batch],
    images: ImageTable,
    *,
    block_ends: np.ndarray,
    image_of_row: np.ndarray,
    rows_to_read: Callable[[Batch], Iterable[int]],
) -> Iterator[Batch]:
    """The batches, while a thread reads the blocks of the next ones into the page cache.

    Each block is read from begin to end, once: its rows are in batches near each other.
    `rows_to_read` are those rows of a batch whose images are needed. Only tars and Arrow files are
    read ahead.
    """
    if not all(isinstance(container, Shard) for container in images.containers):
        yield from batches
        return
    reader = _Reader()
    batches, waiting, known = iter(batches), deque[Batch](), deque[int](maxlen=_MAX_KNOWN)
    try:
        while True:
            new = list(islice(batches, _AHEAD - len(waiting)))
            waiting += new
            if not waiting:
                return
            rows = [row for batch in new for row in rows_to_read(batch)]
            wanted = sorted(set(np.searchsorted(block_ends, rows, side="right").tolist()))
            for block in wanted:
                if block not in known:
                    known.append(block)
                    begin = int(block_ends[block - 1]) if block else 0
                    reader.read(_extent(images, image_of_row[begin : int(block_ends[block])]))
            yield waiting.popleft()
    finally:
        reader.stop()


_MAX_KNOWN = 4 * BLOCKS_PER_GROUP  # the blocks of earlier groups are not needed again


def _extent(images: ImageTable, block: np.ndarray) -> tuple[str, int, int]:
    """The shard of a block of images, and the offset and size of all of them."""
    path, begin, _ = images.byte_range(int(block[0]))
    _, last, size = images.byte_range(int(block[-1]))
    return path, begin, last + size - begin


class _Reader:
    """A thread that reads parts of files, for the page cache; it ends with the process."""

    def __init__(self) -> None:
        self.extents: queue.SimpleQueue[tuple[str, int, int] | None] = queue.SimpleQueue()
        self.is_stopped = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def read(self, extent: tuple[str, int, int]) -> None:
        self.extents.put(extent)

    def stop(self) -> None:
        self.is_stopped = True
        self.extents.put(None)

    def _run(self) -> None:
        buffer = bytearray(_READ_BYTES)
        while (extent := self.extents.get()) is not None:
            path, offset, size = extent
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(offset)
                    while size > 0 and not self.is_stopped:
                        count = file.readinto(memoryview(buffer)[: min(size, len(buffer))])
                        if not count:
                            break
                        size -= count
            except OSError:  # whoever needs the images reports it
                pass
