"""Features as rows of bytes: one fixed-size row per image, in fp32, bf16 or int8.

Axes: B images, P image tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CacheDtype = Literal["fp32", "bf16", "int8"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class FeatureFormat:
    """The layout of features (P, D) in a row: fp32, bf16, or int8 after one fp32 scale per channel.

    int8 is symmetric: a value is an integer in [-127, 127] times the scale of its image and
    channel, which is the largest magnitude there over 127. Rows are padded to a multiple of 16
    bytes, so that the numbers of every row are aligned.
    """

    num_tokens: int
    width: int
    dtype: CacheDtype

    @property
    def row_bytes(self) -> int:
        return -(-(self._scale_bytes + self._value_bytes) // 16) * 16

    @property
    def _scale_bytes(self) -> int:
        return 4 * self.width if self.dtype == "int8" else 0

    @property
    def _value_bytes(self) -> int:
        return self.num_tokens * self.width * _DTYPES[self.dtype].itemsize

    def pack(self, features: Tensor) -> Tensor:
        """Features (B, P, D) -> rows, uint8 (B, row_bytes)."""
        features = features.float()
        rows = torch.zeros(len(features), self.row_bytes, dtype=torch.uint8, device=features.device)
        if self.dtype == "int8":
            scales = features.abs().amax(dim=1) / 127  # (B, D)
            features = (features / scales.clamp_min(1e-30)[:, None]).round()
            rows[:, : self._scale_bytes].view(torch.float32).copy_(scales)
        values = rows[:, self._scale_bytes : self._scale_bytes + self._value_bytes]
        values.view(_DTYPES[self.dtype]).copy_(features.flatten(1))
        return rows

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows, uint8 (B, row_bytes) -> features (B, P, D) in `dtype`."""
        values = rows[:, self._scale_bytes : self._scale_bytes + self._value_bytes]
        features = values.view(_DTYPES[self.dtype]).unflatten(1, (self.num_tokens, self.width))
        if self.dtype == "int8":
            scales = rows[:, : self._scale_bytes].view(torch.float32)
            features = features * scales[:, None]
        return features.to(dtype)
