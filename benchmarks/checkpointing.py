"""The cost of a checkpoint: writing it, flushed to the disk, and reading it back.

    python -m benchmarks.checkpointing --model blip
    python -m benchmarks.checkpointing --model vit_gpt2 --rank 64 --folder /mnt/slow

Training waits while the adapter and AdamW's moments are copied from the device, hashed, written and
flushed to the disk, and while the folder is renamed. Reading checks every hash. As in a real run,
the checkpoint also holds the best adapter and two hundred captions each of it and of the base.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.contenders import checkpoint
from benchmarks.measure import cells, finish, flags, interleave, read_flags, spread, table, wait_for
from benchmarks.ours import ALPHA, RANK
from lora_engine.lora.adapter import adapter_files
from lora_engine.lora.injection import inject, lora_layers
from lora_engine.models.pretrained import load_model
from lora_engine.training.checkpoint import read_checkpoint, write_checkpoint
from lora_engine.training.optim import FlatLoRAParameters, build_optimizer

CAPTIONS = {
    step: [[row, "a dog jumps over a fence in front of a house", True] for row in range(200)]
    for step in ("0", "90")
}
STATE: dict[str, Any] = {
    "step": 100, "total_steps": 200, "settings": {}, "fingerprints": {}, "captions": CAPTIONS,
    "compute_dtype": "torch.float32", "scaler": {}, "micro_batch_rows": None, "seconds": 60.0,
    "validations": {"losses": {"0": 2.0, "90": 1.0}, "scores": {}, "best_step": 90, "num_worse": 0},
    "meter": {
        "finite": [], "num_non_finite": 0, "num_overflows": 0, "rate": 1e-4, "num_images": 0,
        "waited_s": 0.0, "interval_s": 0.0, "training_s": 60.0,
    },
}


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument("--rank", type=int, default=RANK, help=f"default: {RANK}")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    arguments = read_flags(parser, argv)
    with (
        checkpoint(arguments.model, small=arguments.quick) as model_folder,
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
    ):
        write, read, num_bytes = _operations(arguments, model_folder, Path(name))
        seconds = interleave({"write": write, "read": read}, num_rounds=arguments.rounds)
    spreads = {name: spread(values) for name, values in seconds.items()}
    text = table([["seconds", "median", "min", "max"], *(
        cells(name, values, ".4f") for name, values in spreads.items()
    )])
    finish(
        "checkpointing",
        arguments,
        {"seconds": spreads, "megabytes": num_bytes / 1e6, "rank": arguments.rank},
        text=text,
        headline=f"checkpoint of {num_bytes / 1e6:.1f} MB: "
        f"{spreads['write']['median']:.3f} s to write, {spreads['read']['median']:.3f} s to read",
        draw=lambda axes: plots.bars(axes, spreads, "seconds"),
    )


def _operations(
    arguments: argparse.Namespace, model_folder: Path, folder: Path
) -> tuple[Callable[[int], float], Callable[[int], float], int]:
    """Functions that write and read a checkpoint -> seconds, and its bytes."""
    model = load_model(model_folder).to(arguments.device)
    inject(model, ["attention", "feed_forward"], rank=arguments.rank, alpha=ALPHA)
    lora = FlatLoRAParameters((layer for _, layer in lora_layers(model)), arguments.dtype)
    optimizer = build_optimizer(lora, lr=1e-4, weight_decay=0.0)
    lora.gradient.normal_()
    optimizer.step()
    moments = optimizer.state[lora.values]
    path = folder / "step-00000100"
    best_files = adapter_files(model, base_model="base", provenance={"step": "90"})

    def write(_: int) -> float:
        wait_for(arguments.device)
        begin_s = time.perf_counter()
        write_checkpoint(
            path,
            adapter_files=adapter_files(model, base_model="base"),
            best_files=best_files,
            optimizer=optimizer,
            state=STATE,
        )
        return time.perf_counter() - begin_s

    def read(_: int) -> float:
        begin_s = time.perf_counter()
        found = read_checkpoint(path)
        seconds = time.perf_counter() - begin_s
        assert torch.equal(found.moments["exp_avg"], moments["exp_avg"].cpu())
        return seconds

    write(0)
    return write, read, sum(file.stat().st_size for file in path.iterdir())


if __name__ == "__main__":
    main()
