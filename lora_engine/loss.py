"""The loss of captions under a captioner.

Axes: B batch, T caption tokens, M valid targets, P image tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.batches import Batch
from lora_engine.models import CaptionerBody


def caption_loss(
    model: CaptionerBody, features: Tensor, batch: Batch, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy in nats, summed over the M valid targets of a batch -> ().

    Only positions that have a target go through the vocabulary head. The caller divides by the
    number of targets of the whole step, so that gradient accumulation over ragged captions is
    exact.
    """
    hidden = model.decode(batch.input_ids, features)
    hidden = hidden.flatten(0, 1)[batch.target_positions]  # (M, D)
    logits = model.head(hidden)  # (M, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits, batch.target_ids, reduction="sum", label_smoothing=label_smoothing
    )
