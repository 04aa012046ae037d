"""adapter_config.json of PEFT's adapters: read it within limits, and apply its rules of targets.

Format: huggingface/peft (`src/peft/tuners/lora/config.py`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from lora_engine.files import read_limited
from lora_engine.lora.patterns import first_matches

CONFIG_FILE = "adapter_config.json"

MAX_CONFIG_BYTES = 16 * 2**20
MAX_RANK = 2**20
MAX_FP32 = torch.finfo(torch.float32).max

# PEFT settings and their supported values: other values must not load as plain LoRA.
_UNSUPPORTED: dict[str, tuple] = {
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


# Settings of these forms change what an adapter computes; those known here do not, or are above.
_VARIANT = re.compile("use_.*|.*_config")
_KNOWN = frozenset((
    "use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "megatron_config", "runtime_config", *_UNSUPPORTED,
))


class AdapterError(ValueError):
    """An adapter folder that cannot be read or used."""


class MisfitError(AdapterError):
    """An adapter that does not fit the model."""


def read_config(folder: Path) -> dict[str, Any]:
    """The checked configuration of an adapter folder. Raises AdapterError."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(read_limited(path, MAX_CONFIG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(
            f"{folder} has no {CONFIG_FILE}; expected an adapter folder such as RUN/adapter"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind is None:
        raise AdapterError(
            f'{path} has no "peft_type"; expected an adapter that PEFT or this engine has saved'
        )
    if kind != "LORA":
        raise AdapterError(
            f'{path}: peft_type is {shortened(kind)}; expected "LORA". Train with LoRA, or merge '
            f"the adapter with PEFT (merge_and_unload, then save_pretrained) and use the result as "
            f"--model"
        )
    _check_settings(path, config)
    refused = [
        name for name, value in config.items()
        if value not in _UNSUPPORTED.get(name, (value,))
        or value and _VARIANT.fullmatch(name) and name not in _KNOWN
    ]
    for name in refused:
        initial = "init_lora_weights"
        hint = " (or save it with path_initial_model_for_weight_conversion)"
        known = "" if name in _UNSUPPORTED else ", an unknown setting, perhaps of a newer PEFT"
        raise AdapterError(
            f"{path}: {name} is {shortened(config[name])}{known}; only LoRA, rsLoRA and DoRA are "
            f"supported. Merge it with PEFT (merge_and_unload, then save_pretrained), and use "
            f"the result as --model{hint if name == initial else ''}"
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

    def are(kind: type, values: Any) -> bool:
        return isinstance(values, list) and all(type(item) is kind for item in values)

    check("r", is_rank(config.get("r")), f"a whole number from 1 to {MAX_RANK:,}")
    check("lora_alpha", is_alpha(config.get("lora_alpha")), "a finite number above 0")
    dropout = config.get("lora_dropout", 0.0)
    check("lora_dropout", type(dropout) in (int, float) and 0 <= dropout < 1,
          "a number that is at least 0 and below 1")
    for name in ("use_rslora", "use_dora", "lora_bias"):
        check(name, config.get(name) in (None, False, True), "true or false")
    check("bias", config.get("bias") in (None, "none", "all", "lora_only"),
          '"none", "all" or "lora_only"')
    for name, is_right in (("rank_pattern", is_rank), ("alpha_pattern", is_alpha)):
        patterns = config.get(name) or {}
        check(name, isinstance(patterns, dict) and all(map(is_right, patterns.values())),
              "{pattern: number}, with numbers as for r and lora_alpha")
    for name in ("target_modules", "exclude_modules"):
        names = config.get(name)
        check(name, names is None or isinstance(names, str) or are(str, names),
              "names, a regular expression or null")
    check("modules_to_save", config.get("modules_to_save") is None
          or are(str, config["modules_to_save"]), "names or null")
    layers = config.get("layers_to_transform")
    check("layers_to_transform", layers is None or type(layers) is int or are(int, layers),
          "numbers of layers or null")
    pattern = config.get("layers_pattern")
    check("layers_pattern", pattern is None or isinstance(pattern, str) or are(str, pattern),
          "names or null")
    for name in ("base_model_name_or_path", "revision"):
        check(name, config.get(name) is None or is_text(config[name]),
              "printable text of up to 1,000 characters or null")
    # A revision becomes part of a path in the Hub's cache.
    check("revision", ".." not in (config.get("revision") or ""), "a branch, a tag or a commit")
    mapping = config.get("auto_mapping") or {}
    check("auto_mapping", isinstance(mapping, dict) and (
        mapping.get("base_model_class") is None or is_text(mapping["base_model_class"])
    ), '{"base_model_class": class name} or null')


def targeted(config: Mapping[str, Any], paths: Sequence[str]) -> set[str]:
    """Those of the module paths that the configuration targets.

    PEFT's rule (huggingface/peft, `tuners_utils.py: check_target_module_exists`).
    """
    targets = config.get("target_modules")
    matched = _matching(targets, paths)
    if not isinstance(targets, str):
        numbers = config.get("layers_to_transform")
        numbers = [numbers] if isinstance(numbers, int) else numbers
        whole = set(targets or ())  # names of whole paths are targets in any layer
        matched = {
            path for path in matched
            if not numbers or path in whole
            or _layer_number(path, config.get("layers_pattern")) in numbers
        }
    saved = config.get("modules_to_save") or ()
    return matched - _matching(config.get("exclude_modules"), paths) - {
        path for path in paths if any(f".{name}." in f".{path}." for name in saved)
    }


def _matching(patterns: str | list[str] | None, paths: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        return set(first_matches([patterns], paths))
    names = set(patterns or ())
    return {path for path in paths if not names.isdisjoint(_tails(path))}


def _tails(path: str) -> list[str]:
    """A path, and what follows each of its dots."""
    parts = path.split(".")
    return [".".join(parts[begin:]) for begin in range(len(parts))]


def _layer_number(path: str, lists: str | list[str] | None) -> int | None:
    """The number behind the first of `lists`, names of layer lists; without, the first number."""
    names = [lists] if isinstance(lists, str) else lists or []
    patterns = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in names]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        if match := re.match(pattern, path):
            return int(match[1])
    return None
