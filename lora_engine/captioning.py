"""Images -> captions, with a loaded captioner."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.devices import autocast
from lora_engine.features import encode_pixels
from lora_engine.generation import generate
from lora_engine.images import ImageError, load_pixels
from lora_engine.pretrained import Captioner


class Captioned(NamedTuple):
    """One image's outcome: a caption, or the reason why there is none."""

    image: str
    caption: str | None
    reason: str | None = None


@torch.no_grad()
def caption_features(
    captioner: Captioner,
    features: Tensor,
    *,
    prompt: str = "",
    num_beams: int = 1,
    max_new_tokens: int = 30,
) -> list[str]:
    """Caption images by their features (B, P, D), without their prompt."""
    model, tokenizer = captioner.model, captioner.tokenizer
    was_training = model.training
    model.eval()
    prompt_ids = tokenizer.prompt_ids(prompt)
    # A growing cache has another shape at every token: compiled layers would be compiled anew for
    # each, up to torch's limit, beyond which the training step, too, would run uncompiled.
    with autocast(features.device, features.dtype), torch.compiler.set_stance("force_eager"):
        tokens = generate(
            model,
            features,
            prompt_ids=prompt_ids,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
    model.train(was_training)
    return [tokenizer.decode(row) for row in tokens[:, len(prompt_ids) :].tolist()]


def caption_pixels(
    captioner: Captioner,
    pixels: np.ndarray,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **settings,
) -> list[str]:
    """Caption uint8 pixels (B, 3, H, W), made by `images.load_pixels`.

    `settings` are those of `caption_features`.
    """
    with autocast(device, dtype):
        features = encode_pixels(
            captioner.model, torch.from_numpy(pixels).to(device), captioner.pixels
        )
    return caption_features(captioner, features.to(dtype), **settings)


def caption_images(
    captioner: Captioner,
    images: Sequence[str | Path],
    *,
    batch_size: int = 16,
    **settings,
) -> Iterator[Captioned]:
    """Caption image files in batches, in order; one that cannot be read yields its reason.

    `settings` are those of `caption_pixels`.
    """
    for begin in range(0, len(images), batch_size):
        outcomes: list[np.ndarray | ImageError] = []
        for image in images[begin : begin + batch_size]:
            try:
                outcomes.append(load_pixels(image, captioner.pixels))
            except ImageError as error:
                outcomes.append(error)
        pixels = [outcome for outcome in outcomes if not isinstance(outcome, ImageError)]
        captions = iter(
            caption_pixels(captioner, np.stack(pixels), **settings) if pixels else []
        )
        for image, outcome in zip(images[begin : begin + batch_size], outcomes):
            if isinstance(outcome, ImageError):
                yield Captioned(str(image), None, outcome.reason)
            else:
                yield Captioned(str(image), next(captions))
