"""Batches of a dataset with the features of their images, in a given order."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from lora_engine.data.batches import (
    CaptionedImages,
    Collate,
    FeatureBatch,
    PixelBatch,
    SampleIndex,
    load_batches,
)
from lora_engine.features.source import FeatureSource


class FeatureLoader:
    """Iterates over the batches of `dataset` in `order`, each with its images' features.

    Only images without kept features are loaded, by `num_workers` processes ahead of their use, or
    by this process. Close an iterator that is not exhausted: processes may be loading. `timeout_s`,
    `waiting` and `batch_bytes` are those of `workers.load`. `waited_s` is the time that the
    consumer has waited for loaded images so far, in seconds.
    """

    def __init__(
        self,
        dataset: CaptionedImages,
        order: Iterable[list[SampleIndex]],
        *,
        features: FeatureSource,
        collate: Collate,
        num_workers: int = 0,
        timeout_s: float = 0,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        batch_bytes: int = 0,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.features = features
        self.waited_s = 0.0
        self._load = partial(
            load_batches,
            collate=collate,
            num_workers=num_workers,
            pin_memory=features.device.type == "cuda",
            timeout_s=timeout_s,
            waiting=waiting,
            batch_bytes=batch_bytes,
        )

    def __iter__(self) -> Generator[FeatureBatch]:
        images = self.dataset.images
        loaded = self._load(
            self.dataset, self.order, has_features=partial(self.features.has, images)
        )
        return self.features.attach(self._timed(loaded), images)

    def _timed(self, batches: Iterator[PixelBatch]) -> Iterator[PixelBatch]:
        while True:
            begin_s = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited_s += time.perf_counter() - begin_s
            yield batch
