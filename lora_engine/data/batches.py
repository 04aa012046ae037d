"""Rows -> batches: deterministic order, similar lengths together, loaded by worker processes.

The order is a function of (seed, epoch) alone, and an unreadable image's substitute one of (seed,
epoch, position), so that no state of workers or prefetching has to be saved.

Axes: B batch, T caption tokens, M targets of the batch (IGNORED ones pad them), U images
loaded for it, H height, W width, P image tokens, D width of the features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lora_engine.data.captions import IGNORED, TokenizedCaptions, collate_captions
from lora_engine.data.image_identity import FileStamp, content_digest
from lora_engine.data.image_table import ImageTable
from lora_engine.data.images import ImageError
from lora_engine.data.pixels import PixelSettings, load_pixels
from lora_engine.data.read_order import BLOCKS_PER_GROUP, read_ahead
from lora_engine.data.seen_images import ImageList
from lora_engine.data.workers import load

MAX_SUBSTITUTES = 20

_WINDOW = 64  # batches sorted by length together: little padding, and an order still random


class SampleIndex(NamedTuple):
    """The row at a position of an epoch's order, and whether its image must be read."""

    epoch: int
    position: int
    row: int
    needs_pixels: bool = True


class Skipped(NamedTuple):
    """A row whose image cannot be used."""

    row: int
    image: str
    reason: str


class Identified(NamedTuple):
    """An image that was read: number, digest, and the stamp of its file (None: not reliable)."""

    image: int
    file: FileStamp | None
    digest: bytes


class Example(NamedTuple):
    """One loaded row: token ids, and pixels uint8 (3, H, W) if they are needed.

    `is_usable` is False if no image could be read.
    """

    row: int
    image: int
    token_ids: np.ndarray
    is_usable: bool = True
    pixels: np.ndarray | None = None
    identified: Identified | None = None
    skipped: tuple[Skipped, ...] = ()


class PixelBatch(NamedTuple):
    """Rows on the CPU, with the pixels of those images whose features are not kept.

    `input_ids` (B, T). The targets are kept flat, M of them: `target_ids` and their
    `target_positions` in the flattened (B * T) positions; `num_targets` of them are not IGNORED.
    `rows` are the B row numbers, `images` their images' numbers; `skipped` the rows that could not
    be loaded. `pixels` uint8 (U, 3, H, W) are those of the images in `loaded`.
    """

    input_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    num_targets: int
    rows: list[int]
    images: list[int]
    skipped: list[Skipped]
    pixels: Tensor
    loaded: list[Identified]

    def with_features(self, features: Tensor) -> "FeatureBatch":
        """The same rows, with the features (B, P, D) of their images."""
        shared = {
            name: getattr(self, name) for name in FeatureBatch._fields if name != "features"
        }
        return FeatureBatch(**shared, features=features)


class FeatureBatch(NamedTuple):
    """Rows with the features (B, P, D) of their images; else as in `PixelBatch`."""

    input_ids: Tensor
    target_positions: Tensor
    target_ids: Tensor
    num_targets: int
    rows: list[int]
    images: list[int]
    skipped: list[Skipped]
    features: Tensor

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """(input_ids, target_positions, target_ids, features) on a device, as the loss takes them.

        From pinned memory the copies do not block.
        """
        tensors = self.input_ids, self.target_positions, self.target_ids, self.features
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def epoch_batches(
    lengths: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    block_ends: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """One epoch's batches as arrays of row numbers: every row once, a function of (seed, epoch).

    The epoch's permutation is cut into windows of 64 batches, each sorted by caption length and
    cut into batches, and the batches are shuffled: as many steps as without sorting. At most one
    batch is shorter than `batch_size`.

    With `block_ends` (read_order.py) the permutation is one of blocks, then of the rows within a
    few blocks, and batches are shuffled within their window, so that a disk reads each block once.
    """
    generator = np.random.default_rng([seed, epoch])
    if block_ends is not None:
        yield from _block_batches(lengths, batch_size, generator, block_ends)
        return
    order = np.arange(len(lengths), dtype=np.min_scalar_type(max(len(lengths) - 1, 0)))
    generator.shuffle(order)
    for begin in range(0, len(order), _WINDOW * batch_size):
        window = order[begin : begin + _WINDOW * batch_size]
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    num_batches = -(-len(order) // batch_size)
    for number in generator.permutation(num_batches).tolist():
        yield order[number * batch_size : (number + 1) * batch_size].astype(np.int64)


def _block_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator, block_ends: np.ndarray
) -> Iterator[np.ndarray]:
    rows = np.empty(0, dtype=np.int64)
    blocks = generator.permutation(len(block_ends))
    begins = np.concatenate([[0], block_ends[:-1]])
    for first in range(0, len(blocks), BLOCKS_PER_GROUP):
        group = [
            np.arange(begins[block], block_ends[block])
            for block in blocks[first : first + BLOCKS_PER_GROUP]
        ]
        rows = np.concatenate([rows, generator.permutation(np.concatenate(group))])
        is_last = first + BLOCKS_PER_GROUP >= len(blocks)
        while len(rows) >= _WINDOW * batch_size or is_last and len(rows):
            window, rows = rows[: _WINDOW * batch_size], rows[_WINDOW * batch_size :]
            window = window[np.argsort(lengths[window], kind="stable")]
            for number in generator.permutation(-(-len(window) // batch_size)).tolist():
                yield window[number * batch_size : (number + 1) * batch_size]


class StepRows(NamedTuple):
    """The rows of an optimizer step, in its micro-batches; some of the last ones may be empty."""

    micro_batches: list[list[SampleIndex]]

    @property
    def rows(self) -> list[int]:
        return [index.row for batch in self.micro_batches for index in batch]


def training_steps(
    lengths: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
    grad_accum_steps: int = 1,
    micro_batches: int | None = 1,
    first_epoch: int = 0,
    num_done: int = 0,
    block_ends: np.ndarray | None = None,
) -> Iterator[StepRows]:
    """All steps of a run, epoch after epoch, without the first `num_done` of the first epoch.

    A step has `batch_size` x `grad_accum_steps` rows. Sorted by length, they are dealt to
    `micro_batches` like cards, so that these are equally heavy: row i to micro-batch i modulo their
    number. With None a step is, as in earlier versions, `grad_accum_steps` batches of
    `batch_size` rows, each of rows of similar length.
    """
    num_batches = grad_accum_steps if micro_batches is None else 1  # of `epoch_batches`, per step
    for epoch in range(first_epoch, num_epochs):
        batches = epoch_batches(
            lengths,
            batch_size=batch_size * grad_accum_steps // num_batches,
            seed=seed,
            epoch=epoch,
            block_ends=block_ends,
        )
        position = sum(map(len, islice(batches, num_done * num_batches)))
        while step := list(islice(batches, num_batches)):
            parts = []
            for rows in step:
                parts.append([
                    SampleIndex(epoch, position + i, row) for i, row in enumerate(rows.tolist())
                ])
                position += len(rows)
            if micro_batches is not None:
                parts = [parts[0][m::micro_batches] for m in range(micro_batches)]
            yield StepRows(parts + [[]] * (num_batches - len(step)))
        num_done = 0


def validation_order(lengths: np.ndarray, *, batch_size: int) -> list[list[SampleIndex]]:
    """Every row once, longest captions first: a batch that is too large fails at once."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    return in_batches(order.tolist(), batch_size)


def in_batches(rows: Iterable[int], batch_size: int) -> list[list[SampleIndex]]:
    """Cut rows into batches, in this order."""
    indices = [SampleIndex(0, position, row) for position, row in enumerate(rows)]
    return [indices[begin : begin + batch_size] for begin in range(0, len(indices), batch_size)]


class CaptionedImages(Dataset):
    """Rows of captions and images, loaded by their `SampleIndex`.

    `image_of_row` (N,) are the numbers of their images in `images`; `digests` V16 (images,) are the
    known digests, zeros for the others. With `substitute`, a row whose image cannot be
    used is replaced by another one, drawn from (seed, epoch, position); otherwise its batch is
    shorter. `block_ends` are those of a set that is read in blocks (read_order.py).
    """

    def __init__(
        self,
        images: ImageTable,
        image_of_row: np.ndarray,
        captions: TokenizedCaptions,
        pixels: PixelSettings,
        *,
        seed: int,
        substitute: bool,
        digests: np.ndarray | None = None,
        block_ends: np.ndarray | None = None,
    ) -> None:
        self.image_of_row = image_of_row
        self.block_ends = block_ends
        self.images = ImageList(images, digests)
        self.captions = captions
        self.pixels = pixels
        self.seed = seed
        self.substitute = substitute

    def __len__(self) -> int:
        return len(self.image_of_row)

    @property
    def image_paths(self) -> Sequence[str]:
        return self.images.table

    def paths_of(self, rows: Sequence[int]) -> list[str]:
        """The images of some rows."""
        return [self.image_paths[int(image)] for image in self.image_of_row[rows]]

    def __getitem__(self, index: SampleIndex) -> Example:
        row = index.row
        if not index.needs_pixels:
            return Example(row, int(self.image_of_row[row]), self.captions[row])
        generator = np.random.default_rng([self.seed, index.epoch, index.position])
        skipped: list[Skipped] = []
        for _ in range(MAX_SUBSTITUTES + 1):
            image = int(self.image_of_row[row])
            try:
                pixels, file, digest = read_image(self.images.table, image, self.pixels)
                return Example(
                    row, image, self.captions[row], True, pixels, Identified(image, file, digest),
                    tuple(skipped),
                )
            except ImageError as error:
                skipped.append(Skipped(row, self.image_paths[image], error.reason))
            if not self.substitute:
                break
            row = int(generator.integers(len(self)))
        return Example(row, image, self.captions[row], is_usable=False, skipped=tuple(skipped))


def read_image(
    images: ImageTable, image: int, settings: PixelSettings
) -> tuple[np.ndarray, FileStamp | None, bytes]:
    """An image's pixels uint8 (3, H, W), its file's stamp, and its digest; raises ImageError."""
    file = images.stamp(image)
    data = images.read(image)
    if images.stamp(image) != file:  # it changed meanwhile: what was read is good, the stamp is not
        file = None
    try:
        return load_pixels(data, settings), file, content_digest(data)
    except ImageError as error:
        raise ImageError(images[image], error.reason) from error


class Collate:
    """Examples -> PixelBatch, without rows whose image could not be read; runs in the workers.

    With `longest_bucket`, captions are padded to the next of a few lengths up to that one, and
    targets (with IGNORED) to the next of eight numbers per length, so that full batches have few
    shapes.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        prompt_length: int,
        pad_id: int,
        longest_bucket: int | None = None,
    ) -> None:
        self.image_size = image_size
        self.longest_bucket = longest_bucket
        self.prompt_length = prompt_length
        self.pad_id = pad_id

    def __call__(self, examples: list[Example]) -> PixelBatch:
        usable = [example for example in examples if example.is_usable]
        input_ids, targets = collate_captions(
            [example.token_ids for example in usable],
            prompt_length=self.prompt_length,
            pad_id=self.pad_id,
        )
        if self.longest_bucket is not None:
            num_more = min(bucket_length(input_ids.shape[1]), self.longest_bucket)
            num_more -= input_ids.shape[1]
            input_ids = F.pad(input_ids, (0, num_more), value=self.pad_id)
            targets = F.pad(targets, (0, num_more), value=IGNORED)
        targets = targets.flatten()
        positions = (targets != IGNORED).nonzero().flatten()
        num_targets = len(positions)
        target_ids = targets[positions]
        if self.longest_bucket is not None:
            positions, target_ids = pad_targets(
                positions, target_ids, bucket_targets(num_targets, targets.numel())
            )
        pixels = [torch.from_numpy(e.pixels) for e in usable if e.pixels is not None]
        empty = torch.empty((0, 3, *self.image_size), dtype=torch.uint8)
        return PixelBatch(
            input_ids=input_ids,
            target_positions=positions,
            target_ids=target_ids,
            num_targets=num_targets,
            rows=[example.row for example in usable],
            images=[example.image for example in usable],
            skipped=[problem for example in examples for problem in example.skipped],
            # Moves them to shared memory at once: if none is left, that fails here, and not in a
            # background thread whose errors are lost.
            pixels=default_collate(pixels) if pixels else empty,
            loaded=[e.identified for e in usable if e.identified is not None],
        )


def bucket_length(num_tokens: int) -> int:
    """The next of 4, 8, ..., 32, 48, 64, 96, 128, ... tokens."""
    step = 4 if num_tokens <= 32 else 16 if num_tokens <= 64 else 32
    return -(-num_tokens // step) * step


def bucket_targets(num_targets: int, num_positions: int) -> int:
    """The next of eight numbers of targets in that many positions."""
    step = max(num_positions // 8, 1)
    return -(-num_targets // step) * step


def pad_targets(positions: Tensor, ids: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """Positions and ids (M,) -> (num_targets,) each, of which the last ones are IGNORED."""
    num_more = num_targets - len(ids)
    return F.pad(positions, (0, num_more)), F.pad(ids, (0, num_more), value=IGNORED)


def load_batches(
    dataset: CaptionedImages,
    order: Iterable[list[SampleIndex]],
    *,
    collate: Collate,
    num_workers: int,
    has_features: Callable[[int], bool] = lambda image: False,
    pin_memory: bool = False,
    timeout_s: float = 0,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    batch_bytes: int = 0,
) -> Iterator[PixelBatch]:
    """Load batches in this order, ahead of their use if there are workers.

    An image is not read if `has_features` is true for its number when its turn comes. Pinned memory
    lets copies to a GPU overlap with computation. `timeout_s`, `waiting` and `batch_bytes` are
    as in `workers.load`.
    """
    def needs_pixels(index: SampleIndex) -> bool:
        return not has_features(int(dataset.image_of_row[index.row]))

    if dataset.block_ends is not None:
        order = read_ahead(
            order,
            dataset.images.table,
            block_ends=dataset.block_ends,
            image_of_row=dataset.image_of_row,
            rows_to_read=lambda batch: [index.row for index in batch if needs_pixels(index)],
        )
    requests = (
        [index._replace(needs_pixels=needs_pixels(index)) for index in batch] for batch in order
    )
    return load(
        dataset,
        batch_sampler=_Once(requests),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout_s=timeout_s,
        waiting=waiting,
        batch_bytes=batch_bytes,
    )


class _Once:
    """A batch sampler over an iterator; DataLoader asks for it once, in this process."""

    def __init__(self, batches: Iterator[list[SampleIndex]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        return self.batches
