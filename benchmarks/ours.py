"""This engine as a contender, built from the parts of `lora_engine.training`.

Targets, rank, clipping and optimizer are those of the peers (peers.py). Two things differ: rows of
similar length share a batch, and features are kept, here in memory. Images are in memory, as for
the peers, and with a GPU a thread gathers the next batches in pinned memory. The cost of loading
files is in the wall-clock figure of throughput.py.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.measure import wait_for
from benchmarks.rows import Rows
from lora_engine.data.batches import (
    Collate,
    Example,
    FeatureBatch,
    Identified,
    PixelBatch,
    epoch_batches,
)
from lora_engine.data.image_table import ImageTable
from lora_engine.data.pixels import PixelSettings
from lora_engine.data.seen_images import ImageList
from lora_engine.features.precision import EncoderPrecision
from lora_engine.features.source import FeatureSource, open_features
from lora_engine.lora.injection import inject
from lora_engine.models.pretrained import Captioner, load_model
from lora_engine.training.setup import place_model
from lora_engine.training.trainer import Trainer

RANK, ALPHA = 8, 32
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0  # those of peers.py

T = TypeVar("T")
U = TypeVar("U")


class Ours:
    """The engine on rows in memory; a first or later epoch -> captions/s."""

    def __init__(
        self,
        folder: Path,
        rows: Rows,
        settings: PixelSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        lora_dropout: float = 0.0,
        lr: float = LEARNING_RATE,
        seed: int = 0,
        compile: bool = False,
        encoder: EncoderPrecision = "auto",
        num_ahead: int = 3,
        variant: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.rows = rows
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.lr = lr
        self.seed = seed
        self.encoder = encoder
        # On a CPU a thread would only take time from the training.
        self.num_ahead = num_ahead if device.type == "cuda" else 0
        model = load_model(folder)
        torch.manual_seed(seed)
        inject(
            model, ["attention", "feed_forward"],
            rank=RANK, alpha=ALPHA, dropout=lora_dropout, **variant,
        )
        self.model = place_model(
            model, device, dtype, compile=compile, encoder_precision=encoder
        )
        self.trainer = Trainer(
            self.model,
            device=device,
            dtype=dtype,
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            seed=seed,
        )
        self.num_steps = 0
        self.collate = Collate(
            image_size=settings.size,
            prompt_length=1,
            pad_id=0,
            longest_bucket=model.decoder.max_positions if device.type == "cuda" else None,
        )
        no_tokenizer: Any = None
        self.captioner = Captioner(self.model, no_tokenizer, settings, "", "", Path(), None, {})
        # An image's number takes the place of its file's digest.
        self.images = ImageList(ImageTable.of_files(
            f"image {number}" for number in range(len(rows.pixels))
        ))
        for number in range(len(rows.pixels)):
            self.images.record(number, None, _digest(number))
        self.source: FeatureSource | None = None

    def first_epoch(self, number: int) -> float:
        """Without kept features: each image is encoded with its first row."""
        self.source = self._empty_source()
        return self._epoch(number, self.source, self._with_pixels())

    def later_epoch(self, number: int) -> float:
        """With all features kept."""
        if self.source is None:
            self.encode()
        assert self.source is not None
        return self._epoch(number, self.source, self._batch)

    def encode(self) -> None:
        """Compute and keep all features."""
        self.source = self._empty_source()
        rows = np.arange(len(self.rows.captions))
        batches = map(self._with_pixels(), np.split(rows, rows[self.batch_size::self.batch_size]))
        for _ in self.source.attach(batches, self.images):
            pass

    def _epoch(
        self, number: int, source: FeatureSource, batch_of: Callable[[np.ndarray], PixelBatch]
    ) -> float:
        order = epoch_batches(
            self.rows.lengths, batch_size=self.batch_size, seed=self.seed, epoch=number
        )
        wait_for(self.device)
        begin_s = time.perf_counter()
        batches = _ahead(batch_of, order, num_ahead=self.num_ahead)
        for batch in source.attach(batches, self.images):
            self._step(batch)
        wait_for(self.device)
        return len(self.rows.captions) / (time.perf_counter() - begin_s)

    def _step(self, batch: FeatureBatch) -> None:
        """What `lora_engine.training.loop.train` does in a step; the one place to follow it."""
        self.num_steps += 1
        loss = self.trainer.accumulate([batch], self.num_steps)
        self.trainer.update(loss, lr=self.lr)

    def _empty_source(self) -> FeatureSource:
        self.source = None  # or both would be there for a moment
        return open_features(
            self.captioner,
            device=self.device,
            dtype=self.dtype,
            num_images=len(self.images.table),
            cache="memory",
            cache_dir=Path("nothing is kept on disk"),
            cache_dtype=None,
            cache_limit_bytes=0,
            encoder_precision=self.encoder,
        )

    def _with_pixels(self) -> Callable[[np.ndarray], PixelBatch]:
        """Batches of an epoch in which the first row of an image brings its pixels."""
        return partial(self._batch, seen=set())

    def _batch(self, indices: np.ndarray, seen: set[int] | None = None) -> PixelBatch:
        examples = []
        for row in indices.tolist():
            image = int(self.rows.image_of_row[row])
            example = Example(row, image, self.rows.captions[row])
            if seen is not None and image not in seen:
                seen.add(image)
                example = example._replace(
                    pixels=self.rows.pixels[image],
                    identified=Identified(image, None, _digest(image)),
                )
            examples.append(example)
        batch = self.collate(examples)
        if self.device.type == "cuda":
            pinned = ("input_ids", "target_positions", "target_ids", "pixels")
            batch = batch._replace(**{name: getattr(batch, name).pin_memory() for name in pinned})
        return batch


def _digest(image: int) -> bytes:
    return (image + 1).to_bytes(16, "big")  # 0 means unknown


def _ahead(function: Callable[[T], U], items: Iterable[T], *, num_ahead: int) -> Iterator[U]:
    """`function` of the items in order, in a thread `num_ahead` items ahead (0: no thread)."""
    if not num_ahead:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
