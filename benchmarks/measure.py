"""Interleaved rounds, medians with their range, a table and a JSON file."""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleave(
    contenders: dict[str, Callable[[int], float]], *, num_rounds: int
) -> dict[str, list[float]]:
    """Call every contender once a round, in turn -> its figure of each round.

    Round 0 warms up and does not count. In turn, because a machine's speed drifts: ratios are
    formed within rounds.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(num_rounds + 1):
        for name, contender in contenders.items():
            figure = contender(number)
            if number:
                figures[name].append(figure)
            print(f"round {number}/{num_rounds}  {name:<24} {figure:8.2f}", flush=True)
    return figures


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(rows: list[list[str]]) -> str:
    """Rows of cells as text, the first row above a line; all but the first column to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_result(name: str, result: dict[str, Any], *, device: torch.device) -> Path:
    """Write results/<name>.json with what the figures depend on."""
    import transformers

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
        "transformers": transformers.__version__,
        **result,
    }, indent=2) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
