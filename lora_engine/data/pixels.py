"""An RGB image -> the pixels that a captioner takes, as its checkpoint's preprocessor makes them.

Axes: B batch, H height, W width. Pixels are uint8 (3, H, W), a quarter of their size as floats, and
are normalized in batches on the device.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from lora_engine.data.images import (
    MAX_DECODE_S,
    MAX_PIXELS,
    MAX_SIDE,
    ImageError,
    image_errors,
    open_image,
    source_name,
)

# Part of the key of everything that is computed from pixels and cached; to be increased whenever
# the pixels of any image change.
PIXELS_VERSION = 1

# Pillow's resize takes longer than decoding a photograph. torch has two of its filters in vector
# instructions, four times as fast; images at least this many times as large as needed use it.
FAST_FROM = 1.5
FAST_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


@dataclass(frozen=True)
class PixelSettings:
    """What a checkpoint's preprocessor does to an image, in this order.

    resize: (height, width) regardless of the aspect ratio, or the length of the shortest edge.
    resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
    crop: (height, width) of the center, padded with black where the image is smaller.
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
        """(height, width) of all pixels that `to_pixels` returns."""
        if self.crop is not None:
            return self.crop
        assert not isinstance(self.resize, int)
        return self.resize

    @property
    def num_bytes(self) -> int:
        """Size of one image's pixels, uint8 (3, height, width)."""
        height, width = self.size
        return 3 * height * width


def load_pixels(
    source: str | Path | bytes,
    settings: PixelSettings,
    *,
    max_pixels: int = MAX_PIXELS,
    limit_s: float = MAX_DECODE_S,
) -> np.ndarray:
    """Read an image file, or a file's bytes, as uint8 pixels (3, H, W), (H, W) = settings.size.

    Raises ImageError as `open_image` and `to_pixels` do, also for an image that cannot be resized.
    """
    path = source_name(source)
    image = open_image(source, max_pixels=max_pixels, limit_s=limit_s)
    with image_errors(path):
        return to_pixels(image, settings, path=path)


def to_pixels(
    image: Image.Image, settings: PixelSettings, *, path: str = "<memory>"
) -> np.ndarray:
    """Resize and crop an RGB image as transformers' Pillow processors do.

    Returns uint8 (3, H, W) with (H, W) = settings.size. The pixels equal Pillow's to the bit; for
    images of at least FAST_FROM times the height and the width they are within one level of
    Pillow's resize to the width and then to the height. (Pillow 13 resizes some tall images to the
    height first; there it differs from its older versions, and from these pixels, by a few levels
    in one pixel of a thousand.)

    Raises ImageError, which names `path`, for an image so narrow that scaling its shortest edge
    would make it larger than MAX_PIXELS.
    """
    if image.mode != "RGB":
        raise ValueError(f"got an image of mode {image.mode}, expected RGB: use open_image()")
    height, width = resized(image, settings.resize)
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


def normalize(pixels: torch.Tensor, settings: PixelSettings) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) on the same device."""
    values = pixels.to(torch.float32).mul_(settings.rescale_factor)
    # Channel by channel with plain numbers: a tensor of means would be copied to the GPU at each
    # call, which waits for all work queued there.
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values


def resized(image: Image.Image, resize: tuple[int, int] | int) -> tuple[int, int]:
    """(height, width) after resizing; the longer edge is rounded down."""
    if not isinstance(resize, int):
        return resize
    if image.width <= image.height:
        return int(resize * image.height / image.width), resize
    return resize, int(resize * image.width / image.height)


def _shrink(image: Image.Image, size: tuple[int, int], mode: str) -> np.ndarray:
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    # In strips: converting a large image at once would copy all its bytes two more times.
    for top in range(0, image.height, 64):
        bottom = min(top + 64, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    planes = torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return F.interpolate(planes[None], size, mode=mode, antialias=True)[0].numpy()


def _crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (3, *size) from the center of (3, H, W)."""
    (_, height, width), (crop_height, crop_width) = pixels.shape, size
    # Floor division, also below zero: transformers pads the odd pixel before the image.
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    right, bottom = left + crop_width - width, top + crop_height - height
    # A negative edge cuts, a positive one pads with black.
    return F.pad(torch.from_numpy(pixels), (-left, right, -top, bottom)).numpy()
