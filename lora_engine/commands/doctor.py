"""python -m lora_engine doctor: check this machine for training and suggest fixes."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_engine import cli
from lora_engine.commands.source_flags import SourceConfig
from lora_engine.terminal import one_line, printable
from lora_engine.version import __version__

if TYPE_CHECKING:  # torch may not import
    import torch

PROBLEMS = 1  # exit status: something would stop a run
_LABEL = {"good": "ok", "note": "note", "bad": "PROBLEM"}
_MIN_FREE_BYTES = 2 * 10**9
_MIN_SHARED_BYTES = 10**9
_HUB_TIMEOUT_S = 5.0
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # the square product that reaches the best rate
# Work to build and measure a captioner, for each of its parameters.
_BUILD_S = 1.5e-8
_MEASURE_FLOP = 6e3


@dataclass(frozen=True)
class DoctorConfig(SourceConfig):
    """Flags of `doctor`."""

    output_path: str = "runs"
    """Folder for runs."""
    cache_dir: str | None = None
    """Folder for features. Default: the same as for training."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: CUDA if available."""
    data: str | tuple[str, ...] | None = None
    """Training data: estimates the size of its features and the time of an epoch; needs --model."""
    model: str | None = None
    """Captioner to train: a folder or a Hub name."""
    cache_limit_gb: float = 50.0
    """Maximum size of the cache folder."""
    offline: bool = False
    """Do not check whether the Hugging Face Hub can be reached."""
    speed: bool = True
    """Measure the speed of this machine, and of training --model or the two base captioners."""


class Finding(NamedTuple):
    """The result of a check: its state ("good", "note" or "bad"), and advice if there is any."""

    state: str
    topic: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{_LABEL[self.state]:<8}{self.topic:<12}{self.text}"
        return f"{line}\n{'':<20}{self.advice}" if self.advice else line


def doctor(args: list[str]) -> int:
    """Check everything that a run needs and return the exit status."""
    config = cli.parse(
        DoctorConfig, args, prog="python -m lora_engine doctor",
        description="Check this machine for training and suggest fixes.",
    )
    checks = [_run(check, config) for check in _CHECKS]
    if config.speed:
        checks += [_run(measure, config, failed="note") for measure in _MEASUREMENTS]
    num_bad = 0
    for finding in chain.from_iterable(checks):
        print(printable(str(finding)), flush=True)
        num_bad += finding.state == "bad"
    if num_bad:
        print(f"{num_bad} problem{'s' if num_bad > 1 else ''} would stop a run")
    else:
        print("nothing here would stop a run")
    return PROBLEMS if num_bad else 0


def _run(
    check: Callable[..., Iterator[Finding]], *args: Any, failed: str = "bad", what: str = ""
) -> Iterator[Finding]:
    """Run a check; if it fails, that is a finding (about `what`), and the other checks still run.
    """
    try:
        yield from check(*args)
    except Exception as error:  # whatever may be wrong with a machine
        topic = check.__name__.strip("_")
        yield Finding(failed, topic, f"{what}{type(error).__name__}: {one_line(error)}")


def _versions(config: DoctorConfig) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    yield Finding(
        "good", "versions", f"lora_engine {__version__}, Python {platform.python_version()} on "
        f"{platform.platform()}"
    )
    found = []
    for line in metadata.requires("lora_engine") or []:
        requirement = Requirement(line)
        if requirement.marker is not None:  # of an extra
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("bad", "packages", f"{requirement.name} is missing",
                          f"pip install '{requirement}'")
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Finding("bad", "packages", f"{requirement.name} {installed} is too old",
                          f"pip install '{requirement}'")
    yield Finding("good", "packages", ", ".join(found))


def _device(config: DoctorConfig) -> Iterator[Finding]:
    import torch

    from lora_engine.devices import (
        describe,
        dtype_name,
        resolve_device,
        resolve_dtype,
        use_device,
    )
    from lora_engine.lora.matmul import describe_kernels

    try:
        device = resolve_device(config.device)
    except ValueError as error:
        yield Finding("bad", "device", str(error))
        return
    use_device(device)
    dtype = resolve_dtype("auto", device)
    kernels = describe_kernels(device, dtype)
    yield Finding("good", "device", f"{describe(device)}, {dtype_name(dtype)}: {kernels}")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        state = "good" if free > 4e9 else "note"
        yield Finding(state, "GPU memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "note", "GPU", f"there is a driver, but torch {torch.__version__} finds no CUDA device",
            "install a CUDA build of torch: pytorch.org/get-started",
        )
    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        yield Finding(
            "note", "processor", f"{torch.backends.cpu.get_cpu_capability()} only: slower than "
            f"processors with AVX-512"
        )
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None and device.type == "cpu":
        yield Finding("note", "compiler", "no C++ compiler: --compile would have no effect",
                      "install g++ to use --compile")


def _memory(config: DoctorConfig) -> Iterator[Finding]:
    import torch

    from lora_engine.devices import free_memory_bytes

    free = free_memory_bytes(torch.device("cpu"))
    if free < 4e9:
        yield Finding("note", "memory", f"{free / 1e9:.1f} GB are free; training a full-size "
                      f"captioner takes about 4 GB")
    else:
        yield Finding("good", "memory", f"{free / 1e9:.1f} GB are free")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        if shared < _MIN_SHARED_BYTES:
            yield Finding(
                "note", "memory", f"/dev/shm, through which worker processes pass images, has "
                f"{shared / 1e6:.0f} MB",
                "start the container with --ipc=host, or use --num_workers 0",
            )


def _disks(config: DoctorConfig) -> Iterator[Finding]:
    from lora_engine.features.store import cache_folder
    from lora_engine.files import existing_parent, free_bytes

    for topic, flag, path in (
        ("runs", "--output_path", Path(config.output_path)),
        ("features", "--cache_dir", cache_folder(config.cache_dir)),
    ):
        if path is None:
            yield Finding("note", topic, "kept in memory only: this user has no home folder",
                          f"give a folder with {flag}")
            continue
        try:
            with tempfile.TemporaryFile(dir=existing_parent(path)):
                pass
        except OSError as error:
            state = "bad" if topic == "runs" else "note"
            yield Finding(state, topic, f"{path} cannot be written: {error.strerror}",
                          f"give another folder with {flag}")
            continue
        free = free_bytes(path)
        where = f"{free / 1e9:.1f} GB are free for {path.resolve()}"
        if free < _MIN_FREE_BYTES:
            yield Finding("note", topic, where, f"free space, or give another disk with {flag}")
        else:
            yield Finding("good", topic, where)


def _images(config: DoctorConfig) -> Iterator[Finding]:
    from PIL import features

    names = {"jpg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000"}
    missing = [name for feature, name in names.items() if not features.check(feature)]
    if missing:
        state = "bad" if "JPEG" in missing else "note"
        yield Finding(state, "images", f"this Pillow cannot read {', '.join(missing)}",
                      "reinstall pillow from its wheels")
    else:
        yield Finding("good", "images", f"Pillow reads {', '.join(names.values())}")


def _hub(config: DoctorConfig) -> Iterator[Finding]:
    from huggingface_hub import constants

    offline = "download models elsewhere and pass their folder with --model"
    if config.offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if config.offline else "HF_HUB_OFFLINE is set"
        yield Finding("note", "Hub", f"not checked ({why})", offline)
        return
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT_S):
            pass
    except HTTPError:  # it answers, even if with an error
        pass
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("note", "Hub", f"{constants.ENDPOINT} cannot be reached ({reason})", offline)
        return
    yield Finding("good", "Hub", f"{constants.ENDPOINT} answers")


def _data(config: DoctorConfig) -> Iterator[Finding]:
    if config.data is None:
        return
    if config.model is None:
        yield Finding("bad", "data", "--data needs a captioner to measure with", "give --model")
        return
    import numpy as np

    from lora_engine.data.workers import default_num_workers
    from lora_engine.devices import resolve_device, resolve_dtype
    from lora_engine.features.sizing import size_up
    from lora_engine.features.source import open_features
    from lora_engine.features.store import cache_folder
    from lora_engine.lora.injection import cast_frozen
    from lora_engine.models.pretrained import load_captioner

    device = resolve_device(config.device)
    dtype = resolve_dtype("auto", device)
    cache_dir = cache_folder(config.cache_dir)
    pairs = config.read(config.data, index_folder=cache_dir)
    captioner = load_captioner(config.model)
    cast_frozen(captioner.model, dtype)
    captioner.model.to(device)
    sample = map(pairs.text, range(min(len(pairs), 1000)))
    lengths, _ = captioner.tokenizer.count_tokens(sample)
    with open_features(
        captioner, device=device, dtype=dtype, num_images=len(pairs.images), cache="auto",
        cache_dir=cache_dir, cache_dtype=None, cache_limit_bytes=config.cache_limit_gb * 1e9,
    ) as features:
        lines = size_up(
            features, captioner, pairs.images, num_captions=len(pairs),
            num_tokens=int(np.median(lengths)) + 2,
            num_loaders=default_num_workers(device, None),
        )
    for line in lines:
        yield Finding("good", "data", line)


# --- measurements ------------------------------------------------------------------------------


def _load(config: DoctorConfig) -> Iterator[Finding]:
    processors = os.cpu_count() or 1  # all of the machine, whose load it is
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    if load > processors:
        yield Finding("note", "load", f"load average {load:.1f} on {processors} processors: other "
                      f"programs slow down what is measured below")


def _matrices(config: DoctorConfig) -> Iterator[Finding]:
    import torch

    from lora_engine.devices import disable_tf32, dtype_name, resolve_device, resolve_dtype
    from lora_engine.lora.matmul import frozen_linear
    from lora_engine.training.speed import BATCH_SIZE, NUM_TOKENS, matrix_rate

    device = resolve_device(config.device)
    disable_tf32()
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes.append(resolve_dtype("auto", device))
    elif torch.backends.cpu.get_cpu_capability() == "AVX512":  # others may take minutes
        dtypes.append(torch.bfloat16)
    size, rows, width = _MATRIX_SIZE[device.type], BATCH_SIZE * NUM_TOKENS, 768
    rates = [
        f"{dtype_name(dtype)} {matrix_rate(device, dtype, size, size) / 1e9:,.0f}"
        for dtype in dtypes
    ]
    frozen = matrix_rate(
        device, resolve_dtype("auto", device), rows, width, multiply=frozen_linear
    )
    yield Finding(
        "good", "matrices", f"{', '.join(rates)} GFLOP/s ({size} x {size} x {size}); a step's "
        f"linear layers {frozen / 1e9:,.0f} ({rows} x {width} x {width})"
    )


def _decoding(config: DoctorConfig) -> Iterator[Finding]:
    from lora_engine.training.speed import PHOTOGRAPH, PIXELS, decode_s

    (width, height), (new_height, new_width) = PHOTOGRAPH, PIXELS.size
    yield Finding(
        "good", "decoding", f"{1 / decode_s():,.0f} images/s and core (JPEG, {width} x {height} to "
        f"{new_width} x {new_height})"
    )


def _reading(config: DoctorConfig) -> Iterator[Finding]:
    from lora_engine.features.store import cache_folder, read_rate
    from lora_engine.files import existing_parent

    folder = cache_folder(config.cache_dir)
    if folder is not None:
        rate = read_rate(existing_parent(folder))
        yield Finding("good", "reading", f"{rate / 1e9:.2g} GB/s from the disk of features")


def _speed(config: DoctorConfig) -> Iterator[Finding]:
    import torch

    from lora_engine.devices import free_memory_bytes, resolve_device
    from lora_engine.models.model_folder import find_folder
    from lora_engine.training.speed import NUM_TOKENS, matrix_rate, num_parameters, write_sizes

    device, processor = resolve_device(config.device), torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        if config.model is None:
            folders = write_sizes(Path(temporary))
        else:
            folders = {config.model: find_folder(config.model, None)}
        numbers = {name: num_parameters(folder) for name, folder in folders.items()}
        rate = matrix_rate(processor, torch.float32, 1024, 1024)
        seconds = sum(numbers.values()) * (_BUILD_S + _MEASURE_FLOP / rate)
        yield Finding("good", "speed", f"measuring the speed of training takes about {seconds:.0f} "
                      f"s (--no_speed skips it): LoRA of rank 8 on random weights, an image has "
                      f"one caption of {NUM_TOKENS} tokens with its start")
        for name, folder in folders.items():
            needed = 6 * numbers[name]  # bytes: weights in fp32, and half as much besides
            free = min(free_memory_bytes(processor), free_memory_bytes(device))
            if free < needed:
                yield Finding("note", "speed", f"{name} is not measured: it takes "
                              f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
                continue
            yield from _run(_training, name, folder, device, failed="note", what=f"{name}: ")


def _training(name: str, folder: Path, device: "torch.device") -> Iterator[Finding]:
    """The speed of one captioner; on a GPU also whether recorded steps are right."""
    from lora_engine.devices import disable_tf32, resolve_dtype, use_device
    from lora_engine.training.speed import BATCH_SIZE, TrainingSpeed, random_captioner

    disable_tf32()
    use_device(device)
    speed = TrainingSpeed(
        random_captioner(folder), device=device, dtype=resolve_dtype("auto", device)
    )
    first, later = speed.images_per_s
    yield Finding(
        "good", "speed", f"{name}, batch {BATCH_SIZE}: about {_number(first)} images/s in a first "
        f"epoch, {_number(later)} in later ones (features kept)"
    )
    if speed.records:
        problem = speed.recording_problem()
        if problem is None:
            yield Finding("good", "CUDA graphs", "recorded and plain steps agree")
        else:
            yield Finding("note", "CUDA graphs", problem, "train with --no_cuda_graphs")


def _number(rate: float) -> str:
    return f"{rate:.2g}" if rate < 9.5 else f"{rate:,.0f}"


_CHECKS = (_versions, _device, _memory, _disks, _images, _hub, _data)
_MEASUREMENTS = (_load, _matrices, _decoding, _reading, _speed)
