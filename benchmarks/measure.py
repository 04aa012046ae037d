"""Shared by all benchmarks: flags, interleaved rounds, timing, tables and result files."""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.plots import Draw, save_plot
from lora_engine.devices import describe, resolve_device, resolve_dtype, use_device

RESULTS = Path(__file__).parent / "results"
MODELS = ("blip", "vit_gpt2")
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Spread = dict[str, float]  # median, min and max of the rounds
_QUICK_ROUNDS = 2
_BATCH_SIZE = {"cpu": 8, "cuda": 32}


# --- flags ----------------------------------------------------------------------------------


def flags(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The flags of every benchmark; each adds more, then calls `read_flags`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="blip", help="its sizes are used")
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 32 on a GPU")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument(
        "--quick", action="store_true",
        help=f"check that it runs: a small model, {_QUICK_ROUNDS} rounds, meaningless figures",
    )
    parser.add_argument("--tag", help="added to the names of the result files")
    return parser


def read_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags, with `device` and `dtype` as torch objects.

    A GPU is set up as for training, for the peers, too: without attention by cuDNN.
    """
    arguments = parser.parse_args(argv)
    try:
        arguments.device = resolve_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    use_device(arguments.device)
    arguments.dtype = resolve_dtype(arguments.precision, arguments.device)
    arguments.precision = PRECISIONS[arguments.dtype]
    arguments.batch_size = arguments.batch_size or _BATCH_SIZE[arguments.device.type]
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, _QUICK_ROUNDS)
    return arguments


# --- rounds ---------------------------------------------------------------------------------


def interleave(
    contenders: dict[str, Callable[[int], float]],
    *,
    num_rounds: int,
    num_warm_ups: int = 1,
    show: bool = True,
) -> dict[str, list[float]]:
    """Call every contender once per round, in turn -> its figure of each round.

    They take turns because a machine's speed drifts; ratios are formed within rounds. Warm-up
    rounds do not count. A contender gets the number of its earlier calls.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(num_warm_ups + num_rounds):
        counts = number >= num_warm_ups
        label = f"round {number - num_warm_ups + 1}/{num_rounds}" if counts else "warming up"
        for name, contender in contenders.items():
            figure = contender(number)
            if counts:
                figures[name].append(figure)
            if show:
                print(f"{label:<12} {name:<28} {figure:10.2f}", flush=True)
    return figures


def spread(values: list[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(values: list[float], others: list[float]) -> Spread:
    """The ratio within each round."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(
    call: Callable[[], object], device: torch.device, *, least_s: float = 0.1
) -> float:
    """Mean time of a call, over enough calls to take `least_s`, after a first one."""
    def together(count: int) -> float:
        wait_for(device)
        begin_s = time.perf_counter()
        for _ in range(count):
            call()
        wait_for(device)
        return time.perf_counter() - begin_s

    first_s = together(1)
    if first_s >= least_s:
        return first_s
    count = math.ceil(least_s / max(together(1), 1e-6))
    return together(count) / count


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A CUDA graph of the call, to time its kernels without their launches."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries allocate their workspaces before the capture
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_fresh_process(function: str, **arguments: Any) -> Any:
    """Call "benchmarks.MODULE:FUNCTION" in a new process, which imports only what it needs.

    Arguments and result are passed as JSON.
    """
    program = (
        "import importlib, json, sys\n"
        "module, _, name = sys.argv[1].partition(':')\n"
        "function = getattr(importlib.import_module(module), name)\n"
        "print(json.dumps(function(**json.loads(sys.argv[2]))))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, function, json.dumps(arguments)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1],
    ).stdout
    return json.loads(output.splitlines()[-1])


# --- memory ---------------------------------------------------------------------------------


def start_peak(device: torch.device) -> int:
    """Start measuring this process's peak memory -> bytes currently in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if platform.libc_ver()[0] == "glibc":  # it keeps freed memory, which would count as in use
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current use
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


# --- results --------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """Rows of cells as text: a line below the first row, numbers aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cells(name: str, figures: Spread, form: str = ".2f") -> list[str]:
    """A table row with the columns median, min and max."""
    return [name, *(format(figures[key], form) for key in ("median", "min", "max"))]


def finish(
    name: str,
    arguments: argparse.Namespace,
    result: dict[str, Any],
    *,
    text: str,
    headline: str,
    draw: Draw,
) -> Path:
    """Write results/NAME-MODEL-DEVICE[-TAG][-quick].json and .png, and print the table.

    The last line printed is the headline, which `benchmarks.all` shows.
    """
    size = " (small)" if arguments.quick else ""
    settings = {
        "benchmark": name,
        "model": arguments.model + size,
        "device": describe(arguments.device),
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
        "num_rounds": arguments.rounds,
        "headline": headline,
    }
    parts = [name, arguments.model, arguments.device.type, arguments.tag,
             "quick" if arguments.quick else None]
    path = write_result(
        "-".join(filter(None, parts)), settings | result, device=arguments.device
    )
    title = f"{settings['model']}, {arguments.precision}, {settings['device']}"
    print(f"\n{name}: {title}\n{text}\n")
    has_plot = save_plot(path.with_suffix(".png"), f"{name}: {title}", draw)
    print(f"written to {path}{' and .png' if has_plot else '; no plot without matplotlib'}")
    print(headline)
    return path


def write_result(name: str, result: dict[str, Any], *, device: torch.device) -> Path:
    """Write results/NAME.json with commit, machine and versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": machine,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        **result,
    }, indent=2) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
