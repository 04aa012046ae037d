"""doctor: one line per check, advice for each problem, and an exit status that reports them."""

import re
import urllib.request
from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub import constants
from PIL import features

from lora_engine import __main__ as verbs
from lora_engine.commands import doctor as doctor_module


@pytest.fixture
def examined(command, monkeypatch):
    """Runs doctor while requests to the Hub raise or return `hub`."""
    def run(*flags, hub=URLError("no route")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        def answer(request, timeout):
            if isinstance(hub, Exception):
                raise hub
            return hub

        monkeypatch.setattr(urllib.request, "urlopen", answer)
        return command(verbs.run_verb, "doctor", *flags)

    run.work = command.work
    return run


def test_a_healthy_machine_has_no_problem(examined):
    status, out, err = examined(hub=HTTPError("", 404, "", {}, None))
    assert status == 0 and err == ""
    for topic in ("versions", "packages", "device", "memory", "runs", "features", "images", "Hub"):
        assert f" {topic} " in out
    assert "PROBLEM" not in out and out.endswith("nothing here would stop a run\n")
    assert "torch " in out and "answers" in out
    assert list(examined.work.iterdir()) == []


def test_a_hub_out_of_reach_is_a_note_with_what_to_do(examined):
    status, out, err = examined()
    assert status == 0 and "cannot be reached (no route)" in out and "--model" in out
    status, out, err = examined("--offline")
    assert status == 0 and "not checked (--offline)" in out


def test_a_folder_that_cannot_be_written_is_a_problem(examined):
    (examined.work / "file").write_text("")
    status, out, err = examined("--output_path", "file/runs", "--cache_dir", "file/cache")
    assert status == doctor_module.PROBLEMS
    assert "PROBLEM runs        file/runs cannot be written" in out
    assert "give another folder with --output_path" in out
    assert "note    features    file/cache cannot be written" in out
    assert "1 problem would stop a run" in out


def test_packages_that_are_missing_or_too_old_are_problems(examined, monkeypatch):
    real = doctor_module.metadata.version

    def version(name):
        if name == "einops":
            raise doctor_module.metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor_module.metadata, "version", version)
    status, out, err = examined()
    assert status == doctor_module.PROBLEMS
    assert "einops is missing" in out and "pip install 'einops>=" in out
    assert "transformers 4.0 is too old" in out


def test_a_pillow_without_jpeg_is_a_problem(examined, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name == "webp")
    status, out, err = examined()
    assert status == doctor_module.PROBLEMS and "cannot read JPEG, AVIF" in out


def test_a_device_that_is_not_there_is_a_problem(examined):
    status, out, err = examined("--device", "cuda:9")
    assert status == doctor_module.PROBLEMS and "PROBLEM device" in out


def test_little_memory_and_a_small_shared_memory_are_notes(examined, monkeypatch):
    from lora_engine import devices

    monkeypatch.setattr(devices, "free_memory_bytes", lambda device: 10**9)
    real = doctor_module.shutil.disk_usage

    def usage(path):
        return type(real("/"))(64 * 2**20, 0, 64 * 2**20)

    monkeypatch.setattr(doctor_module.shutil, "disk_usage", usage)
    status, out, err = examined()
    assert status == 0
    assert "1.0 GB are free; training a full-size" in out and "--ipc=host" in out
    assert "free space, or give another disk with --output_path" in out


def test_a_check_that_fails_is_a_finding_and_the_others_still_run(examined, monkeypatch):
    def _fails(config):
        raise RuntimeError("out of order")
        yield

    monkeypatch.setattr(doctor_module, "_CHECKS", (_fails, doctor_module._images))
    status, out, err = examined()
    assert status == doctor_module.PROBLEMS
    assert "PROBLEM fails       RuntimeError: out of order" in out and "Pillow reads" in out


def test_space_and_time_that_data_take_are_told(examined, data, blip_folder):
    status, out, err = examined("--offline", "--data", data / "train.json", "--model", blip_folder)
    assert status == 0 and "PROBLEM" not in out
    plan, space, time = [line[8:] for line in out.splitlines() if line.startswith("ok      data")]
    assert plan.startswith("data        features of 12 images, ")
    assert re.search(r"space: features take \S+ kB as fp32, .* as int8; there is space for", space)
    assert re.search(r"time: about \S+ \w+ for the first epoch, \S+ \w+ for each later", time)
    assert list(examined.work.iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--data", "train.json"], "--data needs a captioner to measure with"),
    (["--data", "train.json", "--model", "MODEL"], "train.json: no such file"),
])
def test_data_that_cannot_be_measured_are_a_problem(examined, blip_folder, flags, words):
    flags = [str(blip_folder) if flag == "MODEL" else flag for flag in flags]
    status, out, err = examined("--offline", *flags)
    assert status == doctor_module.PROBLEMS and "PROBLEM data" in out and words in out
