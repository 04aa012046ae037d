"""The weights of a checkpoint: read its files, and load them into a model."""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_engine.files import UnusableFileError, read_limited
from lora_engine.lora.tensor_files import read_bin, read_tensors
from lora_engine.models.model_folder import MAX_CONFIG_BYTES, PretrainedError
from lora_engine.models.protocol import CaptioningModel
from lora_engine.terminal import one_line

_MAX_WEIGHTS_BYTES = 2**37
_MAX_TENSORS = 100_000
_MAX_NAME = 500  # characters
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; floating-point ones are converted to fp32."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_weights(path)
    return {
        name: tensor.float() if tensor.dtype in _WEIGHT_DTYPES else tensor
        for name, tensor in tensors.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, one or shards; safetensors before .bin.

    Raises PretrainedError if there are none, or if the index of shards is damaged.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if (folder / f"{stem}.{suffix}").exists():
            return [folder / f"{stem}.{suffix}"]
        if index.exists():
            return _read_index(index)
    raise PretrainedError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _read_index(path: Path) -> list[Path]:
    try:
        shards = json.loads(read_limited(path, MAX_CONFIG_BYTES))["weight_map"].values()
        return [path.with_name(Path(shard).name) for shard in sorted(set(shards))]
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PretrainedError(
            f"{path} is not an index of shards; expected "
            f'{{"weight_map": {{tensor: file name}}}}; download it again'
        ) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """A weight file's tensors in their stored dtypes, under the names of an unwrapped model.

    Raises PretrainedError if it is damaged.
    """
    try:
        read = read_tensors if path.suffix == ".safetensors" else read_bin
        tensors, _ = read(path, refuse=lambda name, _: None, max_bytes=_MAX_WEIGHTS_BYTES)
        if len(tensors) > _MAX_TENSORS or any(len(name) > _MAX_NAME for name in tensors):
            raise ValueError(
                f"it holds {len(tensors):,} tensors; expected at most {_MAX_TENSORS:,}, with names "
                f"of up to {_MAX_NAME} characters"
            )
        return _without_wrappers(tensors)
    except FileNotFoundError:
        raise PretrainedError(f"{path} is missing, although the index names it") from None
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        why = one_line(error)
        message = why if str(path) in why else f"cannot read {path}: {why}"
        raise PretrainedError(f"{message}; download it again") from None


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile and DistributedDataParallel add; raises ValueError."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: short.removeprefix("module.") for name, short in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError("some names occur with and without _orig_mod, so tensors are ambiguous")
    return {names[name]: tensor for name, tensor in tensors.items()}


def load_state(model: CaptioningModel, state: dict[str, Tensor], *, source: str) -> None:
    """Load tensors into a model on the meta device; names and shapes must match exactly."""
    head, embedding = model.tied_head
    stored_apart = head in state and embedding in state
    is_tied = not stored_apart or torch.equal(state[head], state[embedding])
    if is_tied:
        stored = state.get(embedding, state.get(head))
        if stored is not None:
            state[embedding] = state[head] = stored
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    complaints = [f"unknown tensor {name}" for name in sorted(set(state) - set(expected))]
    complaints += [
        f"missing tensor {name}" for name in sorted(expected) if state.get(name) is None
    ]
    complaints += [
        f"{name} is {tuple(state[name].shape)}, config.json says {shape}"
        for name, shape in expected.items()
        if state.get(name) is not None and tuple(state[name].shape) != shape
    ]
    complaints += [
        f"{name} is {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        for name, tensor in state.items() if tensor.dtype != torch.float32
    ]
    if complaints:
        more = [f"and {len(complaints) - 50:,} more"] if len(complaints) > 50 else []
        raise PretrainedError(
            f"the weights in {source} do not fit their configuration:\n  "
            + "\n  ".join([*complaints[:50], *more])
        )
    for name, tensor in state.items():
        # The sum takes one pass and no memory, but may itself overflow.
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            raise PretrainedError(
                f"the weights in {source} are damaged: {name} holds NaN, infinity or a number "
                f"beyond float32; download the files again"
            )
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    if is_tied:
        tie_head(model)


def tie_head(model: CaptioningModel) -> None:
    """Let the vocabulary head share the embedding's weight."""
    head, embedding = model.tied_head
    model.get_submodule(head.rpartition(".")[0]).weight = model.get_parameter(embedding)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and fp32 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()
