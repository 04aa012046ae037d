"""Fixtures for all tests: small random checkpoint folders of both families, written once.

All tests share the folders: copy one before changing it.
"""

import functools
import gc
import os
import signal
import sys
from pathlib import Path

import checkpoints
import hypothesis
import pytest
import torch
from command_lines import plain
from pictures import write_pictures

from lora_engine import cli
from lora_engine.devices import num_processors
from lora_engine.features import encoder, placement, sizing
from lora_engine.features.store import read_rate
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.report.loss_curve import draw_loss_curve
from lora_engine.stopping import SIGNALS
from lora_engine.training import run as run_module
from lora_engine.training import run_data, validation_captions

# The same examples each time; a busy machine takes longer for one than any deadline.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

# One thread: these models are so small that sharing the work costs several times the work, the
# more so on a busy machine. Children inherit the environment.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network, not even by mistake


def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: many a test waits for a process to end."""
    return num_processors() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker waits for another one at the end."""
    slow = "test_ranks", "test_captioning_ranks", "test_training", "test_loss"
    items.sort(key=lambda item: item.path.stem not in slow)


def pytest_collection_finish() -> None:
    """No collection looks again at the modules of torch and transformers, a tenth of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _features_are_kept_for_these_tests_only(tmp_path_factory):
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder that has no other test's folder beside it: images are looked for there, too."""
    folder = tmp_path / "test"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    checkpoints.write_blip(folder)
    return folder


@pytest.fixture(scope="session")
def vit_gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit_gpt2")
    checkpoints.write_vit_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """train.json of twelve pictures, val.json of four."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=4, name="val.json")
    return folder


@pytest.fixture(scope="session", params=["blip", "vit_gpt2"])
def captioner_folder(request) -> Path:
    """A checkpoint folder of each family in turn."""
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def captioner(captioner_folder) -> Captioner:
    """A freshly loaded captioner of each family in turn, free to be changed."""
    return load_captioner(captioner_folder)


@pytest.fixture(autouse=True, scope="session")
def _signals_arrive():
    """Also where the suite was started in the background, or by nohup, with signals ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _short_validation_captions():
    """Captions of random models never end: with 2 tokens in place of 30 a run takes half the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation_captions, "MAX_NEW_TOKENS", 2)
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_measurements():
    """What a run measures of disk and processor before it begins took a third of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "read_rate", functools.partial(read_rate, num_bytes=2**20))
        patch.setattr(encoder, "_NUM_TIMED", 1)
        patch.setattr(sizing, "_BATCH_SIZES", (2,))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk():
    """No test cuts the power: what a killed process has written is there without fsync, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_validation_images():
    """Tests validate on a handful of images, without a warning about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "FEW_IMAGES", 0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_picture():
    """Drawing the loss curve takes longer than a short run: a file stands in for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_module, "draw_loss_curve", lambda metrics, path: path.write_bytes(b"a picture")
        )
        yield


@pytest.fixture(scope="module")
def loss_curve():
    """For modules that look at the picture that a run draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_loss_curve", draw_loss_curve)
        yield


@pytest.fixture(scope="module")
def whole_captions():
    """For modules whose runs are compared with commands, or whose captions end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation_captions, "MAX_NEW_TOKENS", 30)
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command line in an empty working folder -> (status, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        capsys.readouterr()
        try:
            status = cli.run(main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    run.work = work
    return run


@pytest.fixture
def refused(command):
    """Asserts that a command line fails with these words, and leaves nothing behind."""

    def check(main, *args, words, status=cli.USAGE_ERROR, allowed=()):
        result, out, err = command(main, *args)
        assert result == status
        told = plain(err)
        for word in words:
            assert str(word) in told, f"{word!r} is not in {told!r}"
        assert out == ""
        assert sorted(p.name for p in command.work.rglob("*")) == sorted(allowed)

    return check
