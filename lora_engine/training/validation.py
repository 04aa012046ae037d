"""Validation: the loss of a captioner on rows that it is not trained on."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_engine.data.batches import CaptionedImages, FeatureBatch, Skipped, validation_order
from lora_engine.devices import autocast
from lora_engine.features.loader import FeatureLoader
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner
from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.report.run_folder import RunFolder
from lora_engine.training.best_adapter import AdapterKeeper
from lora_engine.training.loss import caption_loss
from lora_engine.training.skipped_rows import SkippedRows
from lora_engine.training.validation_captions import ValidationCaptions


class ValidationLoss(NamedTuple):
    """`loss` is nats per valid target token; `skipped` are the rows that could not be loaded."""

    loss: float
    skipped: list[Skipped]


@torch.no_grad()
def validation_loss(
    model: CaptioningModel,
    batches: Iterable[FeatureBatch],
    *,
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
        with autocast(device, dtype):
            total += caption_loss(model, *batch.tensors(device))
        num_targets += batch.num_targets
    model.train(was_training)
    if not num_targets:
        first = f", first {skipped[0].image}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"no validation image can be read ({len(skipped)} failed{first})")
    return ValidationLoss(float(total) / num_targets, skipped)


@dataclass(kw_only=True)
class Validation:
    """A run's validations: the loss, captions with their scores, and the best adapter."""

    captioner: Captioner
    dataset: CaptionedImages
    load: Callable[..., FeatureLoader]
    batch_size: int
    keeper: AdapterKeeper
    captions: ValidationCaptions
    skipped: SkippedRows
    folder: RunFolder
    metrics: MetricsLogger
    device: torch.device
    dtype: torch.dtype

    def run(
        self, *, step: int, epoch: float, undivided: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Validate after `step` steps; the adapter is kept if it is the best so far.

        All that is written about it is written within `undivided()`.
        Raises TrainingStopped for too many unusable images, and ValueError where nothing can be
        learnt: no image at all, or a loss that is not finite before any training.
        """
        places = validation_order(self.dataset.captions.lengths, batch_size=self.batch_size)
        with closing(iter(self.load(places))) as batches:
            result = validation_loss(
                self.captioner.model,
                self._with_progress(batches, step),
                device=self.device,
                dtype=self.dtype,
            )
        self.skipped.add_validation(result.skipped, dataset_size=len(self.dataset))
        if step == 0 and not math.isfinite(result.loss):
            raise ValueError(
                f"the validation loss before any training is {result.loss}: "
                f"{self.captioner.name} cannot be trained like this; try --precision fp32"
            )
        # All that can fail comes before the first word about this validation is written.
        scores = self.captions.caption(step)
        values = {} if scores is None else scores.as_dict()
        with undivided():
            self.metrics.record("validation", step=step, epoch=epoch, loss=result.loss, **values)
            is_best = self.keeper.offer(step, result.loss, scores)
            found = "" if scores is None else f", CIDEr-D {scores.cider_d:.3f}"
            best = " (best so far)" if is_best and step else ""
            self.metrics.say(f"step {step}: validation loss {result.loss:.4f}{found}{best}")
            self.captions.write(self.folder, step)
            if is_best:
                self.captions.write_best(self.folder, step)
        self.metrics.track("samples", step=step, rows=[
            (os.path.basename(sample.image), sample.reference, sample.before, sample.best)
            for sample in self.captions.compare(step)
        ])

    def _with_progress(self, batches: Iterator[FeatureBatch], step: int) -> Iterator[FeatureBatch]:
        num_rows = 0
        for batch in batches:
            yield batch
            num_rows += len(batch.rows) + len(batch.skipped)
            self.metrics.tick(f"step {step}: validated {num_rows} of {len(self.dataset)} captions")
