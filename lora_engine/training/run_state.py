"""All that changes while a run goes on, saved and restored together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_engine.data.batches import epoch_batches
from lora_engine.data.seen_images import DIGESTS_FILE, write_digests
from lora_engine.files import check_space
from lora_engine.lora.adapter import AdapterError
from lora_engine.report.run_folder import RunFolder, checkpoint_name
from lora_engine.stopping import TrainingStopped
from lora_engine.training.best_adapter import AdapterKeeper
from lora_engine.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_bytes,
    remove_old_checkpoints,
    restore_moments,
    write_checkpoint,
)
from lora_engine.training.meter import Meter
from lora_engine.training.micro_batches import FittingBatches
from lora_engine.training.schedule import Schedule
from lora_engine.training.setup import Prepared
from lora_engine.training.skipped_rows import SkippedRows
from lora_engine.training.validation_captions import ValidationCaptions


@dataclass(kw_only=True)
class RunState:
    """A run's parts that change, and their checkpoints; `step` steps are done."""

    parts: Prepared
    schedule: Schedule
    folder: RunFolder
    fitting: FittingBatches
    keeper: AdapterKeeper
    captions: ValidationCaptions
    skipped: SkippedRows
    meter: Meter
    begin_s: float
    say: Callable[[str], None]
    step: int = 0
    is_whole: bool = True
    saved_step: int | None = None
    saved_validated: bool = False
    saved_digests: bytes = b""  # the checksum of what is in their file
    saved_s: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds(self) -> float:
        """What the run has taken so far, in earlier processes too."""
        return time.monotonic() - self.begin_s

    @property
    def has_begun(self) -> bool:
        """Whether the validation before the first step is done."""
        return 0 in self.keeper.losses

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds besides the adapter, which is loaded with the model."""
        state = checkpoint.state
        if checkpoint.step > self.schedule.total_steps:
            raise CheckpointError(
                f"{checkpoint.path} is of step {checkpoint.step}, but this run has "
                f"{self.schedule.total_steps} steps"
            )
        restore_moments(self.parts.optimizer, self.parts.matrices, checkpoint)
        if self.parts.scaler.is_enabled():
            self.parts.scaler.load_state_dict(state["scaler"])
        self.fitting.num_rows = state["micro_batch_rows"]
        self.keeper.load_state_dict(state["validations"])
        self.captions.load_state_dict(state["captions"])
        self.meter.load_state_dict(state["meter"])
        self.begin_s -= state["seconds"]
        self.step = self.saved_step = checkpoint.step
        self.saved_validated = checkpoint.is_validated
        self.say(self._going_on(checkpoint))
        self.skipped.restore(self.parts.train_set, self._rows_tried())
        self.keeper.restore_best(checkpoint)
        self.captions.write_best(self.folder, self.keeper.best_step)

    def _rows_tried(self) -> list[int]:
        """The rows whose turn has come."""
        epoch, num_done = self.schedule.position(self.step)
        train_set, config = self.parts.train_set, self.parts.config
        if epoch:
            return list(range(len(train_set)))
        batches = epoch_batches(
            train_set.captions.lengths, batch_size=config.batch_size, seed=config.seed, epoch=0
        )
        return [int(row) for rows in batches[:num_done] for row in rows]

    def _going_on(self, checkpoint: Checkpoint) -> str:
        before, now = checkpoint.state["total_steps"], self.schedule.total_steps
        lines = [f"going on after step {self.step} of {now}, from {checkpoint.path}"]
        if self.parts.changes:
            lines.append(f"with other settings: {', '.join(self.parts.changes)}")
        if before != now:
            lines.append(
                f"from here on the learning rate falls as in a run of {now} steps, not {before}: "
                f"the next step's is {self.schedule.learning_rate(self.step + 1):.3g}"
            )
        return "\n".join(lines)

    @property
    def is_save_due(self) -> bool:
        """Whether it is time for a checkpoint, by --save_every."""
        num_steps, seconds = self.parts.config.save_interval()
        return self.step % num_steps == 0 or time.monotonic() - self.saved_s >= seconds

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Changes within the context are all or nothing: if one fails, no checkpoint is written."""
        self.is_whole = False
        try:
            yield
        except TrainingStopped:  # raised between two parts, by the run itself
            self.is_whole = True
            raise
        self.is_whole = True

    def save(self) -> None:
        """Write a checkpoint, unless that of this step is there, or nothing is to be lost yet, or
        a change that is `undivided` failed.

        Where the disk does not take it, or the adapter is not finite, that is said, and the run
        goes on: the checkpoints that are there stay.
        """
        is_validated = self.step in self.keeper.losses
        is_saved = self.step == self.saved_step and is_validated == self.saved_validated
        if is_saved or not self.has_begun or not self.is_whole:
            return
        self.saved_s = time.monotonic()
        folder = self.folder.checkpoints
        parts = self.parts
        digests = np.concatenate([part.images.digests for part in (parts.train_set, parts.val_set)])
        try:
            folder.mkdir(parents=True, exist_ok=True)  # even where the run folder was removed
            needed = checkpoint_bytes(self.parts.matrices.values.numel()) + digests.nbytes
            check_space(folder, needed=needed)
            self.folder.sync()  # up to this step, where a run that goes on begins to log again
            self.saved_digests = write_digests(folder / DIGESTS_FILE, digests, self.saved_digests)
            write_checkpoint(
                folder / checkpoint_name(self.step),
                adapter_files=(
                    self.keeper.best_files if self.keeper.best_step == self.step
                    else self.keeper.files(self.step)
                ),
                best_files=self.keeper.best_files,
                optimizer=self.parts.optimizer,
                state=self._state(),
            )
        except (OSError, AdapterError) as error:
            self.say(f"warning: no checkpoint of step {self.step}: {error}")
            return
        self.saved_step, self.saved_validated = self.step, is_validated
        keep_last = self.parts.config.keep_last
        remove_old_checkpoints(folder, keep_last=keep_last, best_step=self.keeper.best_step)

    def how_to_go_on(self) -> str:
        if self.saved_step is None:
            return f"there is no checkpoint in {self.folder.checkpoints} yet"
        return (
            f"the checkpoint of step {self.saved_step} is in {self.folder.checkpoints}; the same "
            f"command with --output_path {self.folder.path} --resume goes on from there"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.schedule.total_steps,
            "settings": self.parts.config.as_dict(),
            "fingerprints": self.parts.fingerprints,
            "compute_dtype": str(self.parts.dtype),
            "scaler": self.parts.scaler.state_dict(),
            "micro_batch_rows": self.fitting.num_rows,
            "validations": self.keeper.state_dict(),
            "captions": self.captions.state_dict(self.keeper.best_step),
            "meter": self.meter.state_dict(),
            "seconds": self.seconds,
        }
