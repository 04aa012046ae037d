"""Rows of features whose content is a function of their digest, and a process that writes them.

    python feature_rows.py CACHE_DIR BEGIN END [MOMENT COUNT]

offers the rows BEGIN to END and prints the number of each; at the COUNT-th MOMENT, a key of
MOMENTS, it kills itself as `kill -9` would.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from lora_engine.features import store as store_module
from lora_engine.features.store import FeatureStore, _Queued

ROW_BYTES = 5000  # not a multiple of a page, so that rows share pages


def digest_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def row_of(number: int) -> np.ndarray:
    data = hashlib.shake_128(digest_of(number)).digest(ROW_BYTES)
    return np.frombuffer(data, dtype=np.uint8)


def open_store(
    cache_dir: Path, *, encoder: str = "a", limit_bytes: int = 10**9, **settings
) -> closing[FeatureStore]:
    """A context that opens a store and closes it at the end."""
    return closing(FeatureStore(
        cache_dir, {"encoder": encoder}, row_bytes=ROW_BYTES, limit_bytes=limit_bytes, **settings
    ))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def write(store: FeatureStore, numbers: Iterable[int]) -> None:
    """Offer the rows and wait until they are in the index."""
    numbers = list(numbers)
    for number in numbers:
        assert store.offer(digest_of(number), row_of(number))
    wait_until(lambda: not any(is_queued(store, number) for number in numbers))


def is_queued(store: FeatureStore, number: int) -> bool:
    with store._changed:
        return digest_of(number) in store._queue


def offer_at_once(store: FeatureStore, numbers: Iterable[int]) -> None:
    """Offer rows so that the writer gets all of them together."""
    with store._changed:
        queued = {digest_of(number): _Queued(row_of(number), None) for number in numbers}
        store._queue.update(queued)
        store._changed.notify_all()


def row_number(store: FeatureStore, number: int) -> int:
    """Where in the file the store has a row."""
    query = "SELECT number FROM rows WHERE digest = ?"
    return store._reader.execute(query, (digest_of(number),)).fetchone()[0]


def found(store: FeatureStore, numbers: Iterable[int]) -> list[int]:
    """The rows that the store has; their content must be right."""
    held = []
    for number in numbers:
        content = np.zeros(ROW_BYTES, dtype=np.uint8)
        was_there = digest_of(number) in store
        is_read = store.read(digest_of(number), content)
        # Another process may add the row in the meantime.
        assert was_there <= is_read <= (digest_of(number) in store)
        if is_read:
            assert np.array_equal(content, row_of(number)), number
            held.append(number)
    return held


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_a_row(file: int, row: memoryview, offset: int) -> None:
    _PWRITE(file, row[: len(row) // 2], offset)
    _die()


def _synced(file: int) -> None:
    _FDATASYNC(file)
    _die()


_PWRITE, _FDATASYNC = os.pwrite, os.fdatasync

# name: a function of os and its replacement, or the beginning of one of the writer's statements
MOMENTS: dict[str, tuple[str, Callable] | str] = {
    "while reserving": "UPDATE counter",
    "reserved, nothing written": ("pwrite", _die),
    "half a row written": ("pwrite", _half_a_row),
    "rows written, not on the disk": ("fdatasync", _die),
    "rows on the disk, no entry": ("fdatasync", _synced),
    "while making entries": "INSERT INTO rows",
    "before the entries are committed": "COMMIT",
}


def _die_at(store: FeatureStore, moment: str, count: int) -> None:
    what = MOMENTS[moment]
    if isinstance(what, str):
        def watch(statement: str) -> None:
            nonlocal count
            count -= statement.startswith(what)
            if count == 0:
                _die()

        store._writer.set_trace_callback(watch)
        return
    name, fatal = what
    original = getattr(os, name)

    def replacement(*arguments):
        nonlocal count
        count -= 1
        return (fatal if count == 0 else original)(*arguments)

    setattr(os, name, replacement)


@contextmanager
def writing(cache_dir: Path, begin: int, end: int, *moment: object) -> Iterator:
    """A process that writes these rows and prints their numbers, as a Popen."""
    command = [sys.executable, __file__, str(cache_dir), str(begin), str(end), *map(str, moment)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _main(cache_dir: str, begin: str, end: str, *moment: str) -> None:
    store_module.WRITE_BYTES = 8 * ROW_BYTES  # many small transactions
    with open_store(Path(cache_dir)) as store:
        if moment:
            _die_at(store, moment[0], int(moment[1]))
        print("ready", flush=True)
        for number in range(int(begin), int(end)):
            assert store.offer(digest_of(number), row_of(number))
            print(number, flush=True)
    assert store.stopped_because is None, store.stopped_because


if __name__ == "__main__":
    _main(*sys.argv[1:])
