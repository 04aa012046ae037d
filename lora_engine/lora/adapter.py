"""Adapters in PEFT's format: read and write adapter_config.json and adapter_model.safetensors.

Format: huggingface/peft (`src/peft/utils/save_and_load.py`, `src/peft/tuners/lora/config.py`).
Keys are `base_model.model.<path>.lora_A.weight` (R, in) and `.lora_B.weight` (out, R), with
Hugging Face's module paths, which our models share. PEFT drops weights that its targets do not
cover and only warns about missing ones; here both are errors.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import files
from lora_engine.files import UnusableFileError, read_limited
from lora_engine.lora.adapter_folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    AdapterError,
    find_adapter,
)
from lora_engine.lora.injection import (
    InjectionPlan,
    by_pattern,
    inject,
    linear_layers,
    lora_layers,
    lora_parameters,
    select,
)
from lora_engine.lora.layer import LoRALinear, update_bound
from lora_engine.lora.patterns import first_matches
from lora_engine.lora.tensor_files import Described, read_tensors, tensor_bytes

MAX_RANK = 2**20
MAX_FP32 = torch.finfo(torch.float32).max

_DTYPES = frozenset(("F64", "F32", "F16", "BF16"))  # safetensors' names
_KEY = re.compile(r"base_model\.model\.([!-~]{1,500})\.(lora_[AB])\.weight")

# PEFT settings and their supported values: other values must not load as plain LoRA.
_UNSUPPORTED: dict[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Others, such as PiSSA and OLoRA, change the frozen weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


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

    `matrices` have the names of `injection.lora_parameters`. `provenance` is the metadata stored
    with them (base fingerprint, prompt, ...), which is empty for files written by PEFT.
    """

    folder: Path
    config: dict[str, Any]
    matrices: dict[str, Tensor]
    provenance: dict[str, str] = field(default_factory=dict)

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
        words = " and ".join(OTHER_BASE[part] for part in different)
        note = " (a copy in another number format counts as such)" if "base" in different else ""
        base = f" ({self.base_model})" if self.base_model and self.base_model != name else ""
        return f"{self.folder} was trained on a base model{base} with {words} than {name} has{note}"

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

    The settings are those of `adapter_files`. An existing adapter is replaced only when the new one
    is complete; other files in `folder` are kept.
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
        f"base_model.model.{name}.weight": matrix.detach().float().cpu().contiguous()
        for name, matrix in lora_parameters(model).items()
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

    Raises AdapterError if a file is missing or damaged, if a key is not a LoRA matrix or its A or B
    is missing, if a number is out of range or not finite, and if the adapter is not plain LoRA.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / weights_file
    matrices: dict[str, Tensor] = {}

    def refuse(key: str, described: Described) -> str | None:
        if _match(key) is None:
            return (
                "is not a LoRA matrix; expected base_model.model.<path>.lora_A.weight or "
                ".lora_B.weight"
            )
        if len(described.shape) != 2 or 0 in described.shape or described.dtype not in _DTYPES:
            return f"is {described}; expected a floating-point matrix"
        return None

    try:
        tensors, provenance = read_tensors(path, refuse=refuse, max_bytes=MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {weights_file}; is it an adapter folder?") from None
    except UnusableFileError as error:
        raise AdapterError(str(error)) from None
    for key, tensor in tensors.items():
        match = _match(key)
        assert match is not None
        name = f"{match[1]}.{match[2]}"
        if name in matrices:
            raise AdapterError(f"{path} holds {name} twice, with _orig_mod in its key and without")
        matrices[name] = tensor.clone()  # Windows removes no file that is still mapped
    for name in matrices:
        _check_pair(path, name, matrices)
    _check_values(path, matrices, config)
    if not matrices:
        raise AdapterError(f"{path} holds no matrices")
    provenance.pop("format", None)
    return Adapter(folder, config, matrices, provenance)


def load_adapter(
    model: nn.Module, adapter: Adapter | str | Path, *, dropout: float | None = None
) -> InjectionPlan:
    """Inject an adapter into a model without LoRA layers and load its matrices.

    `adapter` is one that was read, or what `find_adapter` accepts. Ranks and scaling come from its
    configuration. For further training, `dropout` replaces the adapter's own.

    Raises AdapterError, before anything is changed, if a path is not a layer that LoRA may adapt,
    if a matrix does not have the shape given by model and configuration, or if the matrices are
    not those of exactly the layers that the configuration targets.
    """
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(find_adapter(adapter))
    config = adapter.config
    paths = [name.removesuffix(".lora_A") for name in adapter.matrices if name.endswith("lora_A")]
    try:
        select(model, paths)
        _check_fit(model, adapter, paths)
        plan = inject(
            model,
            [f"re:{re.escape(path)}" for path in paths],
            rank=config["r"],
            rank_pattern=config.get("rank_pattern"),
            alpha=config["lora_alpha"],
            alpha_pattern=config.get("alpha_pattern"),
            dropout=config.get("lora_dropout", 0.0) if dropout is None else dropout,
            rslora=bool(config.get("use_rslora")),
        )
    except ValueError as error:
        raise AdapterError(
            f"the adapter in {adapter.folder} does not fit this model "
            f"({type(model).__name__}): {error}"
        ) from None
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.copy_(adapter.matrices[name])
    return plan


@contextmanager
def naming_base(adapter: Adapter, name: str) -> Iterator[None]:
    """Within the context an AdapterError of `load_adapter` names the base model that the adapter
    was trained on, instead of the matrices that do not fit, if the model `name` is another."""
    try:
        yield
    except AdapterError:
        wanted = adapter.base_model
        if wanted is None or wanted in (name, str(Path(name).resolve())):
            raise
        raise AdapterError(
            f"{adapter.folder} was trained on {wanted} and does not fit {name}; give its own base "
            f"model with --model"
        ) from None


def _check_fit(model: nn.Module, adapter: Adapter, paths: list[str]) -> None:
    """Raises ValueError unless the matrices are those required by model and configuration."""
    config, matrices, layers = adapter.config, adapter.matrices, linear_layers(model)
    targeted = _targeted(config, [*layers, *(path for path in paths if path not in layers)])
    complaints = [
        f"target_modules does not cover {path}" for path in paths if path not in targeted
    ]
    without_matrices = targeted.difference(paths)
    complaints += [f"{path} is missing" for path in layers if path in without_matrices]
    complaints += [f"the model has no linear layer {path}" for path in paths if path not in layers]
    ranks = by_pattern(
        config.get("rank_pattern"), sorted(layers.keys() & paths), default=config["r"]
    )
    for path, rank in ranks.items():
        num_in, num_out = layers[path]
        for letter, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
            found = tuple(matrices[f"{path}.lora_{letter}"].shape)
            if found != shape:
                complaints.append(f"{path}.lora_{letter} is {found}, expected {shape}")
    if complaints:
        raise ValueError(_listed(complaints))


def _targeted(config: Mapping[str, Any], paths: Sequence[str]) -> set[str]:
    """PEFT's rule (huggingface/peft, `tuners_utils.py: check_target_module_exists`)."""
    def matching(patterns: str | list[str] | None) -> set[str]:
        if isinstance(patterns, str):
            return set(first_matches([patterns], paths))
        names = set(patterns or ())
        return {path for path in paths if not names.isdisjoint(_tails(path))}

    return matching(config.get("target_modules")) - matching(config.get("exclude_modules"))


def _tails(path: str) -> list[str]:
    """A path, and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[begin:]) for begin in range(len(parts))]


def _listed(complaints: list[str]) -> str:
    more = [f"and {len(complaints) - 8} more"] if len(complaints) > 8 else []
    return "".join(f"\n  {complaint}" for complaint in [*sorted(complaints)[:8], *more])


def _peft_config(
    layers: Mapping[str, LoRALinear],
    base_model: str | None,
    hugging_face_class: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """PEFT's configuration; ranks and alphas that differ from the first layer's are patterns."""
    first = next(iter(layers.values()))
    rank, alpha = first.rank, first.alpha
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
        "rank_pattern": {re.escape(p): x.rank for p, x in layers.items() if x.rank != rank},
        "alpha_pattern": {
            re.escape(p): x.alpha for p, x in layers.items() if x.alpha != alpha
        },
        # The alphas above already include rsLoRA's scaling.
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _match(key: str) -> re.Match | None:
    return _KEY.fullmatch(key.replace("_orig_mod.", ""))  # from a compiled model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(read_limited(path, MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(
            f"{folder} has no {CONFIG_FILE}; expected an adapter folder such as RUN/adapter"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: expected peft_type \"LORA\"")
    _check_settings(path, config)
    for name, plain in _UNSUPPORTED.items():
        if name in config and config[name] not in plain:
            raise AdapterError(
                f"{path}: {name} is {shortened(config[name])}; only plain LoRA is supported"
            )
    return config


def _check_settings(path: Path, config: Mapping[str, Any]) -> None:
    def check(name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise AdapterError(
                f"{path}: {name} is {shortened(config.get(name))}; expected {expected}"
            )

    def is_rank(value: Any) -> bool:
        return type(value) is int and 1 <= value <= MAX_RANK

    def is_alpha(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value <= MAX_FP32

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable() and len(value) <= 1000

    check("r", is_rank(config.get("r")), f"a whole number from 1 to {MAX_RANK:,}")
    check("lora_alpha", is_alpha(config.get("lora_alpha")), "a finite number above 0")
    dropout = config.get("lora_dropout", 0.0)
    check("lora_dropout", type(dropout) in (int, float) and 0 <= dropout < 1,
          "a number that is at least 0 and below 1")
    check("use_rslora", config.get("use_rslora") in (None, False, True), "true or false")
    for name, is_right in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha)):
        patterns = config.get(name) or {}
        check(name, isinstance(patterns, dict) and all(map(is_right, patterns.values())),
              "{pattern: number}, with numbers as for r and lora_alpha")
    for name in ("target_modules", "exclude_modules"):
        names = config.get(name)
        check(name, names is None or isinstance(names, str) or (
            isinstance(names, list) and all(isinstance(item, str) for item in names)
        ), "names, a regular expression or null")
    for name in ("base_model_name_or_path", "revision"):
        check(name, config.get(name) is None or is_text(config[name]),
              "printable text of up to 1,000 characters or null")
    # A revision becomes part of a path in the Hub's cache.
    check("revision", ".." not in (config.get("revision") or ""), "a branch, a tag or a commit")
    mapping = config.get("auto_mapping") or {}
    check("auto_mapping", isinstance(mapping, dict) and (
        mapping.get("base_model_class") is None or is_text(mapping["base_model_class"])
    ), '{"base_model_class": class name} or null')


def _check_pair(path: Path, name: str, matrices: Mapping[str, Tensor]) -> None:
    other = name[:-1] + ("B" if name.endswith("A") else "A")
    if other not in matrices:
        raise AdapterError(f"{path} has {name} but not {other}")
    rank, other_rank = matrices[name].shape[0], matrices[other].shape[1]
    if name.endswith("A") and rank != other_rank:
        raise AdapterError(f"{path}: {name} has rank {rank}, but {other} has rank {other_rank}")


def _check_values(
    path: Path, matrices: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Refuse matrices that are not finite, and those whose update may overflow."""
    largest = {name: float(matrix.float().abs().max()) for name, matrix in matrices.items()}
    for name, value in largest.items():
        if not math.isfinite(value):
            raise AdapterError(
                f"{path}: {name} holds NaN, infinity or a number beyond float32; the adapter is "
                f"damaged: use another copy, or train it again with a lower learning rate"
            )
    alpha = max([config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()])
    for name in (name for name in matrices if name.endswith("A")):
        largest_A, largest_B = largest[name], largest[name[:-1] + "B"]
        if update_bound(alpha, len(matrices[name]), largest_A, largest_B) > MAX_FP32:
            raise AdapterError(
                f"{path}: the update of {name.removesuffix('.lora_A')} may overflow float32 (with "
                f"alpha up to {alpha:g}); the adapter is damaged: use another copy"
            )
