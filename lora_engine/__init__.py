"""LoRA training for image captioning, written out: BLIP and ViT+GPT2.

Importing this package is fast: each name below loads its room when it is first asked for, and
transformers loads with the first model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lora_engine.version import __version__

if TYPE_CHECKING:
    from lora_engine.adapter import load_adapter, save_adapter
    from lora_engine.generation import generate
    from lora_engine.lora import inject, merge, unmerge
    from lora_engine.pretrained import load_captioner
    from lora_engine.training import TrainingConfig, train

_ROOMS = {
    "inject": "lora",
    "merge": "lora",
    "unmerge": "lora",
    "load_adapter": "adapter",
    "save_adapter": "adapter",
    "load_captioner": "pretrained",
    "generate": "generation",
    "train": "training",
    "TrainingConfig": "training",
}

__all__ = [
    "__version__",
    "TrainingConfig",
    "generate",
    "inject",
    "load_adapter",
    "load_captioner",
    "merge",
    "save_adapter",
    "train",
    "unmerge",
]


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module 'lora_engine' has no attribute {name!r}")
    return getattr(import_module(f"lora_engine.{_ROOMS[name]}"), name)
