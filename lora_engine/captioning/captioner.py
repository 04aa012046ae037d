"""Images -> captions, by one captioner or by several that share an encoder."""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from itertools import islice, product, repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
from lora_engine.data.captions import IGNORED, collate_captions
from lora_engine.data.image_table import ImageTable
from lora_engine.devices import autocast
from lora_engine.features.loader import FeatureLoader
from lora_engine.features.source import FeatureSource
from lora_engine.models import CaptioningModel
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


def by_encoder(captioners: Sequence[Captioner]) -> list[list[int]]:
    """The numbers of the captioners, in groups that compute the same features."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, captioner in enumerate(captioners):
        model = captioner.model
        parts = (part for part in model.children() if part is not model.decoder)
        weights = tuple(id(weight) for part in parts for weight in part.parameters())
        groups.setdefault(weights, []).append(number)
    return list(groups.values())


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
    tokenizer = captioner.tokenizer
    return [
        Caption(tokenizer.decode(row), tokenizer.end_id in row)
        for row in caption_ids(captioner, features, settings, numbers=numbers)
    ]


def caption_ids(
    captioner: Captioner,
    features: Tensor,
    settings: GenerationSettings = GenerationSettings(),
    *,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """The tokens of the captions of `caption_features`, padded to the longest."""
    tokenizer = captioner.tokenizer
    prompt_ids = tokenizer.prompt_ids(captioner.prompt)
    with _inference(captioner.model, features):
        tokens = generate_tokens(
            captioner.model,
            features,
            settings,
            prompt_ids=prompt_ids,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            numbers=numbers,
        )
    return tokens[:, len(prompt_ids) :].tolist()


def mean_log_probabilities(
    captioner: Captioner, features: Tensor, captions: Sequence[Sequence[int]]
) -> list[float]:
    """How probable the model finds captions, in nats per token: minus the loss of each.

    `captions` are `caption_ids` for features (B, P, D). The end token counts, the prompt does not.
    However the tokens were chosen, the probabilities are the model's own, at temperature 1.
    """
    tokenizer, end = captioner.tokenizer, captioner.tokenizer.end_id
    prompt_ids = tokenizer.prompt_ids(captioner.prompt)
    rows = [
        np.array([*prompt_ids, *ids[: ids.index(end) + 1 if end in ids else None]])
        for ids in captions
    ]
    input_ids, targets = collate_captions(
        rows, prompt_length=len(prompt_ids), pad_id=tokenizer.pad_id
    )
    targets = targets.to(features.device)
    model = captioner.model
    with _inference(model, features):
        logits = model.head(model.decode(input_ids.to(features.device), features)).float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )  # (B, T)
    return (-losses.sum(dim=1) / (targets != IGNORED).sum(dim=1)).tolist()


@contextmanager
def _inference(model: CaptioningModel, features: Tensor) -> Iterator[None]:
    """Within the context a model, which may be in training, computes without dropout or gradients,
    in the dtype of `features`."""
    # The key/value cache has a new shape at every token. Compiled layers would be recompiled for
    # each, up to torch's limit, beyond which the training step would run uncompiled, too.
    # What compiles takes a second to import; where it was not, no layer is compiled.
    may_be_compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if may_be_compiled else nullcontext()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(features.device, features.dtype), eager:
            yield
    finally:
        model.train(was_training)


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


def side_by_side(
    results: Sequence[Captioned],
    groups: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
) -> Captioned:
    """One result of several groups of captioners (`by_encoder`) for the same image."""
    failed = [result for result in results if result.reason is not None]
    if failed:
        return failed[0]
    captions: list[Caption] = []
    remaining = [iter(result.captions) for result in results]
    for setting in settings:
        by_captioner = {
            number: list(islice(of_group, setting.num_return_sequences))
            for of_group, group in zip(remaining, groups) for number in group
        }
        for number in sorted(by_captioner):
            captions += by_captioner[number]
    return Captioned(results[0].image, tuple(captions))


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
