"""What a run is made of, from its settings: rows, adapters, datasets, features, loaders."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lora_engine.adapter import load_adapter, read_adapter
from lora_engine.adapter_keeper import AdapterKeeper
from lora_engine.annotations import Row, hold_out, read_annotations
from lora_engine.batches import (
    Batch,
    CaptionedImages,
    Collate,
    default_num_workers,
    load_batches,
)
from lora_engine.config import TrainingConfig
from lora_engine.devices import autocast, describe
from lora_engine.features import FeatureSource, ImageList
from lora_engine.lora import InjectionPlan, cast_frozen, inject
from lora_engine.models import CaptionerBody
from lora_engine.pretrained import FAMILIES, Captioner
from lora_engine.run_folder import RunFolder, allowed_failures


def read_rows(config: TrainingConfig) -> tuple[list[Row], list[Row]]:
    if config.train_data_path is None:
        raise ValueError("--train_data_path is missing: a JSON list of {\"text\", \"image\"} rows")
    rows = read_annotations(config.train_data_path)
    if config.val_data_path is not None:
        train_rows, val_rows = rows, read_annotations(config.val_data_path)
    else:
        train_rows, val_rows = hold_out(rows, fraction=config.val_fraction, seed=config.seed)
    for path, part in ((config.train_data_path, train_rows), (config.val_data_path, val_rows)):
        _check_images_exist(path or config.train_data_path, part, config.max_bad_share)
    return train_rows, val_rows


def _check_images_exist(path: str, rows: Sequence[Row], max_share: float) -> None:
    """Say at once, from 200 of the rows, that the images are not where the file says."""
    looked_at = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), 200)).astype(int)]
    missing = [row.image for row in looked_at if not os.path.isfile(row.image)]
    if len(missing) > allowed_failures(len(looked_at), max_share, is_sample=len(rows) > 200):
        raise ValueError(
            f"{path}: {len(missing)} of {len(looked_at)} rows looked at name an image that does "
            f"not exist, more than --max_bad_share {max_share:g}; the first is {missing[0]} (image "
            f"paths are absolute or relative to the annotation file)"
        )


def add_lora(model: CaptionerBody, config: TrainingConfig) -> InjectionPlan:
    if config.init_adapter is None:
        return inject(
            model,
            config.lora_targets,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
        )
    adapter = read_adapter(config.init_adapter)
    if "prompt" in adapter.provenance and adapter.prompt != config.prompt:
        raise ValueError(
            f"the adapter in {config.init_adapter} was trained with --prompt {adapter.prompt!r}, "
            f"this run has {config.prompt!r}; give the same one"
        )
    return load_adapter(model, adapter, dropout=config.lora_dropout)


def captioned_images(
    rows: Sequence[Row], captioner: Captioner, config: TrainingConfig, *, substitute: bool
) -> CaptionedImages:
    captions = captioner.tokenizer.encode(
        (row.text for row in rows),
        prompt=config.prompt,
        max_caption_tokens=config.max_caption_tokens,
    )
    images = [row.image for row in rows]
    return CaptionedImages(
        images, captions, captioner.pixels, seed=config.seed, substitute=substitute
    )


def place_model(
    model: CaptionerBody, device: torch.device, dtype: torch.dtype, config: TrainingConfig
) -> CaptionerBody:
    """Put the model where and how it runs, in training mode."""
    cast_frozen(model, dtype)
    model.to(device)
    model.decoder.gradient_checkpointing = config.gradient_checkpointing
    model.train()
    if config.compile:
        _compile(model, device, dtype)
    return model


def _compile(model: CaptionerBody, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the decoder's layers, and on a GPU the encoder's, each by itself.

    So the layers of a kind share one compilation; the decoder's hold for all lengths. It is tried
    at once, so that a machine that cannot (no C++ compiler, say) says so in a line and trains
    without.
    """
    layers = list(model.decoder.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    if device.type == "cuda":  # a CPU has its time in the matrix products, which stay as they are
        for layer in model.encoder.layers:
            layer.compile()
            layers.append(layer)
    pixels = torch.zeros(2, 3, *model.encoder.image_size, device=device)
    input_ids = torch.zeros(2, 5, dtype=torch.long, device=device)
    try:
        with autocast(device, dtype):
            with torch.no_grad():
                features = model.encode(pixels)
            model.decode(input_ids, features).sum().backward()
    except Exception as error:  # whatever the compiler's many layers say
        reason = " ".join(str(error).split())[:200]  # the first line names no more than "inductor"
        print(f"--compile does not work here ({reason}): training without it", file=sys.stderr)
        for layer in layers:
            layer._compiled_call_impl = None  # what nn.Module.compile sets
    model.zero_grad(set_to_none=True)


def feature_source(
    captioner: Captioner,
    *datasets: CaptionedImages,
    device: torch.device,
    dtype: torch.dtype,
    config: TrainingConfig,
    say: Callable[[str], None],
) -> FeatureSource:
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return FeatureSource(
        captioner,
        device=device,
        dtype=dtype,
        num_images=len({path for dataset in datasets for path in dataset.image_paths}),
        cache=config.cache,
        cache_dir=Path(config.cache_dir or Path(user_cache, "lora_engine")),
        cache_dtype=config.cache_dtype,
        cache_limit_bytes=config.cache_limit_gb * 1e9,
        say=say,
    )


def loader(
    dataset: CaptionedImages, features: FeatureSource, captioner: Captioner, config: TrainingConfig
) -> Callable[..., Iterator[Batch]]:
    """A function of places, in whose order it gives batches with their images' features."""
    tokenizer = captioner.tokenizer
    images = ImageList(dataset.image_paths)
    load = partial(
        load_batches,
        dataset,
        collate=Collate(
            image_size=captioner.pixels.size,
            longest_bucket=tokenizer.max_positions if features.device.type == "cuda" else None,
            prompt_length=len(tokenizer.prompt_ids(config.prompt)),
            pad_id=tokenizer.pad_id,
        ),
        num_workers=default_num_workers(features.device, config.num_workers),
        has_features=partial(features.has, images),
        pin_memory=features.device.type == "cuda",
    )
    return lambda places, waiting=iter: features.attach(waiting(load(places)), images)


def adapter_keeper(
    captioner: Captioner, folder: RunFolder, train_rows: Sequence[Row], config: TrainingConfig
) -> AdapterKeeper:
    is_folder = Path(captioner.name).is_dir()
    return AdapterKeeper(
        captioner.model,
        folder,
        base_model=str(Path(captioner.name).resolve()) if is_folder else captioner.name,
        hugging_face_class=FAMILIES[captioner.family].hugging_face_class,
        revision=captioner.revision,
        best_by=config.best_by,
        provenance={
            "base_fingerprint": captioner.fingerprint,
            "data_fingerprint": _data_fingerprint(train_rows),
            "label_convention": "each position predicts the next token; one end token",
            "prompt": config.prompt,
        },
    )


def _data_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over captions and image names, not over where the images lie."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.text}\0{os.path.basename(row.image)}\n".encode())
    return digest.hexdigest()


def sizes(
    train_set: CaptionedImages, val_set: CaptionedImages, plan: InjectionPlan
) -> dict[str, int]:
    """How much is trained, on how much, for the report."""
    return {
        "num_train_captions": len(train_set),
        "num_train_images": len(train_set.image_paths),
        "num_val_captions": len(val_set),
        "num_val_images": len(val_set.image_paths),
        "num_adapted_modules": len(plan.modules),
        "num_trainable": plan.num_trainable,
        "num_frozen": plan.num_frozen,
    }


def opening(
    config: TrainingConfig,
    plan: InjectionPlan,
    train_set: CaptionedImages,
    val_set: CaptionedImages,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
) -> str:
    cut = train_set.captions.num_truncated
    truncated = f"; {cut:,} captions cut to {config.max_caption_tokens} tokens" if cut else ""
    return "\n".join([
        f"model {config.model} on {describe(device)}, {str(dtype).removeprefix('torch.')}: "
        f"{kernels}",
        f"data {len(train_set):,} training captions of {len(train_set.image_paths):,} images, "
        f"{len(val_set):,} validation captions of {len(val_set.image_paths):,}{truncated}",
        plan.folded(),
    ])
