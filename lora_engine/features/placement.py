"""Where features are kept: a GPU's memory, the disk, host memory, or nowhere."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lora_engine.devices import free_memory_bytes
from lora_engine.features.cache import FeatureCache, RowMemory
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.machine import SHARED_MEMORY, MachineFolder, is_on_network
from lora_engine.features.store import FeatureStore, FeatureStoreError, read_rate
from lora_engine.ranks import OneProcess, Ranks
from lora_engine.terminal import counted

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

    Several processes of a machine share what is kept in host memory: it is in /dev/shm then.
    """

    mode: CacheMode
    folder: Path | None
    limit_bytes: float


class _Measured(NamedTuple):
    """What a machine's first process measures: seconds per image, and free memory for rows.

    read_s: None without a disk to read from; `disk_error` tells why there is none.
    """

    encode_s: float
    read_s: float | None
    disk_error: str
    shared_memory_bytes: int


def place_features(
    encoder: FeatureEncoder,
    num_images: int,
    settings: CacheSettings,
    ranks: Ranks = OneProcess(),
) -> Placement:
    """Open a cache for images that are needed again and again; all processes must call it.

    What is measured varies, so one process of each machine measures for all of them. Raises
    ValueError if the mode is "disk" and the folder cannot be used.
    """
    mode, row_bytes = settings.mode, encoder.format.row_bytes
    measured = _measure(encoder, settings, ranks)
    cache = FeatureCache(encoder.device, ranks)
    places, not_on_disk = [], ""
    num_left, num_kept = num_images, 0
    if mode in ("auto", "memory") and encoder.device.type == "cuda":
        cache.device_memory = _memory(num_left, row_bytes, encoder.device)
        num_kept += len(cache.device_memory.rows)
        places.append(f"{num_kept:,} in the GPU's memory")
    if mode in ("auto", "disk"):
        not_on_disk = _drawback(settings, measured) or _keep_on_disk(cache, encoder, settings)
    if cache.store is not None:
        num_there, num_free = cache.store.num_rows, cache.store.num_free_rows()
        # The rows that are there may be of other images, so they do not count.
        more = "" if num_free >= num_left else f", space for {num_free:,} more"
        num_left -= min(num_left, num_free)
        num_kept += num_free + num_there
        places.append(
            f"on disk in {cache.store.folder} ({num_there:,} there already{more}; reading one "
            f"takes {_milliseconds(measured.read_s or 0.0)})"
        )
    if cache.device_memory is not None and ranks.local_size == 1:  # others may hold the same rows
        num_left -= min(num_left, len(cache.device_memory.rows))
    if mode in ("auto", "memory") and num_left > 0:
        most = "up to " if cache.store is not None else ""
        num_in_memory, shortage = _keep_in_memory(cache, encoder, num_left, measured)
        num_kept += num_in_memory
        places.append(f"{most}{num_in_memory:,} in memory{shortage}")
    if mode == "off":
        places.append("no longer than for a batch (--cache off)")
    parts = [f"kept {', '.join(places)}", not_on_disk, _machines(cache)]
    return Placement(
        cache,
        f"features of {counted(num_images, 'image')}, {_size(num_images * row_bytes)} as "
        f"{encoder.format.dtype} (encoding one takes {_milliseconds(measured.encode_s)}): "
        f"{'; '.join(filter(None, parts))}",
        measured.encode_s,
        None if cache.store is None else measured.read_s,
        num_kept,
    )


def place_features_used_once(
    encoder: FeatureEncoder,
    num_images: int,
    settings: CacheSettings,
    ranks: Ranks = OneProcess(),
) -> FeatureCache:
    """Open a cache for images that are needed once: on disk or not at all.

    Auto measures nothing, and keeps nothing, for a few images. All processes must call it. Raises
    ValueError as `place_features`.
    """
    cache = FeatureCache(encoder.device, ranks)
    is_on_disk = settings.mode == "disk"
    if settings.mode == "auto" and num_images >= _FEW_IMAGES:
        is_on_disk = not _drawback(settings, _measure(encoder, settings, ranks))
    if is_on_disk:
        _keep_on_disk(cache, encoder, settings)
    return cache


def _measure(encoder: FeatureEncoder, settings: CacheSettings, ranks: Ranks) -> _Measured:
    measured = None
    if ranks.local_rank == 0:
        encode_s, read_s, error = encoder.measure_s(), None, ""
        if settings.mode in ("auto", "disk"):
            try:
                # The machine's processes read at the same time.
                rate = read_rate(_folder(settings)) / ranks.local_size
                read_s = encoder.format.row_bytes / rate
            except FeatureStoreError as reason:
                error = str(reason)
        measured = _Measured(encode_s, read_s, error, _shared_memory_bytes())
    return _Measured(*ranks.from_machine(measured))


def _drawback(settings: CacheSettings, measured: _Measured) -> str:
    """Why features are not kept on disk; "" if they are. Raises ValueError if they must be."""
    if measured.read_s is None:
        if settings.mode == "disk":
            raise _disk_error(measured.disk_error)
        return f"not on disk: {measured.disk_error}"
    if settings.mode == "disk" or measured.read_s < measured.encode_s:
        return ""
    return (
        f"not on disk in {settings.folder}, where reading one takes "
        f"{_milliseconds(measured.read_s)}"
    )


def _keep_on_disk(cache: FeatureCache, encoder: FeatureEncoder, settings: CacheSettings) -> str:
    """Keep rows on disk -> "", or why that fails. Raises ValueError if the mode is "disk"."""
    try:
        folder = _folder(settings)
        cache.store = FeatureStore(
            folder,
            encoder.describe(),
            row_bytes=encoder.format.row_bytes,
            limit_bytes=int(settings.limit_bytes),
            ranks=cache.ranks,
            index_folder=_machine_folder(cache) / "indexes" if is_on_network(folder) else None,
        )
        return ""
    except FeatureStoreError as error:
        if settings.mode == "disk":
            raise _disk_error(error) from None
        return f"not on disk: {error}"


def _keep_in_memory(
    cache: FeatureCache, encoder: FeatureEncoder, num_rows: int, measured: _Measured
) -> tuple[int, str]:
    """Keep rows in host memory, which processes share -> space for how many, and advice."""
    row_bytes = encoder.format.row_bytes
    if cache.ranks.local_size == 1:
        cache.host_memory = _memory(num_rows, row_bytes, torch.device("cpu"))
        return len(cache.host_memory.rows), ""
    try:
        cache.shared_memory = FeatureStore(
            _machine_folder(cache) / "rows",
            encoder.describe(),
            row_bytes=row_bytes,
            limit_bytes=measured.shared_memory_bytes,
            ranks=cache.ranks,
        )
        num_fitting = min(num_rows, cache.shared_memory.num_free_rows())
        reason = f"half of what is free in {SHARED_MEMORY}"
    except FeatureStoreError as error:
        num_fitting, reason = 0, str(error)
    if num_fitting == num_rows:
        return num_fitting, ""
    return num_fitting, (
        f" of {num_rows:,}: {reason} (in a container --ipc=host or a larger --shm-size helps)"
    )


def _shared_memory_bytes() -> int:
    """Half of what is free in the memory that processes share."""
    try:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not Linux
        return 0
    return int(_MEMORY_SHARE * min(free_bytes, free_memory_bytes(torch.device("cpu"))))


def _machine_folder(cache: FeatureCache) -> Path:
    if cache.machine is None:
        try:
            cache.machine = MachineFolder(cache.ranks.launch)
        except OSError as error:
            raise FeatureStoreError(f"no folder for this machine's processes: {error}") from None
    return cache.machine.path


def _machines(cache: FeatureCache) -> str:
    """What it costs that several machines share no disk, or that they do."""
    num_machines = -(-cache.ranks.size // cache.ranks.local_size)
    if num_machines == 1 or cache.is_off:
        return ""
    if cache.store is not None and cache.store.index_folder is not None:
        return f"the {num_machines} machines share the disk: each image is encoded about once"
    return (
        f"each of the {num_machines} machines encodes the images that it meets first: up to "
        f"{num_machines} times as many in all, over the first epochs"
    )


def _folder(settings: CacheSettings) -> Path:
    if settings.folder is None:
        raise FeatureStoreError("this user has no home folder; give --cache_dir")
    return settings.folder


def _disk_error(error: object) -> ValueError:
    return ValueError(f"--cache disk: {error}")


def _memory(num_rows: int, row_bytes: int, device: torch.device) -> RowMemory:
    """Memory for as many of the rows as fit into half of what is free."""
    num_fitting = int(_MEMORY_SHARE * free_memory_bytes(device)) // row_bytes
    return RowMemory(min(num_rows, num_fitting), row_bytes, device)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
