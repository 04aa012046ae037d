"""Adapter folders for tests."""

from pathlib import Path

import torch

from lora_engine.lora.adapter import save_adapter
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.models.pretrained import load_captioner


def adapter_folder(model: Path, folder: Path, *, prompt="", seed: int = 1) -> Path:
    """An adapter whose weights change every caption."""
    captioner = load_captioner(model)
    inject(captioner.model, ["attention"], rank=2)
    torch.manual_seed(seed)
    for matrix in lora_parameters(captioner.model).values():
        torch.nn.init.normal_(matrix, std=0.3)
    save_adapter(
        captioner.model, folder, base_model=str(model),
        provenance={"base_fingerprint": captioner.fingerprints["base"], "prompt": prompt},
    )
    return folder
