"""When a run writes checkpoints, and that a failed write costs nothing that is there."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lora_engine.cli import quoted
from lora_engine.data.seen_images import DIGESTS_FILE, write_digests
from lora_engine.files import check_space
from lora_engine.lora.adapter import AdapterError
from lora_engine.report.run_folder import RunFolder, checkpoint_name
from lora_engine.training.best_adapter import BestAdapter
from lora_engine.training.checkpoint import (
    Checkpoint,
    checkpoint_bytes,
    remove_old_checkpoints,
    write_checkpoint,
)

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes each state of a run once, every so many steps or seconds, and removes old checkpoints.

    `step` is that of the newest checkpoint, if there is one. A checkpoint of `kept_step` is written
    and stays.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        every_steps: float,
        every_s: float,
        keep_last: int,
        kept_step: int | None = None,
    ) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self.every_s = every_s
        self.keep_last = keep_last
        self.kept_step = kept_step
        self.step: int | None = None
        self._is_validated = False
        self._digests_checksum = b""
        self._last_s = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after a checkpoint that was read."""
        self.note(checkpoint.step, is_validated=checkpoint.is_validated)

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint after `step` steps."""
        is_time = time.monotonic() - self._last_s >= self.every_s
        if is_time:  # several processes ask for the next step before this one's is written
            self._last_s = time.monotonic()
        return step % self.every_steps == 0 or step == self.kept_step or is_time

    def has(self, step: int, *, is_validated: bool) -> bool:
        """Whether the newest checkpoint is of `step`, with its validation done or not."""
        return step == self.step and is_validated == self._is_validated

    def write(
        self,
        step: int,
        *,
        is_validated: bool,
        best: BestAdapter,
        optimizer: torch.optim.Optimizer,
        best_average: BestAdapter | None,
        digests: np.ndarray,
        state: Mapping[str, Any],
    ) -> bool:
        """Write a checkpoint; `digests` V16 (N,) are those of the run's images.

        Returns whether it is written. If the disk does not take it, or the adapter is not finite,
        log a warning: the existing checkpoints stay.
        """
        self._last_s = time.monotonic()
        if not self.folder.is_writer:
            return False
        folder = self.folder.checkpoints
        try:
            folder.mkdir(parents=True, exist_ok=True)  # even if the run folder was removed
            num_elements = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
            check_space(folder, needed=checkpoint_bytes(num_elements) + digests.nbytes)
            self.folder.sync()  # up to this step, where a resumed run begins to log again
            self._digests_checksum = write_digests(
                folder / DIGESTS_FILE, digests, self._digests_checksum
            )
            write_checkpoint(
                folder / checkpoint_name(step),
                adapter_files=best.files if best.step == step else best.files_after(step),
                best_files=best.files,
                optimizer=optimizer,
                state=state,
                average=None if best_average is None else best_average.average,
                average_files=None if best_average is None else best_average.files,
            )
        except (OSError, AdapterError) as error:
            logger.warning(f"no checkpoint of step {step}: {error}")
            return False
        remove_old_checkpoints(
            folder, keep_last=self.keep_last, kept_steps=(best.step, self.kept_step)
        )
        return True

    def note(self, step: int, *, is_validated: bool) -> None:
        """Note that the newest checkpoint is of `step`, also in a process that did not write it."""
        self.step, self._is_validated = step, is_validated

    def how_to_resume(self) -> str:
        """Where the newest checkpoint is, and what to type to continue from it."""
        if self.step is None:
            return f"there is no checkpoint in {self.folder.checkpoints} yet"
        return (
            f"the checkpoint of step {self.step} is in {self.folder.checkpoints}; rerun the "
            f"command with --output_path {quoted(str(self.folder.path))} --resume to continue from "
            f"there"
        )
