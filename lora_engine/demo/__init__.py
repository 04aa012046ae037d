"""The embedded demo: scenes that the package draws, and a tiny captioner of each family."""

import dataclasses
from pathlib import Path

from lora_engine.config import TrainingConfig


def captioner_folder(family: str) -> str:
    """The Hugging Face folder of the tiny captioner "blip" or "vit_gpt2" that ships here."""
    return str(Path(__file__).parent / family)


def demo_settings(settings: TrainingConfig, family: str) -> TrainingConfig:
    """A recipe's settings with the demo's captioner and a schedule that suits its size."""
    return dataclasses.replace(
        settings,
        model=captioner_folder(family),
        epochs=8,
        batch_size=32,
        lr=5e-3,
        warmup_steps=20,
        # Plain LoRA: EVA helps short runs and small sets, not these 8 epochs (9.22, without 9.25).
        init_lora_weights="default",
        # A second thread saves a quarter of the time on an idle machine and costs minutes on a busy
        # one, where two threads spin while they wait for each other (benchmarks/LOG.md).
        num_threads=1,
    )
