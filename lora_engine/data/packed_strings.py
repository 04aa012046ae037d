"""Many strings in one block of memory."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings, back to back in one buffer instead of as a million objects.

    Python counts the references to an object in the object itself: processes that are forked to
    load images would each get a copy of every page with a string that they look at.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        # JSON may hold halves of surrogate pairs, and file names bytes that are not text.
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
        place = range(len(self))[index]
        begin, end = self._ends[place], self._ends[place + 1]
        return self._bytes[begin:end].decode("utf-8", "surrogatepass")
