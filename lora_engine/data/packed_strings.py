"""Many strings in one block of memory."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings, concatenated in one buffer instead of a million objects.

    Python stores an object's reference count in the object: forked loading processes would each
    copy every memory page with a string that they read.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        # JSON may hold halves of surrogate pairs, and file names may hold bytes that are not text.
        parts = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._bytes = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        begin, end = self._ends[position], self._ends[position + 1]
        return self._bytes[begin:end].decode("utf-8", "surrogatepass")
