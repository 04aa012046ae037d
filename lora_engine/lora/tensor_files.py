"""Files of tensors: safetensors, written with equal bytes for equal tensors, and .bin files.

They are read with limits. The only file that may read a published `.bin`, with weights_only.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_engine.files import UnusableFileError, check_file
from lora_engine.terminal import one_line

_FLOATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}


class Described(NamedTuple):
    """A tensor as described by the file's header; floating-point dtypes as safetensors names them
    ("F32").
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file of CPU tensors; equal for equal tensors and metadata.

    safetensors itself writes metadata in random order, and its `save_file` ignores the umask.
    """
    data = save(dict(tensors), metadata={"format": "pt", **metadata})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_tensors(
    path: Path, *, refuse: Callable[[str, Described], str | None], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Before any tensor is read, `refuse` is called with the name and description of each; it returns
    what is wrong with the tensor, or None. Raises UnusableFileError and FileNotFoundError.
    """
    try:
        check_file(path, max_bytes=max_bytes)
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for key in keys:
                part = file.get_slice(key)
                complaint = refuse(key, Described(part.get_dtype(), tuple(part.get_shape())))
                if complaint is not None:
                    raise UnusableFileError(f"{path}: {_short(key)} {complaint}")
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise UnusableFileError(f"cannot read {path}: {error}") from None


def read_bin(
    path: Path, *, refuse: Callable[[str, Described], str | None], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same for a .bin file of torch, which has no metadata; `refuse` is called after reading.

    Also raises UnusableFileError for contents other than tensors, or much larger than the file.
    """
    try:
        tensors = _read_bin(path, max_bytes)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        why = one_line(error)
        if "weights_only" in why:  # torch advises to run the code in the file
            why = "it is damaged, or holds more than tensors, such as code, which is never run"
        raise UnusableFileError(
            why if str(path) in why else f"cannot read {path}: {why}"
        ) from None
    for key, tensor in tensors.items():
        dtype = _FLOATS.get(tensor.dtype, str(tensor.dtype))
        complaint = refuse(key, Described(dtype, tuple(tensor.shape)))
        if complaint is not None:
            raise UnusableFileError(f"{path}: {_short(key)} {complaint}")
    return tensors, {}


def _short(key: str) -> str:
    return key if len(key) < 300 else shortened(key)


def _read_bin(path: Path, max_bytes: int) -> dict[str, Tensor]:
    size = check_file(path, max_bytes=max_bytes)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(member.file_size for member in file.infolist()) > size:
                raise ValueError("it is compressed, so it is not a published checkpoint")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        and tensor.device.type == "cpu" and not tensor.is_quantized
        for name, tensor in tensors.items()
    ):
        raise ValueError("it holds more than named tensors, so it is not a published checkpoint")
    # Only a tied tensor, which has two names, counts more than the bytes that store it.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
        raise ValueError("its tensors exceed the file's size, so it is not a published checkpoint")
    return {name: tensor.detach() for name, tensor in tensors.items()}
