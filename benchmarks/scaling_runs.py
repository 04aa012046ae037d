"""Does the simulation of scaling.py predict real runs? With 1, 2 and 4 processes on this machine.

Only parts are measured, each by itself: encoding an image, a micro-batch, an update, reading, the
exchange of gradients. The simulation puts them together, and its images/s are compared with those
of runs under torchrun: a first epoch, later ones, and later ones from a slow disk, which is made by
reads that sleep. A machine's speed drifts, so it is measured around the parts and around each run,
by products of matrices, and the parts' times are scaled by it.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.contenders import checkpoint, pixel_settings
from benchmarks.features import filled_store
from benchmarks.measure import table, write_result
from benchmarks.ours import Ours
from benchmarks.processes import in_processes, write_rows
from benchmarks.ranks import num_trainable
from benchmarks.rows import Rows
from benchmarks.scaling import Setup, simulate
from lora_engine.data.batches import FeatureBatch, StepRows, training_steps
from lora_engine.data.pixels import load_pixels
from lora_engine.devices import num_processors
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.ranks import open_ranks

T = TypeVar("T")

BATCH_SIZE, NUM_MICRO_BATCHES = 4, 4  # of a step, whatever the number of processes
NUM_STEPS = 6  # of an epoch
NUM_IMAGES = BATCH_SIZE * NUM_MICRO_BATCHES * NUM_STEPS
NUM_PROCESSES = (1, 2, 4)
PHASES = ("first epoch", "later epochs", "later epochs, slow disk")
FEATURES_AHEAD = 1  # micro-batches whose features the engine reads ahead of their use, on a CPU
TOLERANCE = 0.1
ENDLESS = 1e12  # bytes/s


def validate(model: str, *, quick: bool) -> None:
    with checkpoint(model, small=quick) as folder, tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_rows(data, folder, model=model, num_images=NUM_IMAGES)
        parts, gflop_per_s = around(partial(measured_parts, folder, data, model))
        disk_bytes_per_s = slow_disk_speed(parts)
        runs = {
            (phase, number): around(partial(run, folder, data, phase, number, disk_bytes_per_s))
            for phase in PHASES for number in NUM_PROCESSES
        }
    rows = [["", "processes", "images/s", "simulated", "simulated / real", "machine"]]
    points: list[dict[str, Any]] = []
    for (phase, number), (speed, run_gflop_per_s) in runs.items():
        machine = run_gflop_per_s / gflop_per_s
        now = {
            key: value / machine if key.endswith("_s") else value for key, value in parts.items()
        }
        setup = setup_of(now, phase, number, disk_bytes_per_s)
        simulated = simulate(setup, is_first=phase == PHASES[0]).images_per_s
        points.append({"phase": phase, "num_processes": number, "images_per_s": speed,
                       "simulated": simulated, "machine": machine})
        rows.append([
            phase, str(number), f"{speed:.2f}", f"{simulated:.2f}", f"{simulated / speed:.3f}",
            f"{machine:.3f}",
        ])
    errors = [abs(point["simulated"] / point["images_per_s"] - 1) for point in points]
    headline = (
        f"{sum(error <= TOLERANCE for error in errors)} of {len(errors)} points within "
        f"{TOLERANCE:.0%}; the largest error is {max(errors):.1%}"
    )
    path = write_result(
        f"scaling-{model}{'-quick' if quick else ''}",
        {"benchmark": "scaling", "points": points, "parts": parts,
         "gflop_per_s": gflop_per_s, "disk_bytes_per_s": disk_bytes_per_s, "headline": headline},
        device=torch.device("cpu"),
    )
    for key, value in parts.items():
        print(f"{key:<28} {value:12.6g}")
    print(f"\n{table(rows)}\n\nwritten to {path}\n{headline}")


def around(measure: Callable[[], T]) -> tuple[T, float]:
    """What `measure` returns, and the machine's GFLOP/s before and after it, as their mean."""
    before = machine_speed()
    result = measure()
    return result, (before + machine_speed()) / 2


def machine_speed(seconds: float = 4.0) -> float:
    """GFLOP/s of products of matrices on all processors."""
    x = torch.randn(1024, 1024)
    num_products, begin_s = 0, time.perf_counter()
    while time.perf_counter() - begin_s < seconds:
        torch.mm(x, x)
        num_products += 1
    return 2e-9 * num_products * 1024**3 / (time.perf_counter() - begin_s)


def setup_of(parts: dict[str, float], phase: str, number: int, disk_bytes_per_s: float) -> Setup:
    main = "encode_s" if phase == PHASES[0] else "micro_batch_s"
    exchange_s = parts.get(f"exchange_{number}_s", 0.0)
    return Setup(
        num_processes=number,
        micro_batches=NUM_MICRO_BATCHES // number,
        batch_size=BATCH_SIZE,
        disk_bytes_per_s=disk_bytes_per_s if phase == PHASES[2] else ENDLESS,
        feature_bytes=parts["feature_bytes"],
        num_cores=num_processors(),
        images_ahead=0,
        features_ahead=FEATURES_AHEAD,
        on_cores=True,
        busy_speed=min(parts[main] / parts[f"busy_{main}"], 1.0),
        caption_s=0.0,
        variation=0.0,
        link_latency_s=exchange_s / 2,
        link_bytes_per_s=ENDLESS,
        decode_s=parts["decode_s"],
        feature_s=parts["feature_s"],
        encode_s=parts["encode_s"],
        micro_batch_s=parts["micro_batch_s"],
        update_s=parts["update_s"],
    )


def slow_disk_speed(parts: dict[str, float]) -> float:
    """A disk that takes half as long for a caption as one processor."""
    return parts["feature_bytes"] / (parts["micro_batch_s"] / BATCH_SIZE / 2)


# --- real runs ------------------------------------------------------------------------------------


def run(folder: Path, data: Path, phase: str, number: int, disk_bytes_per_s: float) -> float:
    """Images/s of a run, in its steps from the third on."""
    throttle = {"queue": str(data / "queue"), "feature_bytes_per_s": disk_bytes_per_s}
    with tempfile.TemporaryDirectory() as empty:
        is_first = phase == PHASES[0]
        ranks = in_processes(
            "benchmarks.processes:train_timed",
            None if number == 1 else number,
            checkpoint=str(folder),
            data=str(data),
            # The first run of all fills it: that of the first epoch in one process.
            cache_dir=empty if is_first and number > 1 else str(data / "cache"),
            throttle=throttle if phase == PHASES[2] else None,
            epochs=1 if is_first else 2,
            batch_size=BATCH_SIZE,
            grad_accum_steps=NUM_MICRO_BATCHES,
            micro_batches=NUM_MICRO_BATCHES,
            num_threads=1,
        )
    steps_s = np.diff(ranks[0]["ends_s"])[1:]
    speed = BATCH_SIZE * NUM_MICRO_BATCHES * len(steps_s) / steps_s.sum()
    print(f"{phase}, {number} processes: {speed:.2f} images/s", flush=True)
    return speed


# --- parts ----------------------------------------------------------------------------------------


def measured_parts(folder: Path, data: Path, model: str) -> dict[str, float]:
    """Seconds of each part with one processor in use, and of some, as busy_..., with all of them.
    """
    measure = "benchmarks.scaling_runs:parts_in_process"
    settings = {"checkpoint": str(folder), "data": str(data), "model": model}
    (parts,) = in_processes(measure, None, **settings)
    together = in_processes(measure, num_processors(), **settings)
    for name in ("encode_s", "micro_batch_s"):
        parts[f"busy_{name}"] = float(np.mean([one[name] for one in together]))
    num_values = num_trainable(folder) + 1
    for number in NUM_PROCESSES[1:]:
        times_s = in_processes(
            "benchmarks.processes:time_exchange", number,
            num_values=num_values, num_parts=NUM_MICRO_BATCHES, num_rounds=20,
        )
        parts[f"exchange_{number}_s"] = float(np.median(times_s))
    return parts


def parts_in_process(checkpoint: str, data: str, model: str) -> dict[str, float]:
    """The parts on one thread; all processes of a launch begin each of them together."""
    torch.set_num_threads(1)
    settings = pixel_settings(Path(checkpoint))
    rows = Rows(NUM_IMAGES, (1, 1), model=model)
    device = torch.device("cpu")
    ours = Ours(
        Path(checkpoint), rows, settings, device=device, dtype=torch.float32, batch_size=BATCH_SIZE
    )
    encoder = FeatureEncoder(ours.captioner, device=device, dtype=torch.float32)
    files = sorted(Path(data).glob("*.jpg"))
    batches = micro_batches(ours, rows)
    pixels = torch.randint(0, 256, (1, 3, *settings.size), dtype=torch.uint8)

    def train(batch: FeatureBatch) -> None:
        ours.trainer.accumulate([batch], 1)

    def decode(file: Path) -> None:
        load_pixels(file.read_bytes(), settings)

    def update() -> None:
        ours.trainer.update(torch.zeros(()), lr=1e-4)

    with open_ranks() as ranks, tempfile.TemporaryDirectory() as empty:
        def mean_s(calls: list[Callable[[], object]]) -> float:
            calls[0]()
            ranks.gather(None)
            begin_s = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin_s) / len(calls)

        num_images = encoder.batch_size
        pixels = pixels.expand(num_images, -1, -1, -1).contiguous()
        return {
            "micro_batch_s": mean_s([partial(train, batch) for batch in batches]),
            "update_s": mean_s([update] * 20),
            "encode_s": mean_s([lambda: encoder.encode(pixels)] * 10) / num_images,
            "decode_s": mean_s([partial(decode, file) for file in files]),
            "feature_s": mean_s(reads(encoder.format.row_bytes, Path(empty))),
            "feature_bytes": float(encoder.format.row_bytes),
        }


def micro_batches(ours: Ours, rows: Rows) -> list[FeatureBatch]:
    """Those of an epoch of the runs, with random features."""
    steps: list[StepRows] = list(training_steps(
        rows.lengths, batch_size=BATCH_SIZE, grad_accum_steps=NUM_MICRO_BATCHES,
        micro_batches=NUM_MICRO_BATCHES, seed=42, num_epochs=1,
    ))
    encoder: Any = ours.model.encoder
    features = torch.randn(BATCH_SIZE, encoder.num_tokens, encoder.width)
    return [
        ours._batch(np.array([index.row for index in batch])).with_features(features)
        for step in steps for batch in step.micro_batches
    ]


def reads(row_bytes: int, folder: Path, *, num_rows: int = 32) -> list[Callable[[], object]]:
    """Reads of rows from a store in an empty folder, which are in the page cache."""
    digests = [bytes([number] * 16) for number in range(num_rows)]
    noise = np.random.default_rng(0).integers(0, 256, row_bytes, dtype=np.uint8)
    store = filled_store(folder, digests, noise)
    return [partial(store.read, digest, np.empty_like(noise)) for digest in digests]
