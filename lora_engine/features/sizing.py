"""Estimates for a data set on this machine: space for features, time per epoch, use of caching.

They are made before a run begins, from the time that a few images and one batch take.
"""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from lora_engine.data.image_table import ImageTable
from lora_engine.data.images import ImageError
from lora_engine.data.pixels import PixelSettings, load_pixels
from lora_engine.data.sampling import evenly_spaced
from lora_engine.devices import autocast
from lora_engine.features.encoder import FeatureEncoder, shortest_s
from lora_engine.features.format import CacheDtype, FeatureFormat
from lora_engine.features.source import FeatureSource
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner
from lora_engine.terminal import counted

_NUM_LOADED = 8  # images
_NUM_COMPARED = 4  # images whose features are compared with fp32's
_BATCH_SIZES = (2, 32)  # the second one where the first is so fast that overhead dominates
_LONG_S = 0.1
_FORWARDS = 3  # a training step takes about as long as three forward passes
_DTYPES: tuple[CacheDtype, ...] = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Sizing:
    """The size of a data set, and this machine's time for one image or caption, in seconds.

    load_s: reading and decoding an image file, by one of `num_loaders` processes.
    encode_s: the frozen encoder. train_s: a caption's share of a training step.
    read_s: reading features from the disk; None if they are not kept there.
    num_kept: images for whose features there is space. num_processes: that share the work.
    """

    num_images: int
    num_captions: int
    features: FeatureFormat
    load_s: float
    encode_s: float
    train_s: float
    read_s: float | None
    num_kept: int
    num_loaders: int = 1
    num_processes: int = 1

    @property
    def fresh_s(self) -> float:
        """To compute the features of an image; worker processes load while others are encoded."""
        if self.num_loaders:
            return max(self.load_s / self.num_loaders, self.encode_s)
        return self.load_s + self.encode_s

    @property
    def first_epoch_s(self) -> float:
        seconds = self.num_images * self.fresh_s + self.num_captions * self.train_s
        return seconds / self.num_processes

    @property
    def later_epoch_s(self) -> float:
        num_kept = min(self.num_kept, self.num_images)
        again_s = num_kept * (self.read_s or 0.0) + (self.num_images - num_kept) * self.fresh_s
        return (again_s + self.num_captions * self.train_s) / self.num_processes

    def lines(self) -> list[str]:
        """Two lines for people: space, and time."""
        space = ", ".join(
            f"{_bytes(self.num_images * _with_dtype(self.features, dtype).row_bytes)} as {dtype}"
            for dtype in _DTYPES
        )
        num_kept = min(self.num_kept, self.num_images)
        share = f"all {num_kept:,}" if num_kept == self.num_images else (
            f"{num_kept:,} of {self.num_images:,} ({num_kept / self.num_images:.0%})"
        )
        return [
            f"space: features take {space}; there is space for {share} as {self.features.dtype}",
            f"time: about {_duration(self.first_epoch_s)} for the first epoch, "
            f"{_duration(self.later_epoch_s)} for each later one; {self._caching()}",
        ]

    def _caching(self) -> str:
        if not self.num_kept:
            return "features are not cached"
        if self.read_s is None:
            return "features are cached in memory"
        verdict = "saves time" if self.read_s < self.fresh_s else "saves no time"
        return (
            f"caching {verdict}: reading the features of an image takes {_duration(self.read_s)}, "
            f"computing them {_duration(self.fresh_s)}"
        )


def size_up(
    source: FeatureSource,
    captioner: Captioner,
    images: ImageTable,
    *,
    num_captions: int,
    num_tokens: int,
    num_loaders: int,
    num_processes: int = 1,
) -> list[str]:
    """Lines for the log: where features are kept, their size, and the time of an epoch.

    `num_tokens` is the length of a typical caption.
    """
    placement, encoder = source.placement, source.encoder
    assert placement is not None
    sizing = Sizing(
        num_images=len(images),
        num_captions=num_captions,
        features=encoder.format,
        load_s=measure_load_s(images, captioner.pixels),
        encode_s=placement.encode_s,
        train_s=measure_train_s(
            captioner.model,
            encoder.format,
            num_tokens=num_tokens,
            device=encoder.device,
            dtype=encoder.dtype,
        ),
        read_s=placement.read_s,
        num_kept=placement.num_kept,
        num_loaders=num_loaders,
        num_processes=num_processes,
    )
    lines = [placement.plan, *sizing.lines()]
    if encoder.precision in ("bf16", "int8"):
        lines.append(_precision_line(encoder, images))
    return lines


def _precision_line(encoder: FeatureEncoder, images: ImageTable) -> str:
    """How far features in the encoder's precision are from exact ones, for some images."""
    found = _some_pixels(images, encoder.pixels, _NUM_COMPARED)
    pixels = [torch.from_numpy(image) for image in found]
    error = encoder.relative_error(torch.stack(pixels)) if pixels else math.nan
    return (
        f"the encoder computes in {encoder.precision}: relative error {error:.2%} from fp32 (the "
        f"features of {counted(len(pixels), 'image')})"
    )


def _with_dtype(features: FeatureFormat, dtype: CacheDtype) -> FeatureFormat:
    return FeatureFormat(features.num_tokens, features.width, dtype)


def measure_load_s(images: ImageTable, settings: PixelSettings) -> float:
    """The time that reading and decoding one of the images takes."""
    begin_s = time.perf_counter()
    num_loaded = sum(1 for _ in _some_pixels(images, settings, _NUM_LOADED))
    return (time.perf_counter() - begin_s) / max(num_loaded, 1)


def _some_pixels(images: ImageTable, settings: PixelSettings, number: int) -> Iterator[np.ndarray]:
    """The uint8 pixels (3, H, W) of some images, without those that cannot be read."""
    for image in evenly_spaced(len(images), number):
        with suppress(ImageError):
            yield load_pixels(images.read(image), settings)


@torch.no_grad()
def measure_train_s(
    model: CaptioningModel,
    features: FeatureFormat,
    *,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The time that a caption of `num_tokens` takes in training, from a few forward passes."""
    was_training = model.training
    model.eval()
    for batch_size in _BATCH_SIZES:
        shape = batch_size, features.num_tokens, features.width
        rows = torch.zeros(shape, dtype=dtype, device=device)
        input_ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
        with autocast(device, dtype):
            forward_s = shortest_s(lambda: model.head(model.decode(input_ids, rows)), device)
        if forward_s > _LONG_S:
            break
    model.train(was_training)
    return _FORWARDS * forward_s / batch_size


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"
