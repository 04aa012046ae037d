"""Features of the frozen encoder: the same for an image in every epoch.

Axes: B batch, H height, W width, P image tokens, D width.
"""

import torch
from torch import Tensor

from lora_engine.images import PixelSettings, normalize
from lora_engine.models import CaptionerBody


@torch.no_grad()
def encode_pixels(model: CaptionerBody, pixels: Tensor, settings: PixelSettings) -> Tensor:
    """uint8 pixels (B, 3, H, W) -> features (B, P, D); they become floats on their device."""
    return model.encode(normalize(pixels, settings))
