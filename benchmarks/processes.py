"""Functions of benchmarks in processes that torchrun starts, and training whose parts are timed."""

import fcntl
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.wall import write_dataset
from lora_engine.config import TrainingConfig
from lora_engine.data.image_table import ImageTable
from lora_engine.devices import set_threads
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.store import FeatureStore
from lora_engine.ranks import ManyProcesses, open_ranks
from lora_engine.training.loop import train
from lora_engine.training.trainer import Trainer


def in_processes(function: str, num_processes: int | None, **arguments: Any) -> list[Any]:
    """Call "benchmarks.MODULE:FUNCTION" in processes of torchrun -> their results, by rank.

    None starts one process without torchrun. Arguments and results are passed as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        launcher = [] if num_processes is None else [
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)
        ]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "benchmarks.processes",
             function, folder, json.dumps(arguments)],
            cwd=Path(__file__).parents[1], capture_output=True, text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{function} in {num_processes} processes failed: {done.stderr}")
        paths = (Path(folder, f"{rank}.json") for rank in range(num_processes or 1))
        return [json.loads(path.read_text()) for path in paths]


def main(function: str, folder: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def write_rows(
    folder: Path, checkpoint: Path, *, model: str, num_images: int, captions_per_image: int = 1
) -> None:
    """Image files with captions in train.json, and val.json with one image; see `write_dataset`."""
    write_dataset(folder, checkpoint, model=model, num_images=num_images)
    path = folder / "train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([
        {"text": other["text"], "image": row["image"]}
        for number in range(captions_per_image)
        for row, other in zip(rows, rows[number:] + rows[:number])
    ]))


def train_timed(
    checkpoint: str, data: str, cache_dir: str, throttle: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train without validations in between -> when each step ended, and what its parts took.

    `throttle` is passed to `slow_disk`. `num_encoded` images had been encoded when a step ended.
    """
    seen: dict[str, Any] = {"ends_s": [], "num_encoded": [], "vote_s": [], "exchange_s": []}
    num_encoded = 0

    def counted(encode: Callable) -> Callable:
        def count(self: FeatureEncoder, pixels: Any) -> Any:
            nonlocal num_encoded
            num_encoded += len(pixels)
            return encode(self, pixels)

        return count

    def noted(update: Callable) -> Callable:
        def note(*args: Any, **options: Any) -> Any:
            result = update(*args, **options)
            seen["ends_s"].append(time.perf_counter())
            seen["num_encoded"].append(num_encoded)
            return result

        return note

    changes = [
        (FeatureEncoder, "encode", counted),
        (Trainer, "update", noted),
        (ManyProcesses, "vote", lambda vote: _timed_vote(vote, seen["vote_s"])),
        (ManyProcesses, "summation", lambda make: _timed_sum(make, seen["exchange_s"])),
    ]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for owner, name, wrapped in changes:
            stack.enter_context(patch.object(owner, name, wrapped(getattr(owner, name))))
        stack.enter_context(slow_disk(**throttle or {}))
        train(TrainingConfig(
            model=checkpoint,
            train_data_path=f"{data}/train.json",
            val_data_path=f"{data}/val.json",
            output_path=f"{folder}/run",
            cache="disk",
            cache_dir=cache_dir,
            precision="fp32",
            device="cpu",
            lr=1e-4,
            lora_dropout=0.0,
            num_samples=0,
            eval_captions=0,
            eval_every=10**6,
            save_every="1000000",
            log_every=10**6,
            **settings,
        ))
    return seen


def _timed_vote(vote: Callable, times_s: list[float]) -> Callable:
    def timed(self: ManyProcesses, values: Any) -> Callable:
        begin_s = time.perf_counter()
        wait = vote(self, values)
        sent_s = time.perf_counter() - begin_s

        def result() -> Any:
            begin_s = time.perf_counter()
            votes = wait()
            if len(values) > 1:  # else it is the size of a JSON value
                times_s.append(sent_s + time.perf_counter() - begin_s)
            return votes

        return result

    return timed


def _timed_sum(make: Callable, times_s: list[float]) -> Callable:
    def timed(self: ManyProcesses, *args: Any) -> Any:
        summation = make(self, *args)
        finish = summation.finish

        def timed_finish() -> None:
            begin_s = time.perf_counter()
            finish()
            times_s.append(time.perf_counter() - begin_s)

        summation.finish = timed_finish
        return summation

    return timed


@contextmanager
def slow_disk(
    *, queue: str = "", image_bytes_per_s: float = 0.0, feature_bytes_per_s: float = 0.0
) -> Iterator[None]:
    """Within the context, reads take as long as from a disk of this speed; 0: as they are.

    The processes that name the same `queue` file share the disk. It does one read at a time, in the
    order of their arrival; the file says until when it is occupied.
    """
    def occupy(seconds: float) -> None:
        with open(queue, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            until_s = float(file.read() or 0)
            end_s = max(until_s, time.monotonic()) + seconds
            file.truncate(0)
            file.write(str(end_s).encode())
        time.sleep(max(end_s - time.monotonic(), 0.0))

    def slow_image(read: Callable) -> Callable:
        def slow(self: ImageTable, image: int) -> bytes:
            data = read(self, image)
            occupy(len(data) / image_bytes_per_s)
            return data

        return slow

    def slow_row(read: Callable) -> Callable:
        def slow(self: FeatureStore, digest: bytes, out: Any) -> bool:
            found = read(self, digest, out)
            occupy(found * len(out) / feature_bytes_per_s)
            return found

        return slow

    with ExitStack() as stack:
        if image_bytes_per_s:
            stack.enter_context(patch.object(ImageTable, "read", slow_image(ImageTable.read)))
        if feature_bytes_per_s:
            stack.enter_context(patch.object(FeatureStore, "read", slow_row(FeatureStore.read)))
        yield


def time_exchange(num_values: int, num_parts: int, num_rounds: int) -> list[float]:
    """Seconds of each exchange of gradients, begun by all processes together."""
    import torch

    times_s = []
    with open_ranks() as ranks:
        set_threads(None, ranks.local_size)
        buffer = torch.randn(num_values)
        for _ in range(num_rounds + 3):
            summation = ranks.summation(buffer, num_parts)
            for _ in range(num_parts // ranks.size):
                summation.add()
            ranks.gather(None)
            begin_s = time.perf_counter()
            summation.finish()
            times_s.append(time.perf_counter() - begin_s)
    return times_s[3:]


if __name__ == "__main__":
    main(*sys.argv[1:])
