"""Where features are kept: a GPU's memory, the disk, host memory, or nowhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lora_engine.devices import free_memory_bytes
from lora_engine.features.cache import FeatureCache, RowMemory
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.store import FeatureStore, FeatureStoreError, read_rate

CacheMode = Literal["auto", "off", "memory", "disk"]

_MEMORY_SHARE = 0.5  # of the free memory, for features
_FEW_IMAGES = 16  # encoding so few takes no longer than measuring the encoder and the disk


class Placement(NamedTuple):
    """A cache, a line that describes it, measured times in seconds, and its capacity.

    read_s: reading an image's features from the disk, None if they are not kept there.
    num_kept: images for which there is space.
    """

    cache: FeatureCache
    plan: str
    encode_s: float
    read_s: float | None
    num_kept: int


@dataclass(frozen=True)
class CacheSettings:
    """How features may be kept.

    mode: "off" keeps nothing beyond a few batches; "memory" keeps what fits in half of the GPU's
    free memory, then of the host's; "disk" keeps in `folder`; "auto" keeps in the GPU's memory and
    on disk, also for later runs, and in host memory what the disk cannot take. Auto uses a disk
    only if it is measured to be faster than the encoder.
    limit_bytes: for everything in `folder`, whoever wrote it.
    """

    mode: CacheMode
    folder: Path | None
    limit_bytes: float


def place_features(
    encoder: FeatureEncoder, num_images: int, settings: CacheSettings
) -> Placement:
    """Open a cache for images that are needed again and again.

    Raises ValueError if the mode is "disk" and the folder cannot be used.
    """
    mode, row_bytes, num_left = settings.mode, encoder.format.row_bytes, num_images
    num_kept = 0
    encode_s = encoder.measure_s()
    cache = FeatureCache(encoder.device)
    places, not_on_disk = [], ""
    if mode in ("auto", "memory") and encoder.device.type == "cuda":
        cache.device_memory = _memory(num_left, row_bytes, encoder.device)
        places.append(f"{len(cache.device_memory.rows):,} in the GPU's memory")
    if mode in ("auto", "disk"):
        try:
            read_s = row_bytes / read_rate(_folder(settings))
            if mode == "disk" or read_s < encode_s:
                cache.store = _open_store(encoder, settings)
                # The rows that are there may be of other images, so they do not count.
                num_free = cache.store.num_free_rows()
                more = "" if num_free >= num_left else f", space for {num_free:,} more"
                num_left -= min(num_left, num_free)
                num_kept += num_free + cache.store.num_rows
                places.append(
                    f"on disk in {cache.store.folder} ({cache.store.num_rows:,} there already"
                    f"{more}; reading one takes {_milliseconds(read_s)})"
                )
            else:
                not_on_disk = (
                    f"not on disk in {settings.folder}, where reading one takes "
                    f"{_milliseconds(read_s)}"
                )
        except FeatureStoreError as error:
            if mode == "disk":
                raise _disk_error(error) from None
            not_on_disk = f"not on disk: {error}"
    if cache.device_memory is not None:
        num_left -= min(num_left, len(cache.device_memory.rows))
    if mode in ("auto", "memory") and num_left > 0:
        cache.host_memory = _memory(num_left, row_bytes, torch.device("cpu"))
        most = "up to " if cache.store is not None else ""
        places.append(f"{most}{len(cache.host_memory.rows):,} in memory")
    if mode == "off":
        places.append("no longer than for a batch (--cache off)")
    kept = "; ".join(filter(None, [f"kept {', '.join(places)}", not_on_disk]))
    memories = (cache.device_memory, cache.host_memory)
    num_kept += sum(len(memory.rows) for memory in memories if memory is not None)
    return Placement(
        cache,
        f"features of {num_images:,} images, {_size(num_images * row_bytes)} as "
        f"{encoder.format.dtype} (encoding one takes {_milliseconds(encode_s)}): {kept}",
        encode_s,
        None if cache.store is None else read_s,
        num_kept,
    )


def place_features_used_once(
    encoder: FeatureEncoder, num_images: int, settings: CacheSettings
) -> FeatureCache:
    """Open a cache for images that are needed once: on disk or not at all.

    Auto measures nothing, and keeps nothing, for a few images. Raises ValueError as
    `place_features`.
    """
    cache = FeatureCache(encoder.device)
    is_worth_measuring = settings.mode == "auto" and num_images >= _FEW_IMAGES
    try:
        if settings.mode == "disk" or is_worth_measuring and _disk_is_faster(encoder, settings):
            cache.store = _open_store(encoder, settings)
    except FeatureStoreError as error:
        if settings.mode == "disk":
            raise _disk_error(error) from None
    return cache


def _disk_is_faster(encoder: FeatureEncoder, settings: CacheSettings) -> bool:
    encode_s = encoder.measure_s()
    return encoder.format.row_bytes / read_rate(_folder(settings)) < encode_s


def _open_store(encoder: FeatureEncoder, settings: CacheSettings) -> FeatureStore:
    return FeatureStore(
        _folder(settings),
        encoder.describe(),
        row_bytes=encoder.format.row_bytes,
        limit_bytes=int(settings.limit_bytes),
    )


def _folder(settings: CacheSettings) -> Path:
    if settings.folder is None:
        raise FeatureStoreError("this user has no home folder; give --cache_dir")
    return settings.folder


def _disk_error(error: FeatureStoreError) -> ValueError:
    return ValueError(f"--cache disk: {error}")


def _memory(num_rows: int, row_bytes: int, device: torch.device) -> RowMemory:
    """Memory for as many of the rows as fit into half of what is free."""
    num_fitting = int(_MEMORY_SHARE * free_memory_bytes(device)) // row_bytes
    return RowMemory(min(num_rows, num_fitting), row_bytes, device)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
