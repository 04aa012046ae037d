"""Images -> captions, with a loaded captioner and any adapters beside each other."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_engine.captioning.generation import generate
from lora_engine.data.images import ImageError
from lora_engine.data.pixels import PixelSettings, load_pixels
from lora_engine.data.workers import load
from lora_engine.devices import autocast
from lora_engine.features.source import encode_pixels
from lora_engine.lora.adapter import Adapter, load_adapter
from lora_engine.lora.injection import merge
from lora_engine.models.pretrained import Captioner


class Caption(NamedTuple):
    """A caption, and whether it ended by itself: with the end token, not for want of room."""

    text: str
    ended: bool


class Captioned(NamedTuple):
    """One image's outcome: a caption by each speaker, or the reason why there is none."""

    image: str
    captions: tuple[Caption, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Speaker:
    """Who captions: a base model, alone or with one adapter, and the prompt that it continues."""

    captioner: Captioner
    prompt: str = ""


def with_adapter(captioner: Captioner, adapter: Adapter) -> Captioner:
    """The captioner with an adapter folded into weights of its own; all others are shared.

    Raises AdapterError if it does not fit.
    """
    model = captioner.model
    shared: dict[int, Any] = {id(model.encoder): model.encoder}
    shared |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    load_adapter(model, adapter)
    merge(model)
    return dataclasses.replace(captioner, model=model)


@torch.no_grad()
def caption_features(
    captioner: Captioner,
    features: Tensor,
    *,
    prompt: str = "",
    **settings,
) -> list[Caption]:
    """Caption images by their features (B, P, D), without their prompt.

    `settings` are those of `generation.generate`: beams, lengths, sampling.
    """
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
            **settings,
        )
    model.train(was_training)
    new_tokens = tokens[:, len(prompt_ids) :].tolist()
    return [Caption(tokenizer.decode(row), tokenizer.end_id in row) for row in new_tokens]


def caption_pixels(
    speakers: Sequence[Speaker],
    pixels: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **settings,
) -> list[tuple[Caption, ...]]:
    """Each speaker's captions of uint8 pixels (B, 3, H, W), made by `images.load_pixels`.

    The speakers share an encoder, which runs once. `settings` are those of `generation.generate`.
    """
    first = speakers[0].captioner
    with autocast(device, dtype):
        features = encode_pixels(first.model, pixels.to(device, non_blocking=True), first.pixels)
    features = features.to(dtype)
    return list(zip(*(
        caption_features(speaker.captioner, features, prompt=speaker.prompt, **settings)
        for speaker in speakers
    )))


def caption_images(
    speakers: Sequence[Speaker],
    images: Sequence[str | Path],
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    timeout_s: float = 0,
    numbers: Sequence[int] | None = None,
    **settings,
) -> Iterator[Captioned]:
    """Caption image files in batches, in order; one that cannot be read yields its reason.

    `num_workers` and `timeout_s` are those of `workers.load`. `numbers` are the images' numbers for
    sampling, by default their places among `images`. `settings` are those of `caption_pixels`.
    """
    numbers = range(len(images)) if numbers is None else numbers
    files = _ImageFiles(list(map(str, images)), speakers[0].captioner.pixels)
    batches = load(
        files, batch_size=batch_size, collate_fn=list, num_workers=num_workers, timeout_s=timeout_s
    )
    for batch in batches:
        usable = [(place, pixels) for place, pixels, _ in batch if pixels is not None]
        captions: Iterator[tuple[Caption, ...]] = iter(())
        if usable:
            captions = iter(caption_pixels(
                speakers,
                torch.from_numpy(np.stack([pixels for _, pixels in usable])),
                numbers=[numbers[place] for place, _ in usable],
                **settings,
            ))
        for place, pixels, reason in batch:
            yield Captioned(str(images[place]), () if pixels is None else next(captions), reason)


class _ImageFiles(Dataset):
    """(place, pixels uint8 (3, H, W), None) of an image, or (place, None, reason)."""

    def __init__(self, paths: Sequence[str], settings: PixelSettings) -> None:
        self.paths = paths
        self.settings = settings

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | None, str | None]:
        try:
            return place, load_pixels(self.paths[place], self.settings), None
        except ImageError as error:
            return place, None, error.reason
