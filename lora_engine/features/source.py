"""Features of images: looked up if they are kept, and computed by the frozen encoder otherwise.

Nothing in the encoder is trained or random, so an image's features are the same in every epoch and
in every run. They are found by the content of the image file, whatever its name. Fresh features
pass through the format that they are kept in, so that all epochs see the same numbers.

Axes: B rows, U images without features, H height, W width, P image tokens, D width.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.data.batches import FeatureBatch, PixelBatch, read_image
from lora_engine.data.image_identity import Identities
from lora_engine.data.images import ImageError
from lora_engine.data.seen_images import ImageList
from lora_engine.devices import index_on
from lora_engine.features.cache import FeatureCache, RowsAhead
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.format import CacheDtype
from lora_engine.features.placement import (
    CacheMode,
    CacheSettings,
    Placement,
    place_features,
    place_features_used_once,
)
from lora_engine.features.precision import EncoderPrecision
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import OneProcess, Ranks
from lora_engine.stopping import LoadingStopped

_GROUP = 4  # batches whose images are encoded together, so that few encoder batches need padding
_NUM_AHEAD = {"cpu": 0, "cuda": 1}  # groups whose encoding begins before the current one is used


def open_features(
    captioner: Captioner,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_images: int,
    cache: CacheMode,
    cache_dir: Path | None,
    cache_dtype: CacheDtype | None,
    cache_limit_bytes: float,
    encoder_precision: EncoderPrecision = "auto",
    used_once: bool = False,
    ranks: Ranks = OneProcess(),
) -> "FeatureSource":
    """Measure the encoder and the disk, and open the features of `num_images` images.

    `cache`, `cache_dir` and `cache_limit_bytes` are described in `placement.CacheSettings`;
    cache_dtype None is the compute dtype (fp32, otherwise bf16). `encoder_precision` is described
    in features/precision.py. With `used_once` each image is needed once, so nothing is kept in
    memory, and little or nothing is measured.

    All processes of a run must call it. One of each machine measures, and each image is encoded by
    one of them.

    Raises ValueError if `cache` is "disk" and the folder cannot be used, and for a precision that
    the device does not have.
    """
    encoder = FeatureEncoder(
        captioner, device=device, dtype=dtype, cache_dtype=cache_dtype, precision=encoder_precision
    )
    settings = CacheSettings(cache, cache_dir, cache_limit_bytes)
    if used_once:
        cache_used_once = place_features_used_once(encoder, num_images, settings, ranks)
        return FeatureSource(encoder, cache_used_once)
    placement = place_features(encoder, num_images, settings, ranks)
    return FeatureSource(encoder, placement.cache, placement=placement)


class _Reading(NamedTuple):
    """A batch, and the kept rows of its images that are being read."""

    batch: PixelBatch
    ahead: RowsAhead | None


class _Group(NamedTuple):
    """Batches whose missing images are being encoded: rows (U, row_bytes) in order of digests."""

    batches: list[_Reading]
    digests: dict[bytes, int]
    rows: Tensor
    is_encoded: torch.cuda.Event | None


class FeatureSource:
    """Adds features to batches: kept ones from `cache`, others fresh from `encoder`.

    `placement` tells where they are kept, if that was measured.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        cache: FeatureCache,
        *,
        placement: Placement | None = None,
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.placement = placement
        self.group_size = _GROUP if encoder.batch_size > 1 else 1
        self.num_ahead = _NUM_AHEAD[encoder.device.type]
        self.identities = Identities(cache.local_folder)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def __enter__(self) -> "FeatureSource":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until rows have been written to the disk; after an error, not for long."""
        self.identities.close()
        self.cache.close(timeout_s=30.0 if kind is None else 2.0)

    def has(self, images: ImageList, image: int) -> bool:
        """Whether the features of an image are kept, so that its file need not be read."""
        if self.cache.is_off:
            return False
        file = images.table.stamp(image)
        if file is None:
            return False
        if not images.knows(image, file):
            digest = self.identities.recall(images.table[image], file)
            if digest is None:
                return False
            images.record(image, file, digest)
        return images.digests[image].tobytes() in self.cache

    def attach(self, batches: Iterable[PixelBatch], images: ImageList) -> Generator[FeatureBatch]:
        """The batches, with features (B, P, D) on the device instead of pixels.

        Kept rows of a group of batches are read while the previous group is trained on. A GPU also
        encodes then, on a separate stream; a CPU encodes images when their turn comes.
        """
        groups = self._read_groups(iter(batches), images)
        started: deque[_Group] = deque()
        for group in groups if self.num_ahead else _one_ahead(groups):
            started.append(self._start(group, images, started))
            if len(started) > self.num_ahead:
                yield from self._finish(started.popleft(), images)
        for last in started:
            yield from self._finish(last, images)

    def _read_groups(
        self, batches: Iterator[PixelBatch], images: ImageList
    ) -> Iterator[list[_Reading]]:
        """Groups of batches; threads begin to read the rows of images that came without pixels."""
        while group := list(islice(batches, self.group_size)):
            reading = []
            for batch in group:
                loaded = {image for image, _, _ in batch.loaded}
                kept = [image for image in batch.images if image not in loaded]
                ahead = self.cache.read_ahead(_digests(images, kept))
                reading.append(_Reading(batch, ahead))
            yield reading

    def _start(
        self, batches: list[_Reading], images: ImageList, under_way: Iterable[_Group]
    ) -> _Group:
        """Encode those images of some batches whose features are neither kept nor on their way.

        Rows that groups `under_way` are encoding are shared: the cache may be full when they end.
        This process may have to wait for the others before it gets here again, and they for rows
        that it has claimed. So those are passed on at once.
        """
        new: dict[bytes, tuple[int, int]] = {}  # digest -> number of the batch, position in it
        shared: dict[bytes, Tensor] = {}
        for number, (batch, _) in enumerate(batches):
            for position, (image, file, digest) in enumerate(batch.loaded):
                images.record(image, file, digest)
                if file is not None and not images.is_kept(image):
                    self.identities.remember(images.table[image], file, digest)
                if digest in new or digest in shared:
                    continue
                other = next((group for group in under_way if digest in group.digests), None)
                if other is not None:
                    shared[digest] = other.rows[other.digests[digest]]
                elif digest not in self.cache:
                    new[digest] = number, position
        mine = self.cache.claim(list(new))
        with torch.cuda.stream(self.encoder.stream):
            wanted = []
            for number, (batch, _) in enumerate(batches):
                places = [new[digest] for digest in mine]
                chosen = [position for owner, position in places if owner == number]
                pixels = batch.pixels.to(self.device, non_blocking=True)
                if len(chosen) < len(pixels):
                    pixels = pixels.index_select(0, index_on(self.device, chosen))
                wanted.append(pixels)
            fresh = rows = self.encoder.encode(torch.cat(wanted))
            if shared:
                rows = torch.cat([rows, torch.stack(list(shared.values()))])
            is_encoded = self._queued()
            self.cache.keep(mine, fresh)
        digests = {digest: i for i, digest in enumerate([*mine, *shared])}
        return _Group(batches, digests, rows, is_encoded)

    def _finish(self, group: _Group, images: ImageList) -> Iterator[FeatureBatch]:
        self._await(group.is_encoded, group.rows)
        self.cache.keep_on_device(list(group.digests), group.rows)
        for batch, ahead in group.batches:
            rows = group.rows[:0]
            if batch.rows:
                rows = self.cache.gather(
                    _digests(images, batch.images),
                    group.digests,
                    group.rows,
                    ahead,
                    encode_again=partial(self._encode_again, images, batch.images),
                )
            yield batch.with_features(self.encoder.unpack(rows))

    def _queued(self) -> torch.cuda.Event | None:
        """An event after what is queued on the encoder's stream so far; None on a CPU."""
        return None if self.encoder.stream is None else self.encoder.stream.record_event()

    def _await(self, is_encoded: torch.cuda.Event | None, rows: Tensor) -> None:
        """Let the current stream use rows of the encoder's stream once they are there."""
        if is_encoded is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(is_encoded)
            rows.record_stream(stream)

    def _encode_again(self, images: ImageList, wanted: list[int], position: int) -> Tensor:
        """The row (row_bytes,) of an image whose kept row is damaged, or gone.

        A row can disappear while it is needed: someone has emptied the cache, or the disk was full
        before the row was written.
        """
        image = wanted[position]
        digest, = _digests(images, [image])
        try:
            pixels, file, found = read_image(images.table, image, self.encoder.pixels)
        except ImageError as error:
            raise LoadingStopped(
                f"{images.table[image]}: its features are no longer in the cache, and it cannot be "
                f"read: {error.reason}"
            ) from error
        images.record(image, file, found)
        with torch.cuda.stream(self.encoder.stream):
            rows = self.encoder.encode(torch.from_numpy(pixels)[None])
            is_encoded = self._queued()
            self.cache.keep([digest], rows)
        self._await(is_encoded, rows)
        self.cache.keep_on_device([digest], rows)
        return rows[0]


def _digests(images: ImageList, numbers: Iterable[int]) -> list[bytes]:
    return [images.digests[number].tobytes() for number in numbers]


def _one_ahead(groups: Iterator[list[_Reading]]) -> Iterator[list[_Reading]]:
    """Groups of kept rows each when the next one is there, and others at once.

    An error comes after the groups before it.
    """
    ahead: deque[list[_Reading]] = deque()
    failed = None
    try:
        for group in groups:
            ahead.append(group)
            while ahead and (len(ahead) > 1 or any(batch.loaded for batch, _ in ahead[0])):
                yield ahead.popleft()
    except Exception as error:
        failed = error
    yield from ahead
    try:
        if failed is not None:
            raise failed
    finally:
        del failed  # its traceback refers to this frame
