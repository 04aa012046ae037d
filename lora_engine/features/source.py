"""Features of the frozen encoder: computed once an image, kept in memory or on disk.

Nothing in the encoder is trained or random, so that an image's features are the same in every
epoch and in every run. They are found by the content of the image's file, whatever its name, below
a key made of all that they depend on. Fresh features go through the format that they are kept in,
so that all epochs see the same numbers.

Axes: B rows, U images without features, H height, W width, P image tokens, D width.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.data.batches import FeatureBatch, PixelBatch, read_image
from lora_engine.data.image_identity import FileStamp, Identities, stamp
from lora_engine.data.images import ImageError
from lora_engine.data.pixels import PIXELS_VERSION, PixelSettings, normalize
from lora_engine.data.seen_images import ImageList
from lora_engine.devices import autocast, free_memory_bytes
from lora_engine.features.format import CacheDtype, FeatureFormat
from lora_engine.features.store import FeatureStore, FeatureStoreError, read_rate
from lora_engine.models import CaptioningModel
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.pretrained import Captioner, fingerprint
from lora_engine.models.vit import EncoderLayer
from lora_engine.stopping import LoadingStopped

_MEMORY_SHARE = 0.5  # of what is free, for features in memory
_GROUP = 4  # batches whose images are encoded together: few encoder batches are then part empty
_NUM_AHEAD = {"cpu": 0, "cuda": 1}  # groups that are begun before one is trained on


@torch.no_grad()
def encode_pixels(model: CaptioningModel, pixels: Tensor, settings: PixelSettings) -> Tensor:
    """uint8 pixels (B, 3, H, W) -> features (B, P, D); they become floats on their device."""
    return model.encode(normalize(pixels, settings))


class _Memory:
    """Rows by digest on one device, as many as fit; none is ever given up for another."""

    def __init__(self, capacity: int, row_bytes: int, device: torch.device) -> None:
        # Memory that is not written to yet costs nothing on a CPU.
        self.rows = torch.empty(capacity, row_bytes, dtype=torch.uint8, device=device)
        self.slots: dict[bytes, int] = {}

    def keep(self, digests: Sequence[bytes], rows: Tensor) -> None:
        """Keep those of the rows (n, row_bytes) that are new, as far as there is room."""
        begin = len(self.slots)
        new = {digest: i for i, digest in enumerate(digests) if digest not in self.slots}
        new = dict(islice(new.items(), len(self.rows) - begin))
        if new:
            self.rows[begin : begin + len(new)] = rows[list(new.values())].to(self.rows.device)
            self.slots.update(zip(new, range(begin, begin + len(new))))


class _Group(NamedTuple):
    """Batches whose missing images are being encoded: rows (U, row_bytes) in order of digests."""

    batches: list[PixelBatch]
    digests: dict[bytes, int]
    rows: Tensor
    is_encoded: torch.cuda.Event | None


class FeatureSource:
    """Gives batches the features of their images: those that are kept, and fresh ones.

    cache: "off" keeps nothing beyond some batches; "memory" keeps what fits in half of the GPU's
    free memory, then of the machine's; "disk" keeps in `cache_dir`; "auto" keeps in a GPU's memory
    and on disk, for the next run too, and in the machine's memory what the disk cannot take. Auto
    uses a disk only where it is measured to be faster than the encoder. cache_limit_bytes is for
    all that is in `cache_dir`. cache_dtype None is the compute dtype (fp32, else bf16).

    Raises ValueError where --cache disk has no usable folder.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        device: torch.device,
        dtype: torch.dtype,
        num_images: int,
        cache: str,
        cache_dir: Path | None,
        cache_dtype: CacheDtype | None,
        cache_limit_bytes: float,
        say: Callable[[str], None],
    ) -> None:
        self.model = captioner.model
        self.pixels = captioner.pixels
        self.device = device
        self.dtype = dtype
        self.num_images = num_images
        self.cache = cache
        self.say = say
        self.encoder_batch_size = _encoder_batch_size(device, captioner.model.encoder.num_tokens)
        self.group_size = _GROUP if self.encoder_batch_size > 1 else 1
        self.num_ahead = _NUM_AHEAD[device.type]
        self.num_encoded = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._said_why = False
        self._leaving: deque[tuple[torch.cuda.Event | None, list[bytes], Tensor]] = deque()
        self.encode_s, (num_tokens, width) = self._try_encoder()
        exact: CacheDtype = "fp32" if dtype == torch.float32 else "bf16"
        self.format = FeatureFormat(num_tokens, width, cache_dtype or exact)
        description = {
            "encoder": "" if cache == "off" else _describe_encoder(self.model),
            "encoder_batch_size": self.encoder_batch_size,  # the last bits depend on it
            "pixels": {**dataclasses.asdict(self.pixels), "version": PIXELS_VERSION},
            "format": dataclasses.asdict(self.format),
            "compute_dtype": str(dtype),
            "device": device.type,
        }
        self.store: FeatureStore | None = None
        self.device_memory: _Memory | None = None
        self.host_memory: _Memory | None = None
        self._place_rows(description, cache_dir, int(cache_limit_bytes))
        self.identities = Identities(cache_dir if self.store is not None else None)

    def __enter__(self) -> "FeatureSource":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until what is to be kept on disk is there; after an error, not for long."""
        self._hand_over(wait=True)
        self.identities.close()
        if self.store is not None:
            self.store.close(timeout_s=30.0 if kind is None else 2.0)
            self._say_why_stopped()
            if self.store.num_damaged:
                rows = "row" if self.store.num_damaged == 1 else "rows"
                self.say(f"{self.store.num_damaged:,} damaged {rows} of features encoded again")

    # --- where features are kept ------------------------------------------------------------

    def _place_rows(
        self, description: dict, cache_dir: Path | None, limit_bytes: int
    ) -> None:
        row_bytes, num_left = self.format.row_bytes, self.num_images
        places, not_on_disk = [], ""
        if self.cache in ("auto", "memory") and self._stream is not None:
            free_bytes = free_memory_bytes(self.device)
            capacity = min(num_left, int(_MEMORY_SHARE * free_bytes) // row_bytes)
            self.device_memory = _Memory(capacity, row_bytes, self.device)
            places.append(f"{capacity:,} in the GPU's memory")
        if self.cache in ("auto", "disk"):
            try:
                if cache_dir is None:
                    raise FeatureStoreError("this user has no home folder; give --cache_dir")
                read_s = row_bytes / read_rate(cache_dir)
                if self.cache == "disk" or read_s < self.encode_s:
                    self.store = FeatureStore(
                        cache_dir, description, row_bytes=row_bytes, limit_bytes=limit_bytes
                    )
                    # What is there may be of other images: it says nothing about these.
                    room = self.store.room()
                    more = "" if room >= num_left else f", room for {room:,} more"
                    num_left -= min(num_left, room)
                    places.append(
                        f"on disk in {self.store.folder} ({self.store.num_rows:,} there already"
                        f"{more}; reading one takes {_milliseconds(read_s)})"
                    )
                else:
                    not_on_disk = (
                        f"not on disk in {cache_dir}, where reading one takes "
                        f"{_milliseconds(read_s)}"
                    )
            except FeatureStoreError as error:
                if self.cache == "disk":
                    raise ValueError(f"--cache disk: {error}") from None
                not_on_disk = f"not on disk: {error}"
        if self.device_memory is not None:
            num_left -= min(num_left, len(self.device_memory.rows))
        if self.cache in ("auto", "memory") and num_left > 0:
            free_bytes = free_memory_bytes(torch.device("cpu"))
            capacity = min(num_left, int(_MEMORY_SHARE * free_bytes) // row_bytes)
            self.host_memory = _Memory(capacity, row_bytes, torch.device("cpu"))
            places.append(f"{'up to ' if self.store else ''}{capacity:,} in memory")
        if self.cache == "off":
            places.append("no longer than for a batch (--cache off)")
        kept = "; ".join(filter(None, [f"kept {', '.join(places)}", not_on_disk]))
        self.plan = (
            f"features of {self.num_images:,} images, {_size(self.num_images * row_bytes)} as "
            f"{self.format.dtype} (encoding one takes {_milliseconds(self.encode_s)}): {kept}"
        )

    def has(self, images: ImageList, image: int) -> bool:
        """Whether an image's features are there, so that its file need not be read."""
        if self.cache == "off":
            return False
        path = images.paths[image]
        file = stamp(path)
        if file is None:
            return False
        if images.stamps[image].tobytes() != file:
            digest = self.identities.recall(path, file)
            if digest is None:
                return False
            images.know(image, file, digest)
        return self._keeps(images, image)

    def _keeps(self, images: ImageList, image: int) -> bool:
        digest = images.digests[image].tobytes()
        if any(memory and digest in memory.slots for memory in self._memories):
            return True
        if self.store is None:
            return False
        return self.store.pending(digest) is not None or bool(self.store.find([digest])[0] >= 0)

    @property
    def _memories(self) -> tuple[_Memory | None, _Memory | None]:
        return self.device_memory, self.host_memory

    def _keep(self, digests: list[bytes], rows: Tensor) -> None:
        """Keep fresh rows (n, row_bytes) wherever there is room."""
        if self.device_memory is not None:
            self.device_memory.keep(digests, rows)
        if self.store is None and self.host_memory is None:
            return
        copied = None
        if self._stream is not None:
            rows = rows.to("cpu", non_blocking=True)  # to pinned memory, by torch's own choice
            copied = torch.cuda.Event()
            copied.record()
        self._leaving.append((copied, digests, rows))
        self._hand_over(wait=False)

    def _hand_over(self, *, wait: bool) -> None:
        """Give rows that have arrived from the device to the disk, else to memory."""
        while self._leaving:
            copied, digests, rows = self._leaving[0]
            if copied is not None and not copied.query():
                if not wait:
                    return
                copied.synchronize()
            self._leaving.popleft()
            for digest, row in zip(digests, rows):
                on_disk = self.store is not None and self.store.offer(digest, row.numpy())
                if not on_disk and self.host_memory is not None:
                    self.host_memory.keep([digest], row[None])
        self._say_why_stopped()

    def _say_why_stopped(self) -> None:
        if self.store is not None and self.store.stopped_because and not self._said_why:
            self._said_why = True
            self.say(self.store.stopped_because)

    # --- batches ----------------------------------------------------------------------------

    def attach(self, batches: Iterable[PixelBatch], images: ImageList) -> Generator[FeatureBatch]:
        """The batches, with features (B, P, D) on the device in place of pixels.

        A GPU encodes on a stream of its own, while the batches before are trained on.
        """
        batches = iter(batches)
        started: deque[_Group] = deque()
        while group := list(islice(batches, self.group_size)):
            started.append(self._start(group, images, started))
            if len(started) > self.num_ahead:
                yield from self._finish(started.popleft(), images)
        for last in started:
            yield from self._finish(last, images)

    def features_of(self, path: str) -> Tensor:
        """Features (P, D) of an image file; raises ImageError if it cannot be used."""
        images = ImageList([path])
        if not self.has(images, 0):
            pixels, file, digest = read_image(path, self.pixels)
            images.know(0, file, digest)
            if not self._keeps(images, 0):
                rows = self._encode(torch.from_numpy(pixels)[None])
                self._keep([digest], rows)
                return self.format.unpack(rows, self.dtype)[0]
        return self.format.unpack(self._gather(images, [0], {}, None), self.dtype)[0]

    def _start(
        self, batches: list[PixelBatch], images: ImageList, under_way: Iterable[_Group]
    ) -> _Group:
        """Encode those images of some batches whose features are not there.

        What groups `under_way` are encoding is taken over: it may find no place when they end.
        """
        digests: dict[bytes, int] = {}
        wanted: list[Tensor] = []
        taken_over: dict[bytes, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for batch in batches:
                pixels = batch.pixels.to(self.device, non_blocking=True)
                chosen = []
                for place, (image, file, digest) in enumerate(batch.loaded):
                    images.know(image, file, digest)
                    if file is not None:
                        self.identities.remember(images.paths[image], file, digest)
                    if digest in digests or digest in taken_over or self._keeps(images, image):
                        continue
                    other = next((group for group in under_way if digest in group.digests), None)
                    if other is not None:
                        taken_over[digest] = other.rows[other.digests[digest]]
                    else:
                        digests[digest] = len(digests)
                        chosen.append(place)
                wanted.append(pixels[chosen])
            rows = self._encode(torch.cat(wanted))
            if taken_over:
                rows = torch.cat([rows, torch.stack(list(taken_over.values()))])
                digests |= {digest: len(digests) + i for i, digest in enumerate(taken_over)}
            event = None
            if self._stream is not None:
                event = torch.cuda.Event()
                event.record()
        return _Group(batches, digests, rows, event)

    def _finish(self, group: _Group, images: ImageList) -> Iterator[FeatureBatch]:
        if group.is_encoded is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(group.is_encoded)
            group.rows.record_stream(stream)
        self._keep(list(group.digests), group.rows)
        for batch in group.batches:
            rows = group.rows[:0]
            if batch.rows:
                rows = self._gather(images, batch.images, group.digests, group.rows)
            yield batch.with_features(self.format.unpack(rows, self.dtype))

    def _gather(
        self,
        images: ImageList,
        wanted: Sequence[int],
        fresh: dict[bytes, int],
        fresh_rows: Tensor | None,
    ) -> Tensor:
        """The rows (B, row_bytes) of images, wherever they are."""
        digests = [images.digests[image].tobytes() for image in wanted]
        sources: list[tuple[dict[bytes, int], Any]] = [(fresh, fresh_rows)]
        sources += [(memory.slots, memory.rows) for memory in self._memories if memory]
        found: list[tuple[list[int], Tensor]] = []
        left = list(range(len(wanted)))
        for slots, kept in sources:
            places = [i for i in left if digests[i] in slots]
            if places:
                rows = self._empty_rows(len(places), kept.device)
                numbers = self._index([slots[digests[i]] for i in places], kept.device)
                # Not by kept[numbers], which copies byte by byte.
                torch.index_select(kept, 0, numbers, out=rows)
                found.append((places, rows.to(self.device, non_blocking=True)))
                left = [i for i in left if digests[i] not in slots]
        if left:
            rows = self._empty_rows(len(left), torch.device("cpu"))
            for row, i in zip(rows, left):
                self._read(images, wanted[i], row.numpy())
            rows = rows.to(self.device, non_blocking=True)
            if self.device_memory is not None:
                self.device_memory.keep([digests[i] for i in left], rows)
            found.append((left, rows))
        if len(found) == 1:  # as usual: nothing to put together
            return found[0][1]
        out = self._empty_rows(len(wanted), self.device)
        for places, rows in found:
            out.index_copy_(0, self._index(places, self.device), rows)
        return out

    def _empty_rows(self, count: int, device: torch.device) -> Tensor:
        """Memory for rows; that of the machine is pinned beside a GPU, for copies not to wait."""
        is_pinned = self._stream is not None and device.type == "cpu"
        shape = (count, self.format.row_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=is_pinned)

    def _index(self, numbers: list[int], device: torch.device) -> Tensor:
        index = torch.tensor(numbers, pin_memory=self._stream is not None)
        return index.to(device, non_blocking=True)

    def _read(self, images: ImageList, image: int, out: np.ndarray) -> None:
        """Copy a row from the disk, or from what waits for it, into `out` (row_bytes,).

        A row may be damaged, or have gone since it was asked for: someone has emptied the cache, or
        the disk was full before it was written. Then the image is encoded again.
        """
        path, digest = images.paths[image], images.digests[image].tobytes()
        if self.store is not None:
            waiting = self.store.pending(digest)
            if waiting is not None:
                out[:] = waiting
                return
            if self.store.read(digest, out):
                return
        try:
            pixels, file, found = read_image(path, self.pixels)
        except ImageError as error:
            raise LoadingStopped(
                f"{path}: its features have gone from the cache, and it cannot be read: "
                f"{error.reason}"
            ) from error
        images.know(image, file, found)
        rows = self._encode(torch.from_numpy(pixels)[None])
        self._keep([digest], rows)
        out[:] = rows[0].cpu().numpy()

    # --- the encoder ------------------------------------------------------------------------

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (U, 3, H, W) -> rows (U, row_bytes)."""
        self.num_encoded += len(pixels)
        packed = [torch.empty(0, self.format.row_bytes, dtype=torch.uint8, device=self.device)]
        for chunk in pixels.to(self.device, non_blocking=True).split(self.encoder_batch_size):
            num_missing = self.encoder_batch_size - len(chunk)
            if len(chunk) and num_missing:
                chunk = torch.cat([chunk, chunk.new_zeros(num_missing, *chunk.shape[1:])])
            if len(chunk):
                features = self._features(chunk)[: self.encoder_batch_size - num_missing]
                packed.append(self.format.pack(features))
        return torch.cat(packed)

    def _features(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return encode_pixels(self.model, pixels, self.pixels)

    def _try_encoder(self) -> tuple[float, torch.Size]:
        """Seconds that an image takes, and the shape of its features (P, D)."""
        pixels = torch.zeros(
            self.encoder_batch_size, 3, *self.pixels.size, dtype=torch.uint8, device=self.device
        )
        for _ in range(2):  # the first time prepares
            begin_s = time.perf_counter()
            shape = self._features(pixels).shape[1:]
            if self._stream is not None:
                torch.cuda.synchronize(self.device)
        return (time.perf_counter() - begin_s) / len(pixels), shape


def _encoder_batch_size(device: torch.device, num_tokens: int) -> int:
    """Images that are encoded at a time.

    Always as many, filled up where there are fewer: with another number the last bits of the
    features could differ. A CPU reaches its rate with some 500 rows of image tokens, one image of
    BLIP's and two of ViT+GPT2's (benchmarks/LOG.md).
    """
    return 64 if device.type == "cuda" else min(max(512 // num_tokens, 1), 4)


def _describe_encoder(model: CaptioningModel) -> dict[str, Any]:
    """All of a captioner that its features depend on: weights, and what is no weight."""
    parts = {name: part for name, part in model.named_children() if part is not model.decoder}
    layer = model.encoder.layers[0]
    assert isinstance(layer, EncoderLayer)
    return {
        "weights": fingerprint(torch.nn.ModuleDict(parts)),
        "num_heads": layer.num_heads,
        "eps": layer.norm1.eps,
        "activation": next(name for name, act in ACTIVATIONS.items() if act is layer.act),
        "compiled": layer._compiled_call_impl is not None,  # the last bits may be others
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
