"""Validation: the loss on rows that are not trained on, and the captions of their images."""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.captioning.metrics import Scores
from lora_engine.data.batches import FeatureBatch, Skipped
from lora_engine.devices import autocast
from lora_engine.features.loader import FeatureLoader
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import OneProcess, Ranks, collect
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
    model: CaptioningModel, batches: Iterable[FeatureBatch], ranks: Ranks = OneProcess()
) -> ValidationLoss:
    """The mean loss over all valid targets, in evaluation mode, without label smoothing.

    `batches` are this process' share, as `ranks.dealt` gives it; the sum is over those of all
    processes, in order. Device and compute dtype are those of the batches' features. Raises
    ValueError if not one row could be loaded.
    """
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []  # on the device until the end: reading one would wait for it
    counts: list[tuple[int, list[Skipped]]] = []
    for batch in batches:
        device, dtype = batch.features.device, batch.features.dtype
        loss = torch.zeros((), dtype=torch.float64, device=device)
        if batch.rows:
            with autocast(device, dtype):
                loss = caption_loss(model, *batch.tensors(device)).double()
        losses.append(loss)
        counts.append((batch.num_targets if batch.rows else 0, batch.skipped))
    model.train(was_training)
    sums = torch.stack(losses).tolist() if losses else []
    mine = [(loss, *count) for loss, count in zip(sums, counts)]
    total, num_targets = 0.0, 0
    skipped: list[Skipped] = []
    for batch_loss, batch_targets, problems in collect(mine, ranks):
        total += batch_loss
        num_targets += batch_targets
        skipped += (Skipped(*problem) for problem in problems)
    if not num_targets:
        first = f", first {skipped[0].image}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"no validation image can be read ({len(skipped)} failed{first})")
    return ValidationLoss(total / num_targets, skipped)


class Validation:
    """Measures a run's captioner on its validation rows: the loss, and captions with their scores.

    `loader` gives this process' batches for the loss, `caption_loader` those for `captions`.
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
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
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
                self.captioner.model, self._with_progress(batches, step, num_rows), self.ranks
            )
        self.skipped.add_validation(skipped, dataset_size=num_rows)
        if step == 0 and not math.isfinite(loss):
            raise ValueError(
                f"the validation loss before any training is {loss}: {self.captioner.name} cannot "
                f"be trained like this; try --precision fp32"
            )
        with closing(iter(self.caption_loader)) as batches:
            scores = self.captions.caption(step, batches, self.ranks)
        return loss, scores

    def _with_progress(
        self, batches: Iterable[FeatureBatch], step: int, num_rows: int
    ) -> Iterator[FeatureBatch]:
        num_done = 0
        for batch in batches:
            yield batch
            # The others are about as far.
            num_done += self.ranks.size * (len(batch.rows) + len(batch.skipped))
            num_done = min(num_done, num_rows)
            self.metrics.tick(f"step {step}: validated {num_done} of {num_rows} captions")
