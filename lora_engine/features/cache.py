"""Rows of features by the digest of their image, in a GPU's memory, on disk and in host memory.

Axes: B rows asked for, U fresh rows, N rows to keep.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lora_engine.features.store import FeatureStore

logger = logging.getLogger(__name__)


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
            self.rows[begin : begin + len(new)] = rows[list(new.values())].to(self.rows.device)
            self.slots.update(zip(new, range(begin, begin + len(new))))


class FeatureCache:
    """Keeps rows wherever there is space, and finds them again.

    Fresh rows go to `device_memory` and to `store`; those that the store does not accept go to
    `host_memory`. Rows read from the store go to `device_memory` too. Without any of the three
    nothing is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.store: FeatureStore | None = None
        self.device_memory: RowMemory | None = None
        self.host_memory: RowMemory | None = None
        self._uses_gpu = device.type == "cuda"
        self._leaving: deque[tuple[torch.cuda.Event | None, list[bytes], Tensor]] = deque()
        self._has_warned = False

    def close(self, timeout_s: float) -> None:
        """Write what is waiting for the disk, as far as that is done in time."""
        self._store_arrived(wait=True)
        if self.store is None:
            return
        self.store.close(timeout_s)
        self._warn_if_stopped()
        if self.store.num_damaged:
            rows = "row" if self.store.num_damaged == 1 else "rows"
            logger.warning(f"{self.store.num_damaged:,} damaged {rows} of features encoded again")

    def __contains__(self, digest: bytes) -> bool:
        if any(digest in memory.slots for memory in self._memories):
            return True
        if self.store is None:
            return False
        # In this order: a row leaves the queue only after it has been added to the index.
        return self.store.pending(digest) is not None or digest in self.store

    @property
    def is_off(self) -> bool:
        return self.store is None and not self._memories

    @property
    def _memories(self) -> list[RowMemory]:
        return [memory for memory in (self.device_memory, self.host_memory) if memory is not None]

    # --- keep -------------------------------------------------------------------------------

    def keep(self, digests: list[bytes], rows: Tensor) -> None:
        """Keep fresh rows (N, row_bytes), which are on the device."""
        if self.device_memory is not None:
            self.device_memory.keep(digests, rows)
        if self.store is None and self.host_memory is None:
            return
        copied = None
        if self._uses_gpu:
            rows = rows.to("cpu", non_blocking=True)  # torch chooses pinned memory for this
            copied = torch.cuda.Event()
            copied.record()
        self._leaving.append((copied, digests, rows))
        self._store_arrived(wait=False)

    def _store_arrived(self, *, wait: bool) -> None:
        """Pass rows that have arrived from the device to the disk, otherwise to host memory."""
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
        self._warn_if_stopped()

    def _warn_if_stopped(self) -> None:
        if self.store is not None and self.store.stopped_because and not self._has_warned:
            self._has_warned = True
            logger.warning(self.store.stopped_because)

    # --- find -------------------------------------------------------------------------------

    def gather(
        self,
        digests: Sequence[bytes],
        fresh: Mapping[bytes, int],
        fresh_rows: Tensor,
        *,
        encode_again: Callable[[int], Tensor],
    ) -> Tensor:
        """The rows (B, row_bytes) of `digests` on the device.

        `fresh` gives positions in `fresh_rows` (U, row_bytes), which take precedence. Rows that are
        nowhere, or damaged, come from `encode_again(position in digests)` -> (row_bytes,).
        """
        row_bytes = fresh_rows.shape[1]
        sources = [(fresh, fresh_rows), *((memory.slots, memory.rows) for memory in self._memories)]
        found: list[tuple[list[int], Tensor]] = []
        left = list(range(len(digests)))
        for slots, kept in sources:
            positions = [i for i in left if digests[i] in slots]
            if positions:
                rows = self._empty_rows(len(positions), row_bytes, kept.device)
                numbers = self._index([slots[digests[i]] for i in positions], kept.device)
                # Not kept[numbers], which copies byte by byte.
                torch.index_select(kept, 0, numbers, out=rows)
                found.append((positions, rows.to(self.device, non_blocking=True)))
                left = [i for i in left if digests[i] not in slots]
        if left:
            rows = self._empty_rows(len(left), row_bytes, torch.device("cpu"))
            for row, i in zip(rows, left):
                if not self._read(digests[i], row.numpy()):
                    row.copy_(encode_again(i))
            rows = rows.to(self.device, non_blocking=True)
            if self.device_memory is not None:
                self.device_memory.keep([digests[i] for i in left], rows)
            found.append((left, rows))
        if len(found) == 1:  # the usual case: all rows come from one source
            return found[0][1]
        out = self._empty_rows(len(digests), row_bytes, self.device)
        for positions, rows in found:
            out.index_copy_(0, self._index(positions, self.device), rows)
        return out

    def _read(self, digest: bytes, out: np.ndarray) -> bool:
        """Copy a row from the store, or from its queue, into `out` (row_bytes,), if it is there."""
        if self.store is None:
            return False
        pending = self.store.pending(digest)
        if pending is None:
            return self.store.read(digest, out)
        out[:] = pending
        return True

    def _empty_rows(self, count: int, row_bytes: int, device: torch.device) -> Tensor:
        """Memory for rows; with a GPU, host memory is pinned so that copies do not block."""
        is_pinned = self._uses_gpu and device.type == "cpu"
        shape = count, row_bytes
        return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=is_pinned)

    def _index(self, numbers: list[int], device: torch.device) -> Tensor:
        index = torch.tensor(numbers, pin_memory=self._uses_gpu)
        return index.to(device, non_blocking=True)
