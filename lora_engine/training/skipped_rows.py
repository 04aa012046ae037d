"""Rows that cannot be used: counted against --max_bad_share, and listed in skipped.jsonl."""

import json
import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lora_engine.data.batches import CaptionedImages, Skipped
from lora_engine.data.rows import MAX_ROWS_SHOWN, BadRow
from lora_engine.report.run_folder import RunFolder
from lora_engine.stopping import TrainingStopped
from lora_engine.terminal import counted

logger = logging.getLogger(__name__)

ADVICE = "Repair or remove them, or raise --max_bad_share"
MIN_SAMPLE = 200  # rows to judge --max_bad_share by
MAX_SHOWN = 10  # skipped images named on the console


class SkippedRows:
    """Counts rows whose image cannot be used, and lists each image once in skipped.jsonl, after the
    rows that were rejected when the annotation files were read."""

    def __init__(self, folder: RunFolder, *, max_share: float, num_rows: int) -> None:
        self.folder = folder
        self.max_share = max_share
        self.tried = np.zeros(num_rows, dtype=bool)
        self.failed = np.zeros(num_rows, dtype=bool)
        self.seen: set[str] = set()
        self.last: Skipped | None = None

    @property
    def num_images(self) -> int:
        return len(self.seen)

    def begin(self, bad_rows: Sequence[BadRow], *, is_listed: bool) -> None:
        """Print the first rejected rows, and list all of them unless a resumed run has done so."""
        if not bad_rows:
            return
        if not is_listed:
            self.folder.write_lines(
                self.folder.skipped,
                ({"row": bad.location, "reason": bad.reason} for bad in bad_rows),
            )
        for bad in bad_rows[:MAX_ROWS_SHOWN]:
            logger.info(f"skipped {bad}")
        logger.info(
            f"skipped {counted(len(bad_rows), 'row')} in all; {self.folder.skipped} lists them"
        )

    def restore(self, dataset: CaptionedImages, tried: Iterable[int]) -> None:
        """Restore which rows of a resumed run were tried, and which images it skipped."""
        if self.folder.skipped.exists():
            lines = self.folder.skipped.read_text(encoding="utf-8").rstrip("\n").split("\n")
            self.seen = {
                record["image"] for record in map(json.loads, filter(None, lines))
                if "image" in record
            }
        self.tried[list(tried)] = True
        if not self.seen:
            return
        failed = [image for image, path in enumerate(dataset.image_paths) if path in self.seen]
        self.failed = self.tried & np.isin(dataset.image_of_row, failed)

    def add(self, batches: Sequence[Sequence[int]], problems: Sequence[Skipped]) -> None:
        """Count the rows of a step, given by micro-batch, and list those that failed.

        Raises TrainingStopped if too many of the rows tried so far, or a whole batch, failed.
        """
        bad_rows = [problem.row for problem in problems]
        self.tried[[row for batch in batches for row in batch] + bad_rows] = True
        self.failed[bad_rows] = True
        self._log(problems)
        num_tried, num_failed = int(self.tried.sum()), int(self.failed.sum())
        limit = allowed_failures(
            num_tried, self.max_share, is_sample=num_tried < len(self.tried)
        )
        too_many = num_failed > limit and num_tried >= min(len(self.tried), MIN_SAMPLE)
        if self.last and (too_many or not all(batches)):
            raise TrainingStopped(
                f"{num_failed} of {num_tried} training rows tried have no usable image, more than "
                f"--max_bad_share {self.max_share:g}; the last is {self.last.image}: "
                f"{self.last.reason} (all are in {self.folder.skipped}). {ADVICE}"
            )

    def add_validation(self, problems: Sequence[Skipped], *, dataset_size: int) -> None:
        """List the validation rows that failed.

        Raises TrainingStopped if they are too many; all rows must have been tried.
        """
        self._log(problems)
        if len(problems) > self.max_share * dataset_size:
            raise TrainingStopped(
                f"{len(problems)} of {dataset_size} validation rows have no usable image, more "
                f"than --max_bad_share {self.max_share:g}; the first is {problems[0].image}: "
                f"{problems[0].reason}. {ADVICE}"
            )

    def _log(self, problems: Sequence[Skipped]) -> None:
        """Log problems, and add each image once to skipped.jsonl."""
        for problem in problems:
            self.last = problem
            if problem.image in self.seen:
                continue
            self.seen.add(problem.image)
            line = {"image": problem.image, "reason": problem.reason}
            self.folder.append(self.folder.skipped, line)
            if len(self.seen) <= MAX_SHOWN:
                logger.info(f"skipped {problem.image}: {problem.reason}")
            elif len(self.seen) == MAX_SHOWN + 1:
                logger.info(f"further skipped images are only listed in {self.folder.skipped}")


def allowed_failures(num_tried: int, max_share: float, *, is_sample: bool) -> float:
    """How many of `num_tried` may fail; of a sample three standard deviations more.

    Otherwise a dataset just below the allowed share could be refused by chance.
    """
    chance = 3 * math.sqrt(max_share * (1 - max_share) * num_tried) if is_sample else 0.0
    return max_share * num_tried + chance
