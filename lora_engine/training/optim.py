"""The LoRA parameters of a model as one flat tensor, and their optimizer."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_engine.lora.layer import LoRALinear

_ALIGNMENT = 64  # elements: every matrix begins at a multiple, as fast kernels want their operands


class FlatLoRAParameters:
    """All trained LoRA parameters as views of one fp32 tensor, and their gradients as views of
    another.

    One kernel then computes the gradient's norm, one clips it and one takes the step, instead of
    several for every matrix. With a compute dtype other than the matrices' own, the layers also get
    views of one copy in that dtype, which `refresh` updates: one cast per step.

    `groups` are parts of `values` with learning rates of their own, `rates` times the run's: a
    single one, or with `lr_ratio` A matrices and the rest, whose rate is `lr_ratio` times as high
    (LoRA+, https://arxiv.org/abs/2402.12354).

    Build it after the model is on its device: `.to()` on a model and `zero_grad()` on its
    parameters replace the views by separate tensors.
    """

    def __init__(
        self, layers: Iterable[LoRALinear], dtype: torch.dtype, *, lr_ratio: float | None = None
    ) -> None:
        layers = list(layers)
        named = [
            (name, parameter)
            for layer in layers
            for name, parameter in layer.lora_parameters().items() if parameter.requires_grad
        ]
        if lr_ratio is not None:
            named.sort(key=lambda item: item[0] != "lora_A")
        matrices = [parameter for _, parameter in named]
        padded = [-(-matrix.numel() // _ALIGNMENT) * _ALIGNMENT for matrix in matrices]
        first = matrices[0]
        self._sizes = padded
        self.values = nn.Parameter(first.new_zeros(sum(padded)))
        # One buffer, because processes exchange both at once.
        self.gradient_and_loss = first.new_zeros(sum(padded) + 1)
        self.values.grad, self.loss = self.gradient_and_loss.split([sum(padded), 1])
        self.cast = None if dtype == first.dtype else torch.zeros_like(self.values, dtype=dtype)
        self.groups, self.rates = [self.values], [1.0]
        num_A = sum(size for size, (name, _) in zip(padded, named) if name == "lora_A")
        if lr_ratio is not None and num_A:
            sizes = [num_A, sum(padded) - num_A]
            self.rates = [1.0, lr_ratio]
            self.groups = [nn.Parameter(part) for part in self.values.detach().split(sizes)]
            for group, gradient in zip(self.groups, self.gradient.split(sizes)):
                group.grad = gradient
        elif lr_ratio is not None:
            self.rates = [lr_ratio]

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
            self._cast_views = views(self.cast)
            cast_of = dict(zip(matrices, self._cast_views))
            for layer in layers:
                A, B = layer.lora_A, layer.lora_B
                cast_A = cast_of[A] if A in cast_of else A.detach().to(dtype)
                layer.cast_matrices = cast_A, cast_of[B]
        self.refresh()

    @property
    def gradient(self) -> Tensor:
        assert self.values.grad is not None
        return self.values.grad

    @contextmanager
    def cast_gradients(self) -> Iterator[None]:
        """Within, forward and backward take gradients of the copies in the compute dtype.

        At the end they are added to the fp32 gradients, all in one kernel. Outside autograd casts
        and adds each matrix's gradient by itself. Without copies this does nothing.
        """
        if self.cast is None:
            yield
            return
        try:
            for cast in self._cast_views:
                cast.requires_grad_(True)
            yield
            self.gradient.add_(torch.cat(self._padded_gradients()))
        finally:
            for cast in self._cast_views:
                cast.grad = None
                cast.requires_grad_(False)

    def _padded_gradients(self) -> list[Tensor]:
        """Parts of the flat gradient, in order."""
        parts = []
        for cast, size in zip(self._cast_views, self._sizes):
            if cast.grad is None:
                parts.append(cast.new_zeros(size))
                continue
            parts.append(cast.grad.flatten())
            if size > cast.numel():
                parts.append(cast.new_zeros(size - cast.numel()))
        return parts

    def digest(self) -> str:
        """The SHA-256 of all matrices."""
        return hashlib.sha256(self.values.detach().cpu().numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the copy in the compute dtype, if there is one."""
        if self.cast is not None:
            self.cast.copy_(self.values)


def build_optimizer(
    lora: FlatLoRAParameters,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) in one fused kernel; moments are fp32 like the matrices.

    On a GPU the learning rate is a tensor there, so that a CUDA graph reads its current value.
    """
    on_gpu = lora.values.is_cuda
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [group],
                "lr": torch.tensor(lr * rate, device=group.device) if on_gpu else lr * rate,
                "rate": rate,
            }
            for group, rate in zip(lora.groups, lora.rates)
        ],
        weight_decay=weight_decay,
        betas=betas,
        fused=True,
        capturable=on_gpu,
    )
    # Some steps run without a graph on purpose: no warning about them.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of the next step; in place for a tensor, so that a CUDA graph sees it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["rate"])
        else:
            group["lr"] = lr * group["rate"]
