"""Training and captioning without what only Linux or POSIX has, as on Windows and macOS."""

import ast
import ctypes
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pictures import read_annotations
from tars import write_tar
from test_layout import modules

from lora_engine import __main__ as verbs
from lora_engine import devices, files, ranks, stopping
from lora_engine.cli import quoted
from lora_engine.data import workers
from lora_engine.data.download.img2dataset import find_command
from lora_engine.devices import free_memory_bytes, num_processors, resolve_device
from lora_engine.stopping import StopSignal

POSIX_MODULES = "fcntl", "grp", "pwd", "resource", "termios"
POSIX_ONLY = {
    os: "sched_getaffinity fork forkpty pread preadv pwrite pwritev posix_fadvise fdatasync getuid "
        "geteuid sysconf killpg O_DIRECTORY O_NOFOLLOW O_NONBLOCK",
    signal: "SIGHUP SIGCHLD SIGKILL SIGPIPE SIGBUS SIGALRM setitimer",
}
FREE_BYTES = 3 * 2**30


@pytest.fixture
def windows(monkeypatch):
    """Takes away what Windows lacks, and refuses to open folders, as it does."""
    for module, names in POSIX_ONLY.items():
        for name in names.split():
            monkeypatch.delattr(module, name)
    for name in POSIX_MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.setattr(stopping, "SIGNALS", (signal.SIGINT, signal.SIGTERM))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    os_open = os.open

    def no_folders(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, flags, *args, **kwargs)

    def memory_status(status):
        assert status[0] == ctypes.sizeof(status) == 64
        status[2] = FREE_BYTES

    kernel = SimpleNamespace(GlobalMemoryStatusEx=memory_status)
    monkeypatch.setattr(os, "open", no_folders)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)


@pytest.fixture
def spawned(monkeypatch):
    """Sends what worker processes need as spawn would -> the kinds of data sets, by this process.

    Without fork, a worker gets the data set, the collate function and its start by pickle.
    """
    start, kinds = workers._start, []

    def start_spawned(loader):
        parts = loader.dataset, loader.collate_fn, loader.worker_init_fn
        loader.dataset.__dict__ |= pickle.loads(pickle.dumps(parts))[0].__dict__
        kinds.append(type(loader.dataset).__name__)
        return start(loader)

    monkeypatch.setattr(workers, "_start", start_spawned)
    return kinds


def test_a_run_and_a_caption_need_nothing_that_windows_lacks(
    command, tmp_path, data, blip_folder, windows, spawned
):
    rows = read_annotations(data / "train.json")
    for number in range(2):
        part = rows[6 * number : 6 * number + 6]
        write_tar(tmp_path / f"{number}.tar", [
            (str(i), {"png": Path(row.image).read_bytes(), "txt": row.text.encode()})
            for i, row in enumerate(part)
        ])
    status, out, err = command(
        verbs.run_verb, "train", "--model", blip_folder, "--train_data_path", tmp_path,
        "--val_size", "4", "--output_path", "run", "--epochs", "1", "--batch_size", "4",
        "--warmup_steps", "0", "--num_workers", "0", "--eval_captions", "2", "--best_by", "loss",
    )
    assert (status, err) == (0, "")
    assert "not on disk: " in out and "has no preadv" in out and "in memory" in out
    assert " (lowest loss so far)" in out
    assert {"_Parts", "CaptionedImages"} <= set(spawned)
    run = command.work / "run"
    assert json.loads((run / "environment.json").read_text())["peak_memory_bytes"] is None
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    image = shutil.copy(rows[0].image, tmp_path / "x.png")
    status, out, err = command(verbs.run_verb, "caption", "--adapter", "run", "--txt", image)
    assert (status, err) == (0, "") and out.startswith(f"{image}\t")
    assert out.strip().endswith((tmp_path / "x.txt").read_text().strip())


def test_processors_memory_and_signals_of_windows(windows):
    assert num_processors() == os.cpu_count()
    assert devices._unused_memory_bytes() == FREE_BYTES
    assert 0 < free_memory_bytes(torch.device("cpu"))
    assert ranks._exists(2**22 + 1)  # os.kill(pid, 0) would end a process there
    stop = StopSignal()
    stop.lose_output(BrokenPipeError())
    assert stop.number == signal.SIGTERM
    with pytest.raises(ValueError, match="Linux and macOS; on Windows"):
        find_command()


def test_the_memory_of_macos_is_guessed(monkeypatch):
    pages = {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}

    def sysconf(name):
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert devices._unused_memory_bytes() == 2**31


def test_lines_are_appended_without_the_flags_of_posix(windows, tmp_path):
    with files.open_to_append(tmp_path / "a.jsonl") as file:
        files.append_line(file, b"one\n")
    assert (tmp_path / "a.jsonl").read_bytes() == b"one\n"


def test_command_lines_are_quoted_for_the_shell_of_the_system(monkeypatch):
    assert quoted("my run", "a") == "'my run' a"
    with monkeypatch.context() as patch:  # in which even pathlib fails
        patch.setattr(os, "name", "nt")
        on_windows = quoted("my run", "a")
    assert on_windows == '"my run" a'


def test_no_module_needs_posix_to_be_imported():
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not set(names) & set(POSIX_MODULES), f"{module} imports {names}"


@pytest.mark.parametrize("name, words", [
    ("mps", "Apple's GPU"), ("gpu", "is cuda here"), ("tpu", "is not supported"),
    ("quantum", "is unknown"), ("cuda:x", "is unknown"),
])
def test_a_device_that_is_not_supported_is_refused_by_name(name, words):
    with pytest.raises(ValueError, match=f"--device {name} .*{words}.*; this machine has cpu"):
        resolve_device(name)
