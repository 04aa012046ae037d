"""Validation: the loss on rows that were not trained on, sample captions, and the best adapter."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lora_engine.adapter import save_adapter
from lora_engine.annotations import Row
from lora_engine.batches import (
    Batch,
    CaptionedImages,
    Skipped,
    validation_places,
)
from lora_engine.captioning import caption_pixels
from lora_engine.config import TrainingConfig
from lora_engine.devices import autocast
from lora_engine.features import encode_pixels
from lora_engine.images import ImageError, PixelSettings, open_image, to_pixels
from lora_engine.journal import Journal
from lora_engine.loss import caption_loss
from lora_engine.models import CaptionerBody
from lora_engine.pretrained import FAMILIES, Captioner
from lora_engine.run_folder import RunFolder, SkippedRows, TrainingStopped
from lora_engine.summary import Sample, TrainingSummary


MAX_SAMPLE_TOKENS = 30


class ValidationLoss(NamedTuple):
    """`loss` is nats per valid target token; `skipped` are the rows that could not be loaded."""

    loss: float
    skipped: list[Skipped]


@torch.no_grad()
def validation_loss(
    model: CaptionerBody,
    batches: Iterable[Batch],
    *,
    pixels: PixelSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> ValidationLoss:
    """The mean loss over all valid targets, in evaluation mode, without label smoothing.

    Raises ValueError if not one row could be loaded.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = 0
    skipped: list[Skipped] = []
    for batch in batches:
        skipped += batch.skipped
        if not batch.rows:
            continue
        batch = batch.to(device)
        with autocast(device, dtype):
            features = encode_pixels(model, batch.pixels, pixels)
            total += caption_loss(model, features, batch)
        num_targets += len(batch.target_ids)
    model.train(was_training)
    if not num_targets:
        first = f", first {skipped[0].image}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"no validation image can be read ({len(skipped)} failed{first})")
    return ValidationLoss(float(total) / num_targets, skipped)


class Validation:
    """Validates, captions a few fixed images, and keeps the best adapter."""

    def __init__(
        self,
        captioner: Captioner,
        dataset: CaptionedImages,
        rows: Sequence[Row],
        load: Callable[..., Iterator[Batch]],
        config: TrainingConfig,
        folder: RunFolder,
        journal: Journal,
        skipped: SkippedRows,
        device: torch.device,
        dtype: torch.dtype,
        *,
        data_fingerprint: str,
    ) -> None:
        self.captioner = captioner
        self.dataset = dataset
        self.load = load
        self.config = config
        self.folder = folder
        self.journal = journal
        self.skipped = skipped
        self.device = device
        self.dtype = dtype
        self.losses: dict[int, float] = {}
        self.captions: dict[int, list[str]] = {}
        self.best_step = 0
        self.data_fingerprint = data_fingerprint
        self.samples = _pick_samples(rows, captioner, config.num_samples)

    def run(self, *, step: int, epoch: float) -> None:
        """Validate after `step` steps; the adapter is kept if it is the best so far.

        Raises TrainingStopped for too many unusable images, and ValueError where nothing can be
        learnt: no image at all, or a loss that is not finite before any training.
        """
        places = validation_places(
            self.dataset.captions.lengths, batch_size=self.config.batch_size
        )
        result = validation_loss(
            self.captioner.model,
            self._with_progress(self.load(self.dataset, places), step),
            pixels=self.captioner.pixels,
            device=self.device,
            dtype=self.dtype,
        )
        self.skipped.list(result.skipped)
        if len(result.skipped) > self.config.max_bad_share * len(self.dataset):
            raise TrainingStopped(
                f"{len(result.skipped)} of {len(self.dataset)} validation images cannot be used, "
                f"more than --max_bad_share {self.config.max_bad_share:g}; the first is "
                f"{result.skipped[0].image}: {result.skipped[0].reason}"
            )
        if step == 0 and not math.isfinite(result.loss):
            raise ValueError(
                f"the validation loss before any training is {result.loss}: {self.config.model} "
                f"cannot be trained like this; try --precision fp32"
            )
        captions = self._caption_samples()
        self.losses[step] = result.loss
        self.captions[step] = captions
        self.journal.record("validation", step=step, epoch=epoch, loss=result.loss)
        is_best = step == 0 or result.loss < self.losses[self.best_step]
        if is_best:
            self.best_step = step
            self._save(self.folder.adapter, step)
        best = " (best so far)" if is_best and step else ""
        self.journal.say(f"step {step}: validation loss {result.loss:.4f}{best}")
        for (row, _), caption in zip(self.samples, captions):
            self.folder.append(self.folder.samples, {
                "step": step, "image": row.image, "reference": row.text, "caption": caption,
            })

    def keep_last(self, step: int) -> None:
        """Keep the adapter as it is after `step` too, where it is not the best."""
        if step != self.best_step:
            self._save(self.folder.last_adapter, step)

    def summary(self, *, seconds: float) -> TrainingSummary:
        before, best = self.captions[0], self.captions[self.best_step]
        return TrainingSummary(
            path=self.folder.path,
            losses=dict(self.losses),
            best_step=self.best_step,
            num_skipped_images=self.skipped.num_images,
            samples=tuple(
                Sample(row.image, row.text, *captions)
                for (row, _), *captions in zip(self.samples, before, best)
            ),
            seconds=seconds,
        )

    def _save(self, folder: Path, step: int) -> None:
        config = self.config
        is_folder = Path(config.model).is_dir()
        save_adapter(
            self.captioner.model,
            folder,
            base_model=str(Path(config.model).resolve()) if is_folder else config.model,
            hugging_face_class=FAMILIES[self.captioner.family].hugging_face_class,
            revision=config.revision,
            provenance={
                "base_fingerprint": self.captioner.fingerprint,
                "data_fingerprint": self.data_fingerprint,
                "label_convention": "each position predicts the next token; one end token",
                "prompt": config.prompt,
                "step": str(step),
                "validation_loss": f"{self.losses[step]:.7g}" if step in self.losses else "",
            },
        )

    def _caption_samples(self) -> list[str]:
        if not self.samples:
            return []
        tokenizer, prompt = self.captioner.tokenizer, self.config.prompt
        room = tokenizer.max_positions - len(tokenizer.prompt_ids(prompt))
        return caption_pixels(
            self.captioner,
            np.stack([pixels for _, pixels in self.samples]),
            prompt=prompt,
            device=self.device,
            dtype=self.dtype,
            max_new_tokens=min(MAX_SAMPLE_TOKENS, room),
        )

    def _with_progress(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        num_rows = 0
        for batch in batches:
            yield batch
            num_rows += len(batch.rows) + len(batch.skipped)
            self.journal.tick(f"step {step}: validated {num_rows} of {len(self.dataset)} captions")


def _pick_samples(
    rows: Sequence[Row], captioner: Captioner, num_samples: int
) -> list[tuple[Row, np.ndarray]]:
    """Rows of `num_samples` different images, spread over the set, with their pixels."""
    unique = list({row.image: row for row in reversed(rows)}.values())[::-1]
    spread = np.linspace(0, len(unique) - 1, min(num_samples, len(unique))).astype(int)
    samples = []
    for index in spread:
        try:
            pixels = to_pixels(open_image(unique[index].image), captioner.pixels)
            samples.append((unique[index], pixels))
        except ImageError:
            pass  # the validation that follows counts and lists it
    return samples
