"""Training speed in captions per second: ours against PEFT on transformers.

    python -m benchmarks.throughput --model blip --batch_size 8 --rounds 5
    python -m benchmarks.throughput --model vit_gpt2 --phase later --peers B0 B2 B3 --steps 2
    python -m benchmarks.throughput --model blip --captions_per_image 5 --tag photos
    python -m benchmarks.throughput --model blip --phase wall

Every phase is measured separately and writes its own files:

- first: an epoch in which no features are kept yet;
- later: an epoch for which ours (and B3 and B4) has all features;
- wall: seconds from starting a process to the end of --epochs epochs over --images images, with
  imports, loading, compiling, and on our side reading files, validation and saving adapters. It
  takes minutes, so by default there is one round and no warm-up.

The first two also measure the machine's matrix products in the same rounds, and the share of their
rate that ours reaches (flops.py). On a GPU whose figures gpu_budget.py knows, its roofline stands
beside ours. All sides train LoRA of rank 8 on all decoder linears of the same
full-size checkpoint with random weights, on the same rows; peers.py describes the peers, ours.py
our side. B0 takes 2 rows per step.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plots
from benchmarks.contenders import PEERS, Case, checkpoint, make_case
from benchmarks.flops import decoder_flops, encoder_flops
from benchmarks.gpu_budget import card_of, expected_captions_per_s, meta_trainer
from benchmarks.measure import (
    cells,
    finish,
    flags,
    interleave,
    ratios,
    read_flags,
    seconds_a_call,
    spread,
    table,
)
from lora_engine.lora.matmul import frozen_linear
from lora_engine.models import CaptioningModel

PEERS_BY_DEFAULT = {
    "cpu": {"first": ["B2", "B2sdpa"], "later": ["B2", "B3"], "wall": ["B2", "B2sdpa"]},
    "cuda": {"first": ["B1", "B2"], "later": ["B1", "B3", "B4"], "wall": ["B2", "B2sdpa"]},
}
STEPS = {"cpu": 4, "cuda": 64}
WARM_UPS = {"cpu": 1, "cuda": 3}  # rounds; on a GPU ours records a shape when it recurs
# The square product that reaches the machine's best rate; a GPU needs a larger one.
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument(
        "--phase", nargs="+", choices=["first", "later", "wall"], default=["first", "later"]
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: by phase and device")
    parser.add_argument("--steps", type=int, help="per round; default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--captions_per_image", type=int, default=1)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--checkpoint_dropout", type=float, default=0.0, help="that of GPT-2")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument(
        "--encoder_precision", nargs="*", choices=["fp32", "bf16", "int8"], default=[],
        help="ours in a first epoch with these encoders, too",
    )
    parser.add_argument("--images", type=int, default=64, help="in the wall phase")
    parser.add_argument("--epochs", type=int, default=10, help="in the wall phase")
    parser.add_argument("--wall_rounds", type=int, default=1, help="rounds of the wall phase")
    arguments = read_flags(parser, argv)
    arguments.steps = arguments.steps or STEPS[arguments.device.type]
    if arguments.quick:
        arguments.steps, arguments.images, arguments.epochs = 2, 8, 2
    for phase in arguments.phase:
        print(f"{phase}:")
        with checkpoint(
            arguments.model, small=arguments.quick, dropout=arguments.checkpoint_dropout
        ) as folder:
            measure = measure_wall if phase == "wall" else measure_epochs
            measure(folder, arguments, phase, _peers(arguments, phase))


def _peers(arguments: argparse.Namespace, phase: str) -> list[str]:
    if arguments.peers is not None:
        return arguments.peers
    names = PEERS_BY_DEFAULT[arguments.device.type][phase]
    # transformers' ViT+GPT2 already uses SDPA.
    return [name for name in names if name != "B2sdpa" or arguments.model == "blip"]


def measure_epochs(
    folder: Path, arguments: argparse.Namespace, phase: str, peers: list[str]
) -> None:
    """Measure first or later epochs, in turn with the machine's matrix products."""
    case = make_case(
        folder,
        arguments,
        num_rows=arguments.steps * arguments.batch_size,
        captions_per_image=arguments.captions_per_image,
        lora_dropout=arguments.lora_dropout,
    )
    ours = case.ours(compile=arguments.compile)
    epochs: dict[str, Callable[[int], float]] = {
        "ours": ours.first_epoch if phase == "first" else ours.later_epoch
    }
    if phase == "first":
        epochs |= {
            f"ours, {precision} encoder": case.ours(encoder=precision).first_epoch
            for precision in arguments.encoder_precision
        }
    ours_named = list(epochs)
    epochs |= {name: case.peer(name) for name in peers}
    size = 512 if arguments.quick else MATRIX_SIZE[arguments.device.type]
    rates = matrix_rates(case, ours.model, size)
    figures = interleave(
        {**epochs, **rates}, num_rounds=arguments.rounds,
        num_warm_ups=WARM_UPS[arguments.device.type],
    )
    result: dict[str, Any] = {
        "steps_a_round": arguments.steps,
        "captions_per_image": arguments.captions_per_image,
        "compile": arguments.compile,
        "lora_dropout": arguments.lora_dropout,
        "checkpoint_dropout": arguments.checkpoint_dropout,
        "captions_per_s": {name: spread(figures[name]) for name in epochs},
        "ours_over": {name: ratios(figures["ours"], figures[name]) for name in peers},
        "others_over": {
            f"{name} / {peer}": ratios(figures[name], figures[peer])
            for name in ours_named[1:] for peer in ["ours", *peers]
        },
        "machine_gflop_per_s": {name: spread(figures[name]) for name in rates},
        "work": {},
    }
    if (card := card_of(arguments.device, arguments.dtype)) is not None:
        expected = expected_captions_per_s(
            meta_trainer(
                arguments.model, arguments.dtype, arguments.quick,
                lora_dropout=arguments.lora_dropout,
                checkpoint_dropout=arguments.checkpoint_dropout,
            ),
            card,
            case.rows.lengths,
            batch_size=arguments.batch_size,
            num_images=len(case.rows.pixels) if phase == "first" else 0,
        )
        result["roofline"] = {
            "captions_per_s": expected,
            "ours_over": ratios(figures["ours"], [expected] * arguments.rounds),
        }
    for part, flops in flops_of_a_caption(case, ours.model, phase).items():
        reached = [speed * flops / 1e9 for speed in figures["ours"]]
        result["work"][part] = {
            "gflop_a_caption": flops / 1e9,
            "gflop_per_s": spread(reached),
            "share_of": {rate: ratios(reached, figures[rate]) for rate in rates},
        }
    speeds = result["captions_per_s"]
    finish(
        f"throughput_{phase}", arguments, result,
        text=_epochs_table(result),
        headline=_headline(phase, f"{speeds['ours']['median']:.2f} captions/s", result),
        draw=lambda axes: plots.bars(axes, speeds, f"captions/s, {phase} epoch"),
    )


def _epochs_table(result: dict[str, Any]) -> str:
    rows = [["captions/s", "median", "min", "max"]]
    rows += [cells(name, speeds) for name, speeds in result["captions_per_s"].items()]
    rows += [cells(f"ours / {name}", ratio) for name, ratio in result["ours_over"].items()]
    rows += [cells(name, ratio) for name, ratio in result["others_over"].items()]
    if roofline := result.get("roofline"):
        rows.append(["roofline of the card", f"{roofline['captions_per_s']:.2f}", "", ""])
        rows.append(cells("ours / roofline", roofline["ours_over"]))
    rows += [
        cells(f"{name}, GFLOP/s", rate, ".0f")
        for name, rate in result["machine_gflop_per_s"].items()
    ]
    for part, work in result["work"].items():
        name = f"ours, {part}: {work['gflop_a_caption']:.3g} GFLOP per caption"
        rows.append(cells(f"{name}, GFLOP/s", work["gflop_per_s"], ".1f"))
        rows += [cells(f"  of {rate}", share) for rate, share in work["share_of"].items()]
    return table(rows)


def matrix_rates(
    case: Case, model: CaptioningModel, size: int
) -> dict[str, Callable[[int], float]]:
    """GFLOP/s of torch.mm on large matrices, and of `frozen_linear` on the step's shapes."""
    width = model.vocabulary.in_features
    num_rows = case.batch_size * int(np.median(case.rows.lengths) - 1)

    def rate(multiply: Callable, num_rows: int, size: int, _: int) -> float:
        x = torch.randn(num_rows, size, device=case.device, dtype=case.dtype)
        y = torch.randn(size, size, device=case.device, dtype=case.dtype)
        return 2e-9 * num_rows * size**2 / seconds_a_call(lambda: multiply(x, y), case.device)

    return {
        f"torch.mm {size} x {size} x {size}": partial(rate, torch.mm, size, size),
        f"frozen_linear {num_rows} x {width} x {width}": partial(
            rate, frozen_linear, num_rows, width
        ),
    }


def flops_of_a_caption(case: Case, model: CaptioningModel, phase: str) -> dict[str, float]:
    lengths = case.rows.lengths - 1  # the last token is no input
    decoder = float(np.mean([decoder_flops(model, length) for length in lengths.tolist()]))
    if phase == "later":
        return {"decoder": decoder}
    encoder = encoder_flops(model) * len(case.rows.pixels) / len(lengths)
    return {"encoder": encoder, "encoder and decoder": encoder + decoder}


def measure_wall(
    folder: Path, arguments: argparse.Namespace, phase: str, peers: list[str]
) -> None:
    """Measure whole processes."""
    from benchmarks.wall import seconds, write_dataset

    with tempfile.TemporaryDirectory() as dataset:
        write_dataset(
            Path(dataset), folder, model=arguments.model, num_images=arguments.images
        )
        settings = {
            "checkpoint": str(folder),
            "dataset": dataset,
            "model": arguments.model,
            "device": str(arguments.device),
            "precision": arguments.precision,
            "batch_size": arguments.batch_size,
            "lora_dropout": arguments.lora_dropout,
            "compile": arguments.compile,
            "num_images": arguments.images,
            "epochs": arguments.epochs,
        }
        figures = interleave(
            {name: partial(seconds, name, settings) for name in ["ours", *peers]},
            num_rounds=arguments.wall_rounds,
            num_warm_ups=0,
        )
    result: dict[str, Any] = {
        "num_rounds": arguments.wall_rounds,
        "num_images": arguments.images,
        "num_epochs": arguments.epochs,
        "compile": arguments.compile,
        "lora_dropout": arguments.lora_dropout,
        "checkpoint_dropout": arguments.checkpoint_dropout,
        "seconds": {name: spread(values) for name, values in figures.items()},
        "ours_over": {name: ratios(figures[name], figures["ours"]) for name in peers},
    }
    rows = [["seconds", "median", "min", "max"]]
    rows += [cells(name, times, ".1f") for name, times in result["seconds"].items()]
    rows += [cells(f"{name} / ours", ratio) for name, ratio in result["ours_over"].items()]
    times = result["seconds"]
    finish(
        "throughput_wall", arguments, result,
        text=table(rows),
        headline=_headline(phase, f"{times['ours']['median']:.1f} s", result),
        draw=lambda axes: plots.bars(
            axes, times, f"seconds for {arguments.epochs} epochs of {arguments.images} images"
        ),
    )


def _headline(phase: str, figure: str, result: dict[str, Any]) -> str:
    times = [f"{ratio['median']:.2f} x {name}" for name, ratio in result["ours_over"].items()]
    if roofline := result.get("roofline"):
        times.append(f"{roofline['ours_over']['median']:.2f} x the roofline")
    return f"{phase}: {figure}; speed " + (", ".join(times) or "of ours alone")


if __name__ == "__main__":
    main()
