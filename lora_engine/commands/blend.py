"""python -m lora_engine blend: a weighted sum of adapters, as one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_engine import cli
from lora_engine.captioning.merging import check_out
from lora_engine.lora.adapter import read_adapter
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.lora.blending import blend as blended
from lora_engine.terminal import printable


@dataclass(frozen=True)
class BlendConfig:
    """Flags of `blend`."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Adapters of one base with their weights, such as runs/a:0.7 runs/b:0.3: run folders, adapter
    folders, or owner/name on the Hub. A negative weight subtracts what the adapter has learned.
    Without weights, the mean. A single adapter is scaled."""
    out: str
    """Folder for the new adapter; it must be new or empty."""
    rank: int | None = None
    """Truncate each layer's update to this rank by SVD. Default: exact, of the sum of the ranks."""


def blend(args: list[str]) -> int:
    """Write a weighted sum of adapters as a new adapter, and return the exit status."""
    config = cli.parse(
        BlendConfig, args, prog="python -m lora_engine blend",
        description="Blend adapters of one base: their weighted sum, as one LoRA adapter.",
    )
    check_out(Path(config.out))
    names, weights = _names_and_weights(config.adapters)
    result = blended(
        [read_adapter(find_adapter(name)) for name in names], weights, rank=config.rank
    )
    result.save(config.out)
    ranks = sorted({len(A) for A, _ in result.matrices.values()})
    told = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    parts = " + ".join(f"{weight:g} x {name}" for name, weight in zip(names, weights))
    lines = [f"blended {parts}: LoRA of rank {told} on {len(result.matrices)} layers"]
    if config.rank is not None and not any(result.cut.values()):
        lines.append(f"nothing to cut: the exact blend has rank {told}, within {config.rank}")
    elif config.rank is not None:
        path, error = result.worst
        lines.append(
            f"cut by rank {config.rank}: {result.error:.2%} of the update's Frobenius norm, at "
            f"most {error:.2%} of a layer's ({path})"
        )
    out, program = cli.quoted(config.out), cli.this_program()
    print(printable("\n".join([
        *lines,
        f"adapter     {config.out}",
        f"to caption  {program} caption --adapter {out} photo.jpg",
        f"to score    {program} evaluate --adapter {out} --data val.json",
    ])))
    return 0


def _names_and_weights(adapters: Sequence[str]) -> tuple[list[str], list[float]]:
    """Adapters' names and weights from NAME:WEIGHT or NAME, which may contain colons itself."""
    names, weights = [], []
    for text in adapters:
        name, _, tail = text.rpartition(":")
        is_name = not name or Path(text).exists() or tail.startswith(("/", "\\"))  # C:\runs\mine
        try:
            weight = None if is_name else float(tail)
        except ValueError:
            raise ValueError(
                f"the weight {tail!r} in {text!r} is not a number; expected NAME:WEIGHT, such as "
                f"{name}:0.7"
            ) from None
        names.append(text if weight is None else name)
        weights.append(weight)
    if not names:
        raise ValueError("no adapters to blend: give one or more, such as runs/a:0.7 runs/b:0.3")
    missing = [name for name, weight in zip(names, weights) if weight is None]
    if len(missing) not in (0, len(names)):
        raise ValueError(f"{missing[0]} has no weight; give all adapters one, or none for the mean")
    return names, [1 / len(names) if weight is None else weight for weight in weights]
