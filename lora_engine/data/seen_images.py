"""The digests of a run's images, so that a change of an image is noticed.

    RUN/checkpoints/image_digests.bin    16 bytes per image, and their BLAKE2b

The images are those of the training rows, then of the validation rows, in order of first
appearance; images that the run has not read have zeros. The file is written with the newest
checkpoint and is valid for all of them, because a digest in it never changes.
"""

from pathlib import Path

import numpy as np

from lora_engine.data.image_identity import FileStamp, content_digest
from lora_engine.data.image_table import ImageTable, JoinedImages
from lora_engine.data.images import ImageError
from lora_engine.data.sampling import evenly_spaced
from lora_engine.files import replaced_file, write_synced
from lora_engine.stopping import LoadingStopped

DIGESTS_FILE = "image_digests.bin"
UNKNOWN = bytes(16)
NUM_SAMPLED = 64
_MAX_BYTES = 2**30  # 67 million images


class ImageList:
    """The images of a dataset, with the known stamps and digests of their files.

    They are arrays, not objects, because there may be millions of images. `digests` V16 (N,) are
    those that a run has seen already. Images in indexed shards need no stamps of their own: their
    digests are valid as long as the shard's stamp is, and are kept with the index.
    """

    def __init__(self, table: ImageTable, digests: np.ndarray | None = None) -> None:
        self.table = table
        self.stamps = np.zeros(len(table), dtype="V16")
        self.digests = np.zeros(len(table), dtype="V16") if digests is None else digests

    def knows(self, image: int, file: FileStamp) -> bool:
        """Whether the digest is that of the file with this stamp."""
        kept = self.table.kept_digest(image)
        if kept is None:
            return self.stamps[image].tobytes() == file
        if kept == UNKNOWN:
            return False
        if self.digests[image].tobytes() != kept:
            self.record(image, file, kept)
        return True

    def is_kept(self, image: int) -> bool:
        """Whether the image's digest is kept with the index of its shard."""
        return self.table.kept_digest(image) is not None

    def record(self, image: int, file: FileStamp | None, digest: bytes) -> None:
        """Record an image's stamp and digest.

        Raises LoadingStopped if the image had another digest before.
        """
        if self.digests[image].tobytes() not in (UNKNOWN, digest):
            raise LoadingStopped(
                f"{self.table[image]} has changed since the run began; restore it, or begin "
                f"another run"
            )
        self.digests[image] = np.void(digest)
        if file is not None and not self.table.keep_digest(image, digest):
            self.stamps[image] = np.void(file)


def sample_digests(images: JoinedImages) -> np.ndarray:
    """Digests of images, V16 (N,): of 64 evenly spread ones, `UNKNOWN` for the others."""
    digests = np.zeros(len(images), dtype="V16")
    for image in evenly_spaced(len(images), NUM_SAMPLED):
        digests[image] = np.void(_digest(images, image))
    return digests


def find_change(images: JoinedImages, digests: np.ndarray) -> str | None:
    """Compare 64 images, evenly spread over the known ones; return what has changed, or None.

    Unreadable images are ignored here: they are skipped and listed when they are loaded.
    """
    if len(images) != len(digests):
        return f"there are {len(images):,}, not {len(digests):,}"
    is_known = digests.view(np.uint64).reshape(-1, 2).any(axis=1)
    known = np.flatnonzero(is_known)
    for image in known[evenly_spaced(len(known), NUM_SAMPLED)].tolist():
        if _digest(images, image) not in (UNKNOWN, digests[image].tobytes()):
            return f"{images[image]} has changed"
    return None


def write_digests(path: Path, digests: np.ndarray, written: bytes = b"") -> bytes:
    """Write the file atomically unless its checksum is `written`; return the checksum."""
    data = digests.tobytes()
    checksum = content_digest(data)
    if checksum != written:
        with replaced_file(path) as new:
            write_synced(new, data + checksum)
    return checksum


def read_digests(path: Path) -> np.ndarray | None:
    """The digests (N,) in a file; None if there is no file, or a damaged one."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) % 16 or content_digest(data[:-16]) != data[-16:]:
        return None
    return np.frombuffer(data[:-16], dtype="V16").copy()


def _digest(images: JoinedImages, image: int) -> bytes:
    try:
        return content_digest(images.read(image))
    except ImageError:
        return UNKNOWN
