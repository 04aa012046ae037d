"""Weighted sums of LoRA adapters of one base, as one LoRA adapter.

The sum of the updates w_i s_i B_i A_i of a layer (s_i: the scaling) is itself a product,

    sum_i w_i s_i B_i A_i = B A,    B = [w_1 s_1 B_1, w_2 s_2 B_2, ...],    A = [A_1; A_2; ...]

of the sum of the ranks, exactly, whatever ranks and scalings the adapters have. Its best
approximation of a lower rank is its truncated SVD (Eckart and Young, 1936), which needs no matrix
of (out, in): with the QR decompositions B = Q_B R_B and A^T = Q_A R_A,

    B A = Q_B (R_B R_A^T) Q_A^T = (Q_B U) S (Q_A V)^T    with the SVD  R_B R_A^T = U S V^T

of a matrix no larger than the sum of the ranks. What is cut has the Frobenius norm of the singular
values that are left out. Negative weights subtract what an adapter has learned
(arXiv:2212.04089).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_engine.cli import quoted
from lora_engine.lora.adapter import OTHER_BASE, Adapter, save_adapter
from lora_engine.lora.adapter_config import MAX_FP32, AdapterError, MisfitError, targeted
from lora_engine.lora.adapter_weights import adapted_paths
from lora_engine.lora.injection import by_pattern
from lora_engine.lora.layer import LoRALinear, lora_scaling, update_bound
from lora_engine.lora.patterns import PatternError


@dataclass(frozen=True)
class Blend:
    """A weighted sum of adapters: A (R, in) and B (out, R) of each layer, whose scaling is 1.

    `cut` and `norm` are the squared Frobenius norms of what a lower rank has left out of each
    layer's update, and of the whole update; both are empty for an exact sum.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    cut: Mapping[str, float]
    norm: Mapping[str, float]

    @property
    def error(self) -> float:
        """|cut| / |update| over all layers."""
        return _ratio(sum(self.cut.values()), sum(self.norm.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        errors = {path: _ratio(self.cut[path], self.norm[path]) for path in self.cut}
        return max(errors.items(), key=lambda item: item[1])

    def save(self, folder: str | Path) -> None:
        """Write a PEFT adapter folder. Raises AdapterError for values that are not finite."""
        config = self.adapters[0].config
        provenance: dict[str, str] = {}
        for adapter in self.adapters:
            shared = {key: adapter.provenance[key] for key in _shared_keys(adapter)}
            provenance = shared | provenance
        names = [f"{weight:g} {adapter.folder}"
                 for adapter, weight in zip(self.adapters, self.weights)]
        names_of_base = [adapter.base_model for adapter in self.adapters if adapter.base_model]
        save_adapter(
            self._module(),
            folder,
            base_model=next(iter(names_of_base), None),
            hugging_face_class=(config.get("auto_mapping") or {}).get("base_model_class"),
            revision=config.get("revision"),
            provenance=provenance | {"blended_from": " + ".join(names)},
        )

    def _module(self) -> nn.Module:
        """Nothing but LoRA layers, without frozen weights, at the layers' paths."""
        config = self.adapters[0].config
        root = nn.Module()
        root.fan_in_fan_out = bool(config.get("fan_in_fan_out"))  # type: ignore[assignment]
        for path, (A, B) in self.matrices.items():
            *parents, name = path.split(".")
            module = root
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            layer = LoRALinear(
                nn.Linear(A.shape[1], len(B), bias=False, device="meta"),
                rank=len(A), alpha=len(A), dropout=config.get("lora_dropout", 0.0),
            )
            layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
            module.add_module(name, layer)
        return root


def blend(
    adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None
) -> Blend:
    """The sum of the adapters' updates, each times its weight.

    Layers that not all adapters have are summed over those that do. With `rank`, layers of a
    larger rank are truncated to it. Raises AdapterError for weights that are not finite, all 0 or
    too large, for adapters that change more than LoRA layers, and for adapters of different bases
    or prompts.
    """
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise AdapterError(
            f"the weights are {', '.join(f'{weight:g}' for weight in weights)}; expected finite "
            f"numbers, not all 0"
        )
    if rank is not None and rank < 1:
        raise AdapterError(f"the rank is {rank}; it must be 1 or more")
    for adapter in adapters:
        _check_plain(adapter)
        _check_same_base(adapters[0], adapter)
    prompts = [(a.prompt, a.folder) for a in adapters if "prompt" in a.provenance]
    if len({prompt for prompt, _ in prompts}) > 1:
        told = ", ".join(f"{prompt!r} ({folder})" for prompt, folder in prompts)
        raise AdapterError(f"the adapters were trained with different prompts: {told}")
    terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in zip(adapters, weights):
        for path, A, B in _scaled(adapter):
            if weight:
                terms.setdefault(path, []).append((A, weight * B))
    matrices = {path: _concatenated(path, parts) for path, parts in terms.items()}
    for path, (A, B) in matrices.items():  # as in the check of an adapter that is read
        bound = update_bound(len(A), len(A), float(A.abs().max()), float(B.abs().max()))
        if not bound <= MAX_FP32:
            weight, adapter = max(zip(weights, adapters), key=lambda item: abs(item[0]))
            raise AdapterError(
                f"the weight {weight:g} of {adapter.folder} is too large: the update of {path} may "
                f"overflow float32"
            )
    cut, norm = {}, {}
    if rank is not None:
        for path, (A, B) in matrices.items():
            A, B, cut[path], norm[path] = _truncated(A, B, rank)
            matrices[path] = A, B
    return Blend(adapters, weights, matrices, cut, norm)


def _scaled(adapter: Adapter) -> list[tuple[str, Tensor, Tensor]]:
    """The path, A and scaling * B of each layer."""
    config, paths = adapter.config, adapted_paths(adapter.matrices)
    try:
        ranks = by_pattern(config.get("rank_pattern"), paths, default=config["r"])
        alphas = by_pattern(config.get("alpha_pattern"), paths, default=config["lora_alpha"])
        missed = [path for path in paths if path not in targeted(config, paths)]
    except PatternError as error:
        raise AdapterError(f"the adapter in {adapter.folder}: {error}") from None
    layers = []
    for path in paths:
        A, B = (adapter.matrices[f"{path}.lora_{letter}"].float() for letter in "AB")
        if len(A) != ranks[path] or path in missed:
            what = "target_modules does not cover it" if path in missed else (
                f"its matrices have rank {len(A)}, but the configuration says {ranks[path]}"
            )
            raise AdapterError(f"the adapter in {adapter.folder} is damaged at {path}: {what}")
        scaling = lora_scaling(alphas[path], ranks[path], use_rslora=bool(config.get("use_rslora")))
        layers.append((path, A, scaling * B))
    return layers


def _concatenated(path: str, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One A (R, in) and B (out, R) for a sum of products; equal A are stored once."""
    shapes = {(A.shape[1], len(B)) for A, B in parts}
    if len(shapes) > 1:
        raise MisfitError(
            f"the adapters are for different bases: {path} has (in, out) of "
            f"{' and '.join(map(str, sorted(shapes)))}"
        )
    distinct: list[tuple[Tensor, Tensor]] = []
    for A, B in parts:
        same = next((i for i, (other, _) in enumerate(distinct) if torch.equal(A, other)), None)
        if same is None:
            distinct.append((A, B))
        else:
            distinct[same] = A, distinct[same][1] + B
    return torch.cat([A for A, _ in distinct]), torch.cat([B for _, B in distinct], dim=1)


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A and B of B A truncated to a rank, and the squared norms of what is cut and of B A."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    cut, norm = float(S[rank:].square().sum()), float(S.square().sum())
    if len(S) > rank or len(A) > rank:
        root = S[:rank].sqrt()  # shared by both, as in PEFT's initialization from an SVD
        A = (root.unsqueeze(1) * (Vt[:rank] @ Q_A.T)).float()
        B = ((Q_B @ U[:, :rank]) * root).float()
    return A, B, cut, norm


def _ratio(cut: float, norm: float) -> float:
    return math.sqrt(cut / norm) if norm else 0.0


def _shared_keys(adapter: Adapter) -> list[str]:
    """What the provenance tells of the base and the prompt; the rest is of one training run."""
    keys = [*(f"{part}_fingerprint" for part in OTHER_BASE), "prompt", "label_convention"]
    return [key for key in keys if key in adapter.provenance]


def _check_plain(adapter: Adapter) -> None:
    config = adapter.config
    is_embedding = any(".lora_embedding_" in name for name in adapter.matrices)
    is_convolution = any(matrix.dim() != 2 for matrix in adapter.matrices.values())
    what = next((words for is_so, words in (
        (config.get("use_dora"), "is a DoRA adapter"),
        (config.get("lora_bias"), "has LoRA layers with a bias"),
        (adapter.others or config.get("modules_to_save") or config.get("bias") not in
         (None, "none"), "replaces tensors of the base (bias or modules_to_save)"),
        (is_embedding or is_convolution, "changes embeddings or convolutions"),
    ) if is_so), None)
    if what is not None:
        raise AdapterError(
            f"the adapter in {adapter.folder} {what}, and only LoRA on linear layers can be "
            f"blended; merge it instead (python -m lora_engine merge --adapter "
            f"{quoted(str(adapter.folder))} --out MERGED)"
        )


def _check_same_base(first: Adapter, adapter: Adapter) -> None:
    """Raises AdapterError if two adapters record different bases, by fingerprint or by name."""
    shared = {
        part: first.provenance[key] for part in OTHER_BASE
        if (key := f"{part}_fingerprint") in first.provenance.keys() & adapter.provenance.keys()
    }
    complaint = adapter.foreign_base(f"that of {first.folder}", shared)
    names = first.base_model, adapter.base_model
    if complaint is None and not shared and None not in names and names[0] != names[1]:
        complaint = f"{adapter.folder} was trained on {names[1]}, and {first.folder} on {names[0]}"
    is_transposed = [bool(a.config.get("fan_in_fan_out")) for a in (first, adapter)]
    if complaint is None and is_transposed[0] != is_transposed[1]:
        complaint = f"fan_in_fan_out differs in {adapter.folder} and {first.folder}"
    if complaint is not None:
        raise AdapterError(f"{complaint}; only adapters of one base can be blended")
