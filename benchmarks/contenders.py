"""The contenders by short name, on the same checkpoint and the same rows.

PEFT and transformers' models are imported when they are first needed, so that a process that runs
only our engine does not pay for them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.ours import Ours
from benchmarks.rows import Rows
from lora_engine.data.pixels import PixelSettings
from lora_engine.features.precision import EncoderPrecision

# name: builder in peers.py, and its additional arguments
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "B0": ("published_loop", {}),
    "B1": ("trainer", {}),
    "B2": ("peft_loop", {}),
    "B2sdpa": ("peft_loop", {"sdpa": True}),
    "B3": ("feature_loop", {}),
    "B4": ("compiled_loop", {}),
    "B4graphs": (
        "compiled_loop", {"compile_options": {"dynamic": False, "mode": "reduce-overhead"}}
    ),
}
_B0_BATCH_SIZE = 2  # an image takes seconds on a CPU


@dataclass(frozen=True)
class Case:
    """What all contenders of a benchmark get."""

    folder: Path
    model: str
    rows: Rows
    settings: PixelSettings
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    lora_dropout: float = 0.0

    def ours(
        self,
        *,
        compile: bool = False,
        encoder: EncoderPrecision = "auto",
        variant: Mapping[str, Any] = MappingProxyType({}),
    ) -> Ours:
        return Ours(
            self.folder, self.rows, self.settings, device=self.device, dtype=self.dtype,
            batch_size=self.batch_size, lora_dropout=self.lora_dropout, compile=compile,
            encoder=encoder, variant=variant,
        )

    def peer(self, name: str, **more: Any) -> Callable[[int], float]:
        """A peer from PEERS: a function that trains an epoch -> captions/s."""
        from benchmarks import peers

        _hide_progress_bars()
        builder, options = PEERS[name]
        rows, batch_size = self.rows, self.batch_size
        if name == "B0":
            num_rows = _B0_BATCH_SIZE * len(rows.captions) // batch_size  # as many steps
            rows, batch_size = Rows(num_rows, self.settings.size, model=self.model), _B0_BATCH_SIZE
        return getattr(peers, builder)(
            self.folder, rows, self.settings, model=self.model, device=self.device,
            dtype=self.dtype, batch_size=batch_size, lora_dropout=self.lora_dropout,
            **options, **more,
        )


@contextmanager
def checkpoint(model: str, *, small: bool, dropout: float = 0.0) -> Iterator[Path]:
    """A random checkpoint in a temporary folder; `dropout` is that of GPT-2 itself."""
    from benchmarks.checkpoints import write_checkpoint

    _hide_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(model, Path(name), small=small, dropout=dropout)
        yield Path(name)


def make_case(
    folder: Path,
    arguments: argparse.Namespace,
    *,
    num_rows: int,
    captions_per_image: int = 1,
    lora_dropout: float = 0.0,
) -> Case:
    """A checkpoint and rows with images of its size, as the flags of `measure.read_flags` ask."""
    settings = pixel_settings(folder)
    rows = Rows(
        num_rows, settings.size, model=arguments.model, captions_per_image=captions_per_image
    )
    return Case(
        folder, arguments.model, rows, settings, arguments.device, arguments.dtype,
        arguments.batch_size, lora_dropout,
    )


def _hide_progress_bars() -> None:
    """Hide the bars of loading and writing weights, which would clutter the figures."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def pixel_settings(folder: Path) -> PixelSettings:
    """Settings for pixels that already have the encoder's size."""
    config = json.loads((folder / "config.json").read_text())
    size = config.get("vision_config", config.get("encoder"))["image_size"]
    return PixelSettings((size, size), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
