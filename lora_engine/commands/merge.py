"""python -m lora_engine merge: merge an adapter into its base model, as a Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_engine import cli
from lora_engine.captioning.adapted_captioner import (
    adapted_tensors,
    check_base,
    load_base,
    with_tensors,
)
from lora_engine.captioning.merging import check_out, export_merged
from lora_engine.data.image_files import find_images
from lora_engine.data.pixels import PixelSettings, load_pixels, to_pixels
from lora_engine.lora.adapter import beyond_lora, load_adapter, naming_base, read_adapter
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.lora.injection import lora_layers
from lora_engine.terminal import printable

NUM_DRAWN = 4  # scenes to compare captions on if no images are given


@dataclass(frozen=True)
class MergeConfig:
    """Flags of `merge`."""

    adapter: str
    """Adapter: a run folder, an adapter folder, or owner/name on the Hub."""
    out: str
    """Folder for the merged model; it must be new or empty."""
    model: str | None = None
    """Base model: a folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub model."""
    images: tuple[str, ...] = ()
    """Image files or folders to compare captions on. Default: four drawn scenes."""
    force: bool = False
    """Merge even if the weights, configuration, tokenizer or preprocessor of the base model are not
    those that the adapter was trained on."""


def merge(args: list[str]) -> int:
    """Merge an adapter into its base model, in a new folder, and return the exit status."""
    config = cli.parse(
        MergeConfig, args, prog="python -m lora_engine merge",
        description="Merge an adapter into its base model, as a folder that loads without PEFT.",
    )
    check_out(Path(config.out))
    images = find_images(config.images)
    adapter = read_adapter(find_adapter(config.adapter))
    captioner = load_base(config.model, [adapter], revision=config.revision)
    changed = None
    with naming_base(adapter, captioner.name):
        if beyond_lora(captioner.model, adapter):
            changed = adapted_tensors(captioner, adapter)
            captioner.model = with_tensors(captioner, changed)
        else:
            load_adapter(captioner.model, adapter)
    check_base(captioner, adapter, force=config.force)
    parity = export_merged(
        captioner,
        config.out,
        pixels=_pixels_to_compare(images, captioner.pixels),
        prompt=adapter.prompt,
        changed=changed,
    )
    num_merged = len(changed or list(lora_layers(captioner.model)))
    summary = (
        f"merged {num_merged} weights of {captioner.name} with {config.adapter}\n"
        f"compared with the unmerged adapter: {parity}\n"
        f"merged model  {config.out}"
    )
    if captioner.hugging_face_class:
        summary += (
            f"\nto load it    transformers.{captioner.hugging_face_class}"
            f".from_pretrained({config.out!r})"
        )
    if adapter.prompt:
        summary += (
            f"\nits prompt    {adapter.prompt!r}: not stored in the folder, pass it to generate"
        )
    print(printable(summary))
    return 0


def _pixels_to_compare(images: Sequence[Path], settings: PixelSettings) -> np.ndarray:
    if images:
        return np.stack([load_pixels(image, settings) for image in images])
    from lora_engine.demo.scenes import draw, scene_at

    scenes = [draw(scene_at(index, seed=0)) for index in range(NUM_DRAWN)]
    return np.stack([to_pixels(scene, settings) for scene in scenes])
