"""Injection: choose linear layers of a module tree, add adapters, and count parameters.

A module may have two attributes that `inject` reads: `lora_groups`, named regular expressions over
module paths (`{"attention": ...}`), and `lora_scope`, a regular expression over the paths that may
be adapted at all.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr as shortened
from typing import Any

import torch
from torch import nn

from lora_engine.keywords import known_keywords
from lora_engine.lora.layer import (
    LoRALinear,
    check_settings,
    is_conv1d,
    is_intercepted,
    widths,
)
from lora_engine.lora.patterns import PatternError, first_matches
from lora_engine.terminal import counted

# What layers of a group are called in other architectures.
_ELSEWHERE = {
    "attention": "q_proj k_proj v_proj o_proj out_proj qkv qkv_proj c_attn q_attn query key value "
                 "query_key_value",
    "feed_forward": "gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc dense_h_to_4h "
                    "dense_4h_to_h wi wo lin1 lin2",
}


@dataclass(frozen=True)
class AdaptedModule:
    """One line of an injection plan."""

    path: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    num_parameters: int
    """Number of trainable parameters."""


@dataclass(frozen=True)
class InjectionPlan:
    """What `inject` did: every adapted module, and the number of parameters by kind."""

    modules: tuple[AdaptedModule, ...]
    num_trainable: int
    num_frozen: int

    @property
    def totals(self) -> str:
        share = 100 * self.num_trainable / (self.num_trainable + self.num_frozen)
        return (
            f"LoRA on {counted(len(self.modules), 'module')}: {self.num_trainable:,} trainable, "
            f"{self.num_frozen:,} frozen parameters ({share:.2f} % trainable)"
        )

    def __str__(self) -> str:
        """A table with one line per module, and the totals."""
        width = max(len(module.path) for module in self.modules)
        lines = [f"{'module':<{width}}  {'in -> out':>12}  rank  scaling  parameters"]
        lines += [_table_line(module.path, module, width) for module in self.modules]
        return "\n".join([*lines, self.totals])

    def grouped(self) -> str:
        """The same table, with modules that differ only in their layer number on one line."""
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


@known_keywords(
    lora_rank="rank", lora_alpha="alpha", lora_dropout="dropout", lora_targets="targets"
)
def inject(
    module: nn.Module,
    targets: str | Sequence[str],
    *,
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.1,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    use_lorafa: bool = False,
    init_lora_weights: str | bool = "default",
) -> InjectionPlan:
    """Freeze `module` and replace its targeted linear layers by `LoRALinear`, in place.

    `targets` and `layers_to_transform`, the numbers of the decoder's layers to adapt (None: all),
    are matched as in `select`. `rank_pattern` and `alpha_pattern` give some layers another rank or
    alpha: the key is one of the module's `lora_groups`, or by PEFT's rule a regular expression that
    matches the path or what follows a dot in it. The variants are those of `LoRALinear`. Matrices
    are drawn from torch's global generator in the order of the module tree. Afterwards only the new
    ones require a gradient.

    Before anything is changed, raises ValueError as `select` does, for a pattern that is no regular
    expression, takes too long to match or matches nothing, for a setting that `LoRALinear` refuses,
    and for a targeted layer with hooks or a replaced `forward`.
    """
    paths = select(module, targets, layers_to_transform)
    groups: Mapping[str, str] = getattr(module, "lora_groups", {})
    return adapt(
        module,
        _values("rank_pattern", rank_pattern, paths, groups, rank),
        _values("alpha_pattern", alpha_pattern, paths, groups, alpha),
        dropout=dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        use_lorafa=use_lorafa,
        init_lora_weights=init_lora_weights,
    )


def adapt(
    module: nn.Module,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    dropout: float,
    use_rslora: bool = False,
    use_dora: bool = False,
    use_lorafa: bool = False,
    init_lora_weights: str | bool = "default",
) -> InjectionPlan:
    """`inject` for the layers whose ranks and alphas are given by path."""
    settings: dict[str, Any] = {
        "dropout": dropout, "use_rslora": use_rslora, "use_dora": use_dora,
        "use_lorafa": use_lorafa,
        "init_lora_weights": "default" if init_lora_weights is True else init_lora_weights,
    }
    for path, rank in ranks.items():
        base = module.get_submodule(path)
        check_settings(base, rank=rank, alpha=alphas[path], **settings)
        if is_intercepted(base):
            raise ValueError(
                f"{path} has hooks, a replaced forward or a compiled call, which an adapter would "
                f"drop; remove them, and add them to the LoRA layer after inject()"
            )
    module.requires_grad_(False)
    adapted = []
    for path, rank in ranks.items():
        parent_path, _, name = path.rpartition(".")
        parent = module.get_submodule(parent_path)
        layer = LoRALinear(getattr(parent, name), rank=rank, alpha=alphas[path], **settings)
        setattr(parent, name, layer)
        num_trained = sum(p.numel() for p in layer.lora_parameters().values() if p.requires_grad)
        adapted.append(AdaptedModule(
            path, layer.in_features, layer.out_features, rank, layer.scaling, num_trained
        ))
    return InjectionPlan(tuple(adapted), *count_parameters(module))


def select(
    module: nn.Module,
    targets: str | Sequence[str],
    layers_to_transform: int | Sequence[int] | None = None,
) -> list[str]:
    """Paths of the linear layers that `targets` match, in the order of the module tree.

    A single string is one regular expression over the whole path, with or without "re:". In a
    sequence, each item is a group of the module's `lora_groups`, a regular expression after "re:",
    or a name as in PEFT: it equals the path, or the path ends with "." + name.
    `layers_to_transform` keeps those in layers of these numbers, the first number in a path.

    Raises ValueError for a target that matches nothing (with close matches) or only layers that may
    not be adapted, for a layer that does not exist, and for a module that already has adapters.
    """
    if next(lora_layers(module), None) is not None:
        raise ValueError("this module already has LoRA layers; inject once, with all targets")
    if isinstance(targets, str):
        targets = [f"re:{targets.removeprefix('re:')}"]
    patterns = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"targets is {shortened(targets)}; expected names, or one regular expression"
        )
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
    numbers = {path: number for path in selected if (number := _layer_number(path)) is not None}
    wanted = _layer_numbers(layers_to_transform, default=numbers.values())
    if missing := sorted(wanted - set(numbers.values())):
        raise ValueError(
            f"there is no layer {missing[0]} to adapt; the targets are in layers "
            f"{', '.join(map(str, sorted(set(numbers.values())))) or '(none)'}"
        )
    return [
        path for path in allowed
        if path in selected and (layers_to_transform is None or numbers.get(path) in wanted)
    ]


def _layer_numbers(given: Any, *, default: Iterable[int]) -> set[int]:
    if given is None:
        return set(default)
    numbers = list(given) if isinstance(given, Iterable) else [given]
    is_whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
    if not numbers or not is_whole:
        raise ValueError(
            f"layers_to_transform is {shortened(given)}; expected the number of a layer, several, "
            f"or None for all layers"
        )
    return set(numbers)


def _layer_number(path: str) -> int | None:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match[1]) if match else None


def linear_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every layer that can be adapted, by its path, in the order of the tree."""
    return {
        path: widths(child) for path, child in module.named_modules()
        # No subclasses: they may compute something else, and the owner of some reads their weight
        # without calling them (nn.MultiheadAttention's out_proj).
        if type(child) is nn.Linear or is_conv1d(child)
    }


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRA layer with its path."""
    for path, child in module.named_modules():
        if isinstance(child, LoRALinear):
            yield path, child


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of every LoRA layer by its name: `<path>.lora_A`, `<path>.lora_B`, and with
    DoRA `<path>.lora_magnitude_vector`."""
    return {
        f"{path}.{name}": parameter
        for path, layer in lora_layers(module)
        for name, parameter in layer.lora_parameters().items()
    }


def merge(module: nn.Module) -> None:
    """Fold every adapter into its frozen weight: same outputs, without the adapters' cost."""
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
    """Convert the frozen weights of linear and convolution layers to `dtype`, once.

    Autocast would cast them in every step: it caches casts only of weights that require a gradient.
    Norms and embeddings are left alone, as under autocast; a vocabulary head tied to an embedding
    gets its own copy, so the embedding keeps its precision.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv2d, LoRALinear)) or is_conv1d(child):
            for name in ("weight", "bias"):
                parameter = getattr(child, name)
                is_frozen = parameter is not None and not parameter.requires_grad
                if is_frozen and parameter.dtype != dtype:
                    cast = parameter.detach().to(dtype)
                    setattr(child, name, nn.Parameter(cast, requires_grad=False))


def _values(
    name: str, given: Any, paths: Sequence[str], groups: Mapping[str, str], default: float
) -> dict[str, Any]:
    """The ranks or alphas of all paths; raises ValueError as `inject` does for the pattern `name`.
    """
    kind = int if name == "rank_pattern" else (int, float)
    expected, above = ("a whole number above 0", 0) if kind is int else ("a number", -math.inf)
    is_named = isinstance(given, Mapping) and all(isinstance(key, str) for key in given)
    if given is not None and not is_named:
        raise ValueError(f"{name} is {shortened(given)}; expected a dictionary, {{name: number}}")
    patterns = {groups.get(key, key): value for key, value in (given or {}).items()}
    for key, value in (given or {}).items():
        if not isinstance(value, kind) or isinstance(value, bool) or not above < value < math.inf:
            raise ValueError(f"{name}: {key!r} is {shortened(value)}; expected {expected}")
    try:
        used = first_matches(patterns, paths, or_tail=True).values()
    except PatternError as error:
        raise ValueError(f"{name}: {error}") from None
    for key in given or {}:
        if groups.get(key, key) not in used:
            known = [group for group in groups if _matching(paths, group, groups)]
            known += sorted({path.rpartition(".")[2] for path in paths})
            raise ValueError(
                f"{name}: {key!r} matches no adapted layer (or an earlier pattern does); their "
                f"names are {', '.join(known)}"
            )
    return by_pattern(patterns, paths, default=default)


def by_pattern(patterns: Mapping | None, paths: Sequence[str], *, default) -> dict[str, Any]:
    """Each path's value: that of the first matching pattern, by PEFT's rule (see `inject`)."""
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
            f"LoRA target {target!r} matches only modules that cannot be adapted (encoder, "
            f"embeddings, vocabulary head): {', '.join(outside[:3])}"
            f"{' ...' if len(outside) > 3 else ''}"
        )
    # Every tail of every path would have matched.
    parts = [path.split(".") for path in allowed]
    tails = {".".join(p[i:]) for p in parts for i in range(len(p)) if not p[i].isdigit()}
    wanted = target.removeprefix("re:")
    near = difflib.get_close_matches(wanted, sorted(tails | set(groups)), n=5, cutoff=0.5)
    group = next((name for name in groups if wanted in _ELSEWHERE.get(name, "").split()), None)
    layers = _matching(allowed, group, groups) if group else allowed
    known = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
    advice = f"close matches: {', '.join(near)}" if near else f"linear layers: {known}"
    if group:
        advice = f"here use the group {group} ({known})"
    if wanted == "all-linear" and groups:
        advice = "to adapt all linear layers, give all groups"
    group_names = f"; groups: {', '.join(groups)}" if groups else ""
    return f"LoRA target {target!r} matches no linear layer; {advice}{group_names}"


def _table_line(name: str, module: AdaptedModule, width: int, times: int = 1) -> str:
    shape = f"{module.in_features} -> {module.out_features}"
    return (
        f"{name:<{width}}  {shape:>12}  {module.rank:>4}  {module.scaling:>7g}  "
        f"{times * module.num_parameters:>10,}"
    )
