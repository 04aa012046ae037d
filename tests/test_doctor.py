"""doctor: one line per check, advice for each problem, and an exit status that reports them."""

import json
import re
import urllib.request
from urllib.error import HTTPError, URLError

import published
import pytest
import torch
from fake_cuda import FakeCuda, record_steps
from huggingface_hub import constants
from PIL import features

from lora_engine import __main__ as verbs
from lora_engine.commands import doctor as doctor_module
from lora_engine.features.format import FeatureFormat
from lora_engine.models.pretrained import build_from_config
from lora_engine.training import speed
from lora_engine.training.speed import TrainingSpeed, random_captioner
from lora_engine.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def examined(command, monkeypatch):
    """Runs doctor while requests to the Hub raise or return `hub`; it measures only if asked."""

    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # the other tests'

    def run(*flags, hub=URLError("no route"), measure="--no_speed"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        def answer(request, timeout):
            if isinstance(hub, Exception):
                raise hub
            return hub

        monkeypatch.setattr(urllib.request, "urlopen", answer)
        return command(verbs.run_verb, "doctor", measure, *flags)

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


@pytest.mark.parametrize("load", [0.5, 2.5, None])
def test_measurements_on_a_busy_machine_come_with_a_note(examined, monkeypatch, load):
    monkeypatch.setattr(doctor_module, "_MEASUREMENTS", doctor_module._MEASUREMENTS[:1])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    if load is None:  # Windows
        monkeypatch.delattr("os.getloadavg")
    else:
        monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    status, out, _ = examined(measure="--speed")
    assert status == 0
    assert ("note    load        load average 2.5 on 2 processors" in out) == (load == 2.5)


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


# --- measurements ---------------------------------------------------------------------------


@pytest.fixture
def measured(examined, monkeypatch):
    """Runs doctor with its measurements alone, on small matrices."""
    monkeypatch.setattr(doctor_module, "_CHECKS", ())
    monkeypatch.setattr(doctor_module, "_MATRIX_SIZE", {"cpu": 64})

    def run(*flags):
        return examined(*flags, measure="--speed")

    run.work = examined.work
    return run


@pytest.fixture
def small_sizes(blip_folder, vit_gpt2_folder, monkeypatch):
    """The base captioners replaced by the tests' own."""
    monkeypatch.setattr(speed, "BASE_SIZES", {
        "small BLIP": json.loads((blip_folder / "config.json").read_text()),
        "small ViT+GPT2": json.loads((vit_gpt2_folder / "config.json").read_text()),
    })


RATE = r"[\d.,e+]+"


def speed_line(name):
    return re.compile(
        rf"^ok      speed       {re.escape(str(name))}, batch 8: about ({RATE}) images/s in a "
        rf"first epoch, ({RATE}) in later ones \(features kept\)$", re.MULTILINE
    )


def test_the_speed_of_the_machine_and_of_both_base_captioners_is_told(measured, small_sizes):
    status, out, err = measured()
    assert (status, err) == (0, "") and "PROBLEM" not in out and "note" not in out
    assert re.search(rf"ok      matrices    float32 {RATE}.* GFLOP/s \(64 x 64 x 64\)", out)
    assert re.search(rf"ok      decoding    {RATE} images/s and core \(JPEG, 640 x 480", out)
    assert re.search(rf"ok      reading     {RATE} GB/s from the disk of features", out)
    announced = out.index("measuring the speed of training takes about ")
    for name in ("small BLIP", "small ViT+GPT2"):
        found = speed_line(name).search(out)
        assert announced < found.start()
        first, later = (float(rate.replace(",", "")) for rate in found.groups())
        assert 0 < first < later
    assert list(measured.work.iterdir()) == []


def test_the_speed_of_the_given_captioner_is_told(measured, captioner_folder):
    status, out, err = measured("--model", captioner_folder)
    assert (status, err) == (0, "")
    assert speed_line(captioner_folder).search(out) and out.count("batch 8") == 1


def test_a_measurement_that_fails_is_a_note_and_the_others_go_on(
    measured, small_sizes, monkeypatch
):
    def fail(*args, **kwargs):
        raise RuntimeError("out of order")

    class OnlyGPT2(TrainingSpeed):
        def __init__(self, captioner, **settings):
            if captioner.folder.name == "blip":
                fail()
            super().__init__(captioner, **settings)

    monkeypatch.setattr(speed, "decode_s", lambda *args: fail() if not args else 1e-3)
    monkeypatch.setattr(speed, "TrainingSpeed", OnlyGPT2)
    status, out, err = measured()
    assert (status, err) == (0, "")
    assert "note    decoding    RuntimeError: out of order" in out and "ok      reading" in out
    assert "note    training    small BLIP: RuntimeError: out of order" in out
    assert speed_line("small ViT+GPT2").search(out)
    status, out, err = measured("--model", "nowhere/nothing")
    assert status == 0 and "note    speed       PretrainedError: " in out


def test_a_captioner_that_exceeds_the_free_memory_is_not_measured(
    measured, small_sizes, monkeypatch
):
    from lora_engine import devices

    monkeypatch.setattr(devices, "free_memory_bytes", lambda device: 10**5)
    status, out, err = measured()
    assert (status, err) == (0, "") and "batch 8" not in out
    for name in ("small BLIP", "small ViT+GPT2"):
        assert f"note    speed       {name} is not measured: it takes 0.0 GB of memory" in out


@pytest.mark.parametrize("name, config", [
    ("BLIP base", published.BLIP), ("ViT+GPT2 base", published.VIT_GPT2),
])
def test_base_sizes_are_the_published_ones(tmp_path, name, config):
    def described(folder):
        with torch.device("meta"):
            model = build_from_config(folder)
        attention = [
            (path, part.num_heads, getattr(part, "residual_dropout", None))
            for path, part in model.named_modules() if hasattr(part, "num_heads")
        ]
        shapes = {path: tensor.shape for path, tensor in model.state_dict().items()}
        return model.encoder.image_size, shapes, attention

    published_folder = tmp_path / "published"
    published_folder.mkdir()
    (published_folder / "config.json").write_text(json.dumps(config))
    assert described(speed.write_sizes(tmp_path)[name]) == described(published_folder)


def test_recorded_steps_are_compared_with_plain_ones_from_the_same_start(
    blip_folder, monkeypatch
):
    """Here nothing is recorded: both are the same to the bit, unless one is broken."""
    measured = TrainingSpeed(random_captioner(blip_folder), device=CPU, dtype=torch.float32)
    assert measured.recording_problem() is None

    class Broken(Trainer):
        """As if a graph never read the new inputs."""

        def accumulate(self, batches, step, **settings):
            self.first = getattr(self, "first", batches)
            return super().accumulate(self.first, step, **settings)

    def trainer(*args, cuda_graphs, **settings):
        return (Broken if cuda_graphs else Trainer)(*args, **settings)

    monkeypatch.setattr(speed, "Trainer", trainer)
    assert "recorded steps differ from plain ones by" in measured.recording_problem()


@pytest.mark.parametrize("broken, line", [
    ("nothing", "ok      CUDA graphs recorded and plain steps agree"),
    ("replays", "note    CUDA graphs a CUDA graph of micro_step does not compute what its"),
    ("recording", "note    CUDA graphs CUDA graphs do not work here (no graphs on this device)"),
])
def test_graphs_that_training_switches_off_are_told(
    measured, blip_folder, monkeypatch, broken, line
):
    """Although its steps then agree with plain ones."""
    cuda = FakeCuda(monkeypatch)
    cuda.loses_writes = broken == "replays"
    if broken == "recording":
        cuda.failures = dict.fromkeys(range(9), "create")

    def trainer(*args, cuda_graphs, **settings):
        return (record_steps if cuda_graphs else lambda trainer: trainer)(
            Trainer(*args, **settings)
        )

    monkeypatch.setattr(speed, "Trainer", trainer)
    status, out, _ = measured("--model", blip_folder)
    assert status == 0 and line in out
    assert ("train with --no_cuda_graphs" in out) == (broken != "nothing")


def test_a_photograph_is_as_large_as_one():
    assert 60_000 < len(speed.photograph()) < 160_000


def test_no_step_is_measured_on_denormal_numbers(tmp_path):
    """With which a processor computes several times as slowly as in a real run."""
    sizes = speed.BASE_SIZES["BLIP base"]
    (tmp_path / "config.json").write_text(json.dumps(sizes | {
        part: sizes[part] | {"num_hidden_layers": 1} for part in ("text_config", "vision_config")
    }))
    model = random_captioner(tmp_path).model.eval()
    batch = speed.random_batch(model, FeatureFormat(577, 768, "fp32"), seed=0)
    with torch.no_grad():
        hidden = model.decode(batch.input_ids, batch.features)
        probabilities = model.head(hidden).softmax(-1)
    assert probabilities.min() > torch.finfo(torch.float32).smallest_normal
