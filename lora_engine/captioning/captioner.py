"""Images -> captions, by one captioner or by several that share an encoder."""

import copy
import dataclasses
import sys
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.captioning.generation import generate
from lora_engine.captioning.merged_adapter import adapted_tensors, with_tensors
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
from lora_engine.lora.adapter import Adapter, beyond_lora, load_adapter
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
    """The result for one image: a caption by each captioner, or the reason why there is none."""

    image: str
    captions: tuple[Caption, ...] = ()
    reason: str | None = None


def with_adapter(
    captioner: Captioner, adapter: Adapter, *, prompt: str | None = None
) -> Captioner:
    """A captioner with the adapter merged into its own copy of the weights; others are shared.

    So is the encoder, unless the adapter changes it. The captioner continues the adapter's prompt
    unless another one is given. Raises AdapterError if the adapter does not fit.
    """
    model = captioner.model
    if beyond_lora(model, adapter):
        model = with_tensors(captioner, adapted_tensors(captioner, adapter))
    else:
        shared: dict[int, Any] = {id(model.encoder): model.encoder}
        shared |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
        load_adapter(model, adapter)
        merge(model)
    return dataclasses.replace(
        captioner, model=model, prompt=adapter.prompt if prompt is None else prompt
    )


def by_encoder(captioners: Sequence[Captioner]) -> list[list[int]]:
    """The numbers of the captioners, in groups that compute the same features."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, captioner in enumerate(captioners):
        model = captioner.model
        parts = (part for part in model.children() if part is not model.decoder)
        weights = tuple(id(weight) for part in parts for weight in part.parameters())
        groups.setdefault(weights, []).append(number)
    return list(groups.values())


@torch.no_grad()
def caption_features(captioner: Captioner, features: Tensor, **settings) -> list[Caption]:
    """Caption images by their features (B, P, D); the captions do not include the prompt.

    `settings` go to `generation.generate`: beams, lengths, sampling.
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


def caption_images(
    captioners: Sequence[Captioner],
    images: ImageTable,
    *,
    features: FeatureSource,
    batch_size: int = 16,
    num_workers: int = 0,
    timeout_s: float = 0,
    numbers: Sequence[int] | None = None,
    ranks: Ranks = OneProcess(),
    **settings,
) -> Generator[Captioned]:
    """Caption images, in order; one that cannot be read yields the reason.

    Batches are split across `ranks`; each process yields the results of all. The captioners share
    the encoder of `features`. `num_workers` and `timeout_s` are described in `workers.load`.
    `numbers` are the images' numbers for sampling, by default their positions in `images`.
    `settings` go to `generation.generate`.
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
                _caption_batch(captioners, batch, numbers, **settings)
                for batch in islice(batches, num_at_once)
            ]
            for results in collect(mine, ranks):
                for row, captions, reason in results:
                    yield Captioned(
                        images[row], tuple(Caption(*caption) for caption in captions), reason
                    )


def side_by_side(results: Sequence[Captioned], groups: Sequence[Sequence[int]]) -> Captioned:
    """One result of several groups of captioners (`by_encoder`) for the same image."""
    failed = [result for result in results if result.reason is not None]
    if failed:
        return failed[0]
    by_number = {
        number: caption
        for result, group in zip(results, groups)
        for number, caption in zip(group, result.captions)
    }
    captions = tuple(by_number[number] for number in sorted(by_number))
    return Captioned(results[0].image, captions)


_Result = tuple[int, Sequence[Caption], str | None]  # of a row


def _caption_batch(
    captioners: Sequence[Captioner], batch: FeatureBatch, numbers: Sequence[int], **settings
) -> list[_Result]:
    """What `Captioned` says of each row of a batch, in the order of rows."""
    results: list[_Result] = [(bad.row, (), bad.reason) for bad in batch.skipped]
    if batch.rows:
        captions = zip(*(
            caption_features(
                captioner,
                batch.features,
                numbers=[numbers[row] for row in batch.rows],
                **settings,
            )
            for captioner in captioners
        ))
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
