"""adapter_model.safetensors or .bin of PEFT's adapters: their tensors, read and checked.

Keys (huggingface/peft, `src/peft/utils/save_and_load.py`) are `base_model.model.<path>` and

    .lora_A.weight (R, in), .lora_B.weight (out, R)         on a linear layer
    .lora_A.weight (R, in, y, x), .lora_B.weight (out, R, 1, 1)  on a convolution
    .lora_embedding_A (R, rows), .lora_embedding_B (D, R)   on an embedding (rows, D)
    .lora_magnitude_vector (out,)                           of DoRA
    .lora_B.bias (out,)                                     of lora_bias
    .bias, .base_layer.bias, .weight, ...                   a tensor that replaces the base's
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lora_engine.files import UnusableFileError
from lora_engine.lora.adapter_config import MAX_FP32, AdapterError
from lora_engine.lora.layer import update_bound
from lora_engine.lora.tensor_files import Described, read_bin, read_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"  # of earlier versions of PEFT

MAX_WEIGHTS_BYTES = 8 * 2**30

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))  # safetensors' names
_KEY = re.compile(r"base_model\.model\.([!-~]{1,500})")
_MATRIX = re.compile(r".+\.(lora_[AB]|lora_embedding_[AB])")
_ADDED = re.compile(r".+\.(lora_magnitude_vector|lora_B\.bias)")


class AdapterTensors(NamedTuple):
    """The tensors of an adapter, on the CPU, and the metadata in their file.

    `matrices` come in pairs, `<path>.lora_A` and `.lora_B`, or `<path>.lora_embedding_A` and `_B`.
    `others` are `<path>.lora_magnitude_vector`, `<path>.lora_B.bias`, and tensors that replace the
    base model's, under its names.
    """

    matrices: dict[str, Tensor]
    others: dict[str, Tensor]
    metadata: dict[str, str]


def read_adapter_tensors(
    folder: Path, weights_file: str, config: Mapping[str, Any]
) -> AdapterTensors:
    """The tensors in `weights_file` of an adapter folder, or else in its .bin file.

    Raises AdapterError if a file is missing or damaged, if a key is none of the above, if A or B of
    a pair is missing, if a tensor that `config` asks for is missing or one is left over, and if a
    number is not finite or an update may overflow.
    """
    path = folder / weights_file
    try:
        if not path.exists() and (folder / BIN_FILE).exists():
            path, read = folder / BIN_FILE, read_bin
        else:
            read = read_tensors
        tensors, metadata = read(path, refuse=_complaint, max_bytes=MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {weights_file}; is it an adapter folder?") from None
    except UnusableFileError as error:
        raise AdapterError(str(error)) from None
    matrices: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _name(key)
        assert name is not None
        if name in matrices or name in others:
            raise AdapterError(f"{path} holds {name} twice, with _orig_mod in its key and without")
        # A copy: Windows removes no file that is still mapped.
        (matrices if _MATRIX.fullmatch(name) else others)[name] = tensor.clone()
    if not matrices:
        raise AdapterError(f"{path} holds no matrices")
    for name in matrices:
        _check_pair(path, name, matrices)
    for setting, suffix in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        _check_added(path, setting, bool(config.get(setting)), suffix, matrices, others)
    _check_values(path, matrices, others, config)
    metadata.pop("format", None)
    return AdapterTensors(matrices, others, metadata)


def adapted_paths(matrices: Mapping[str, Tensor]) -> list[str]:
    """The paths of the modules that the matrices adapt."""
    return [name.rpartition(".")[0] for name in matrices if name.endswith("A")]


def _name(key: str) -> str | None:
    """The name of a key in `AdapterTensors`; None if it is not an adapter's key."""
    match = _KEY.fullmatch(key.replace("_orig_mod.", ""))  # from a compiled model
    if match is None:
        return None
    name = re.sub(r"(\.lora_[AB]|\.lora_magnitude_vector)\.weight$", r"\1", match[1])
    name = name.replace(".base_layer.", ".")
    is_known = _MATRIX.fullmatch(name) or _ADDED.fullmatch(name)
    return name if is_known or not re.search(r"\.(lora_|token_adapter)", name) else None


def _complaint(key: str, described: Described) -> str | None:
    """What is wrong with a tensor; None if it is in order."""
    name = _name(key)
    if name is None:
        return (
            "is not a LoRA matrix; expected base_model.model.<path>.lora_A.weight or "
            ".lora_B.weight"
        )
    is_float = described.dtype in _FLOATS
    shape = described.shape
    if _MATRIX.fullmatch(name) and (len(shape) not in (2, 4) or 0 in shape or not is_float):
        return f"is {described}; expected a floating-point matrix"
    if _ADDED.fullmatch(name) and not is_float:  # buffers of the base may be whole numbers
        return f"is {described}; expected floating-point numbers"
    return None


def _check_pair(path: Path, name: str, matrices: Mapping[str, Tensor]) -> None:
    other = name[:-1] + ("B" if name.endswith("A") else "A")
    if other not in matrices:
        raise AdapterError(f"{path} has {name} but not {other}")
    rank, other_rank = matrices[name].shape[0], matrices[other].shape[1]
    if name.endswith("A") and rank != other_rank:
        raise AdapterError(f"{path}: {name} has rank {rank}, but {other} has rank {other_rank}")


def _check_added(
    path: Path,
    setting: str,
    is_set: bool,
    suffix: str,
    matrices: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> None:
    """Raises AdapterError unless each layer has the tensor that `setting` adds, or none has."""
    expected = {f"{layer}.{suffix}" for layer in adapted_paths(matrices)} if is_set else set()
    found = {name for name in others if name.endswith(f".{suffix}")}
    if missing := sorted(expected - found):
        raise AdapterError(f"{path} has no {missing[0]}, although {setting} is true")
    if surplus := sorted(found - expected):
        raise AdapterError(f"{path}: {surplus[0]} is left over: {setting} is {is_set}".lower())


def _check_values(
    path: Path,
    matrices: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Refuse numbers that are not finite, and matrices whose update may overflow."""
    largest = {
        name: float(tensor.float().abs().max()) if tensor.numel() else 0.0
        for name, tensor in (matrices | others).items()  # type: ignore[operator]
    }
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
                f"{path}: the update of {name.rpartition('.')[0]} may overflow float32 (with "
                f"alpha up to {alpha:g}); the adapter is damaged: use another copy"
            )
