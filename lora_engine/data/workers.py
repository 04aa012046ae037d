"""Processes that load data ahead of its use, how long they are waited for, and how they end."""

import atexit
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lora_engine.stopping import LoadingStopped, ignore_signals
from lora_engine.terminal import one_line

_PREFETCHED = 4  # batches a process
_PATIENCE_S = 2  # between two looks whether they are alive
_CLOSE_S = 2  # to close the queues of processes that were killed
_END = object()


class _Late(BaseException):
    """No batch in time. Not an Exception: it must not be taken for a fault of an image."""


def load(
    dataset: Dataset,
    *,
    num_workers: int,
    timeout_s: float = 0,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    batch_bytes: int = 0,
    **settings: Any,
) -> Iterator[Any]:
    """What a DataLoader with `settings` gives, loaded in `num_workers` processes, or in this one.

    The processes leave signals to this one, and are killed when the iterator is closed. Each batch
    is waited for within the context `waiting()`; it takes about `batch_bytes` of shared memory.

    Raises LoadingStopped, only when it is asked for a batch, where a process has died, where
    descriptors or shared memory run out, and where no batch has come for `timeout_s` (0: for ever).
    In the main thread the time also ends a read that blocks; in another thread it is only checked
    between reads, and not where no processes load.
    """
    shortage = shared_memory_shortage(prefetched_bytes(num_workers, batch_bytes))
    loader: DataLoader = DataLoader(
        dataset,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=_begin,
        timeout=_PATIENCE_S if num_workers else 0,
        **settings,
    )
    try:
        batches, workers = _start(loader)
    except (OSError, RuntimeError) as error:
        _explain(error, (), shortage)
        raise
    kill = partial(_kill, workers)
    atexit.register(kill)  # where nobody exhausts this iterator or lets go of it
    try:
        begin_s = time.monotonic()
        while True:
            try:
                with _deadline(timeout_s), waiting():
                    batch = next(batches, _END)
            except _Late:
                full = shortage or shared_memory_shortage(batch_bytes if num_workers else 0)
                raise _too_late(timeout_s, full) from None
            except LoadingStopped:
                raise
            except (OSError, EOFError, RuntimeError) as error:
                full = shortage or shared_memory_shortage(batch_bytes if num_workers else 0)
                if not str(error).startswith("DataLoader timed out"):  # after _PATIENCE_S
                    _explain(error, workers, full)
                    raise
                if timeout_s and time.monotonic() - begin_s > timeout_s:
                    raise _too_late(timeout_s, full) from None
                continue
            if batch is _END:
                return
            yield batch
            begin_s = time.monotonic()
    finally:
        kill()
        atexit.unregister(kill)
        if workers:
            _close(batches)


def default_num_workers(device: torch.device, asked: int | None) -> int:
    """Processes that load images for `device`, where no number is asked for."""
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0  # a loading process would only take turns with the threads that compute
    return min(8, len(os.sched_getaffinity(0)) // 2)


def prefetched_bytes(num_workers: int, batch_bytes: int) -> int:
    """Shared memory for the batches that `load` has ready at a time."""
    return _PREFETCHED * num_workers * batch_bytes


def shared_memory_shortage(needed_bytes: int) -> str | None:
    """What to say and to do where fewer bytes of shared memory are free; None where they are."""
    try:
        free_bytes = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return None
    if needed_bytes <= free_bytes:
        return None
    return (
        f"/dev/shm, through which loading processes hand over images, has "
        f"{free_bytes / 1e6:,.0f} MB free, {needed_bytes / 1e6:,.0f} MB are needed. {_MORE_SHARED}"
    )


_MORE_SHARED = (
    "Start the container with --ipc=host or a larger --shm-size, or use --num_workers 0"
)


def _start(loader: DataLoader) -> tuple[Any, set[BaseProcess]]:
    """The loader's iterator, and the processes that load for it."""
    others = set(multiprocessing.active_children())
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        batches = iter(loader)
    except BaseException:
        _kill(set(multiprocessing.active_children()) - others)
        raise
    workers = set(multiprocessing.active_children()) - others
    if workers and threading.current_thread() is threading.main_thread():
        # DataLoader has just asked to be told of a dead process at once, and would raise wherever
        # this one is, be it half through a step. It also notices one when it is asked for a batch.
        signal.signal(signal.SIGCHLD, before)
    return batches, workers


def _begin(number: int) -> None:
    ignore_signals()
    gc.freeze()  # looking for garbage among what was there before would copy all of it


def _kill(workers: Collection[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()  # the only signal that ends a stopped one


def _close(batches: Any) -> None:
    """Close DataLoader's queues, whose processes are dead; in a thread, which can be left behind.

    One that was killed while it held a lock of a queue, or had sent half a batch to the thread that
    pins memory, keeps DataLoader waiting for ever.
    """
    closing = threading.Thread(target=batches._shutdown_workers, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        batches._worker_result_queue.cancel_join_thread()  # else waited for at exit


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises _Late within the context after so many seconds (0: never), also in a blocked read."""
    is_main = threading.current_thread() is threading.main_thread()
    if not seconds or not is_main or not hasattr(signal, "setitimer"):  # Windows has none
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _Late

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _too_late(timeout_s: float, shortage: str | None) -> LoadingStopped:
    return LoadingStopped(
        f"no images have been loaded for {timeout_s:g} s (--worker_timeout): "
        f"{shortage or 'does the disk with the images still answer?'}"
    )


def _explain(
    error: Exception, workers: Collection[BaseProcess], shortage: str | None
) -> None:
    """Raises LoadingStopped for what is the fault of processes and limits, not of what they load.
    """
    reason = str(error)
    is_out = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
    if is_out or "Too many open files" in reason or "ancdata" in reason:
        raise LoadingStopped(
            "too many open files: raise the limit (ulimit -n 4096), or use fewer --num_workers"
        ) from error
    if "shared memory" in reason or any(w.exitcode == -signal.SIGBUS for w in workers):
        raise LoadingStopped(
            f"shared memory has run out: {shortage or f'/dev/shm was full. {_MORE_SHARED}'}"
        ) from error
    is_cut_off = isinstance(error, (ConnectionError, EOFError))
    if is_cut_off or reason.startswith("DataLoader worker (pid"):
        how = "while it sent a batch" if is_cut_off else one_line(error)
        advice = "Often memory ran out, or open files (ulimit -n): try fewer --num_workers"
        raise LoadingStopped(
            f"a process that loads images has died ({how}). {shortage or advice}"
        ) from error
