"""What the decoder looked at for each word of a caption: its cross-attention, drawn on the image.

Attention shows where information was read, which need not be the cause of a word (Jain and Wallace,
arXiv:1902.10186).

Axes: N rows, T caption tokens, P image tokens, L layers, H heads.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lora_engine.data.captions import CaptionTokenizer
from lora_engine.data.pixels import PixelSettings, resized
from lora_engine.devices import autocast
from lora_engine.models import CaptioningModel
from lora_engine.models.attention import KeyValueCache
from lora_engine.models.pretrained import Captioner
from lora_engine.models.protocol import Encoder

_COLOR = "orangered"
_OPACITY = 0.75  # of the color where attention is strongest


@torch.no_grad()
def cross_attention_probs(model: CaptioningModel, input_ids: Tensor, features: Tensor) -> Tensor:
    """Token ids (N, T), features (B, P, D) -> cross-attention probabilities (L, N, H, T, P), fp32.

    One pass of the decoder over all tokens; the model should be in evaluation mode. Raises
    ValueError for a decoder that does not use `models/cross_attention.py`.
    """
    cache = KeyValueCache(input_ids.shape[1], record=True)
    with autocast(features.device, features.dtype):
        model.decode(input_ids, features, cache)
    probs = [layer.cross_attention_probs for layer in cache.layers.values()]
    recorded = [layer for layer in probs if layer is not None]
    if not recorded:
        raise ValueError(f"{type(model.decoder).__name__} does not record its cross-attention")
    return torch.stack(recorded)


class WordAttention(NamedTuple):
    """The words of a caption, and for each its cross-attention probabilities (L, H, P)."""

    words: list[str]
    probs: list[Tensor]


def word_attention(captioner: Captioner, features: Tensor, caption: str) -> WordAttention:
    """What a captioner looks at for each word of a caption of the image of `features` (1, P, D).

    The caption, which need not be its own, is tokenized as in training. The attention of a word is
    the mean over its tokens; that of a token is read where the token is predicted, at the one
    before it.
    """
    tokenizer = captioner.tokenizer
    num_prompt = len(tokenizer.prompt_ids(captioner.prompt))
    tokens = tokenizer.encode(
        [caption],
        prompt=captioner.prompt,
        max_caption_tokens=tokenizer.max_positions - num_prompt,
    )
    ids = torch.tensor(tokens[0].astype(np.int64), device=features.device)
    probs = cross_attention_probs(captioner.model, ids[None, :-1], features)[:, 0]  # (L, H, T, P)
    words, of_words = words_of_tokens(tokenizer, ids[num_prompt:].tolist())
    chosen_at = [[num_prompt - 1 + token for token in of_word] for of_word in of_words]
    return WordAttention(words, [probs[:, :, positions].mean(dim=2) for positions in chosen_at])


def words_of_tokens(
    tokenizer: CaptionTokenizer, ids: Sequence[int]
) -> tuple[list[str], list[list[int]]]:
    """The words of a caption, and the positions of the tokens of each.

    A token belongs to the words that it adds to the text before it, or else continues the last one,
    whatever the tokenizer's marks for the two.
    """
    texts = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    num_words = [len(text.split()) for text in texts]
    return texts[-1].split(), [
        [
            position for position, (before, now) in enumerate(pairwise(num_words))
            if min(before, now - 1) <= word < now and ids[position] != tokenizer.end_id
        ]
        for word in range(num_words[-1])
    ]


def on_patches(probs: Tensor, encoder: Encoder) -> Tensor:
    """Probabilities of image tokens (P,) -> those of the patches (rows, columns).

    The class tokens, which come first, have no place in the image. The patches are the smallest
    squares of which the encoder has enough tokens.
    """
    height, width = encoder.image_size
    rows, columns = next(
        (height // side, width // side) for side in range(1, min(height, width) + 1)
        if (height // side) * (width // side) <= len(probs)
    )
    return probs[len(probs) - rows * columns :].unflatten(0, (rows, columns))


def heat_map(image: Image.Image, patches: Tensor, settings: PixelSettings) -> Image.Image:
    """An RGB image in gray, with a color where the probabilities of `patches` are high.

    Gray is the lowest patch of this map, the full color the highest, whatever their values. What a
    crop leaves out stays gray.
    """
    height, width = settings.size
    levels = patches - patches.min()
    heat = Image.fromarray((levels / levels.max().clamp_min(1e-12)).cpu().numpy())
    heat = heat.resize((width, height), Image.Resampling.BICUBIC)
    whole_height, whole_width = resized(image, settings.resize)
    whole = Image.new("F", (whole_width, whole_height))
    whole.paste(heat, ((whole_width - width) // 2, (whole_height - height) // 2))
    whole = whole.resize(image.size, Image.Resampling.BILINEAR)
    opacity = whole.point(lambda level: level * (255 * _OPACITY)).convert("L")
    gray = ImageOps.grayscale(image).convert("RGB")
    return Image.composite(Image.new("RGB", image.size, _COLOR), gray, opacity)
