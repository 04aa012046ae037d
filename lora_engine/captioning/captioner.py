"""Images -> captions, by one captioner or by several that share an encoder."""

import copy
import dataclasses
import sys
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from itertools import islice, product, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.captioning.generation import generate_tokens
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.data.batches import (
    CaptionedImages,
    Collate,
    FeatureBatch,
    SampleIndex,
    in_batches,
)
from lora_engine.data.image_table import ImageTable
from lora_engine.devices import autocast
from lora_engine.features.loader import FeatureLoader
from lora_engine.features.source import FeatureSource
from lora_engine.lora.adapter import Adapter, load_adapter
from lora_engine.lora.injection import merge
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import OneProcess, Ranks, collect, dealt

# Batches of each process between two exchanges. More would wait less for the slowest process; fewer
# would write results earlier.
_NUM_AT_ONCE = 4


class Caption(NamedTuple):
    """A caption; `ended` is false if it was cut at the length limit, before an end token."""

    text: str
    ended: bool


class Captioned(NamedTuple):
    """The result for one image: captions by each captioner, or the reason why there are none."""

    image: str
    captions: tuple[Caption, ...] = ()
    reason: str | None = None


def with_adapter(
    captioner: Captioner, adapter: Adapter, *, prompt: str | None = None
) -> Captioner:
    """A captioner with the adapter merged into its own copy of the weights; others are shared.

    It continues the adapter's prompt unless another one is given. Raises AdapterError if the
    adapter does not fit.
    """
    model = captioner.model
    shared: dict[int, Any] = {id(model.encoder): model.encoder}
    shared |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    load_adapter(model, adapter)
    merge(model)
    return dataclasses.replace(
        captioner, model=model, prompt=adapter.prompt if prompt is None else prompt
    )


@torch.no_grad()
def caption_features(
    captioner: Captioner,
    features: Tensor,
    settings: GenerationSettings = GenerationSettings(),
    *,
    numbers: Sequence[int] | None = None,
) -> list[Caption]:
    """Caption images by their features (B, P, D); the captions do not include the prompt.

    There are `num_return_sequences` of each image, one after the other. `numbers` are the images'
    numbers for sampling.
    """
    model, tokenizer = captioner.model, captioner.tokenizer
    was_training = model.training
    model.eval()
    prompt_ids = tokenizer.prompt_ids(captioner.prompt)
    # The key/value cache has a new shape at every token. Compiled layers would be recompiled for
    # each, up to torch's limit, beyond which the training step would run uncompiled, too.
    # What compiles takes a second to import; where it was not, no layer is compiled.
    may_be_compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if may_be_compiled else nullcontext()
    with autocast(features.device, features.dtype), eager:
        tokens = generate_tokens(
            model,
            features,
            settings,
            prompt_ids=prompt_ids,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            numbers=numbers,
        )
    model.train(was_training)
    new_tokens = tokens[:, len(prompt_ids) :].tolist()
    return [Caption(tokenizer.decode(row), tokenizer.end_id in row) for row in new_tokens]


def caption_images(
    captioners: Sequence[Captioner],
    images: ImageTable,
    *,
    features: FeatureSource,
    settings: Sequence[GenerationSettings] = (GenerationSettings(),),
    batch_size: int = 16,
    num_workers: int = 0,
    timeout_s: float = 0,
    numbers: Sequence[int] | None = None,
    ranks: Ranks = OneProcess(),
) -> Generator[Captioned]:
    """Caption images, in order; one that cannot be read yields the reason.

    With each of `settings`, each captioner makes `num_return_sequences` captions, in this order.
    Batches are split across `ranks`; each process yields the results of all. The captioners share
    the encoder of `features`. `num_workers` and `timeout_s` are described in `workers.load`.
    `numbers` are the images' numbers for sampling, by default their positions in `images`.
    """
    numbers = range(len(images)) if numbers is None else numbers
    order = in_batches(range(len(images)), batch_size)
    loader = _image_loader(
        captioners[0],
        images,
        features,
        dealt(order, ranks),
        num_workers=num_workers,
        timeout_s=timeout_s,
        batch_bytes=batch_size * captioners[0].pixels.num_bytes,
    )
    num_at_once = _NUM_AT_ONCE if ranks.size > 1 else 1
    with closing(iter(loader)) as batches:
        for _ in range(0, len(order), ranks.size * num_at_once):
            mine = [
                _caption_batch(captioners, batch, settings, numbers)
                for batch in islice(batches, num_at_once)
            ]
            for results in collect(mine, ranks):
                for row, captions, reason in results:
                    yield Captioned(
                        images[row], tuple(Caption(*caption) for caption in captions), reason
                    )


_Result = tuple[int, Sequence[Caption], str | None]  # of a row


def _caption_batch(
    captioners: Sequence[Captioner],
    batch: FeatureBatch,
    settings: Sequence[GenerationSettings],
    numbers: Sequence[int],
) -> list[_Result]:
    """What `Captioned` says of each row of a batch, in the order of rows."""
    results: list[_Result] = [(bad.row, (), bad.reason) for bad in batch.skipped]
    if batch.rows:
        numbers = [numbers[row] for row in batch.rows]
        captions: list[list[Caption]] = [[] for _ in batch.rows]
        for setting, captioner in product(settings, captioners):
            found = caption_features(captioner, batch.features, setting, numbers=numbers)
            num_each = setting.num_return_sequences
            for number, of_image in enumerate(captions):
                of_image += found[number * num_each : (number + 1) * num_each]
        results += [(row, of_image, None) for row, of_image in zip(batch.rows, captions)]
    return sorted(results)


def _image_loader(
    captioner: Captioner,
    images: ImageTable,
    features: FeatureSource,
    order: Sequence[list[SampleIndex]],
    **loading,
) -> FeatureLoader:
    """Loads images as training does: each is a row whose caption is empty."""
    tokenizer, pixels = captioner.tokenizer, captioner.pixels
    dataset = CaptionedImages(
        images,
        np.arange(len(images)),
        tokenizer.encode(repeat("", len(images)), max_caption_tokens=0),
        pixels,
        seed=0,
        substitute=False,
    )
    return FeatureLoader(
        dataset,
        order,
        features=features,
        collate=Collate(
            image_size=pixels.size,
            prompt_length=len(tokenizer.prompt_ids()),
            pad_id=tokenizer.pad_id,
        ),
        **loading,
    )
