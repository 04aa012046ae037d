"""The optimizer of the LoRA matrices, and what happens to a step that is not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in one fused kernel; moments are fp32 like the matrices."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def optimizer_step(
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    parameters: list[nn.Parameter],
    loss: Tensor,
    *,
    lr: float,
    max_grad_norm: float,
) -> Tensor:
    """Clip, step, and clear the gradients -> their norm before clipping, (), on the device.

    A step whose loss or gradient is not finite changes neither matrices nor moments. That is
    decided on the device, without waiting for it: fused AdamW takes `found_inf` and does nothing
    where it is 1 (the way that a GradScaler uses; for fp16 the scaler does it).
    """
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not scaler.is_enabled():
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
