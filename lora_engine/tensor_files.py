"""safetensors files: equal tensors as equal bytes, and foreign files read with limits."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class TensorFileError(ValueError):
    """A file that cannot be used, such as a safetensors file that is damaged."""


class Described(NamedTuple):
    """What a file's header says of a tensor; `dtype` as safetensors spells it ("F32")."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of tensors on the CPU; the same for the same tensors and metadata.

    safetensors itself writes metadata in a random order. (Nor would files of its save_file have the
    modes that the umask says: they are for their owner alone.)
    """
    data = save(dict(tensors), metadata={"format": "pt", **metadata})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_tensors(
    path: Path, *, refuse: Callable[[str, Described], str | None], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    `refuse` is asked about every tensor before any is read, and says what is wrong with it, if
    something is. Raises TensorFileError, and FileNotFoundError.
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
                    raise TensorFileError(f"{path}: {name} {complaint}")
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise TensorFileError(f"cannot read {path}: {error}") from None


def read_limited(path: Path, max_bytes: int) -> str:
    """A text file; raises OSError, and ValueError for one that is too large or not UTF-8."""
    size = check_file(path, max_bytes=max_bytes)
    with open(path, "rb") as file:
        return file.read(size).decode()


def check_file(path: Path, *, max_bytes: int) -> int:
    """The size of a regular file, or of one that a link leads to.

    Raises TensorFileError for anything else (reading a pipe or a device may never end) and for a
    file of more than `max_bytes`, and OSError.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise TensorFileError(f"{str(path)!r} is not a possible file name: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise TensorFileError(f"{path} is not a regular file")
    if status.st_size > max_bytes:
        raise TensorFileError(
            f"{path} has {status.st_size:,} bytes; this engine reads no more than {max_bytes:,}"
        )
    return status.st_size
