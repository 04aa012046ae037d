"""LoRA training for image captioning from scratch: BLIP and ViT+GPT2.

Importing this package is fast: each name below imports its module on first use, and transformers is
imported with the first model.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lora_engine.other_names import PYTHON, ours_for
from lora_engine.version import __version__

if TYPE_CHECKING:
    from lora_engine.captioning.generation import generate
    from lora_engine.captioning.image_captioner import ImageCaptioner, load_captioner
    from lora_engine.config import TrainingConfig
    from lora_engine.lora.adapter import load_adapter, save_adapter
    from lora_engine.lora.injection import inject, merge, unmerge
    from lora_engine.training.python_run import train

_MODULES = {
    "inject": "lora.injection",
    "merge": "lora.injection",
    "unmerge": "lora.injection",
    "load_adapter": "lora.adapter",
    "save_adapter": "lora.adapter",
    "load_captioner": "captioning.image_captioner",
    "ImageCaptioner": "captioning.image_captioner",
    "generate": "captioning.generation",
    "train": "training.python_run",
    "TrainingConfig": "config",
}

__all__ = [
    "__version__",
    "ImageCaptioner",
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
    if name not in _MODULES:
        ours = ours_for(name, PYTHON, __all__)
        advice = f"; it is lora_engine.{ours} here" if ours else ""
        raise AttributeError(
            f"module 'lora_engine' has no attribute {name!r}{advice}",
            name=name, obj=sys.modules[__name__],
        )
    return getattr(import_module(f"lora_engine.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
