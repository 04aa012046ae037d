"""Batches split where the GPU's memory is too small for them; the step stays the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_engine.data.batches import FeatureBatch
from lora_engine.data.captions import IGNORED


class FittingBatches:
    """Splits batches into what fits into memory, which it learns from what does not.

    A step's loss is a sum over all of its targets, divided by their number, so that the split
    changes neither loss nor gradients, beyond their last bits and the draws of dropout. `num_rows`
    (None: no limit) is part of a run's state: a run that goes on splits as it did.
    """

    def __init__(self, *, say: Callable[[str], None]) -> None:
        self.num_rows: int | None = None
        self.say = say

    def run(
        self,
        function: Callable[[list[FeatureBatch]], Tensor],
        batches: Sequence[FeatureBatch],
        *,
        clear: Callable[[], None],
    ) -> Tensor:
        """function(batches), with smaller batches until they fit; `clear` undoes a failed try.

        Raises torch.OutOfMemoryError where not even one row fits.
        """
        while True:
            parts = [part for batch in batches for part in split(batch, self.num_rows)]
            try:
                return function(parts)
            except torch.OutOfMemoryError:
                largest = max(len(part.rows) for part in parts)
                if largest == 1:
                    raise
            # Out here nothing refers to the failed try's tensors any more.
            self.num_rows = largest // 2
            clear()
            self.say(
                f"out of GPU memory with {largest} captions at a time: going on with "
                f"{self.num_rows}, and as many micro-steps more (the step stays the same)"
            )


def split(batch: FeatureBatch, num_rows: int | None) -> list[FeatureBatch]:
    """The batch in parts of at most `num_rows` rows, without those that have no target."""
    if num_rows is None or len(batch.rows) <= num_rows:
        return [batch]
    num_tokens = batch.input_ids.shape[1]
    is_target = batch.target_ids != IGNORED
    parts = []
    for begin in range(0, len(batch.rows), num_rows):
        rows = slice(begin, begin + num_rows)
        first = begin * num_tokens
        end = first + len(batch.rows[rows]) * num_tokens
        mine = is_target & (batch.target_positions >= first) & (batch.target_positions < end)
        if mine.any():
            parts.append(batch._replace(
                input_ids=batch.input_ids[rows],
                target_positions=batch.target_positions[mine] - first,
                target_ids=batch.target_ids[mine],
                num_targets=int(mine.sum()),
                rows=batch.rows[rows],
                images=batch.images[rows],
                skipped=[],
                features=batch.features[rows],
            ))
    return parts
