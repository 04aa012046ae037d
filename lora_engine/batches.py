"""Rows -> batches: deterministic order, similar lengths together, loading in worker processes.

The order is a function of (seed, epoch) alone, and an unreadable image's substitute one of (seed,
epoch, position), so that nothing about workers or prefetching has to be remembered.

Axes: B batch, T caption tokens, M valid targets of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_engine.captions import IGNORED, TokenizedCaptions, collate_captions
from lora_engine.images import ImageError, PixelSettings, open_image, to_pixels

MAX_SUBSTITUTES = 20

_WINDOW = 64  # batches sorted by length together: little padding, and an order still random


class Place(NamedTuple):
    """Which row stands at which position of which epoch's order."""

    epoch: int
    position: int
    row: int


class Skipped(NamedTuple):
    """A row whose image cannot be used."""

    row: int
    image: str
    reason: str


class Example(NamedTuple):
    """One row, loaded: pixels uint8 (3, H, W) and token ids; None where no image could be read."""

    row: int
    pixels: np.ndarray | None
    token_ids: np.ndarray
    skipped: tuple[Skipped, ...]


class Batch(NamedTuple):
    """Rows ready for the model; on the CPU until `to`.

    `pixels` uint8 (B, 3, H, W); `input_ids` (B, T). The targets are kept flat, M of them:
    `target_ids` and their `target_positions` in the flattened (B * T) positions. `rows` are the
    B row numbers; `skipped` the rows that could not be loaded.
    """

    pixels: Tensor
    input_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    rows: list[int]
    skipped: list[Skipped]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory the copies do not block."""
        return self._replace(**{
            name: getattr(self, name).to(device, non_blocking=True) for name in self._fields[:4]
        })


def epoch_batches(
    lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """One epoch's batches as arrays of row numbers: every row once, a function of (seed, epoch).

    The epoch's permutation is cut into windows of 64 batches, each sorted by caption length and
    cut into batches, and the batches are shuffled: as many steps as without sorting. At most one
    batch is shorter than `batch_size`.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    for begin in range(0, len(order), _WINDOW * batch_size):
        window = order[begin : begin + _WINDOW * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def training_places(
    lengths: np.ndarray, *, batch_size: int, seed: int, num_epochs: int
) -> Iterator[list[Place]]:
    """All batches of a run, one epoch after the other."""
    for epoch in range(num_epochs):
        position = 0
        for rows in epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch):
            yield [Place(epoch, position + i, int(row)) for i, row in enumerate(rows)]
            position += len(rows)


def validation_places(lengths: np.ndarray, *, batch_size: int) -> list[list[Place]]:
    """Every row once, longest captions first: too large a batch fails at once, not at the end."""
    order = np.argsort(-lengths, kind="stable")
    return [
        [Place(0, begin + i, int(row)) for i, row in enumerate(order[begin : begin + batch_size])]
        for begin in range(0, len(order), batch_size)
    ]


class CaptionedImages(Dataset):
    """Rows of captions and image paths, loaded by their `Place`.

    With `substitute`, a row whose image cannot be used is replaced by another one, drawn from
    (seed, epoch, position); otherwise its batch is shorter.
    """

    def __init__(
        self,
        images: Sequence[str],
        captions: TokenizedCaptions,
        pixels: PixelSettings,
        *,
        seed: int,
        substitute: bool,
    ) -> None:
        self.images = images
        self.captions = captions
        self.pixels = pixels
        self.seed = seed
        self.substitute = substitute

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> Example:
        generator = np.random.default_rng([self.seed, place.epoch, place.position])
        row = place.row
        skipped: list[Skipped] = []
        for _ in range(MAX_SUBSTITUTES + 1):
            try:
                pixels = to_pixels(open_image(self.images[row]), self.pixels)
                return Example(row, pixels, self.captions[row], tuple(skipped))
            except ImageError as error:
                skipped.append(Skipped(row, self.images[row], error.reason))
            if not self.substitute:
                break
            row = int(generator.integers(len(self.images)))
        return Example(row, None, self.captions[row], tuple(skipped))


class Collate:
    """Examples -> Batch, without rows where none could be loaded; runs in the workers."""

    def __init__(self, *, prompt_length: int, pad_id: int) -> None:
        self.prompt_length = prompt_length
        self.pad_id = pad_id

    def __call__(self, examples: list[Example]) -> Batch:
        skipped = [problem for example in examples for problem in example.skipped]
        loaded = [example for example in examples if example.pixels is not None]
        pixels = [example.pixels for example in examples if example.pixels is not None]
        if not loaded:
            empty = torch.empty(0, dtype=torch.long)
            return Batch(empty, empty, empty, empty, [], skipped)
        input_ids, targets = collate_captions(
            [example.token_ids for example in loaded],
            prompt_length=self.prompt_length,
            pad_id=self.pad_id,
        )
        targets = targets.flatten()
        positions = (targets != IGNORED).nonzero().flatten()
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)),
            input_ids=input_ids,
            target_positions=positions,
            target_ids=targets[positions],
            rows=[example.row for example in loaded],
            skipped=skipped,
        )


def load_batches(
    dataset: CaptionedImages,
    places: Iterator[list[Place]] | list[list[Place]],
    *,
    collate: Collate,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Load batches in the order of `places`, ahead of their use where there are workers.

    Pinned memory lets the copy to a GPU run beside the computation.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Once(places),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)


class _Once:
    """A batch sampler over an iterator; DataLoader asks for it once."""

    def __init__(self, places: Iterator[list[Place]] | list[list[Place]]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.places)
