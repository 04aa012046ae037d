"""The wall phase of throughput.py: its data, and what its processes do."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from benchmarks.contenders import Case, pixel_settings
from benchmarks.measure import in_fresh_process
from benchmarks.rows import FIRST_WORD_ID, LAST_WORD_ID, Rows
from lora_engine.devices import resolve_dtype


def seconds(contender: str, settings: dict[str, Any], _: int) -> float:
    """Seconds from starting a process of "ours" or of a peer until it ends after training."""
    begin_s = time.perf_counter()
    if contender == "ours":
        in_fresh_process("benchmarks.wall:train_ours", **settings)
    else:
        in_fresh_process("benchmarks.wall:train_peer", name=contender, **settings)
    return time.perf_counter() - begin_s


def train_ours(
    checkpoint: str, dataset: str, *, epochs: int, model: str, num_images: int, **settings: Any
) -> None:
    """The whole engine, on image files, with an empty cache folder."""
    from lora_engine.config import TrainingConfig
    from lora_engine.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        train(TrainingConfig(
            model=checkpoint,
            train_data_path=f"{dataset}/train.json",
            val_data_path=f"{dataset}/val.json",
            output_path=f"{folder}/run",
            cache_dir=f"{folder}/cache",
            epochs=epochs,
            lr=1e-4,
            num_samples=0,
            **settings,
        ))


def train_peer(
    name: str,
    checkpoint: str,
    dataset: str,
    *,
    epochs: int,
    model: str,
    num_images: int,
    device: str,
    precision: str,
    batch_size: int,
    lora_dropout: float,
    compile: bool,  # ours alone
) -> None:
    """A peer, on pixels in memory."""
    settings = pixel_settings(Path(checkpoint))
    place = torch.device(device)
    peer = Case(
        Path(checkpoint), model, Rows(num_images, settings.size, model=model), settings, place,
        resolve_dtype(precision, place), batch_size, lora_dropout,
    ).peer(name)
    for epoch in range(epochs):
        peer(epoch)


def write_dataset(folder: Path, checkpoint: Path, *, model: str, num_images: int) -> None:
    """Write image files of the encoder's size with the captions of `Rows`, one for validation.

    Also writes a tokenizer and a preprocessor into the checkpoint. The words of a caption are "w"
    followed by the token's id.
    """
    from benchmarks.input_path import draw

    height, width = pixel_settings(checkpoint).size
    captions = Rows(num_images + 1, (1, 1), model=model).captions
    rows = []
    for number, caption in enumerate(captions):
        draw(width, height, seed=number).save(folder / f"{number}.jpg", quality=90)
        words = " ".join(f"w{token}" for token in caption[1:-1])
        rows.append({"text": words, "image": f"{number}.jpg"})
    (folder / "train.json").write_text(json.dumps(rows[:-1]))
    (folder / "val.json").write_text(json.dumps(rows[-1:]))

    vocabulary = {f"w{token}": token for token in range(FIRST_WORD_ID, LAST_WORD_ID + 1)}
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, **vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]",
    }))
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "BlipImageProcessor" if model == "blip" else "ViTImageProcessor",
        "size": {"height": height, "width": width}, "resample": 3 if model == "blip" else 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True,
        "do_normalize": True,
    }))
