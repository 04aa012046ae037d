"""The loss of captions under a captioner.

Axes: B batch, T caption tokens, M targets, P image tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_engine.data.captions import IGNORED
from lora_engine.lora.layer import is_plain
from lora_engine.lora.matmul import compute_dtype, frozen_linear, is_on_cpu
from lora_engine.models import CaptioningModel

_MAX_LOGITS = 2**24  # that exist at once: 64 MB in fp32
_ALIGNMENT = 64  # rows of the head's weight on a GPU


def caption_loss(
    model: CaptioningModel,
    input_ids: Tensor,
    target_positions: Tensor,
    target_ids: Tensor,
    features: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy in nats, summed over the targets of a batch that are not IGNORED -> ().

    `input_ids` (B, T), `features` (B, P, D), and the targets flat, as in `batches.PixelBatch`:
    `target_ids` (M,) at `target_positions` (M,) of the flattened (B * T). Only those positions go
    through the vocabulary head. The caller divides by the number of targets of the whole step, so
    that gradient accumulation over captions of different lengths is exact.
    """
    hidden = model.decode(input_ids, features)
    hidden = model.head_input(hidden.flatten(0, 1).index_select(0, target_positions))  # (M, D)
    hidden = hidden.to(compute_dtype(hidden))
    vocabulary = model.vocabulary
    if type(vocabulary) is not nn.Linear or not is_plain(vocabulary):
        logits = vocabulary(hidden)
        return F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            target_ids,
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
    bias = vocabulary.bias
    return _FrozenHeadLoss.apply(
        hidden,
        _head_weight(vocabulary, hidden),
        None if bias is None else bias.to(hidden.dtype),
        target_ids,
        label_smoothing,
        vocabulary.out_features,
    )


def _head_weight(vocabulary: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's weight (V or more, D) as the loss multiplies by it, in the dtype of `hidden`.

    On a GPU rows of zeros are added, once, up to a multiple of 64: tensor cores need matrices whose
    rows begin at multiples of 16 bytes, and a row of logits is as long as the vocabulary.
    `vocabulary.weight` becomes a view of the result, so there is no second copy.
    """
    weight = vocabulary.weight
    num_more = -len(weight) % _ALIGNMENT
    if is_on_cpu(weight) or not num_more or weight.dtype != hidden.dtype:
        return weight.to(hidden.dtype)
    padded: Tensor | None = getattr(vocabulary, "padded_weight", None)
    if padded is None or padded.data_ptr() != weight.data_ptr():  # new, or the model has moved
        padded = F.pad(weight.detach(), (0, 0, 0, num_more))
        vocabulary.padded_weight = padded
        weight.data = padded[: len(weight)]
    return padded


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head, without storing all logits.

    The head takes no gradient, so the gradient of its input is formed in the forward pass, a chunk
    of rows at a time, while the logits are there: softmax(logits) less the target's distribution,
    times W (as Liger kernels' fused linear cross-entropy does, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        vocab_size: int | None = None,  # rows of the weight that are not padding; None: all
    ) -> Tensor:
        vocab_size = len(weight) if vocab_size is None else vocab_size
        needs_gradient = ctx.needs_input_grad[0]
        gradients: list[Tensor] = []
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=accurate, device=hidden.device)
        num_rows = max(_MAX_LOGITS // vocab_size, 1)
        for rows, ids in zip(hidden.split(num_rows), targets.split(num_rows)):
            is_valid = ids != IGNORED
            ids = ids.clamp_min(0)[:, None]
            padded = frozen_linear(rows, weight).to(accurate)  # (chunk of M, V or more)
            logits = padded[:, :vocab_size]
            if bias is not None:
                logits += bias
            at_target = logits.gather(1, ids)
            if smoothing:
                at_target = at_target.lerp(logits.mean(dim=1, keepdim=True), smoothing)
            # In place from here on, because logits are large: their exponentials, then the softmax.
            largest = logits.amax(dim=1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            losses = largest + total.log() - at_target  # (chunk of M, 1)
            loss += losses[:, 0].masked_fill(~is_valid, 0.0).sum()
            if needs_gradient:
                gradient = logits.div_(total)
                if smoothing:
                    gradient.sub_(smoothing / vocab_size)
                gradient.scatter_add_(1, ids, torch.full_like(losses, smoothing - 1))
                gradient.mul_(is_valid[:, None])
                # The padding's logits and gradients are zeros, like its rows of the weight.
                gradients.append(frozen_linear(padded.to(hidden.dtype), weight.T))
        if needs_gradient:
            ctx.save_for_backward(
                gradients[0] if len(gradients) == 1 else torch.cat(gradients)
            )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (d_hidden,) = ctx.saved_tensors
        # fp16's loss scale arrives here in fp32: multiply before rounding to the hidden's dtype.
        return (gradient * d_hidden.to(gradient.dtype)).to(d_hidden.dtype), *[None] * 5
