"""The optimizer of the LoRA matrices, and what happens to a step that is not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_engine.lora.layer import LoRALinear
from lora_engine.training.cuda_graphs import CudaGraphs

_ALIGNMENT = 64  # elements: every matrix begins at a multiple, as fast kernels want their operands


class FlatLoRAParameters:
    """All LoRA matrices as views of one fp32 tensor, and their gradients as views of another.

    So one kernel measures the gradient, one clips it and one takes the step, instead of some of
    each for every matrix. With a compute dtype other than the matrices' own, the layers also get
    views of one copy in it, which `refresh` brings up to date: one cast a step.

    Build it when the layers are where they stay: `.to()` on a model and `zero_grad()` on its
    parameters put tensors of their own in the place of the views.
    """

    def __init__(self, layers: Iterable[LoRALinear], dtype: torch.dtype) -> None:
        layers = list(layers)
        matrices = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
        padded = [-(-matrix.numel() // _ALIGNMENT) * _ALIGNMENT for matrix in matrices]
        first = matrices[0]
        self.values = nn.Parameter(first.new_zeros(sum(padded)))
        self.values.grad = torch.zeros_like(self.values)
        self.cast = None if dtype == first.dtype else torch.zeros_like(self.values, dtype=dtype)

        def views(flat: Tensor) -> list[Tensor]:
            return [
                part[: matrix.numel()].view_as(matrix)
                for part, matrix in zip(flat.split(padded), matrices)
            ]

        for matrix, value, gradient in zip(
            matrices, views(self.values.data), views(self.gradient)
        ):
            value.copy_(matrix.detach())
            matrix.data = value
            matrix.grad = gradient
        if self.cast is not None:
            casts = views(self.cast)
            for layer, cast_A, cast_B in zip(layers, casts[::2], casts[1::2]):
                layer.cast_matrices = cast_A, cast_B
        self.refresh()

    @property
    def gradient(self) -> Tensor:
        assert self.values.grad is not None
        return self.values.grad

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the matrices as they are now; without a cast there is nothing to do."""
        if self.cast is not None:
            self.cast.copy_(self.values)


def build_optimizer(
    matrices: FlatLoRAParameters, *, lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in one fused kernel; moments are fp32 like the matrices.

    On a GPU the learning rate is a tensor there, so that a recorded step reads the rate of now.
    """
    on_gpu = matrices.values.is_cuda
    optimizer = torch.optim.AdamW(
        [matrices.values],
        lr=torch.tensor(lr, device=matrices.values.device) if on_gpu else lr,
        weight_decay=weight_decay,
        fused=True,
        capturable=on_gpu,
    )
    # Steps that are not recorded are meant to be there: no warning about them.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    return optimizer


def optimizer_step(
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    matrices: FlatLoRAParameters,
    loss: Tensor,
    *,
    lr: float,
    max_grad_norm: float,
    graphs: CudaGraphs | None = None,
) -> Tensor:
    """Clip, step, and clear the gradients -> their norm before clipping, (), on the device.

    A step whose loss or gradient is not finite changes neither matrices nor moments. That is
    decided on the device, without waiting for it: fused AdamW takes `found_inf` and does nothing
    where it is 1 (the way that a GradScaler uses; for fp16 the scaler does it).
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

    def update(loss: Tensor) -> Tensor:
        scaler.unscale_(optimizer)
        gradient = matrices.gradient
        grad_norm = torch.linalg.vector_norm(gradient)
        if max_grad_norm:
            gradient.mul_((max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        if not scaler.is_enabled():
            is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
            optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        scaler.step(optimizer)
        scaler.update()
        gradient.zero_()
        matrices.refresh()
        return grad_norm

    # A GradScaler keeps books on the processor.
    if graphs is None or scaler.is_enabled():
        return update(loss)
    return graphs(update, "update", loss)
