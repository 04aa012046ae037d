"""How fast this machine is: matrix products, decoding an image, and training a captioner.

Speed does not depend on the weights, so that the published sizes are measured with random ones.

Axes: B batch, T caption tokens, P image tokens, D width.
"""

import dataclasses
import io
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lora_engine.data.batches import FeatureBatch
from lora_engine.data.pixels import PixelSettings, load_pixels
from lora_engine.data.workers import default_num_workers
from lora_engine.features.encoder import FeatureEncoder, shortest_s
from lora_engine.features.format import FeatureFormat
from lora_engine.features.sizing import Sizing
from lora_engine.lora.injection import inject
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner, build_from_config
from lora_engine.training.setup import place_model
from lora_engine.training.trainer import Trainer

BATCH_SIZE = 8
NUM_TOKENS = 13  # inputs of a typical caption of CC3M, with its start and the padding of a batch
PHOTOGRAPH = (640, 480)  # width, height
PIXELS = PixelSettings((384, 384), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # BLIP's size
# What config.json of the published base captioners says about sizes, where transformers' defaults
# are others (Salesforce/blip-image-captioning-base, nlpconnect/vit-gpt2-image-captioning).
BASE_SIZES: dict[str, dict[str, Any]] = {
    "BLIP base": {
        "model_type": "blip",
        "text_config": {"num_attention_heads": 12},
        "vision_config": {"image_size": 384},
    },
    "ViT+GPT2 base": {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
    },
}

_NUM_ROUNDS = 3  # of which the median counts
_LEARNING_RATE = 1e-3  # high, so that a step's error shows in the next step's loss
_MAX_RECORDED_ERROR = 1e-2  # relative; bf16's kernels do not add in the same order twice


def matrix_rate(
    device: torch.device, dtype: torch.dtype, rows: int, size: int, *, multiply: Any = torch.mm
) -> float:
    """FLOP/s of products of random (rows, size) and (size, size) matrices."""
    x = torch.randn(rows, size, device=device, dtype=dtype)
    y = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * rows * size**2 / shortest_s(lambda: multiply(x, y), device)


def photograph() -> bytes:
    """A JPEG file of PHOTOGRAPH's size with about as much detail as a photograph (100 kB)."""
    width, height = PHOTOGRAPH
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    detailed = smooth + 6 * generator.standard_normal((height, width, 1), dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray(detailed.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode_s(settings: PixelSettings = PIXELS) -> float:
    """Seconds in which one process reads a photograph from memory as pixels."""
    file = photograph()
    return shortest_s(lambda: load_pixels(file, settings), torch.device("cpu"))


def write_sizes(folder: Path) -> dict[str, Path]:
    """Write each of BASE_SIZES into a model folder of its own; returns these folders by name."""
    folders = {name: folder / size["model_type"] for name, size in BASE_SIZES.items()}
    for name, path in folders.items():
        path.mkdir()
        (path / "config.json").write_text(json.dumps(BASE_SIZES[name]))
    return folders


def num_parameters(folder: Path) -> int:
    """The number of weights of the captioner that a folder's config.json describes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_from_config(folder).parameters())


def random_captioner(folder: Path) -> Captioner:
    """The captioner that a folder's config.json describes, with random weights, without the rest.

    Embeddings get the deviation of published ones. With torch's, 1, most probabilities of words
    would be denormal numbers, with which a processor computes several times as slowly.
    """
    model = build_from_config(folder)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    settings = dataclasses.replace(PIXELS, resize=model.encoder.image_size)
    no_tokenizer: Any = None
    return Captioner(model, no_tokenizer, settings, "", "", folder, None, {})


class TrainingSpeed:
    """Measures the training of a captioner with LoRA, set as in `recipes/finetune.py`.

    The captioner's model gets adapters, and moves to the device. `sizing` is that of one image with
    one caption, `images_per_s` the rates of an epoch that encodes every image and of a later one
    that has all features in memory. `records` tells whether steps are recorded as CUDA graphs.
    """

    def __init__(
        self, captioner: Captioner, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        inject(captioner.model, ["attention", "feed_forward"], rank=8, alpha=32, dropout=0.1)
        self.model = place_model(captioner.model, device, dtype)
        encoder = FeatureEncoder(captioner, device=device, dtype=dtype)
        encode_s = encoder.measure_s()
        self.features = encoder.format
        self.sizing = Sizing(
            num_images=1,
            num_captions=1,
            features=self.features,
            load_s=decode_s(captioner.pixels),
            encode_s=encode_s,
            train_s=self._step_s() / BATCH_SIZE,
            read_s=None,
            num_kept=1,
            num_loaders=default_num_workers(device, None),
        )

    @property
    def images_per_s(self) -> tuple[float, float]:
        return 1 / self.sizing.first_epoch_s, 1 / self.sizing.later_epoch_s

    def recording_problem(self) -> str | None:
        """Why recorded steps (CUDA graphs) are not used, or how far loss or gradient norm differ
        from those of plain steps; None if they agree.

        Both begin at the same start with steps of one shape: the first ones record, others replay.
        """
        trainer = self._trainer(cuda_graphs=False)
        start = trainer.lora.values.detach().clone()
        plain = self._steps(trainer)
        with torch.no_grad():
            trainer.lora.values.copy_(start)  # from here the next trainer takes its matrices
        trainer = self._trainer(cuda_graphs=True)
        recorded = self._steps(trainer)
        if trainer.graphs is not None and trainer.graphs.problem is not None:
            return trainer.graphs.problem
        errors = (recorded - plain).abs() / plain.abs()
        error = float(torch.where(recorded == plain, 0.0, errors).max())  # also of infinite norms
        if error <= _MAX_RECORDED_ERROR:
            return None
        return f"recorded steps differ from plain ones by {error:.1e}"

    def _step_s(self) -> float:
        trainer = self._trainer(cuda_graphs=True)
        self.records = trainer.graphs is not None
        num_warm_ups, num_timed = (3, 8) if self.device.type == "cuda" else (1, 1)
        batches = self._batches(num_timed)
        self._run(trainer, self._batches(num_warm_ups))
        seconds = []
        for _ in range(_NUM_ROUNDS):
            begin_s = time.perf_counter()
            self._run(trainer, batches)
            seconds.append((time.perf_counter() - begin_s) / num_timed)
        return statistics.median(seconds)

    def _trainer(self, *, cuda_graphs: bool) -> Trainer:
        return Trainer(
            self.model, device=self.device, dtype=self.dtype, lr=_LEARNING_RATE,
            cuda_graphs=cuda_graphs,
        )

    def _steps(self, trainer: Trainer) -> Tensor:
        return self._run(trainer, self._batches(5))

    def _run(self, trainer: Trainer, batches: Sequence[FeatureBatch]) -> Tensor:
        """A step on each batch -> (steps, 2): loss, and norm of its gradient."""
        results = []
        for step, batch in enumerate(batches, 1):
            loss = trainer.accumulate([batch], step)
            results.append(torch.stack([loss, trainer.update(loss, lr=_LEARNING_RATE)]))
        return torch.stack(results).cpu()  # waits for the device

    def _batches(self, number: int) -> list[FeatureBatch]:
        return [
            batch._replace(features=batch.features.to(self.device, self.dtype))
            for batch in (random_batch(self.model, self.features, seed) for seed in range(number))
        ]


def random_batch(model: CaptioningModel, features: FeatureFormat, seed: int) -> FeatureBatch:
    """BATCH_SIZE random captions of NUM_TOKENS tokens with random features, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = min(NUM_TOKENS, model.decoder.max_positions)
    shape = BATCH_SIZE, num_tokens + 1
    tokens = torch.randint(model.vocabulary.out_features, shape, generator=generator)
    num_targets = BATCH_SIZE * num_tokens
    return FeatureBatch(
        input_ids=tokens[:, :-1],
        target_positions=torch.arange(num_targets),
        target_ids=tokens[:, 1:].flatten(),
        num_targets=num_targets,
        rows=list(range(BATCH_SIZE)),
        images=list(range(BATCH_SIZE)),
        skipped=[],
        features=torch.randn(
            BATCH_SIZE, features.num_tokens, features.width, generator=generator
        ),
    )
