"""Validation: the loss on rows that are not trained on, and the captions of their images."""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch

from lora_engine.captioning.metrics import Scores
from lora_engine.data.batches import FeatureBatch, Skipped
from lora_engine.devices import autocast
from lora_engine.features.loader import FeatureLoader
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner
from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.training.loss import caption_loss
from lora_engine.training.skipped_rows import SkippedRows
from lora_engine.training.validation_captions import ValidationCaptions


class ValidationLoss(NamedTuple):
    """`loss` in nats per valid target token; `skipped` are the rows that could not be loaded."""

    loss: float
    skipped: list[Skipped]


@torch.no_grad()
def validation_loss(
    model: CaptioningModel, batches: Iterable[FeatureBatch]
) -> ValidationLoss:
    """The mean loss over all valid targets, in evaluation mode, without label smoothing.

    Device and compute dtype are those of the batches' features. Raises ValueError if not one row
    could be loaded.
    """
    was_training = model.training
    model.eval()
    total: torch.Tensor | float = 0.0
    num_targets = 0
    skipped: list[Skipped] = []
    for batch in batches:
        skipped += batch.skipped
        if not batch.rows:
            continue
        device, dtype = batch.features.device, batch.features.dtype
        with autocast(device, dtype):
            total = total + caption_loss(model, *batch.tensors(device)).double()
        num_targets += batch.num_targets
    model.train(was_training)
    if not num_targets:
        first = f", first {skipped[0].image}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"no validation image can be read ({len(skipped)} failed{first})")
    return ValidationLoss(float(total) / num_targets, skipped)


class Validation:
    """Measures a run's captioner on its validation rows: the loss, and captions with their scores.

    `loader` gives the batches for the loss, `caption_loader` those for `captions`.
    """

    def __init__(
        self,
        captioner: Captioner,
        loader: FeatureLoader,
        caption_loader: FeatureLoader,
        *,
        captions: ValidationCaptions,
        skipped: SkippedRows,
        metrics: MetricsLogger,
    ) -> None:
        self.captioner = captioner
        self.loader = loader
        self.caption_loader = caption_loader
        self.captions = captions
        self.skipped = skipped
        self.metrics = metrics

    def measure(self, step: int) -> tuple[float, Scores | None]:
        """The loss after `step` steps, and the scores of the captions if there are any.

        Raises TrainingStopped for too many unusable images, and ValueError if nothing can be
        learnt: no image can be read, or the loss before any training is not finite.
        """
        num_rows = len(self.loader.dataset)
        with closing(iter(self.loader)) as batches:
            loss, skipped = validation_loss(
                self.captioner.model, self._with_progress(batches, step, num_rows)
            )
        self.skipped.add_validation(skipped, dataset_size=num_rows)
        if step == 0 and not math.isfinite(loss):
            raise ValueError(
                f"the validation loss before any training is {loss}: {self.captioner.name} cannot "
                f"be trained like this; try --precision fp32"
            )
        with closing(iter(self.caption_loader)) as batches:
            scores = self.captions.caption(step, batches)
        return loss, scores

    def _with_progress(
        self, batches: Iterable[FeatureBatch], step: int, num_rows: int
    ) -> Iterator[FeatureBatch]:
        num_done = 0
        for batch in batches:
            yield batch
            num_done += len(batch.rows) + len(batch.skipped)
            self.metrics.tick(f"step {step}: validated {num_done} of {num_rows} captions")
