"""Merge an adapter into the tensors of a checkpoint, under Hugging Face's names.

For adapters that change more than LoRA layers can: encoder, head, embeddings and convolutions,
DoRA, biases, and whole modules. The formulas are those of layer.py, in fp32.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.lora.adapter import Adapter, in_one_line
from lora_engine.lora.adapter_config import MisfitError, targeted
from lora_engine.lora.adapter_weights import adapted_paths
from lora_engine.lora.injection import by_pattern
from lora_engine.lora.layer import LinearParts, lora_scaling


class Checkpoint(NamedTuple):
    """A checkpoint's tensors in fp32, and what must be known of them to merge into them."""

    tensors: Mapping[str, Tensor]
    model_class: str
    """How messages name the model."""
    tied_head: tuple[str, str]
    """Names of the weights of vocabulary head and embedding, one of which may not be stored."""
    head_biases: tuple[str, ...] = ()
    """Names of the bias of the vocabulary head, of which one or more are stored."""
    transposed: str = ""
    """A regular expression over the paths of modules that store their weight as (in, out)."""
    other_names: Sequence[Sequence[tuple[str, str]]] = ()
    """Names in other versions of transformers: for each version, regular expressions over the
    beginning of a name and their replacements, applied in order."""
    unused: str = ""
    """A regular expression over the names of tensors that captioning does not use."""


@torch.no_grad()
def merged_tensors(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the checkpoint that an adapter changes, changed.

    If it changes head or embedding, both are in the result, with the head's bias under all of its
    names. What the adapter has for unused tensors is dropped.

    Raises AdapterError if its tensors do not fit the checkpoint or the adapter's configuration, and
    if a result is not finite.
    """
    config = adapter.config
    base = _with_all_names(checkpoint)
    names = _stored_names(base, checkpoint)

    def is_used(name: str) -> bool:
        return not re.fullmatch(checkpoint.unused, name)

    copies = {n: t for n, t in adapter.others.items() if ".lora_" not in n and is_used(n)}
    paths = [path for path in adapted_paths(adapter.matrices) if is_used(f"{path}.weight")]
    used = [name for name in base if is_used(name)]
    ranks = by_pattern(config.get("rank_pattern"), paths, default=config["r"])
    alphas = by_pattern(config.get("alpha_pattern"), paths, default=config["lora_alpha"])
    _check(adapter, checkpoint, [
        *(f"the base model has no module {p}" for p in paths if f"{p}.weight" not in names),
        *_complaints_of_copies(config, copies, paths, used, base, names, checkpoint.tied_head),
        *_uncovered(config, paths, [name for name in used if base[name].dim() > 1], checkpoint),
    ])
    changed: dict[str, Tensor] = {}
    is_tied = torch.equal(*(base[name] for name in checkpoint.tied_head))
    for name, tensor in copies.items():
        is_shared = is_tied and name in checkpoint.tied_head and not _is_saved(name, config)
        for stored in checkpoint.tied_head if is_shared else names[name]:
            changed[stored] = tensor.float()
    complaints = []
    for path in paths:
        weights, biases = names[f"{path}.weight"], names.get(f"{path}.bias", [])
        scaling = lora_scaling(alphas[path], ranks[path], use_rslora=bool(config.get("use_rslora")))
        weight = changed.get(weights[0], base[weights[0]])
        try:
            merged = _merged(weight, adapter, path, ranks[path], scaling, checkpoint.transposed)
        except ValueError as error:
            complaints.append(str(error))
            continue
        changed |= dict.fromkeys(weights, merged)
        added = adapter.others.get(f"{path}.lora_B.bias")
        if added is not None and biases:
            bias = changed.get(biases[0], base[biases[0]])
            changed |= dict.fromkeys(biases, bias + scaling * added.float())
    complaints += [
        f"merged, {name} is not finite" for name, tensor in changed.items()
        if not tensor.isfinite().all()
    ]
    _check(adapter, checkpoint, complaints)
    if not changed.keys().isdisjoint(checkpoint.tied_head):
        head = [*checkpoint.tied_head, *checkpoint.head_biases]
        changed = {name: base[name] for name in head if name in base} | changed
    return changed


def _merged(
    weight: Tensor, adapter: Adapter, path: str, rank: int, scaling: float, transposed: str
) -> Tensor:
    """A module's weight with its update. Raises ValueError if the matrices do not fit it."""
    kind = "lora_A" if f"{path}.lora_A" in adapter.matrices else "lora_embedding_A"
    A = adapter.matrices[f"{path}.{kind}"].float().flatten(1)
    B = adapter.matrices[f"{path}.{kind[:-1]}B"].float().flatten(1)
    is_transposed = kind == "lora_embedding_A" or re.fullmatch(transposed, path)
    rows = (weight.T if is_transposed else weight).flatten(1)  # (out, in)
    for letter, matrix, shape in (
        ("A", A, (rank, rows.shape[1])), ("B", B, (rows.shape[0], rank))
    ):
        if matrix.shape != shape:
            raise ValueError(
                f"{path}.{kind[:-1]}{letter} is {tuple(matrix.shape)}, expected {shape}"
            )
    rows = LinearParts(rows, None, A, B, scaling=scaling).adapted_weight()
    magnitude = adapter.others.get(f"{path}.lora_magnitude_vector")
    if magnitude is not None:
        if magnitude.numel() != len(rows):
            raise ValueError(
                f"{path}.lora_magnitude_vector has {magnitude.numel()} values, expected {len(rows)}"
            )
        norms = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
        rows = rows * (magnitude.float().flatten() / norms).unsqueeze(1)
    return (rows.T if is_transposed else rows).reshape(weight.shape).contiguous()


def _with_all_names(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors, with those of the head that are stored under another of their names."""
    base = dict(checkpoint.tensors)
    for names in (checkpoint.tied_head, checkpoint.head_biases):
        stored = [base[name] for name in names if name in base]
        base |= {name: stored[0] for name in names if stored and name not in base}
    return base


def _stored_names(base: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The checkpoint's names of each tensor, by every name that the tensor may have."""
    names = {name: [name] for name in base}
    for name in base:
        for version in checkpoint.other_names:
            names.setdefault(_renamed(name, version), [name])
    for name in base.keys() & set(checkpoint.head_biases):
        names[name] = list(checkpoint.head_biases)
    return names


def _renamed(name: str, version: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in version:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _complaints_of_copies(
    config: Mapping[str, Any],
    copies: Mapping[str, Tensor],
    paths: Sequence[str],
    used: Sequence[str],
    base: Mapping[str, Tensor],
    names: Mapping[str, list[str]],
    tied_head: tuple[str, str],
) -> list[str]:
    """What is wrong with the tensors that replace the base's, and which of them are missing."""
    bias = config.get("bias")
    complaints = []
    for name, tensor in copies.items():
        is_asked_for = (
            _is_saved(name, config) or name in tied_head
            or bias in ("all", "lora_only") and name.endswith("bias")
        )
        if name not in names:
            complaints.append(f"the base model has no tensor {name}")
        elif tensor.shape != base[names[name][0]].shape:
            expected = tuple(base[names[name][0]].shape)
            complaints.append(f"{name} is {tuple(tensor.shape)}, expected {expected}")
        elif not tensor.is_floating_point():
            complaints.append(f"{name} is {tensor.dtype}, expected floating-point numbers")
        elif not is_asked_for:
            complaints.append(f"{name} is left over: neither bias nor modules_to_save names it")
    required = {name for name in used if _is_saved(name, config)}
    if bias == "all":
        required |= {name for name in used if name.endswith(".bias")}
    elif bias == "lora_only":
        required |= {stored for path in paths for stored in names.get(f"{path}.bias", ())}
    found = {stored for name in copies for stored in names.get(name, ())}
    return complaints + [f"{name} is missing" for name in sorted(required - found)]


def _uncovered(
    config: Mapping[str, Any], paths: list[str], weights: Sequence[str], checkpoint: Checkpoint
) -> list[str]:
    """Adapted modules that the configuration does not target, and targets that are not adapted.

    The modules are named as in the checkpoint, or as other versions of transformers name them:
    whichever fits better.
    """
    if config.get("target_modules") == "all-linear":
        return []
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    complaints = []
    for version in ((), *checkpoint.other_names):
        renamed = [_renamed(f"{module}.", version)[:-1] for module in modules]
        targets = targeted(config, list(dict.fromkeys([*renamed, *paths])))
        complaints.append([
            *(f"target_modules does not cover {path}" for path in paths if path not in targets),
            *(f"{path} is missing" for path in sorted(targets.difference(paths))),
        ])
    return min(complaints, key=len)


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is in one of `modules_to_save`; PEFT compares the ends of module paths."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    saved = tuple(config.get("modules_to_save") or ())
    return any(module.endswith(saved) for module in modules)


def _check(adapter: Adapter, checkpoint: Checkpoint, complaints: list[str]) -> None:
    if complaints:
        raise MisfitError(
            f"the adapter in {adapter.folder} does not fit this model "
            f"({checkpoint.model_class}): {in_one_line(complaints)}"
        )
