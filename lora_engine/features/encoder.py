"""The frozen encoder: images -> features -> rows of bytes, always in batches of one size.

Axes: U images to encode, B batch, H height, W width, P image tokens, D width.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_engine.data.pixels import PIXELS_VERSION, PixelSettings, normalize
from lora_engine.devices import autocast
from lora_engine.features.format import CacheDtype, FeatureFormat
from lora_engine.features.precision import (
    EncoderPrecision,
    in_precision,
    resolve_encoder_precision,
)
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner
from lora_engine.models.weights import fingerprint

_LONG_S = 0.1  # a time that is measured once
_NUM_TIMED = 5  # calls of which the shortest counts


@torch.no_grad()
def encode_pixels(model: CaptioningModel, pixels: Tensor, settings: PixelSettings) -> Tensor:
    """uint8 pixels (B, 3, H, W) -> features (B, P, D); normalization runs on the pixels' device."""
    return model.encode(normalize(pixels, settings))


def shortest_s(call: Callable[[], object], device: torch.device) -> float:
    """The shortest time that a call takes after a warm-up: of one long call, or several short ones.

    On a busy machine, where threads wait for each other, some calls take much longer.
    """
    shortest = float("inf")
    for number in range(1 + _NUM_TIMED):  # the first one is the warm-up
        begin_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin_s
        if number:
            shortest = min(shortest, seconds)
            if seconds > _LONG_S:
                break
    return shortest


class FeatureEncoder:
    """Encodes images into rows of `format`.

    Every batch has `batch_size` images, padded with black ones: with another size the last bits of
    the features could differ. Features are unpacked to `dtype`; `cache_dtype` None stores them in
    it, too (fp32, otherwise bf16). `precision` is that of the encoder, "auto" the same as `dtype`.
    On a GPU callers should encode on `stream`, in parallel with training.

    Raises ValueError for a precision that the device does not have.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cache_dtype: CacheDtype | None = None,
        precision: EncoderPrecision = "auto",
    ) -> None:
        self.model = captioner.model
        self.pixels = captioner.pixels
        self.device = device
        self.dtype = dtype
        self.precision = resolve_encoder_precision(precision, device, dtype)
        self.converted, self.encoder_dtype = in_precision(self.model, self.precision, dtype)
        self.batch_size = encoder_batch_size(device, captioner.model.encoder.num_tokens)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.cache_dtype = cache_dtype
        self.num_encoded = 0
        self._shape: torch.Size | None = None  # of an image's features, (P, D)

    @cached_property
    def format(self) -> FeatureFormat:
        """How features are stored; their shape is known once a batch has been encoded."""
        if self._shape is None:
            self._features(self._blank_batch())
        assert self._shape is not None
        num_tokens, width = self._shape
        exact: CacheDtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return FeatureFormat(num_tokens, width, self.cache_dtype or exact)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (U, 3, H, W) -> rows (U, row_bytes) on the device."""
        self.num_encoded += len(pixels)
        packed = []
        for chunk in pixels.to(self.device, non_blocking=True).split(self.batch_size):
            num_images, num_missing = len(chunk), self.batch_size - len(chunk)
            if num_images == 0:
                break
            if num_missing:
                chunk = torch.cat([chunk, chunk.new_zeros(num_missing, *chunk.shape[1:])])
            features = self._features(chunk)[:num_images]
            packed.append(self.format.pack(features))
        if not packed:
            return torch.empty(0, self.format.row_bytes, dtype=torch.uint8, device=self.device)
        return torch.cat(packed)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows (B, row_bytes) -> features (B, P, D) in the compute dtype."""
        return self.format.unpack(rows, self.dtype)

    def measure_s(self) -> float:
        """Seconds per image, measured by encoding a few batches."""
        pixels = self._blank_batch()
        return shortest_s(lambda: self._features(pixels), self.device) / len(pixels)

    def describe(self) -> dict[str, Any]:
        """Everything that a row depends on besides its image, as JSON: the key of the cache."""
        return {
            "encoder": _describe_model(self.model),
            "encoder_batch_size": self.batch_size,
            "pixels": {**dataclasses.asdict(self.pixels), "version": PIXELS_VERSION},
            "format": dataclasses.asdict(self.format),
            "compute_dtype": str(self.encoder_dtype),
            "device": self.device.type,
            **({"precision": "int8"} if self.precision == "int8" else {}),
        }

    def relative_error(self, pixels: Tensor) -> float:
        """The distance of the features of uint8 pixels (U, 3, H, W) from fp32's, relative to
        their norm."""
        error = norm = torch.zeros((), dtype=torch.float64, device=self.device)
        for image in pixels.to(self.device).split(1):
            exact = encode_pixels(self.model, image, self.pixels).double()
            error = error + (self._features(image) - exact).square().sum()
            norm = norm + exact.square().sum()
        return float((error / norm).sqrt())

    def _features(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.encoder_dtype):
            features = encode_pixels(self.converted, pixels, self.pixels)
        self._shape = features.shape[1:]
        return features

    def _blank_batch(self) -> Tensor:
        shape = self.batch_size, 3, *self.pixels.size
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)


def encoder_batch_size(device: torch.device, num_tokens: int) -> int:
    """Images per encoder batch.

    A CPU reaches its full rate with about 500 image tokens: one image of BLIP, two of ViT+GPT2
    (benchmarks/LOG.md).
    """
    return 64 if device.type == "cuda" else min(max(512 // num_tokens, 1), 4)


def _describe_model(model: CaptioningModel) -> dict[str, Any]:
    """Everything about a model that its features depend on: weights, and settings."""
    parts = {name: part for name, part in model.named_children() if part is not model.decoder}
    is_compiled = any(layer._compiled_call_impl is not None for layer in model.encoder.layers)
    return {
        "weights": fingerprint(torch.nn.ModuleDict(parts)),
        **model.encoder.describe(),
        "compiled": is_compiled,  # the last bits may differ
    }
