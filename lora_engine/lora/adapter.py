"""Adapters in PEFT's format: read them, inject them into a model, and write a model's own.

Format: adapter_config.py and adapter_weights.py. Module paths are Hugging Face's, which our
decoders share. PEFT drops weights that its targets do not cover and only warns about missing ones;
here both are errors.

LoRA on the linear layers of the decoder's blocks is injected, and can be trained further. Adapters
that change more (`beyond_lora`) can only be merged into a checkpoint: checkpoint_merge.py.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import files
from lora_engine.cli import quoted
from lora_engine.lora.adapter_config import (
    CONFIG_FILE,
    AdapterError,
    MisfitError,
    read_config,
    targeted,
)
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.lora.adapter_weights import (
    WEIGHTS_FILE,
    adapted_paths,
    read_adapter_tensors,
)
from lora_engine.lora.injection import (
    InjectionPlan,
    adapt,
    by_pattern,
    linear_layers,
    lora_layers,
    lora_parameters,
    select,
)
from lora_engine.lora.layer import LoRALinear
from lora_engine.lora.tensor_files import tensor_bytes

# What differs in a base model, as messages name it, by the keys of `Captioner.fingerprints`.
OTHER_BASE = {
    "base": "other weights",
    "configuration": "another configuration",
    "tokenizer": "another tokenizer",
    "preprocessor": "another preprocessor",
}


def is_same(before: str, now: str) -> bool:
    """Whether two values of `Captioner.fingerprints` agree.

    Of JSON objects only the keys that both have are compared: later versions may record more.
    """
    try:
        one, other = json.loads(before), json.loads(now)
    except (ValueError, RecursionError):  # a digest
        return before == now
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return before == now
    return all(one[name] == other[name] for name in one.keys() & other.keys())


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read and checked, on the CPU.

    `matrices` and `others` are described in `AdapterTensors`; LoRA matrices have the names of
    `injection.lora_parameters`. `provenance` is the metadata stored with them (base fingerprint,
    prompt, ...), which is empty for files written by PEFT.
    """

    folder: Path
    config: dict[str, Any]
    matrices: dict[str, Tensor]
    provenance: dict[str, str] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.provenance.get("prompt", "")

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    def foreign_base(self, name: str, fingerprints: Mapping[str, str]) -> str | None:
        """How the base model that it was trained on differs from the model `name` with these
        `Captioner.fingerprints`; None if it does not, or the adapter does not tell."""
        different = [
            part for part, fingerprint in fingerprints.items()
            if not is_same(self.provenance.get(f"{part}_fingerprint", fingerprint), fingerprint)
        ]
        if not different:
            return None
        words = ["weights" if part == "base" else part for part in different]
        parts = " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
        note = " (a copy in another number format counts as such)" if "base" in different else ""
        base = f" ({self.base_model})" if self.base_model and self.base_model != name else ""
        return (
            f"{self.folder} was trained on a base model{base} that differs from {name} in its "
            f"{parts}{note}"
        )

    @property
    def base_on_hub(self) -> str | None:
        """The base model's name on the Hub, or None if it is a local folder."""
        is_folder = self.base_model is not None and Path(self.base_model).is_absolute()
        return None if is_folder else self.base_model


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    hugging_face_class: str | None = None,
    revision: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA matrices of `model` as a PEFT adapter folder, both files or none.

    As by PEFT's `save_pretrained`, an adapter that `folder` already holds is replaced, once the new
    one is complete; other files in it are kept. PiSSA and OLoRA change the frozen weights: their
    adapters are saved as LoRA of twice the rank, for the base as it was. The settings are those of
    `adapter_files`.
    """
    write_adapter(folder, adapter_files(
        model,
        base_model=base_model,
        hugging_face_class=hugging_face_class,
        revision=revision,
        provenance=provenance,
    ))


def write_adapter(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write the result of `adapter_files` as an adapter folder, all files or none."""
    with files.replaced_folder(folder) as new:
        for name, data in contents.items():
            (new / name).write_bytes(data)


def adapter_files(
    model: nn.Module,
    *,
    base_model: str | None = None,
    hugging_face_class: str | None = None,
    revision: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """The contents of the files of a PEFT adapter folder, by file name.

    `base_model` is the folder or Hub name of the base model, by default the attribute
    `name_or_path` of `model`, if it has one (PEFT's rule, too); `hugging_face_class` is its class
    in transformers. Raises AdapterError for a model without LoRA layers, and for values that are
    not finite.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise AdapterError("this model has no LoRA layers to save; call inject() first")
    base_model = getattr(model, "name_or_path", None) if base_model is None else base_model
    config = _peft_config(layers, base_model, hugging_face_class, revision)
    # PEFT decides by the module, and warns if the file disagrees.
    config["fan_in_fan_out"] = getattr(model, "fan_in_fan_out", False)
    tensors = {
        # PEFT stores a magnitude vector without the .weight that it has as a module.
        f"base_model.model.{name}{'' if matrix.dim() == 1 else '.weight'}":
            matrix.detach().float().cpu().contiguous()
        for name, matrix in _saved_parameters(layers).items()
    }
    bad = [name for name, matrix in tensors.items() if not matrix.isfinite().all()]
    if bad:
        raise AdapterError(
            f"an adapter with NaN or infinite values is not saved ({len(bad)} of {len(tensors)} "
            f"matrices, first {bad[0]})"
        )
    return {
        WEIGHTS_FILE: tensor_bytes(tensors, provenance or {}),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }


def read_adapter(folder: str | Path, *, weights_file: str = WEIGHTS_FILE) -> Adapter:
    """Read an adapter folder written by PEFT or by `save_adapter`.

    Raises AdapterError as `read_config` and `read_adapter_tensors` do.
    """
    folder = Path(folder)
    config = read_config(folder)
    matrices, others, provenance = read_adapter_tensors(folder, weights_file, config)
    return Adapter(folder, config, matrices, provenance, others)


def load_adapter(
    model: nn.Module,
    adapter: Adapter | str | Path,
    *,
    dropout: float | None = None,
    use_lorafa: bool = False,
) -> InjectionPlan:
    """Inject an adapter into a model without LoRA layers and load its matrices.

    `adapter` is one that was read, or what `find_adapter` accepts. Ranks and scaling come from its
    configuration. For further training, `dropout` replaces the adapter's own, and `use_lorafa`
    freezes its A matrices.

    Raises AdapterError, before anything is changed, if the adapter changes more than LoRA layers
    can (`beyond_lora`), if a matrix does not have the shape given by model and configuration, or if
    the matrices are not those of exactly the layers that the configuration targets.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(find_adapter(adapter))
    if beyond := beyond_lora(model, adapter):
        raise AdapterError(
            f"the adapter in {adapter.folder} {beyond}; merge it first (python -m lora_engine "
            f"merge --adapter {quoted(str(adapter.folder))} --out MERGED), and train with --model "
            f"MERGED"
        )
    config, paths = adapter.config, adapted_paths(adapter.matrices)
    try:
        select(model, paths)
        _check_fit(model, adapter, paths)
        paths = [path for path in linear_layers(model) if path in paths]
        plan = adapt(
            model,
            by_pattern(config.get("rank_pattern"), paths, default=config["r"]),
            by_pattern(config.get("alpha_pattern"), paths, default=config["lora_alpha"]),
            dropout=config.get("lora_dropout", 0.0) if dropout is None else dropout,
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            use_lorafa=use_lorafa,
        )
    except ValueError as error:
        raise MisfitError(
            f"the adapter in {adapter.folder} does not fit this model "
            f"({type(model).__name__}): {error}"
        ) from None
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            stored = (adapter.others if parameter.dim() == 1 else adapter.matrices)[name]
            parameter.copy_(stored.view_as(parameter))
    return plan


@contextmanager
def naming_base(adapter: Adapter, name: str) -> Iterator[None]:
    """Within the context an adapter that does not fit is answered with the base model that it was
    trained on, instead of the tensors that do not fit, if the model `name` is another."""
    try:
        yield
    except MisfitError:
        wanted = adapter.base_model
        if wanted is None or wanted in (name, str(Path(name).resolve())):
            raise
        raise AdapterError(
            f"{adapter.folder} was trained on {wanted} and does not fit {name}; give its own base "
            f"model with --model"
        ) from None


def beyond_lora(model: nn.Module, adapter: Adapter) -> str | None:
    """What an adapter changes besides the layers that LoRA may adapt, for messages, or None.

    Modules that the model does not have are ignored.
    """
    config, decoder = adapter.config, getattr(model, "decoder", None)
    parts = dict(model.named_children())
    scope = re.compile(getattr(model, "lora_scope", ".*"))
    paths = adapted_paths(adapter.matrices)
    replaced = [name for name in adapter.others if ".lora_" not in name]
    for path in paths + replaced:
        part = parts.get(path.partition(".")[0])
        if decoder is not None and part is not None and part is not decoder:
            return "changes the vision encoder, which is frozen here"
    if config.get("lora_bias"):
        return "has LoRA layers with a bias, which are not trained here"
    if replaced or config.get("bias") not in (None, "none") or config.get("modules_to_save"):
        return "replaces tensors of the base (bias or modules_to_save), which are frozen here"
    for path in paths:
        if path.partition(".")[0] in parts and not scope.fullmatch(path):
            return f"changes {path}, which is frozen here"
    return None


def _check_fit(model: nn.Module, adapter: Adapter, paths: list[str]) -> None:
    """Raises ValueError unless the matrices are those required by model and configuration."""
    config, matrices, layers = adapter.config, adapter.matrices, linear_layers(model)
    targets = targeted(config, [*layers, *(path for path in paths if path not in layers)])
    complaints = [f"the model has no linear layer {path}" for path in paths if path not in layers]
    complaints += [f"target_modules does not cover {path}" for path in paths if path not in targets]
    complaints += [f"{path} is missing" for path in layers if path in targets.difference(paths)]
    ranks = by_pattern(
        config.get("rank_pattern"), sorted(layers.keys() & paths), default=config["r"]
    )
    for path, rank in ranks.items():
        num_in, num_out = layers[path]
        for letter, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
            found = tuple(matrices[f"{path}.lora_{letter}"].shape)
            if found != shape:
                complaints.append(f"{path}.lora_{letter} is {found}, expected {shape}")
        magnitude = adapter.others.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None and magnitude.numel() != num_out:
            complaints.append(
                f"{path}.lora_magnitude_vector has {magnitude.numel()} values, expected {num_out}"
            )
    if complaints:
        raise ValueError(in_one_line(complaints))


def in_one_line(complaints: list[str]) -> str:
    """The first of several complaints, and how many more there are."""
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return complaints[0] + more


def _saved_parameters(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """The parameters of LoRA layers by name, as they are saved.

    With A_0 and B_0, whose update PiSSA and OLoRA have taken out of W, that is

        W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]
    """
    saved: dict[str, Tensor] = {}
    for path, layer in layers.items():
        named: dict[str, Tensor] = dict(layer.lora_parameters())
        if layer.initial_matrices is not None:
            A, B = layer.initial_matrices
            named["lora_A"] = torch.cat([layer.lora_A, A.to(layer.lora_A.device)])
            named["lora_B"] = torch.cat([layer.lora_B, -B.to(layer.lora_B.device)], dim=1)
        saved |= {f"{path}.{name}": tensor for name, tensor in named.items()}
    return saved


def restore_initial(model: nn.Module, adapter: Adapter) -> None:
    """Give the new LoRA layers of a run with PiSSA or OLoRA, of which `adapter` was saved, the
    matrices and frozen weights that the run had.

    The layers must have the run's ranks, and the base's weights.
    """
    for path, layer in lora_layers(model):
        with torch.no_grad():
            A, first_A = adapter.matrices[f"{path}.lora_A"].split(layer.rank)
            B, first_B = adapter.matrices[f"{path}.lora_B"].split(layer.rank, dim=1)
            layer.subtract_initial(first_A.to(layer.lora_A), -first_B.to(layer.lora_B))
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            if layer.lora_magnitude_vector is not None:
                magnitude = adapter.others[f"{path}.lora_magnitude_vector"]
                layer.lora_magnitude_vector.copy_(magnitude)


def _peft_config(
    layers: Mapping[str, LoRALinear],
    base_model: str | None,
    hugging_face_class: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """PEFT's configuration; ranks and alphas that differ from the first layer's are patterns."""
    first = next(iter(layers.values()))
    is_converted = first.initial_matrices is not None
    ranks = {path: x.rank * (2 if is_converted else 1) for path, x in layers.items()}
    alphas = {
        # With twice the rank, and without rsLoRA, this alpha gives the same scaling.
        path: x.scaling * ranks[path] if is_converted else x.alpha for path, x in layers.items()
    }
    rank, alpha = (next(iter(values.values())) for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "auto_mapping": {
            "base_model_class": hugging_face_class,
            "parent_library": "transformers",
        } if hugging_face_class else None,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        # Full paths: in PEFT a short name such as "dense" would also match the vocabulary head.
        "target_modules": list(layers),
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(p): a for p, a in alphas.items() if a != alpha},
        "use_rslora": first.use_rslora and not is_converted,
        "use_dora": first.lora_magnitude_vector is not None,
        "bias": "none",
        "lora_bias": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
