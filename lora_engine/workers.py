"""Processes that load data ahead of its use, and how they end."""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lora_engine.stopping import LoadingStopped, ignore_signals

_PATIENCE_S = 2  # between two looks whether they are alive


def load(
    dataset: Dataset, *, num_workers: int, timeout_s: float = 0, **settings: Any
) -> Iterator[Any]:
    """What a DataLoader with `settings` gives, loaded in `num_workers` processes, or in this one.

    The processes leave Ctrl-C and SIGTERM to this one, and end with the iterator. Raises
    LoadingStopped where one has died, or none has answered for `timeout_s` (0: for ever), only when
    it is asked for a batch.
    """
    loader = DataLoader(
        dataset,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_begin,
        timeout=_PATIENCE_S if num_workers else 0,
        **settings,
    )
    if not num_workers:
        yield from loader
        return
    others = set(multiprocessing.active_children())
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    batches = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    end = partial(_kill, workers)
    atexit.register(end)  # where nobody exhausts this iterator or lets go of it
    if threading.current_thread() is threading.main_thread():
        # DataLoader has just asked to be told of a dead process at once, and would raise wherever
        # this one is, be it half through a step. It also notices one when it is asked for a batch.
        signal.signal(signal.SIGCHLD, before)
    try:
        yield from _watched(batches, timeout_s)
    finally:
        del batches  # which tells its processes to end, and waits for some seconds
        end()
        atexit.unregister(end)


def default_num_workers(device: torch.device, asked: int | None) -> int:
    """Processes that load images for `device`, where no number is asked for."""
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0  # a loading process would only take turns with the threads that compute
    return min(8, len(os.sched_getaffinity(0)) // 2)


def _begin(number: int) -> None:
    ignore_signals()
    gc.freeze()  # looking for garbage among what was there before would copy all of it


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _watched(batches: Iterator[Any], timeout_s: float) -> Iterator[Any]:
    """The same batches; raises LoadingStopped where a process is dead, or late by `timeout_s`."""
    begin_s = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # DataLoader's word for both; it may be asked again
            reason = str(error).splitlines()[0]
            if reason.startswith("DataLoader worker (pid"):
                raise _dead(reason) from error
            if not reason.startswith("DataLoader timed out"):
                raise  # of what loads
            if timeout_s and time.monotonic() - begin_s > timeout_s:
                raise LoadingStopped(
                    f"no process that loads images has answered for {timeout_s:g} s "
                    f"(--worker_timeout): does the disk with the images still answer?"
                ) from error
            continue
        except (ConnectionError, EOFError) as error:  # it died while a batch was on its way
            raise _dead(str(error)) from error
        yield batch
        begin_s = time.monotonic()


def _dead(reason: str) -> LoadingStopped:
    return LoadingStopped(
        f"a process that loads images has died ({reason}). Often memory ran out: try fewer "
        f"--num_workers"
    )
