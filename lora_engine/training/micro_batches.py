"""Batches split where the GPU's memory is too small for them; the step stays the same."""

import logging

from lora_engine.data.batches import FeatureBatch, bucket_targets, pad_targets
from lora_engine.data.captions import IGNORED

logger = logging.getLogger(__name__)


class BatchSplitter:
    """Splits batches into what fits into memory, which it learns from what does not.

    A step's loss is a sum over all of its targets, divided by their number, so that the split
    changes neither loss nor gradients, except for their last bits and the dropout masks. `num_rows`
    (None: no limit) is part of a run's state: a resumed run splits as before.
    """

    def __init__(self) -> None:
        self.num_rows: int | None = None

    def split(self, batch: FeatureBatch) -> list[FeatureBatch]:
        """The batch in parts of at most `num_rows` rows."""
        return split(batch, self.num_rows)

    def shrink(self, batch: FeatureBatch) -> bool:
        """Halve the limit after a batch that did not fit; returns whether there is less to try."""
        largest = min(len(batch.rows), self.num_rows or len(batch.rows))
        if largest == 1:
            return False
        self.num_rows = largest // 2
        logger.info(
            f"out of GPU memory with {largest} captions at a time: continuing with "
            f"{self.num_rows}, and as many more micro-steps (the step stays the same)"
        )
        return True


def split(batch: FeatureBatch, num_rows: int | None) -> list[FeatureBatch]:
    """The batch in parts of at most `num_rows` rows, without those that have no target.

    Targets are padded to the same number in all parts, one of few, as in whole batches: a CUDA
    graph is of one shape.
    """
    if num_rows is None or len(batch.rows) <= num_rows:
        return [batch]
    num_tokens = batch.input_ids.shape[1]
    is_target = batch.target_ids != IGNORED
    parts, largest = [], 0
    for begin in range(0, len(batch.rows), num_rows):
        rows = slice(begin, begin + num_rows)
        first = begin * num_tokens
        end = first + len(batch.rows[rows]) * num_tokens
        mine = is_target & (batch.target_positions >= first) & (batch.target_positions < end)
        num_targets = int(mine.sum())
        if num_targets:
            largest = max(largest, bucket_targets(num_targets, num_rows * num_tokens))
            parts.append(batch._replace(
                input_ids=batch.input_ids[rows],
                target_positions=batch.target_positions[mine] - first,
                target_ids=batch.target_ids[mine],
                num_targets=num_targets,
                rows=batch.rows[rows],
                images=batch.images[rows],
                skipped=[],
                features=batch.features[rows],
            ))
    return [_padded(part, largest) for part in parts]


def _padded(part: FeatureBatch, num_targets: int) -> FeatureBatch:
    positions, ids = pad_targets(part.target_positions, part.target_ids, num_targets)
    return part._replace(target_positions=positions, target_ids=ids)
