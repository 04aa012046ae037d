"""Rows of features by the digest of their image, in a GPU's memory, on disk and in host memory.

Axes: B rows asked for, U fresh rows, N rows to keep.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.devices import index_on
from lora_engine.features.machine import MachineFolder
from lora_engine.features.store import FeatureStore
from lora_engine.ranks import OneProcess, Ranks

logger = logging.getLogger(__name__)

_NUM_READERS = 4  # threads that read rows ahead of their use
_POLL_S = 0.005  # for a row that another process computes
_CHECK_EVERY_S = 1.0  # that the other processes are alive
_MAX_WAIT_S = 30.0  # for a row, in case its claim could not be removed or its process is stuck


class RowMemory:
    """The first `capacity` rows that it is given, on one device; none is ever evicted."""

    def __init__(self, capacity: int, row_bytes: int, device: torch.device) -> None:
        # On a CPU, memory that has not been written to costs nothing.
        self.rows = torch.empty(capacity, row_bytes, dtype=torch.uint8, device=device)
        self.slots: dict[bytes, int] = {}

    def keep(self, digests: Sequence[bytes], rows: Tensor) -> None:
        """Keep those of the rows (N, row_bytes) that are new, as far as they fit."""
        begin = len(self.slots)
        new = {digest: i for i, digest in enumerate(digests) if digest not in self.slots}
        new = dict(islice(new.items(), len(self.rows) - begin))
        if new:
            if len(new) < len(rows):
                rows = rows.index_select(0, index_on(rows.device, list(new.values())))
            self.rows[begin : begin + len(new)] = rows.to(self.rows.device)
            self.slots.update(zip(new, range(begin, begin + len(new))))


class RowsAhead(NamedTuple):
    """Rows (N, row_bytes) on the CPU that threads are reading: `slots` are numbers by digest."""

    slots: dict[bytes, int]
    rows: Tensor
    is_read: list[Future[bool]]

    def is_intact(self, digest: bytes) -> bool:
        """Whether a row has been read; waits for its thread."""
        return digest in self.slots and self.is_read[self.slots[digest]].result()

    def are_exactly(self, digests: list[bytes]) -> bool:
        """Whether `rows` are those of the digests, in this order, and all intact."""
        return list(self.slots) == digests and all(map(self.is_intact, digests))


class FeatureCache:
    """Keeps rows wherever there is space, and finds them again.

    Fresh rows go to `device_memory` and to the first of `stores` (disk, then memory that the
    machine's processes share) that accepts them; those that none accepts go to `host_memory`. Rows
    read from a store go to `device_memory` too. Without any of these nothing is kept.
    """

    def __init__(self, device: torch.device, ranks: Ranks = OneProcess()) -> None:
        self.device = device
        self.ranks = ranks
        self.store: FeatureStore | None = None
        self.shared_memory: FeatureStore | None = None
        self.device_memory: RowMemory | None = None
        self.host_memory: RowMemory | None = None
        self.machine: MachineFolder | None = None
        self._uses_gpu = device.type == "cuda"
        self._leaving: deque[tuple[torch.cuda.Event | None, dict[bytes, int], Tensor]] = deque()
        self._warned: set[FeatureStore] = set()
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="features")

    def close(self, timeout_s: float) -> None:
        """Write what is waiting for the disk, as far as that is done in time."""
        self._readers.shutdown(cancel_futures=True)
        for store in self.stores:
            store.close(timeout_s)
        self._warn_if_stopped()
        if num_damaged := sum(store.num_damaged for store in self.stores):
            rows = "row" if num_damaged == 1 else "rows"
            logger.warning(f"{num_damaged:,} damaged {rows} of features encoded again")
        if self.machine is not None:
            self.machine.close()

    def __contains__(self, digest: bytes) -> bool:
        return any(digest in memory.slots for memory in self._memories) or any(
            digest in store for store in self.stores
        )

    @property
    def is_off(self) -> bool:
        return not self.stores and not self._memories

    @property
    def stores(self) -> list[FeatureStore]:
        return [store for store in (self.store, self.shared_memory) if store is not None]

    @property
    def local_folder(self) -> Path | None:
        """A folder on this machine for what belongs to the kept rows."""
        if self.store is not None and self.store.index_folder is None:
            return self.store.cache_dir
        # Not the machine's folder itself, whose lock is in use.
        return None if self.machine is None else self.machine.path / "images"

    @property
    def _memories(self) -> list[RowMemory]:
        return [memory for memory in (self.device_memory, self.host_memory) if memory is not None]

    # --- keep -------------------------------------------------------------------------------

    def claim(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those of the images that this process must encode and keep; see `FeatureStore.claim`."""
        for store in self.stores:
            if store.stopped_because is None:
                return store.claim(digests)
        return list(digests)

    def keep(self, digests: list[bytes], rows: Tensor) -> None:
        """Keep fresh rows (N, row_bytes), which the current stream computes, off the device.

        Other processes find them without further calls here.
        """
        if not digests or not self.stores and self.host_memory is None:
            return
        copied = None
        if self._uses_gpu:
            rows = rows.to("cpu", non_blocking=True)  # torch chooses pinned memory for this
            copied = torch.cuda.Event(blocking=True)
            # Of this device: without a stream it would be that of torch's current device.
            copied.record(torch.cuda.current_stream(self.device))
        arrive = None if copied is None else copied.synchronize
        refused = {
            digest: i for i, (digest, row) in enumerate(zip(digests, rows.numpy()))
            if not any(store.offer(digest, row, arrive) for store in self.stores)
        }
        if refused and self.host_memory is not None:
            self._leaving.append((copied, refused, rows))
        self._keep_arrived()
        self._warn_if_stopped()

    def keep_on_device(self, digests: list[bytes], rows: Tensor) -> None:
        """Keep fresh rows (N, row_bytes), which are on the device, in its memory."""
        if self.device_memory is not None:
            self.device_memory.keep(digests, rows)
        self._keep_arrived()

    def _keep_arrived(self) -> None:
        """Pass rows that have arrived from the device to host memory."""
        while self._leaving and self.host_memory is not None:
            copied, positions, rows = self._leaving[0]
            if copied is not None and not copied.query():
                return
            self._leaving.popleft()
            self.host_memory.keep(list(positions), rows[list(positions.values())])

    def _warn_if_stopped(self) -> None:
        for store in self.stores:
            if store.stopped_because and store not in self._warned:
                self._warned.add(store)
                logger.warning(store.stopped_because)

    # --- find -------------------------------------------------------------------------------

    def read_ahead(self, digests: Iterable[bytes]) -> RowsAhead | None:
        """Begin to read those rows from the stores that are not in memory."""
        if not self.stores:
            return None
        wanted = [
            digest for digest in dict.fromkeys(digests)
            if not any(digest in memory.slots for memory in self._memories)
        ]
        if not wanted:
            return None
        rows = self._empty_rows(len(wanted), self.stores[0].row_bytes, torch.device("cpu"))
        is_read = [
            self._readers.submit(self._read, digest, row.numpy())
            for digest, row in zip(wanted, rows)
        ]
        return RowsAhead({digest: i for i, digest in enumerate(wanted)}, rows, is_read)

    def gather(
        self,
        digests: Sequence[bytes],
        fresh: Mapping[bytes, int],
        fresh_rows: Tensor,
        ahead: RowsAhead | None = None,
        *,
        encode_again: Callable[[int], Tensor],
    ) -> Tensor:
        """The rows (B, row_bytes) of `digests` on the device.

        `fresh` gives positions in `fresh_rows` (U, row_bytes), which take precedence; `ahead` are
        rows that `read_ahead` reads. A row that another process computes is waited for. Rows that
        are nowhere, or damaged, come from `encode_again(position in digests)` -> (row_bytes,).
        Raises as `Ranks.check`.
        """
        row_bytes = fresh_rows.shape[1]
        sources = [(fresh, fresh_rows), *((memory.slots, memory.rows) for memory in self._memories)]
        found: list[tuple[list[int], Tensor]] = []
        left = list(range(len(digests)))
        for slots, kept in sources:
            positions = [i for i in left if digests[i] in slots]
            if positions:
                rows = self._empty_rows(len(positions), row_bytes, kept.device)
                numbers = index_on(kept.device, [slots[digests[i]] for i in positions])
                # Not kept[numbers], which copies byte by byte.
                torch.index_select(kept, 0, numbers, out=rows)
                found.append((positions, rows.to(self.device, non_blocking=True)))
                left = [i for i in left if digests[i] not in slots]
        if left:
            if ahead is not None and ahead.are_exactly([digests[i] for i in left]):
                rows = ahead.rows  # the usual case
            else:
                rows = self._empty_rows(len(left), row_bytes, torch.device("cpu"))
                for row, i in zip(rows, left):
                    if ahead is not None and ahead.is_intact(digests[i]):
                        row.copy_(ahead.rows[ahead.slots[digests[i]]])
                    elif not self._await(digests[i], row.numpy()):
                        row.copy_(encode_again(i))
            rows = rows.to(self.device, non_blocking=True)
            if self.device_memory is not None:
                self.device_memory.keep([digests[i] for i in left], rows)
            found.append((left, rows))
        if len(found) == 1:  # the usual case: all rows come from one source
            return found[0][1]
        out = self._empty_rows(len(digests), row_bytes, self.device)
        for positions, rows in found:
            out.index_copy_(0, index_on(self.device, positions), rows)
        return out

    def _await(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy a row from a store into `out` (row_bytes,), once no process is still encoding it."""
        if self._read(digest, out):
            return True
        if self.ranks.local_size == 1:
            return False
        begin_s = checked_s = time.monotonic()
        while any(store.is_claimed(digest) for store in self.stores):
            now_s = time.monotonic()
            if now_s - begin_s > _MAX_WAIT_S:
                break
            if now_s - checked_s > _CHECK_EVERY_S:
                self.ranks.check()
                checked_s = now_s
            time.sleep(_POLL_S)
        return self._read(digest, out)

    def _read(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy a row from a store into `out` (row_bytes,), if it is there."""
        return any(store.read(digest, out) for store in self.stores)

    def _empty_rows(self, count: int, row_bytes: int, device: torch.device) -> Tensor:
        """Memory for rows; with a GPU, host memory is pinned so that copies do not block."""
        is_pinned = self._uses_gpu and device.type == "cpu"
        shape = count, row_bytes
        return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=is_pinned)
