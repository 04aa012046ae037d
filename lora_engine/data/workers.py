"""Load data ahead of its use in worker processes, with time limits and clear errors."""

import atexit
import errno
import gc
import multiprocessing
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

from lora_engine.devices import num_processors
from lora_engine.stopping import LoadingStopped, ignore_signals
from lora_engine.terminal import one_line

_PREFETCHED = 4  # batches per process
_POLL_S = 2  # between two checks that the processes are alive
_CLOSE_S = 2  # to close the queues of killed processes
_END = object()


class _Late(BaseException):
    """No batch in time. Not an Exception: it must not be mistaken for an image's error."""


def load(
    dataset: Dataset,
    *,
    num_workers: int,
    timeout_s: float = 0,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    batch_bytes: int = 0,
    **settings: Any,
) -> Iterator[Any]:
    """The batches of a DataLoader with `settings`, loaded by `num_workers` processes (0: this one).

    The workers ignore signals and are killed when the iterator is closed. Each batch takes about
    `batch_bytes` of shared memory; waiting for it happens within the context `waiting()`.

    Raises LoadingStopped, only when a batch is requested, if a worker has died, if file descriptors
    or shared memory have run out, or if there has been no batch for `timeout_s` (0: no limit). In
    the main thread the limit also interrupts a blocking read; in other threads it is only checked
    between reads, and not at all without workers.
    """
    shortage = shared_memory_shortage(prefetched_bytes(num_workers, batch_bytes))
    loader: DataLoader = DataLoader(
        dataset,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=_begin,
        timeout=_POLL_S if num_workers else 0,
        **settings,
    )
    try:
        batches, workers = _start(loader)
    except (OSError, RuntimeError) as error:
        _explain(error, (), shortage)
        raise
    kill = partial(_kill, workers)
    atexit.register(kill)  # in case this iterator is neither exhausted nor closed
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
                if not str(error).startswith("DataLoader timed out"):  # after _POLL_S
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


def default_num_workers(device: torch.device, asked: int | None, local_size: int = 1) -> int:
    """The number of loading processes: `asked`, or the default for `device`.

    That is for each of `local_size` processes on this machine.
    """
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0  # workers would only compete with the threads that compute
    return min(8, num_processors() // (2 * local_size))


def prefetched_bytes(num_workers: int, batch_bytes: int) -> int:
    """Shared memory of the batches that `load` prefetches."""
    return _PREFETCHED * num_workers * batch_bytes


def shared_memory_shortage(needed_bytes: int) -> str | None:
    """A message with advice if less than `needed_bytes` of shared memory is free, else None."""
    try:
        free_bytes = shutil.disk_usage("/dev/shm").free
    except OSError:  # not Linux
        return None
    if needed_bytes <= free_bytes:
        return None
    return (
        f"/dev/shm, which workers pass images through, has "
        f"{free_bytes / 1e6:,.0f} MB free, {needed_bytes / 1e6:,.0f} MB are needed. {_MORE_SHARED}"
    )


_MORE_SHARED = (
    "Start the container with --ipc=host or a larger --shm-size, or use --num_workers 0"
)


def _start(loader: DataLoader) -> tuple[Any, set[BaseProcess]]:
    """The loader's iterator, and its worker processes."""
    others = set(multiprocessing.active_children())
    has_signal = hasattr(signal, "SIGCHLD")  # not on Windows
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL if has_signal else None
    try:
        batches = iter(loader)
    except BaseException:
        _kill(set(multiprocessing.active_children()) - others)
        raise
    workers = set(multiprocessing.active_children()) - others
    is_main = threading.current_thread() is threading.main_thread()
    if workers and has_signal and is_main:
        # DataLoader has just installed a handler that raises as soon as a worker dies, even in the
        # middle of a training step. It also notices a dead worker when a batch is requested.
        signal.signal(signal.SIGCHLD, before)
    return batches, workers


def _begin(number: int) -> None:
    ignore_signals()
    gc.freeze()  # collecting the parent's objects would copy their memory pages


def _kill(workers: Collection[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()  # the only signal that ends a stopped one


def _close(batches: Any) -> None:
    """Close DataLoader's queues after its workers were killed; in a thread, which can be abandoned.

    DataLoader waits forever for a worker that was killed while it held a lock of a queue, or had
    sent half a batch to the thread that pins memory.
    """
    closing = threading.Thread(target=batches._shutdown_workers, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)
    if closing.is_alive():
        batches._worker_result_queue.cancel_join_thread()  # otherwise the exit would wait for it


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises _Late within the context after `seconds` (0: never), also in a blocking read."""
    is_main = threading.current_thread() is threading.main_thread()
    if not seconds or not is_main or not hasattr(signal, "setitimer"):  # not on Windows
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
        f"{shortage or 'does the disk with the images still respond?'}"
    )


def _explain(
    error: Exception, workers: Collection[BaseProcess], shortage: str | None
) -> None:
    """Raises LoadingStopped for errors of workers and limits, but not of the data that they load.
    """
    reason = str(error)
    is_limit = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
    if is_limit or "Too many open files" in reason or "ancdata" in reason:
        raise LoadingStopped(
            "too many open files: raise the limit (ulimit -n 4096), or use fewer --num_workers"
        ) from error
    bus_error = -getattr(signal, "SIGBUS", 0)  # not on Windows
    if "shared memory" in reason or any(w.exitcode and w.exitcode == bus_error for w in workers):
        raise LoadingStopped(
            f"shared memory has run out: {shortage or f'/dev/shm was full. {_MORE_SHARED}'}"
        ) from error
    is_cut_off = isinstance(error, (ConnectionError, EOFError))
    if is_cut_off or reason.startswith("DataLoader worker (pid"):
        how = "while it sent a batch" if is_cut_off else one_line(error)
        advice = "Often memory or open files (ulimit -n) ran out: try fewer --num_workers"
        raise LoadingStopped(
            f"a process that loads images has died ({how}). {shortage or advice}"
        ) from error
