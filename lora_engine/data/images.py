"""A file or bytes -> one RGB image -> pixels, guarded.

Axes: B batch, H height, W width. Pixels travel as uint8 (3, H, W), a quarter of their size as
floats, and are normalised in batches on the device.
"""

import errno
import glob
import io
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

# 134 million pixels: more than the 108 million of large photographs from a telephone, less than
# the 179 million at which Pillow refuses by itself. Decoding that many takes up to 1 GB.
MAX_PIXELS = 2**27

# A JPEG's largest side. Resizing takes memory in proportion to a side, however short the other is.
MAX_SIDE = 2**16 - 1

# 4 bytes per pixel of the largest image; larger files are not supported.
MAX_FILE_BYTES = 4 * MAX_PIXELS

# Processor time to decode one image. The largest images take a few seconds; a small file can be
# built to take hours. Processor time, not wall-clock time: a busy machine or a slow disk must not
# change which images are used.
MAX_DECODE_S = 30.0

# Left out on purpose: EPS (Pillow would start Ghostscript), containers whose parts need not have
# the size in the header (ICO, ICNS), and formats without a signature to know them by (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm".split()
)

# Part of the name of whatever is made of pixels and kept: another number, other pixels.
PIXELS_VERSION = 1

# Pillow's resize takes longer than decoding a photograph. torch has two of its filters in vector
# instructions, four times as fast; an image this many times as large as needed is resized there.
FAST_FROM = 1.5
FAST_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class ImageError(ValueError):
    """An image that cannot be used: `path` says which ("<bytes>" without a file), `reason` why."""

    def __init__(self, path: str, reason: str) -> None:
        # Both go to `args`, from which pickle builds the error again in another process.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class PixelSettings:
    """What a checkpoint's preprocessor does to an image, in this order.

    resize: (height, width) to squash to, or the length of the shortest edge (keeps the shape).
    resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
    crop: (height, width) cut from the middle, padded with black where the image is smaller.
    rescale_factor, mean, std: the float pixels are (x * rescale_factor - mean) / std.

    Raises ValueError for sizes that are not positive, an unknown filter, a std of zero, and a
    shortest edge without a crop, with which images would differ in size.
    """

    resize: tuple[int, int] | int
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: tuple[int, int] | None = None
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        if isinstance(self.resize, int) and self.crop is None:
            raise ValueError(
                f"resize={self.resize} fixes the shortest edge only, so images would differ in "
                "size: give resize=(height, width), or a crop"
            )
        if np.min(self.resize) < 1 or min(self.size) < 1:
            raise ValueError(f"resize={self.resize}, crop={self.crop}: sizes must be positive")
        if np.max(self.resize) > MAX_SIDE or self.size[0] * self.size[1] > MAX_PIXELS:
            raise ValueError(
                f"resize={self.resize}, crop={self.crop}: sizes must be at most {MAX_SIDE:,}, and "
                f"height * width at most {MAX_PIXELS:,}"
            )
        if self.resample not in list(Image.Resampling):
            raise ValueError(f"resample={self.resample} is not a Pillow filter (0 to 5)")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(
                f"mean={self.mean}, std={self.std}: expected three numbers each, and no std of 0"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every image that leaves `to_pixels`."""
        if self.crop is not None:
            return self.crop
        assert not isinstance(self.resize, int)
        return self.resize


def load_pixels(
    source: str | Path | bytes,
    settings: PixelSettings,
    *,
    max_pixels: int = MAX_PIXELS,
    limit_s: float = MAX_DECODE_S,
) -> np.ndarray:
    """Read an image file, or a file's bytes, as the pixels that a captioner sees.

    Returns uint8 (3, H, W) with (H, W) = settings.size, on the way through `open_image` and
    `to_pixels`. Raises ImageError as `open_image` does, also for an image that cannot be resized.
    """
    path = _name(source)
    image = open_image(source, max_pixels=max_pixels, limit_s=limit_s)
    with _guard(path):
        return to_pixels(image, settings, path=path)


def open_image(
    source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, limit_s: float = MAX_DECODE_S
) -> Image.Image:
    """Read the (first) image of a file, or of a file's bytes, as RGB, as a person would see it.

    The format is known by content, never by the name; EXIF orientation is applied, transparency
    laid on white, 16-bit grey brought to 8 bits by its high byte (as Pillow does with colours).

    Pillow's warnings are held back through the process-wide filters (`warnings.catch_warnings`):
    call this from one thread of a process at a time if other threads rely on theirs.

    Raises ImageError if the source is missing, unreadable, empty, damaged, in no known format,
    larger than max_pixels (height * width) or MAX_SIDE, which is checked before anything is
    decoded, or takes more than limit_s seconds of processor time; Pillow's own limit,
    2 * Image.MAX_IMAGE_PIXELS, holds beside it.

    The time is checked whenever Pillow asks for more of the file, which holds for JPEG, PNG, GIF,
    BMP and PPM to within two seconds. WebP, AVIF, TIFF and JPEG 2000 are decoded in one call, which
    cannot be stopped. Of MAX_PIXELS it takes up to ten seconds (JPEG 2000: a minute), but a TIFF or
    JPEG 2000 file built to take long is not bounded.
    """
    path = _name(source)
    data = source if isinstance(source, bytes) else read_image_file(source)
    if not data:
        raise ImageError(path, "no bytes at all")
    stream = _LimitedTime(data, limit_s)
    with _guard(path, stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(stream, formats=FORMATS)
        _check_size(image, path, max_pixels)
        if image.format == "JPEG" and image.width * image.height > _LARGE_JPEG:
            # A scan of 10 bytes takes up to 8 ms. With Pillow's 64 KiB at a time, the limit would
            # hold to within a minute only; smaller pieces cost an ordinary photograph 5 %.
            if len(_START_OF_SCAN.findall(data)) > _MAX_SCANS:
                image.decodermaxblock = 10 * _MAX_SCANS  # type: ignore[attr-defined]
        image.load()
        _apply_orientation(image)
        return _to_rgb(image, path)


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a file that may be an image; raises ImageError as `open_image` does."""
    with _guard(str(path)), _open_stream(path, str(path)) as stream:
        return stream.read(MAX_FILE_BYTES)


_START_OF_SCAN = re.compile(b"\xff\xda")
_MAX_SCANS = 100  # of a large JPEG that is read in blocks of the usual size; most have up to 12
_LARGE_JPEG = 2**22  # pixels; of smaller ones even 64 KiB of scans are decoded within a second

_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # this process's fault, not an image's


class _LimitedTime(io.BytesIO):
    """A file's bytes; reading them fails once this thread has spent `limit_s` seconds since."""

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
        if time.monotonic() - self.begin_s <= self.limit_s:  # ten times as fast to find out
            return False
        return time.thread_time() - self.begin_thread_s > self.limit_s


@contextmanager
def _guard(path: str, stream: _LimitedTime | None = None) -> Iterator[None]:
    """Whatever fails in what is done to the image at `path` becomes an ImageError."""
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
        raise ImageError(path, "too large for the memory that is free") from None
    except Exception as error:  # Pillow's decoders raise some fifteen types on damaged files
        if isinstance(error, OSError) and error.errno in _OUT_OF_DESCRIPTORS:
            raise
        if stream is not None and stream.is_late():  # some decoders raise an error of their own
            raise ImageError(
                path, f"decoding takes more than {stream.limit_s:g} s; save the image anew"
            ) from None
        detail = str(error) or type(error).__name__
        raise ImageError(path, f"damaged or truncated: {detail}") from error


def _name(source: str | Path | bytes) -> str:
    return "<bytes>" if isinstance(source, bytes) else str(source)


def _open_stream(source: str | Path, path: str) -> BinaryIO:
    try:
        status = os.stat(source)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(path, "is a folder, expected an image file")
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
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


def _apply_orientation(image: Image.Image) -> None:
    """Turn the pixels as EXIF says, in place; unreadable EXIF leaves them as they are stored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata beside good pixels, again of some fifteen types
        pass


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    # Pillow's convert() clips wide pixels at 255, so they are brought to 8 bits here.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        levels = np.asarray(image)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            path,
            f"32-bit pixels (mode {image.mode}) do not say which value is white: "
            "save the image with 8 or 16 bits a channel",
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    # Converting RGB to RGB would copy it, a tenth of the time that a large photograph takes.
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(
    image: Image.Image, settings: PixelSettings, *, path: str = "<memory>"
) -> np.ndarray:
    """Resize and crop an RGB image as transformers' Pillow processors do.

    Returns uint8 (3, H, W) with (H, W) = settings.size: to the bit, or, from FAST_FROM times the
    height and the width needed on, within one level of Pillow's resize to the width and then to the
    height. (Pillow 13 takes the height of some tall images first. There it differs from its older
    versions, and from these pixels, by a few levels in one of a thousand.)

    Raises ImageError, which names `path`, for a strip so long that scaling its shortest edge would
    blow it up beyond MAX_PIXELS.
    """
    if image.mode != "RGB":
        raise ValueError(f"got an image of mode {image.mode}, expected RGB: use open_image()")
    height, width = _resized(image, settings.resize)
    if height * width > MAX_PIXELS:
        raise ImageError(
            path,
            f"too long and thin: {image.width} x {image.height} would become {width} x {height}",
        )
    resample = Image.Resampling(settings.resample)
    shrinks = image.height >= FAST_FROM * height and image.width >= FAST_FROM * width
    if shrinks and resample in FAST_FILTERS:
        pixels = _shrink(image, (height, width), FAST_FILTERS[resample])
    else:
        bands = image.resize((width, height), resample=resample).split()
        pixels = np.stack([np.asarray(band) for band in bands])  # (3, height, width)
    return pixels if settings.crop is None else _crop(pixels, settings.crop)


def _shrink(image: Image.Image, size: tuple[int, int], mode: str) -> np.ndarray:
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    # In strips: the bytes of a whole large image would pass through memory two times more.
    for top in range(0, image.height, 64):
        bottom = min(top + 64, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    planes = torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return F.interpolate(planes[None], size, mode=mode, antialias=True)[0].numpy()


def _crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (3, *size) from the middle of (3, H, W)."""
    (_, height, width), (crop_height, crop_width) = pixels.shape, size
    # Floor division, also below zero: transformers pads the odd pixel before the image.
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    right, bottom = left + crop_width - width, top + crop_height - height
    # A negative edge cuts, a positive one pads with black.
    return F.pad(torch.from_numpy(pixels), (-left, right, -top, bottom)).numpy()


def _resized(image: Image.Image, resize: tuple[int, int] | int) -> tuple[int, int]:
    """(height, width) after resizing; the long edge is cut down to whole pixels."""
    if not isinstance(resize, int):
        return resize
    if image.width <= image.height:
        return int(resize * image.height / image.width), resize
    return resize, int(resize * image.width / image.height)


def normalize(pixels: torch.Tensor, settings: PixelSettings) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) on the same device."""
    values = pixels.to(torch.float32).mul_(settings.rescale_factor)
    # Channel by channel with plain numbers: a tensor of means would be copied to the GPU at each
    # call, which waits for all work queued there.
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Expand folders, recursively and sorted, to their image files; files are kept as given.

    In folders an image is known by its name's ending, and hidden files and folders are left out. A
    path that does not exist may be a pattern, where ** means folders below.
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
            continue
        if not path.is_dir():
            found.append(path)
            continue
        images = sorted(_images_below(path))
        if not images:
            endings = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{path}: no images in this folder (looked for {endings})")
        found.extend(images)
    return found


def _images_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot list this folder: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)
