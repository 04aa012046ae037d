"""Peak memory of later epochs: ours against PEFT on kept features (B3) and on pixels (B2).

    python -m benchmarks.memory --model blip
    python -m benchmarks.memory --model vit_gpt2 --device cuda

Each contender runs in its own process. Its baseline is the memory between two epochs: the model,
AdamW's moments, late imports, images and kept features. Then an epoch trains. On a CPU both figures
are resident sizes; on a GPU they are allocated tensors. There our baseline includes the kept
features, while B3 keeps its features in host memory.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.contenders import PEERS, checkpoint, make_case
from benchmarks.measure import (
    cells,
    finish,
    flags,
    in_fresh_process,
    interleave,
    peak_bytes,
    ratios,
    read_flags,
    spread,
    start_peak,
    table,
)
from lora_engine.devices import resolve_dtype, use_device

BATCH_SIZE = 8
NUM_STEPS = 4


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__, rounds=3)
    parser.set_defaults(batch_size=BATCH_SIZE)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["B2", "B3"])
    arguments = read_flags(parser, argv)
    if arguments.quick:
        arguments.rounds = 1
    with checkpoint(arguments.model, small=arguments.quick) as folder:
        settings = {
            "folder": str(folder),
            "model": arguments.model,
            "device": str(arguments.device),
            "precision": arguments.precision,
            "batch_size": arguments.batch_size,
        }
        baselines: dict[str, list[float]] = {}
        peaks = interleave(
            {
                name: partial(_peak_mb, name, settings, baselines)
                for name in ["ours", *arguments.peers]
            },
            num_rounds=arguments.rounds,
            num_warm_ups=0,
        )
    added = {
        name: [peak - base for peak, base in zip(peaks[name], baselines[name])] for name in peaks
    }
    result: dict[str, Any] = {
        "peak_mb": {name: spread(values) for name, values in peaks.items()},
        "baseline_mb": {name: spread(values) for name, values in baselines.items()},
        "added_mb": {name: spread(values) for name, values in added.items()},
        "ours_over_peak": {name: ratios(peaks["ours"], peaks[name]) for name in arguments.peers},
        "ours_over_added": {name: ratios(added["ours"], added[name]) for name in arguments.peers},
    }
    rows = [["MB", "median", "min", "max"]]
    for kind in ("baseline", "peak", "added"):
        rows += [
            cells(f"{name}, {kind}", figures, ".0f")
            for name, figures in result[f"{kind}_mb"].items()
        ]
    for kind in ("peak", "added"):
        rows += [
            cells(f"ours / {name}, {kind}", ratio)
            for name, ratio in result[f"ours_over_{kind}"].items()
        ]
    shares = [
        f"{ratio['median']:.2f} x {name}" for name, ratio in result["ours_over_added"].items()
    ]
    finish(
        "memory", arguments, result,
        text=table(rows),
        headline=f"peak {result['peak_mb']['ours']['median']:.0f} MB, of which training adds "
                 f"{result['added_mb']['ours']['median']:.0f} MB: {', '.join(shares)}",
        draw=lambda axes: _draw(axes, result),
    )


def _peak_mb(
    name: str, settings: dict[str, Any], baselines: dict[str, list[float]], _: int
) -> float:
    baseline, peak = in_fresh_process("benchmarks.memory:train_an_epoch", name=name, **settings)
    baselines.setdefault(name, []).append(baseline / 1e6)
    return peak / 1e6


def train_an_epoch(
    name: str, folder: str, model: str, device: str, precision: str, batch_size: int
) -> tuple[int, int]:
    """Bytes in use before a contender's second epoch, and the peak during it."""
    place = torch.device(device)
    use_device(place)
    case = make_case(
        Path(folder),
        argparse.Namespace(
            model=model, device=place, dtype=resolve_dtype(precision, place),
            batch_size=batch_size,
        ),
        num_rows=NUM_STEPS * batch_size,
    )
    if name == "ours":
        trainer = case.ours()
        trainer.encode()
        epoch: Callable[[int], float] = trainer.later_epoch
    else:
        epoch = case.peer(name)
    epoch(0)
    baseline = start_peak(place)
    epoch(1)
    return baseline, peak_bytes(place)


def _draw(axes: Any, result: dict[str, Any]) -> None:
    plots.bars(axes, result["peak_mb"], "peak MB; hollow: baseline")
    baselines = [figures["median"] for figures in result["baseline_mb"].values()]
    axes.barh(list(result["baseline_mb"]), baselines, color="white", edgecolor="C0")


if __name__ == "__main__":
    main()
