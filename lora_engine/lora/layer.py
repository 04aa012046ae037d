"""LoRA: the layer and its formula.

    x ─┬────────────── W (frozen) ──────────────┐
       └─ dropout ── A (R, in) ── B (out, R) ───+── * c ── + b ── out

    out = c * (W x + scaling * B A dropout(x)) + b      scaling = alpha / rank

LoRA has no c (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
https://arxiv.org/abs/2106.09685). In DoRA (https://arxiv.org/abs/2402.09353) c scales each output
to a trained magnitude m: c = m / |W + scaling * B A|, with the norm of each row, which is constant
for the gradient. scaling = alpha / sqrt(rank) is rsLoRA, https://arxiv.org/abs/2312.03732; a
frozen A is LoRA-FA, https://arxiv.org/abs/2308.03303. Conventions (initial values, dropout on the
input, matching of targets) are those of huggingface/peft; adapters load in either library.

`LinearParts` describes a layer's terms, from which forward passes (`project`), cross-attention
(`low_rank_inputs`, `FeatureProjection`) and merging (`LinearParts.adapted_weight`) compute. A
variant changes these terms, in `linear_parts`, and nothing else.

Axes: M rows of the input, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from reprlib import repr as shortened
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from lora_engine.lora.dropout import add_kept_part, dropout_mask, kept_part
from lora_engine.lora.initialization import (
    CHANGES_WEIGHT,
    check_initialization,
    initial_matrices,
)
from lora_engine.lora.matmul import (
    compute_dtype,
    feature_matmul,
    frozen_linear,
    is_on_cpu,
    scaled_matmul,
    scaled_weight_gradient,
    sum_of_matmuls,
)


def lora_scaling(alpha: float, rank: int, *, use_rslora: bool = False) -> float:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def update_bound(alpha: float, rank: int, largest_A: float, largest_B: float) -> float:
    """A bound of the elements of scaling * B A, given the largest elements of A and B.

    It holds for both definitions of the scaling, which is at most alpha.
    """
    return float(alpha) * rank * largest_A * largest_B


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update (arXiv:2106.09685, section 4.1).

    Shares the weight and bias of `base` without copying them. `base` is an `nn.Linear`, weight
    (out, in), or transformers' `Conv1D`, weight (in, out). `lora_A` (R, in), `lora_B` (out, R) and
    with DoRA `lora_magnitude_vector` (out,) are fp32 whatever the frozen weight's dtype (fp64 with
    an fp64 weight). `init_lora_weights` is described in initialization.py; a new layer computes
    what `base` computed. `use_lorafa` freezes `lora_A`.

    After PiSSA or OLoRA the frozen weight is no longer that of `base`, but the residual
    W - scaling * B_0 A_0, where A_0 and B_0 are `initial_matrices`.
    """

    lora_magnitude_vector: nn.Parameter | None
    initial_matrices: tuple[Tensor, Tensor] | None = None
    _fixed_out_scales: dict[torch.dtype, Tensor] | None = None
    _unmerged_weight: Tensor | None
    _squared_norms: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        use_lorafa: bool = False,
        init_lora_weights: str = "default",
    ) -> None:
        super().__init__()
        check_settings(
            base, rank=rank, alpha=alpha, dropout=dropout, init_lora_weights=init_lora_weights,
            use_rslora=use_rslora, use_dora=use_dora, use_lorafa=use_lorafa,
        )
        self.weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.weight_is_transposed = is_conv1d(base)
        self.in_features, self.out_features = widths(base)
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.scaling = lora_scaling(alpha, rank, use_rslora=use_rslora)
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        A, B = initial_matrices(init_lora_weights, self._rows(dtype), rank, self.scaling)
        self.lora_A = nn.Parameter(A, requires_grad=not use_lorafa)
        self.lora_B = nn.Parameter(B)
        # Copies in the compute dtype; the optimizer refreshes them when it changes the matrices.
        self.cast_matrices: tuple[Tensor, Tensor] | None = None
        # Non-persistent buffers move with the layer, but are in neither parameters nor state dict.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.register_buffer("_squared_norms", None, persistent=False)
        self.lora_magnitude_vector = None
        if init_lora_weights in CHANGES_WEIGHT:
            self.subtract_initial(A.clone(), B.clone())
        if use_dora:
            self._squared_norms = self._rows(dtype).square().sum(dim=1)
            self.lora_magnitude_vector = nn.Parameter(self.adapted_norms())

    @torch.no_grad()
    def subtract_initial(self, A: Tensor, B: Tensor) -> None:
        """Take the update of the first A and B out of the frozen weight (PiSSA, OLoRA)."""
        self.initial_matrices = A, B
        rest = self._rows(A.dtype) - self.scaling * (B @ A)
        rest = rest.T if self.weight_is_transposed else rest
        self.weight = nn.Parameter(rest.to(self.weight.dtype).contiguous(), requires_grad=False)
        if self._squared_norms is not None:
            self._squared_norms = self._rows(A.dtype).square().sum(dim=1)

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight (out, in) in `dtype`, whatever its layout."""
        weight = self.weight.detach().to(dtype)
        return weight.T if self.weight_is_transposed else weight

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """lora_A, lora_B, and with DoRA lora_magnitude_vector."""
        parameters = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            parameters["lora_magnitude_vector"] = self.lora_magnitude_vector
        return parameters

    @property
    def active_dropout(self) -> float:
        """The dropout probability of a call now: 0 in evaluation mode."""
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return _project(x, (self,))[0]

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in `dtype`; gradients reach the fp32 matrices.

        Within `FlatLoRAParameters.cast_gradients` they reach the copies instead.
        """
        if self.cast_matrices is not None and self.cast_matrices[0].dtype == dtype:
            cast_A, cast_B = self.cast_matrices
            if cast_B.requires_grad:
                return cast_A, cast_B
            return _Cast.apply(self.lora_A, cast_A), _Cast.apply(self.lora_B, cast_B)
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    def out_scale(self, weight: Tensor) -> Tensor | None:
        """DoRA's c (out,) in the dtype of `weight` (out, in), the frozen weight; None without DoRA.
        """
        if self.lora_magnitude_vector is None:
            return None
        known = {} if self._fixed_out_scales is None else self._fixed_out_scales
        if weight.dtype not in known:
            scale = self.lora_magnitude_vector / self.adapted_norms(weight)
            known[weight.dtype] = scale.to(weight.dtype)
        return known[weight.dtype]

    @torch.no_grad()
    def adapted_norms(self, weight: Tensor | None = None) -> Tensor:
        """|W + scaling * B A| of each row, (out,), with W in the dtype of `weight` (out, in).

        The sum, which is as large as W, is not formed: with P = W A^T (out, R) it is the root of

            |w|^2 + b . (2 scaling P + scaling^2 b A A^T)       for rows w of W, p of P, b of B.
        """
        assert self._squared_norms is not None
        A, B = self.lora_A, self.lora_B
        weight = self._rows(A.dtype) if weight is None else weight
        P = frozen_linear(A.to(weight.dtype), weight).to(A.dtype).T
        squared = self._squared_norms + (
            B * torch.addmm(P, B, A @ A.T, beta=2 * self.scaling, alpha=self.scaling**2)
        ).sum(dim=1)
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weight by `merged_weight`; the adapter is then no longer added.

        The old weight is kept, so `unmerge` restores it bit for bit. Merging twice adds once.
        """
        if self.merged:
            return
        merged = self.merged_weight()
        self._unmerged_weight = self.weight.detach()
        self.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """c * (W + scaling * B A) in the layout and dtype of W, computed in fp32, rounded once."""
        if self.merged:
            return self.weight
        merged = linear_parts(self, self.lora_A.dtype).adapted_weight()
        merged = merged.T if self.weight_is_transposed else merged
        return merged.to(self.weight.dtype).contiguous()

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit."""
        if self._unmerged_weight is not None:
            self.weight = nn.Parameter(self._unmerged_weight, requires_grad=False)
            self._unmerged_weight = None

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"scaling={self.scaling:g}, dropout={self.dropout:g}, merged={self.merged}"
        )


class LinearParts(NamedTuple):
    """The terms of c (x W^T + scaling * dropout(x) A^T B^T) + b, in one dtype.

    A and B are None without an adapter, c without DoRA.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    lora_A: Tensor | None = None  # (R, in)
    lora_B: Tensor | None = None  # (out, R)
    out_scale: Tensor | None = None  # c (out,)
    scaling: float = 0.0

    def adapted_weight(self) -> Tensor:
        """c * (W + scaling * B A) (out, in)."""
        assert self.lora_A is not None and self.lora_B is not None
        adapted = self.weight + self.scaling * (self.lora_B @ self.lora_A)
        return adapted if self.out_scale is None else self.out_scale.unsqueeze(1) * adapted


def linear_parts(layer: nn.Module, dtype: torch.dtype) -> LinearParts:
    """The terms of an `nn.Linear` or a `LoRALinear`; a merged one has no adapter left to add."""
    assert isinstance(layer, (nn.Linear, LoRALinear))
    weight: Tensor = layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if not isinstance(layer, LoRALinear):
        return LinearParts(weight, bias)
    weight = weight.T if layer.weight_is_transposed else weight
    if layer.merged:
        return LinearParts(weight, bias)
    return LinearParts(
        weight, bias, *layer.matrices(dtype), layer.out_scale(weight), layer.scaling
    )


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Within it no weight changes: DoRA computes c once, not in every call."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer._fixed_out_scales = {}
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed_out_scales = None


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but the formula, so that its parts may be used instead.

    True for exactly `LoRALinear` and exactly a frozen `nn.Linear`. A subclass, a parametrization,
    a hook (the layer's own, or a global one) or a replaced `forward` must be called.
    """
    is_frozen_linear = type(layer) is nn.Linear and not any(
        parameter.requires_grad for parameter in (layer.weight, layer.bias) if parameter is not None
    )
    return (
        (is_frozen_linear or type(layer) is LoRALinear)
        and not is_intercepted(layer)
        and not _has_any_global_hook()
    )


def is_intercepted(layer: nn.Module) -> bool:
    """Whether calling `layer` runs more, or something else, than the `forward` of its class."""
    has_hooks = (
        layer._forward_hooks or layer._forward_pre_hooks
        or layer._backward_hooks or layer._backward_pre_hooks
    )
    is_replaced = "forward" in layer.__dict__ or layer._compiled_call_impl is not None
    return bool(has_hooks) or is_replaced


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Apply linear layers, adapted or not, to one input x (..., in) -> (..., out) of each.

    The adapters' low-rank inputs are one matmul with one dropout mask. If a layer is not
    `is_plain`, or dropout probabilities differ, each layer is called by itself.
    """
    if not all(is_plain(layer) for layer in layers) or len(set(_dropouts(layers))) > 1:
        return tuple(layer(x) for layer in layers)
    return _project(x, layers)


def _project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    parts = [linear_parts(layer, dtype) for layer in layers]
    kept, kept_share = _dropout_mask(rows, layers)
    scalings = tuple(part.scaling / kept_share for part in parts)
    tensors = (tensor for part in parts for tensor in part[:5])
    outs = _Projections.apply(rows, kept, scalings, *tensors)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def low_rank_inputs(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor | None]:
    """dropout(x) A^T (..., R) of each layer, for an x (..., in) that needs no gradient.

    None for a layer without an adapter, and for one that is not `is_plain`. As in `project`, they
    are one matmul with one dropout mask.
    """
    adapters = [layer for layer in layers if is_plain(layer) and _has_adapter(layer)]
    if not adapters:
        return [None] * len(layers)
    assert len(set(_dropouts(adapters))) == 1, "one mask, one probability"
    rows = x.flatten(0, -2)
    A = _joined([layer.matrices(x.dtype)[0] for layer in adapters])
    kept, kept_share = _dropout_mask(rows, adapters)
    if kept is not None:
        rows, A = kept_part(rows, kept), A / kept_share
    low_rank = feature_matmul(rows, A).unflatten(0, x.shape[:-1])
    split = low_rank.split([layer.rank for layer in adapters], dim=-1)
    if is_on_cpu(x):  # a GPU's kernels take parts of rows as they are
        split = tuple(part.contiguous() for part in split)
    parts: dict[nn.Module, Tensor] = dict(zip(adapters, split))
    return [parts.get(layer) for layer in layers]


def _has_adapter(layer: nn.Module) -> TypeGuard[LoRALinear]:
    return isinstance(layer, LoRALinear) and not layer.merged


def _dropouts(layers: Sequence[nn.Module]) -> list[float]:
    return [layer.active_dropout for layer in layers if _has_adapter(layer)]


def _dropout_mask(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor | None, float]:
    """Which elements of x the LoRA dropout of `layers` keeps (None: all), and their share."""
    dropouts = _dropouts(layers)
    return dropout_mask(x, dropouts[0]) if any(dropouts) else (None, 1.0)


class _Projections(torch.autograd.Function):
    """Y_i = c_i (X W_i^T + s_i d(X) A_i^T B_i^T) + b_i, where d keeps some elements of X.

    The backward pass is written by hand: autograd would save X twice, with dropout and without,
    and run a low-rank matmul for each layer. With Z_i what c_i is multiplied by (c_i = 1 without
    DoRA), dZ_i = c_i dY_i and G_i = s_i dZ_i B_i it is

        dX = sum dZ_i W_i + d(sum G_i A_i)     dA_i = G_i^T d(X)     dB_i = s_i dZ_i^T (d(X) A_i^T)
        dc_i = the sum of dY_i Z_i over the rows

    W and b are frozen and get no gradient; X and A get one only where they need one.
    """

    @staticmethod
    def forward(ctx, X: Tensor, kept: Tensor | None, scalings: tuple[float, ...], *tensors):
        Ws, biases, As, Bs, cs = (tensors[i::5] for i in range(5))
        ctx.scalings = scalings
        ctx.ranks = [0 if A is None else len(A) for A in As]
        Ys = [
            frozen_linear(X, W, bias if c is None else None) for W, bias, c in zip(Ws, biases, cs)
        ]
        A = low_rank = None
        if any(ctx.ranks):
            A = _joined([A for A in As if A is not None])
            low_rank = frozen_linear(kept_part(X, kept), A)  # (M, sum of R)
            for Y, part, B, s in zip(Ys, low_rank.split(ctx.ranks, dim=1), Bs, scalings):
                if B is not None:
                    Y.addmm_(part, B.T, alpha=s)
        Zs = [None if c is None else Z for Z, c in zip(Ys, cs)]
        Ys = [Y if c is None else _scaled(Y, c, bias) for Y, c, bias in zip(Ys, cs, biases)]
        # Without a trained A no gradient needs the input.
        ctx.trains_A = any(ctx.needs_input_grad[5::5])
        ctx.save_for_backward(X if ctx.trains_A else None, kept, A, low_rank, *Ws, *Bs, *cs, *Zs)
        return tuple(Ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dYs):
        X, kept, A, low_rank, *rest = ctx.saved_tensors
        count = len(dYs)
        Ws, Bs, cs, Zs = (rest[i * count : (i + 1) * count] for i in range(4))
        dcs = [None if Z is None else (dY * Z).sum(dim=0) for dY, Z in zip(dYs, Zs)]
        dZs = [dY if c is None else dY * c for dY, c in zip(dYs, cs)]
        dX: Tensor | None = None
        dAs: Sequence[Tensor | None] = [None] * count
        dBs: Sequence[Tensor | None] = [None] * count
        if ctx.needs_input_grad[0]:
            dX = sum_of_matmuls(dZs, Ws)
        if A is not None:
            if dX is not None or ctx.trains_A:
                adapted = [(dZ, B, s) for dZ, B, s in zip(dZs, Bs, ctx.scalings) if B is not None]
                G = _joined([scaled_matmul(dZ, B, s) for dZ, B, s in adapted], dim=1)  # (M, R)
            if ctx.trains_A:
                dAs = (G.T @ kept_part(X, kept)).split(ctx.ranks)
            parts = low_rank.split(ctx.ranks, dim=1)
            dBs = [
                None if B is None else scaled_weight_gradient(dZ, part, s)
                for dZ, B, part, s in zip(dZs, Bs, parts, ctx.scalings)
            ]
            if dX is not None:
                dX = dX.addmm_(G, A) if kept is None else add_kept_part(dX, G @ A, kept)
        gradients = [
            (None, None, dA if rank else None, dB, dc)
            for dA, dB, dc, rank in zip(dAs, dBs, dcs, ctx.ranks)
        ]
        return dX, None, None, *(gradient for layer in gradients for gradient in layer)


def _scaled(Z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return Z * c if bias is None else torch.addcmul(bias, Z, c)


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Their concatenation; a single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _Cast(torch.autograd.Function):
    """Replaces a matrix by its copy in another dtype."""

    @staticmethod
    def forward(ctx, matrix: Tensor, cast: Tensor) -> Tensor:
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None  # autograd casts it to the matrix's dtype


def check_settings(
    base: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    init_lora_weights: str | bool,
    **switches: bool,
) -> None:
    """Raises ValueError that names the first setting that a `LoRALinear` of `base` cannot have."""
    num_in, num_out = widths(base)
    most = 10 * max(num_in, num_out)  # a rank above the smaller width is useless, but PEFT takes it
    numbers = [type(value) in (int, float) for value in (alpha, dropout)]
    for name, value, is_right, expected in [
        ("rank", rank, type(rank) is int and 1 <= rank <= most,
         f"a whole number from 1 to {most:,}, 10 times the width of a layer ({num_in} -> "
         f"{num_out})"),
        ("alpha", alpha, numbers[0] and abs(alpha) <= torch.finfo(torch.float32).max,
         "a finite number in float32"),
        ("dropout", dropout, numbers[1] and 0 <= dropout < 1,
         "a number that is at least 0 and below 1"),
        *((name, value, type(value) is bool, "True or False") for name, value in switches.items()),
    ]:
        if not is_right:
            raise ValueError(f"{name} is {shortened(value)}; expected {expected}")
    check_initialization(init_lora_weights, rank, alpha, num_in, num_out)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, recognized without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def widths(base: nn.Module) -> tuple[int, int]:
    """(in, out) of an `nn.Linear` or a `Conv1D`."""
    weight: nn.Parameter = base.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if is_conv1d(base) else (second, first)
