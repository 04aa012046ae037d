"""LoRA: the layer and its formula, injection into any module tree, merging, counts.

    x ─┬────────────── W (frozen) ──────────────┐
       └─ dropout ── A (R, in) ── B (out, R) ───+── out

    out = W x + b + scaling * B A dropout(x)        scaling = alpha / rank

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685;
scaling = alpha / sqrt(rank) is rsLoRA, https://arxiv.org/abs/2312.03732. Conventions (initial
values, dropout on the input, matching of targets) are those of huggingface/peft, whose adapters
load here and the other way round.

A module tree may tell `inject` what it knows about itself by two attributes: `lora_groups`, names
for regular expressions over module paths (`{"attention": ...}`), and `lora_scope`, a regular
expression over the paths that may be adapted at all.

Axes: M rows of the input, R rank.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_engine.dropout import dropout_mask, kept_part
from lora_engine.patterns import PatternError, first_matches
from lora_engine.products import compute_dtype, product


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
        _check_settings(rank, dropout)
        self.weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.weight_is_transposed = _is_conv1d(base)
        self.in_features, self.out_features = _widths(base)
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
        Ys = [product(X, W, bias) for W, bias in zip(Ws, biases)]
        A = low_rank = None
        if any(ctx.ranks):
            A = torch.cat([A for A in As if A is not None])
            low_rank = product(kept_part(X, kept), A)  # (M, sum of R)
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
            products = [product(dY, W.T) for dY, W in zip(dYs, Ws)]
            dX = sum(products[1:], products[0])
        if A is not None:
            Gs = [
                product(dY, B.T).mul_(s) for dY, B, s in zip(dYs, Bs, ctx.scalings)
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


@dataclass(frozen=True)
class AdaptedModule:
    """One line of an injection plan."""

    path: str
    in_features: int
    out_features: int
    rank: int
    scaling: float

    @property
    def num_parameters(self) -> int:
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class InjectionPlan:
    """What `inject` did: every adapted module, and the model's parameters by kind."""

    modules: tuple[AdaptedModule, ...]
    num_trainable: int
    num_frozen: int

    @property
    def totals(self) -> str:
        share = 100 * self.num_trainable / (self.num_trainable + self.num_frozen)
        return (
            f"LoRA on {len(self.modules)} modules: {self.num_trainable:,} trainable, "
            f"{self.num_frozen:,} frozen parameters ({share:.2f} % trainable)"
        )

    def __str__(self) -> str:
        """A table with one line a module, and the totals."""
        width = max(len(module.path) for module in self.modules)
        lines = [f"{'module':<{width}}  {'in -> out':>12}  rank  scaling  parameters"]
        lines += [_table_line(module.path, module, width) for module in self.modules]
        return "\n".join([*lines, self.totals])

    def folded(self) -> str:
        """The same table with modules that differ only in their layer number on one line."""
        groups: dict[tuple, list[AdaptedModule]] = {}
        for module in self.modules:
            name = re.sub(r"\.\d+(?=\.)", ".*", module.path)
            shape = (module.in_features, module.out_features, module.rank, module.scaling)
            groups.setdefault((name, *shape), []).append(module)
        names = [f"{len(modules):>3} x {key[0]}" for key, modules in groups.items()]
        width = max(map(len, names))
        lines = [f"{'modules':<{width}}  {'in -> out':>12}  rank  scaling  parameters"]
        for name, modules in zip(names, groups.values()):
            lines.append(_table_line(name, modules[0], width, times=len(modules)))
        return "\n".join([*lines, self.totals])


def inject(
    module: nn.Module,
    targets: str | Sequence[str],
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> InjectionPlan:
    """Freeze `module` and replace its targeted linear layers, in place, by `LoRALinear`.

    `targets` are matched as `select` describes. `rank_pattern` and `alpha_pattern` give single
    layers another rank or alpha, by PEFT's rule: the key, a regular expression, matches the path
    or what follows a dot in it. New A matrices are drawn from torch's global generator in the
    order of the module tree. Only the new matrices require a gradient afterwards.

    Raises ValueError as `select` does, for a pattern that is no regular expression or costs too
    much, and for a rank below 1 or a dropout outside [0, 1), before anything is changed.
    """
    paths = select(module, targets)
    ranks = by_pattern(rank_pattern, paths, default=rank)
    alphas = by_pattern(alpha_pattern, paths, default=alpha)
    for layer_rank in ranks.values():
        _check_settings(layer_rank, dropout)
    module.requires_grad_(False)
    adapted = []
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = module.get_submodule(parent_path)
        layer = LoRALinear(
            getattr(parent, name),
            rank=ranks[path],
            alpha=alphas[path],
            dropout=dropout,
            rslora=rslora,
        )
        setattr(parent, name, layer)
        adapted.append(
            AdaptedModule(path, layer.in_features, layer.out_features, layer.rank, layer.scaling)
        )
    return InjectionPlan(tuple(adapted), *count_parameters(module))


def select(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that `targets` name, in the order of the module tree.

    A single string is one regular expression over the whole path. In a sequence, each item is a
    group that the module declares, a regular expression after "re:", or PEFT's kind of name: equal
    to the path, or the path ends with "." + name.

    Raises ValueError for a target that matches nothing (naming near ones) or matches only what
    may not be adapted, and for a module that is already adapted.
    """
    if next(lora_layers(module), None) is not None:
        raise ValueError("this module already has LoRA layers; inject once, with all targets")
    patterns = [f"re:{targets}"] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("no LoRA targets given; name at least one group or module")
    scope = re.compile(getattr(module, "lora_scope", ".*"))
    linears = list(linear_layers(module))
    allowed = [path for path in linears if scope.fullmatch(path)]
    groups: Mapping[str, str] = getattr(module, "lora_groups", {})
    selected: set[str] = set()
    for pattern in patterns:
        hits = _matching(allowed, pattern, groups)
        if not hits:
            raise ValueError(_nothing_matched(pattern, allowed, linears, groups))
        selected.update(hits)
    return [path for path in allowed if path in selected]


def linear_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every layer that can be adapted, by its path, in the order of the tree."""
    return {
        path: _widths(child) for path, child in module.named_modules()
        # Not subclasses: they compute something else, or are read past their forward
        # (nn.MultiheadAttention's out_proj).
        if type(child) is nn.Linear or _is_conv1d(child)
    }


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRA layer with its path."""
    for path, child in module.named_modules():
        if isinstance(child, LoRALinear):
            yield path, child


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable matrix by its name, `<path>.lora_A` before `<path>.lora_B`."""
    matrices = {}
    for path, layer in lora_layers(module):
        matrices[f"{path}.lora_A"] = layer.lora_A
        matrices[f"{path}.lora_B"] = layer.lora_B
    return matrices


def merge(module: nn.Module) -> None:
    """Fold every adapter into its frozen weight: same outputs, no extra work a call."""
    for _, layer in lora_layers(module):
        layer.merge()


def unmerge(module: nn.Module) -> None:
    """Undo `merge` exactly."""
    for _, layer in lora_layers(module):
        layer.unmerge()


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of (trainable, frozen) parameters; a tied weight counts once."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters()) - trainable


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen weights of matrix products in `dtype`, once.

    Autocast would cast them anew in every step: it remembers casts only of weights that require a
    gradient. Norms and embeddings stay as they are, as under autocast; a vocabulary head tied to
    an embedding gets its own copy, so that the embedding keeps its precision.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d, LoRALinear)) or _is_conv1d(child):
            for name in ("weight", "bias"):
                parameter = getattr(child, name)
                is_frozen = parameter is not None and not parameter.requires_grad
                if is_frozen and parameter.dtype != dtype:
                    cast = parameter.detach().to(dtype)
                    setattr(child, name, nn.Parameter(cast, requires_grad=False))


def _check_settings(rank: int, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be 1 or more")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LoRA dropout is {dropout}; it must be at least 0 and below 1")


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (by its looks: this file knows only torch)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _widths(base: nn.Module) -> tuple[int, int]:
    weight: nn.Parameter = base.weight  # type: ignore[assignment]
    first, second = weight.shape
    return (first, second) if _is_conv1d(base) else (second, first)


def by_pattern(patterns: Mapping | None, paths: Sequence[str], *, default) -> dict[str, Any]:
    """Each path's value: that of the first pattern which matches, by PEFT's rule; see `inject`."""
    patterns = patterns or {}
    found = first_matches(patterns, paths, or_tail=True)
    return {path: patterns[found[path]] if path in found else default for path in paths}


def _matching(paths: Sequence[str], target: str, groups: Mapping[str, str]) -> list[str]:
    if target in groups:
        return [path for path in paths if re.fullmatch(groups[target], path)]
    if not target.startswith("re:"):
        return [path for path in paths if path == target or path.endswith("." + target)]
    try:
        return list(first_matches([target[3:]], paths))
    except PatternError as error:
        raise ValueError(f"LoRA target {shortened(target)}: {error}") from None


def _nothing_matched(
    target: str, allowed: list[str], linears: list[str], groups: Mapping[str, str]
) -> str:
    outside = _matching([path for path in linears if path not in allowed], target, groups)
    if outside:
        return (
            f"LoRA target {target!r} matches only modules that are never adapted here (encoder, "
            f"embeddings, vocabulary head): {', '.join(outside[:3])}"
            f"{' ...' if len(outside) > 3 else ''}"
        )
    # Every tail of every path is a name that would have matched.
    parts = [path.split(".") for path in allowed]
    tails = {".".join(p[i:]) for p in parts for i in range(len(p)) if not p[i].isdigit()}
    wanted = target.removeprefix("re:")
    near = difflib.get_close_matches(wanted, sorted(tails | set(groups)), n=5, cutoff=0.5)
    known = sorted({path.rpartition(".")[2] for path in allowed})
    advice = f"near names: {', '.join(near)}" if near else f"linear layers: {', '.join(known)}"
    group_names = f"; groups: {', '.join(groups)}" if groups else ""
    return f"LoRA target {target!r} matches no linear layer; {advice}{group_names}"


def _table_line(name: str, module: AdaptedModule, width: int, times: int = 1) -> str:
    shape = f"{module.in_features} -> {module.out_features}"
    return (
        f"{name:<{width}}  {shape:>12}  {module.rank:>4}  {module.scaling:>7g}  "
        f"{times * module.num_parameters:>10,}"
    )
