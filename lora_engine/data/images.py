"""An image file, or its bytes -> one RGB image, within limits of size, memory and time."""

import errno
import io
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# 134 million pixels: more than the 108 million of the largest phone photographs, less than the 179
# million at which Pillow itself refuses. Decoding that many takes up to 1 GB.
MAX_PIXELS = 2**27

# A JPEG's longest side. Resizing takes memory in proportion to one side, however short the other.
MAX_SIDE = 2**16 - 1

# 4 bytes per pixel of the largest image; larger files are not supported.
MAX_FILE_BYTES = 4 * MAX_PIXELS

# CPU time to decode one image. The largest images take a few seconds; a small file can be crafted
# to take hours. CPU time, not wall-clock time: a busy machine or a slow disk must not change which
# images are used.
MAX_DECODE_S = 30.0

# Left out on purpose: EPS (Pillow would start Ghostscript), containers whose parts may differ from
# the size in the header (ICO, ICNS), and formats without a signature (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

_START_OF_SCAN = re.compile(b"\xff\xda")
_MAX_SCANS = 100  # of a large JPEG that is read in blocks of the usual size; most have up to 12
_LARGE_JPEG = 2**22  # pixels; of smaller ones even 64 KiB of scans are decoded within a second

# Brands of HEIC files (ISO/IEC 23008-12). AVIF files may share mif1, and are Pillow's.
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"heif"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})

_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # this process's fault, not an image's


class ImageError(ValueError):
    """An image that cannot be used: `path` of its file ("<bytes>" without one), and the `reason`.
    """

    def __init__(self, path: str, reason: str) -> None:
        # Both go to `args`, from which pickle rebuilds the error in another process.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_image(
    source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = MAX_DECODE_S
) -> Image.Image:
    """Read the (first) image of a file, or of a file's bytes, as RGB, as viewers show it.

    The format is detected from the content, not from the name; EXIF orientation is applied,
    transparency composited on white, 16-bit gray reduced to its high byte (as Pillow does with
    colors).

    Pillow's warnings are suppressed through the process-wide filters (`warnings.catch_warnings`):
    call this from one thread of a process at a time if other threads rely on theirs.

    Raises ImageError if the source is missing, unreadable, empty, damaged, in an unknown format,
    larger than max_pixels (height * width) or MAX_SIDE, which is checked before anything is
    decoded, or takes more than limit_s seconds of CPU time. Pillow's own limit,
    2 * Image.MAX_IMAGE_PIXELS, applies as well.

    The time is checked whenever Pillow reads more of the file, so that JPEG, PNG, GIF, BMP and PPM
    keep to the limit within two seconds. WebP, AVIF, HEIC, TIFF and JPEG 2000 are decoded in one
    call, which cannot be stopped. MAX_PIXELS of them take up to ten seconds (JPEG 2000: a minute),
    but the time of a TIFF or JPEG 2000 file crafted to be slow is not bounded.

    HEIC needs the package pillow-heif, the extra "heic".
    """
    path = source_name(source)
    data = source if isinstance(source, bytes) else read_image_file(source)
    if not data:
        raise ImageError(path, "no bytes at all")
    stream = _TimedBytes(data, limit_s)
    with image_errors(path, stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(stream, formats=_heic_formats(path) if _is_heic(data) else FORMATS)
        _check_size(image, path, max_pixels)
        if image.format == "JPEG" and image.width * image.height > _LARGE_JPEG:
            # A scan of 10 bytes takes up to 8 ms. With Pillow's 64 KiB at a time, the limit would
            # hold to within a minute only; smaller pieces cost an ordinary photograph 5 %.
            if len(_START_OF_SCAN.findall(data)) > _MAX_SCANS:
                image.decodermaxblock = 10 * _MAX_SCANS  # type: ignore[attr-defined]
        image.load()
        apply_orientation(image)
        return _to_rgb(image, path)


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a file that may be an image; raises ImageError as `open_image` does."""
    with image_errors(str(path)), _open_regular_file(path, str(path)) as stream:
        return stream.read(MAX_FILE_BYTES)


def source_name(source: str | Path | bytes) -> str:
    """What errors call a source."""
    return "<bytes>" if isinstance(source, bytes) else str(source)


def _is_heic(data: bytes) -> bool:
    """Whether the file's first box, ftyp (size, name, brand, version, brands), says HEIC."""
    if data[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(data[:4]), 1024)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, size, 4))}
    return bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def _heic_formats(path: str) -> tuple[str, ...]:
    """Pillow's name for HEIC, once pillow-heif is registered; it is imported only for such files.
    """
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(
            path, "is HEIC; install pillow-heif to read it: pip install 'lora_engine[heic]'"
        ) from None
    # One thread: the loading processes share the processors already.
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return ("HEIF",)


class _TimedBytes(io.BytesIO):
    """A file's bytes, which cannot be read once this thread has used `limit_s` of CPU time."""

    def __init__(self, data: bytes, limit_s: float) -> None:
        super().__init__(data)
        self.limit_s = limit_s
        self.begin_s = time.monotonic()
        self.begin_thread_s = time.thread_time()

    def read(self, size: int | None = -1, /) -> bytes:
        if self.is_late():
            raise TimeoutError
        return super().read(size)

    def is_late(self) -> bool:
        if time.monotonic() - self.begin_s <= self.limit_s:  # a clock ten times as fast to read
            return False
        return time.thread_time() - self.begin_thread_s > self.limit_s


@contextmanager
def image_errors(path: str, stream: _TimedBytes | None = None) -> Iterator[None]:
    """Within the context every failure in processing the image at `path` becomes an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(path, f"not an image in a known format ({known})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"too large: {error}") from None
    except MemoryError:
        raise ImageError(path, "too large for the free memory") from None
    except Exception as error:  # Pillow's decoders raise some fifteen types on damaged files
        if isinstance(error, OSError) and error.errno in _OUT_OF_DESCRIPTORS:
            raise
        if stream is not None and stream.is_late():  # some decoders raise an error of their own
            raise ImageError(
                path, f"decoding takes more than {stream.limit_s:g} s; save the image again"
            ) from None
        detail = str(error) or type(error).__name__
        raise ImageError(path, f"damaged or truncated: {detail}") from error


def _open_regular_file(source: str | Path, path: str) -> BinaryIO:
    try:
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(path, "is a folder, expected an image file")
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait forever
            raise ImageError(path, "is not a regular file")
        if status.st_size == 0:
            raise ImageError(path, "the file is empty")
        return open(source, "rb")
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except OSError as error:
        if error.errno in _OUT_OF_DESCRIPTORS:
            raise
        raise ImageError(path, f"cannot be read: {error.strerror}") from None
    except ImageError:
        raise
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise ImageError(path, f"not a possible file name: {error}") from None


def _check_size(image: Image.Image, path: str, max_pixels: int) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            path,
            f"too long: {width} x {height} pixels, the limit of a side is {MAX_SIDE:,}; make the "
            f"image smaller",
        )
    if width * height > max_pixels:
        raise ImageError(
            path,
            f"too large: {width} x {height} is {width * height:,} pixels, the limit is "
            f"{max_pixels:,}; make the image smaller",
        )


def apply_orientation(image: Image.Image) -> None:
    """Rotate the image in place according to its EXIF data; unreadable EXIF data are ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata beside good pixels, again of some fifteen types
        pass


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    # Pillow's convert() clips 16-bit pixels at 255, so they are reduced to 8 bits here.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        levels = np.asarray(image)
        gray = (levels >> 8).astype(np.uint8)
        gray[levels == image.info.get("transparency", -1)] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            path,
            f"32-bit pixels (mode {image.mode}) have no defined white level: save the image with "
            "8 or 16 bits per channel",
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    # Converting RGB to RGB would copy it, a tenth of the time that a large photograph takes.
    return image if image.mode == "RGB" else image.convert("RGB")
