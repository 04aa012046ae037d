"""The adapters that a run saves: the best by its validations, and the last."""

import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lora_engine.captioning.metrics import Scores
from lora_engine.lora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    adapter_files,
    read_adapter,
)
from lora_engine.models import CaptioningModel
from lora_engine.report.run_folder import RunFolder, checkpoint_name
from lora_engine.training.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from lora_engine.training.moving_average import MovingAverage


class BestAdapter:
    """Selects the best adapter and saves it in the run's adapter/; the last, where it is another
    one, goes to adapter_last/. With an `average` it selects the best of that, for adapter_ema/.

    `by` is "loss" or the name of a score; of equal scores the lower loss decides. `losses` are the
    validation losses by step, `scores` those of captions. The adapter before training counts too:
    `step` 0 means that nothing was better. `files` are the contents of the best adapter's files.
    `provenance` is written into every adapter; `settings` are passed to `adapter_files`.
    """

    def __init__(
        self,
        model: CaptioningModel,
        folder: RunFolder,
        *,
        by: str,
        provenance: dict[str, str],
        average: MovingAverage | None = None,
        **settings: Any,
    ) -> None:
        self.model = model
        self.folder = folder
        self.average = average
        self.path = folder.adapter if average is None else folder.average_adapter
        self.by = by
        self.provenance = provenance
        self.settings = settings
        self.losses: dict[int, float] = {}
        self.scores: dict[int, Scores] = {}
        self.step = 0
        self.files: dict[str, bytes] = {}
        self.num_worse = 0  # validations since the best

    def offer(self, step: int, loss: float, scores: Scores | None) -> bool:
        """Save the adapter if it is the best so far; return whether it was.

        An adapter whose loss is not finite is never the best, whatever its scores.
        """
        self.losses[step] = loss
        if scores is not None:
            self.scores[step] = scores
        is_better = math.isfinite(loss) and self._worth(step) > self._worth(self.step)
        is_best = step == 0 or is_better
        self.num_worse = 0 if is_best else self.num_worse + 1
        if is_best:
            self.step = step
            self.files = self.files_after(step)
            self.folder.write_adapter(self.path, self.files)
        return is_best

    def _worth(self, step: int) -> tuple[float, ...]:
        if self.by == "loss":
            return (-self.losses[step],)
        return getattr(self.scores[step], self.by), -self.losses[step]

    def save_last(self, step: int) -> None:
        """Save the adapter as it is after `step` too, unless it is the best."""
        if step != self.step:
            self.folder.write_adapter(self.folder.last_adapter, self.files_after(step))
        else:  # a run that was resumed from here may have left one
            shutil.rmtree(self.folder.last_adapter, ignore_errors=True)

    def restore(self, checkpoint: Checkpoint, files: Mapping[str, bytes] | None) -> None:
        """Restore the best adapter as of this checkpoint, which has its `files`; a discarded later
        step may have written another. Call `load_state_dict` first.

        Raises CheckpointError if no intact copy of it is left.
        """
        self.files = dict(files or self._find_best(checkpoint))
        if any(_content(self.path / name) != data for name, data in self.files.items()):
            self.folder.write_adapter(self.path, self.files)

    def _find_best(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """The best adapter's files, for a checkpoint of an earlier version that lacks them."""
        best = self.folder.checkpoints / checkpoint_name(self.step)
        reason = f"{best} does not hold it"
        try:
            found = read_checkpoint(best)
            is_its_own = found.state["validations"]["best_step"] == self.step
            if is_its_own and found.best_files is not None:
                return found.best_files
        except CheckpointError as error:
            reason = str(error)
        try:
            adapter = read_adapter(self.folder.adapter)
        except AdapterError as error:
            reason += f"; {error}"
        else:
            if adapter.provenance.get("step") == str(self.step):
                names = (WEIGHTS_FILE, CONFIG_FILE)
                return {name: (self.folder.adapter / name).read_bytes() for name in names}
            reason += f"; {self.folder.adapter} holds the adapter of another step"
        raise CheckpointError(
            f"the best adapter of this run, of step {self.step}, is lost: {reason}. Resume "
            f"from another checkpoint (--resume=CHECKPOINT), or begin a new run with "
            f"--init_adapter {checkpoint.path}"
        )

    def files_after(self, step: int) -> dict[str, bytes]:
        """Contents of the files of the adapter as it is after `step`, by name."""
        loss = f"{self.losses[step]:.7g}" if step in self.losses else ""
        provenance = {**self.provenance, "step": str(step), "validation_loss": loss}
        with self.in_place():
            return adapter_files(self.model, **self.settings, provenance=provenance)

    def in_place(self) -> AbstractContextManager[None]:
        """Within the context the model has the adapter that this selects from."""
        return nullcontext() if self.average is None else self.average.in_place()

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "scores": {step: asdict(scores) for step, scores in self.scores.items()},
            "best_step": self.step,
            "num_worse": self.num_worse,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, whose steps may have become strings in JSON."""
        self.losses = {int(step): loss for step, loss in state["losses"].items()}
        names = [field.name for field in fields(Scores)]
        self.scores = {
            int(step): Scores(**{name: values[name] for name in names})
            for step, values in state["scores"].items()
        }
        self.step = state["best_step"]
        self.num_worse = state["num_worse"]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
