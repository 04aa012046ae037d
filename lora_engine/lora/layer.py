"""LoRA: the layer and its formula.

    x ─┬────────────── W (frozen) ──────────────┐
       └─ dropout ── A (R, in) ── B (out, R) ───+── out

    out = W x + b + scaling * B A dropout(x)        scaling = alpha / rank

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685;
scaling = alpha / sqrt(rank) is rsLoRA, https://arxiv.org/abs/2312.03732. Conventions (initial
values, dropout on the input, matching of targets) are those of huggingface/peft, whose adapters
load here and the other way round.

Axes: M rows of the input, R rank.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_engine.lora.dropout import dropout_mask, kept_part
from lora_engine.lora.matmul import compute_dtype, frozen_linear


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update (arXiv:2106.09685, section 4.1).

    Takes over the weight and bias of `base` without copying them. `base` is an `nn.Linear`, weight
    (out, in), or transformers' `Conv1D`, weight (in, out). `lora_A` (R, in) is drawn as PEFT draws
    it and `lora_B` (out, R) is zero, so that a new layer computes what `base` computed. Both stay
    fp32 whatever the frozen weight's dtype (fp64 with an fp64 weight).
    """

    _unmerged_weight: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        check_settings(rank, dropout)
        self.weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.weight_is_transposed = is_conv1d(base)
        self.in_features, self.out_features = widths(base)
        self.rank = rank
        self.dropout = dropout
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        # Copies in a compute dtype, kept up to date by whoever changes the matrices (optim.py).
        self.cast_matrices: tuple[Tensor, Tensor] | None = None
        # A buffer follows the layer to its device, but is no parameter and in no state dict.
        self.register_buffer("_unmerged_weight", None, persistent=False)

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return _project(x, (self,))[0]

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in `dtype`; gradients reach the fp32 matrices."""
        if self.cast_matrices is not None and self.cast_matrices[0].dtype == dtype:
            cast_A, cast_B = self.cast_matrices
            return _Cast.apply(self.lora_A, cast_A), _Cast.apply(self.lora_B, cast_B)
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put `merged_weight` in the place of the weight, and no update beside it.

        The old weight is kept, so that `unmerge` restores its very bits. Merging twice adds once.
        """
        if self.merged:
            return
        merged = self.merged_weight()
        self._unmerged_weight = self.weight.detach()
        self.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling * B A in the layout and dtype of W, formed in fp32 and rounded once."""
        if self.merged:
            return self.weight
        update = self.scaling * (self.lora_B @ self.lora_A)
        update = update.T if self.weight_is_transposed else update
        return (self.weight.to(update.dtype) + update).to(self.weight.dtype)

    def unmerge(self) -> None:
        """Put the weight from before `merge` back, bit for bit."""
        if self._unmerged_weight is not None:
            self.weight = nn.Parameter(self._unmerged_weight, requires_grad=False)
            self._unmerged_weight = None

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}, merged={self.merged}"
        )


class LinearParts(NamedTuple):
    """What a frozen linear layer computes with, in one dtype; without an adapter A is None."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    lora_A: Tensor | None = None  # (R, in)
    lora_B: Tensor | None = None  # (out, R)
    scaling: float = 0.0


def linear_parts(layer: nn.Module, dtype: torch.dtype) -> LinearParts:
    """The parts of an `nn.Linear` or a `LoRALinear`; a merged one has no adapter left to add."""
    assert isinstance(layer, (nn.Linear, LoRALinear))
    weight: Tensor = layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if not isinstance(layer, LoRALinear):
        return LinearParts(weight, bias)
    weight = weight.T if layer.weight_is_transposed else weight
    if layer.merged:
        return LinearParts(weight, bias)
    return LinearParts(weight, bias, *layer.matrices(dtype), layer.scaling)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Frozen linear layers, adapted or not, of one input x (..., in) -> (..., out) of each.

    All adapters of the input are one low-rank product, and share one dropout mask. Layers among
    which one is of another kind, trains its weight or bias or has a hook are simply called.
    """
    if not all(_is_plain(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    return _project(x, layers)


def _project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    parts = [linear_parts(layer, dtype) for layer in layers]
    kept, kept_share = _dropout_mask(rows, layers)
    scalings = tuple(part.scaling / kept_share for part in parts)
    tensors = (tensor for part in parts for tensor in part[:4])
    outs = _Projections.apply(rows, kept, scalings, *tensors)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def _dropout_mask(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor | None, float]:
    """Which elements of x the LoRA dropout of `layers` keeps (None: all), and their share."""
    for layer in layers:
        if isinstance(layer, LoRALinear) and layer.training and layer.dropout and not layer.merged:
            return dropout_mask(x, layer.dropout)
    return None, 1.0


class _Projections(torch.autograd.Function):
    """Y_i = X W_i^T + b_i + s_i d(X) A_i^T B_i^T, where d keeps some elements (arXiv:2106.09685).

    The backward pass is written by hand: autograd would keep X twice, dropped and not, and go
    through a low-rank product for every layer. With G_i = s_i dY_i B_i it is

        dX = sum dY_i W_i + d(sum G_i A_i)     dA_i = G_i^T d(X)     dB_i = s_i dY_i^T (d(X) A_i^T)

    W and b are frozen and get no gradient; X gets one only where it needs one.
    """

    @staticmethod
    def forward(ctx, X: Tensor, kept: Tensor | None, scalings: tuple[float, ...], *tensors):
        Ws, biases, As, Bs = (tensors[i::4] for i in range(4))
        ctx.scalings = scalings
        ctx.ranks = [0 if A is None else len(A) for A in As]
        Ys = [frozen_linear(X, W, bias) for W, bias in zip(Ws, biases)]
        A = low_rank = None
        if any(ctx.ranks):
            A = torch.cat([A for A in As if A is not None])
            low_rank = frozen_linear(kept_part(X, kept), A)  # (M, sum of R)
            for Y, part, B, s in zip(Ys, low_rank.split(ctx.ranks, dim=1), Bs, scalings):
                if B is not None:
                    Y.addmm_(part, B.T, alpha=s)
        # Frozen layers alone need no input for their gradients.
        ctx.save_for_backward(None if A is None else X, kept, A, low_rank, *Ws, *Bs)
        return tuple(Ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dYs):
        X, kept, A, low_rank, *rest = ctx.saved_tensors
        Ws, Bs = rest[: len(dYs)], rest[len(dYs) :]
        dX, dAs, dBs = None, [None] * len(dYs), [None] * len(dYs)
        if ctx.needs_input_grad[0]:
            products = [frozen_linear(dY, W.T) for dY, W in zip(dYs, Ws)]
            dX = sum(products[1:], products[0])
        if A is not None:
            Gs = [
                frozen_linear(dY, B.T).mul_(s) for dY, B, s in zip(dYs, Bs, ctx.scalings)
                if B is not None
            ]
            G = torch.cat(Gs, dim=1)  # (M, sum of R)
            dAs = (G.T @ kept_part(X, kept)).split(ctx.ranks)
            parts = low_rank.split(ctx.ranks, dim=1)
            # As the transpose of (R, M) (M, out): kernels like a result with few rows better than
            # one with few columns.
            dBs = [(part.T @ dY).mul_(s).T for dY, part, s in zip(dYs, parts, ctx.scalings)]
            if dX is not None:
                dX = dX.addmm_(G, A) if kept is None else dX.add_(kept_part(G @ A, kept))
        matrices = [
            (None, None, dA, dB) if rank else (None, None, None, None)
            for dA, dB, rank in zip(dAs, dBs, ctx.ranks)
        ]
        return dX, None, None, *(gradient for layer in matrices for gradient in layer)


class _Cast(torch.autograd.Function):
    """A matrix as the copy that was made of it in another dtype."""

    @staticmethod
    def forward(ctx, matrix: Tensor, cast: Tensor) -> Tensor:
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None  # autograd brings it to the matrix's dtype


def _is_plain(layer: nn.Module) -> bool:
    is_frozen = type(layer) is nn.Linear and not any(
        parameter.requires_grad for parameter in (layer.weight, layer.bias) if parameter is not None
    )
    has_hooks = (
        layer._forward_hooks or layer._forward_pre_hooks
        or layer._backward_hooks or layer._backward_pre_hooks
    )
    return (is_frozen or isinstance(layer, LoRALinear)) and not has_hooks


def check_settings(rank: int, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be 1 or more")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LoRA dropout is {dropout}; it must be at least 0 and below 1")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (by its looks: this file knows only torch)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def widths(base: nn.Module) -> tuple[int, int]:
    weight: nn.Parameter = base.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if is_conv1d(base) else (second, first)
