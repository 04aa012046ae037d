"""safetensors files: equal tensors become equal bytes, and files are read with limits."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_engine.files import UnusableFileError, check_file


class Described(NamedTuple):
    """A tensor as described by the file's header; `dtype` as in safetensors ("F32")."""

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
                    name = key if len(key) < 300 else shortened(key)
                    raise UnusableFileError(f"{path}: {name} {complaint}")
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise UnusableFileError(f"cannot read {path}: {error}") from None
