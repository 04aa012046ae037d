"""python -m lora_engine tune: choose learning rate, rank and variant by successive halving."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lora_engine import cli
from lora_engine.commands.recipe import settings_of
from lora_engine.config import Range, TrainingConfig, check_ranges
from lora_engine.demo import demo_settings
from lora_engine.report.page import write_report
from lora_engine.terminal import printable
from lora_engine.training.python_run import FINE_TUNING
from lora_engine.training.tuning import VARIANTS, Candidate, Result, candidates_of
from lora_engine.training.tuning import tune as search

logger = logging.getLogger(__name__)

Variant = Literal["lora", "rslora", "dora", "lorafa", "loraplus", "pissa", "olora", "eva"]


@dataclass(frozen=True)
class TuneConfig:
    """Flags of `tune`; all other flags are those of `train`."""

    minutes: Annotated[float, Range(gt=0)] = 10.0
    """Time to take, about: more minutes try more settings."""
    lrs: tuple[float, ...] = ()
    """Learning rates to try. Default: --lr, and a quarter, a half, twice and four times it."""
    ranks: tuple[int, ...] = ()
    """Ranks to try; alpha / rank stays the same. Default: --lora_rank."""
    variants: tuple[Variant, ...] = ("lora", "dora", "loraplus")
    """Variants to try: of LoRA, rsLoRA, DoRA, LoRA-FA, LoRA+ (a ratio of 8), PiSSA, OLoRA, EVA."""
