"""Torch's count of floating-point operations, without its hooks on modules."""

from contextlib import AbstractContextManager

import torch
from torch.utils.flop_counter import FlopCounterMode


class _NoHooks(AbstractContextManager):
    """Replaces the global hooks by which torch counts per module.

    Under a hook every layer is called by itself, which is another computation.
    """

    parents = ("Global",)

    def __exit__(self, *_: object) -> None:
        pass


def count_flops() -> FlopCounterMode:
    """A context whose `get_total_flops()` includes products that are added in place."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry[torch.ops.aten.addmm_] = counter.flop_registry[torch.ops.aten.addmm]
    counter.mod_tracker = _NoHooks()
    return counter
