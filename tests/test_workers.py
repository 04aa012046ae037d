"""Workers that find no shared memory, or die, lead to errors with advice."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import settings
from torch.utils.data import Dataset

from lora_engine.data import workers
from lora_engine.data.batches import Collate, Example
from lora_engine.data.workers import load, shared_memory_shortage
from lora_engine.stopping import LoadingStopped
from lora_engine.training.loop import train


class Numbers(Dataset):
    """0, 1, ..., 19; in a loading process `act` comes before `at`."""

    def __init__(self, act=lambda: None, at: int = 5) -> None:
        self.act, self.at, self.main = act, at, os.getpid()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> int:
        if number == self.at and os.getpid() != self.main:
            self.act()
        return number


@pytest.fixture
def small_shared_memory(monkeypatch):
    """As in Docker without --ipc=host, with 9 MB left."""
    usage = SimpleNamespace(total=64 * 10**6, used=55 * 10**6, free=9 * 10**6)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(workers, "_POLL_S", 0.2)


def no_shared_memory(*args, **kwargs):
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)"
    )


def test_a_process_that_finds_no_shared_memory_says_so_at_once(small_shared_memory, monkeypatch):
    """Not after --worker_timeout: pixels are put into shared memory where an error is heard."""
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", no_shared_memory)
    collate = Collate(image_size=(4, 4), prompt_length=1, pad_id=0)
    examples = [Example(0, 0, np.array([1, 5, 9]), pixels=np.zeros((3, 4, 4), np.uint8))] * 4
    batches = load(
        examples, collate_fn=collate, batch_size=2, num_workers=1, timeout_s=60, batch_bytes=10**7
    )
    with pytest.raises(LoadingStopped, match="shared memory has run out.*has 9 MB free, 40 MB are "
                       "needed. Start the container with --ipc=host .*--num_workers 0"):
        next(batches)


@pytest.mark.parametrize("act, words", [
    (lambda: os.kill(os.getpid(), signal.SIGBUS), "shared memory has run out"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "a process that loads images has died"),
    (lambda: time.sleep(100), "no images have been loaded for 0.6 s"),
], ids=["SIGBUS", "SIGKILL", "timeout"])
def test_full_shared_memory_is_blamed_and_not_the_disk(small_shared_memory, act, words):
    batches = load(
        Numbers(act), batch_size=2, num_workers=1, timeout_s=0.6, batch_bytes=10**7
    )
    with pytest.raises(LoadingStopped, match=f"{words}.*/dev/shm.*--ipc=host") as caught:
        list(batches)
    assert "disk" not in str(caught.value) and "Often memory" not in str(caught.value)


def test_where_shared_memory_is_large_enough_the_disk_is_blamed(monkeypatch):
    monkeypatch.setattr(workers, "_POLL_S", 0.2)
    act = Numbers(lambda: time.sleep(100))
    with pytest.raises(LoadingStopped, match="does the disk with the images still respond"):
        list(load(act, batch_size=2, num_workers=1, timeout_s=0.5, batch_bytes=1000))


def test_a_bus_error_is_reported_even_if_the_memory_is_free_again(monkeypatch):
    monkeypatch.setattr(workers, "_POLL_S", 0.2)
    act = Numbers(lambda: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(LoadingStopped, match="/dev/shm was full. Start the container with --ipc"):
        list(load(act, batch_size=2, num_workers=1, batch_bytes=1000))


def test_a_shortage_is_known_before_the_first_batch(
    small_shared_memory, monkeypatch, blip_folder, data, tmp_path, capsys
):
    assert shared_memory_shortage(9 * 10**6) is None
    assert "9 MB free, 10 MB are needed" in shared_memory_shortage(10**7)
    monkeypatch.setattr("lora_engine.training.setup.check_space_for_run", lambda *args: None)
    config = settings(blip_folder, data, tmp_path / "run", max_steps=1, batch_size=400)
    train(config)
    assert "/dev/shm" not in capsys.readouterr().err
    train(settings(
        blip_folder, data, tmp_path / "other", max_steps=1, batch_size=400, num_workers=1
    ))
    said = capsys.readouterr().err  # 2 x 4 batches of 400 x 3 x 64 x 64 bytes
    assert "warning: /dev/shm, which workers pass images through, has 9 MB" in said
    assert "39 MB are needed" in said


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError(
    "received 0 items of ancdata"
)], ids=repr)
def test_the_error_for_too_many_open_files_has_advice(error, num_workers):
    def fail():
        raise error

    numbers = Numbers(fail)
    numbers.main = 0  # in this process, too
    with pytest.raises(LoadingStopped, match=r"too many open files: raise the limit \(ulimit -n"):
        list(load(numbers, batch_size=2, num_workers=num_workers))


def test_an_error_of_the_data_is_raised_unchanged():
    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        list(load(Numbers(fail), batch_size=2, num_workers=1))


def test_a_timer_and_its_handler_are_restored():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        assert len(list(load(Numbers(), batch_size=2, num_workers=0, timeout_s=60))) == 10
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_loader_that_cannot_be_closed_is_abandoned(monkeypatch):
    """As when a thread waits for the rest of a batch whose sender was killed."""
    monkeypatch.setattr(workers, "_CLOSE_S", 0.05)
    cancelled = []
    workers._close(SimpleNamespace(
        _shutdown_workers=lambda: time.sleep(1),
        _worker_result_queue=SimpleNamespace(cancel_join_thread=lambda: cancelled.append(1)),
    ))
    assert cancelled
