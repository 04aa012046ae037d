"""The processes of a run: what each of them does, and how they agree.

`OneProcess` is the form for a single process, which imports nothing distributed.
"""

from typing import Any, Protocol


class Ranks(Protocol):
    """The processes of a run; `rank` is this one's number among `size`.

    `local_size` of them are on this machine, and this one is number `local_rank` of those. `launch`
    is the same text in all of them, and another one in every launch.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launch: str

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in order of rank; all must call it."""

    def from_machine(self, value: Any) -> Any:
        """The JSON value of this machine's first process; all must call it."""

    def check(self) -> None:
        """Raises RankLost if another process has failed or no longer responds."""


class OneProcess:
    """A run in one process."""

    rank, size, local_rank, local_size, launch = 0, 1, 0, 1, ""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_machine(self, value: Any) -> Any:
        return value

    def check(self) -> None:
        pass
