"""Which adapters of a run are kept: the best by its validations, and the last."""

import math
import shutil
from collections.abc import Mapping
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
    write_adapter,
)
from lora_engine.models import CaptioningModel
from lora_engine.report.run_folder import RunFolder, checkpoint_name
from lora_engine.training.checkpoint import Checkpoint, CheckpointError, read_checkpoint


class AdapterKeeper:
    """Keeps the best adapter in the run's adapter/, and the last, where it is another one, in
    adapter_last/.

    `best_by` is "loss" or the name of a score. `losses` are the validation losses by step, `scores`
    those of captions. Before training counts too, so that `best_step` 0 says that nothing has
    become better. `provenance` is written into every adapter; `settings` go to `save_adapter` as
    they are.
    """

    def __init__(
        self,
        model: CaptioningModel,
        folder: RunFolder,
        *,
        best_by: str,
        provenance: dict[str, str],
        **settings: Any,
    ) -> None:
        self.model = model
        self.folder = folder
        self.best_by = best_by
        self.provenance = provenance
        self.settings = settings
        self.losses: dict[int, float] = {}
        self.scores: dict[int, Scores] = {}
        self.best_step = 0
        self.best_files: dict[str, bytes] = {}
        self.num_worse = 0  # validations since the best

    def offer(self, step: int, loss: float, scores: Scores | None) -> bool:
        """Save the adapter if it is the best so far; return whether it was.

        One whose loss is not finite never is, whatever its scores.
        """
        self.losses[step] = loss
        if scores is not None:
            self.scores[step] = scores
        is_better = math.isfinite(loss) and self._worth(step) > self._worth(self.best_step)
        is_best = step == 0 or is_better
        self.num_worse = 0 if is_best else self.num_worse + 1
        if is_best:
            self.best_step = step
            self.best_files = self.files(step)
            write_adapter(self.folder.adapter, self.best_files)
        return is_best

    def _worth(self, step: int) -> float:
        if self.best_by == "loss":
            return -self.losses[step]
        return getattr(self.scores[step], self.best_by)

    def keep_last(self, step: int) -> None:
        """Keep the adapter as it is after `step` too, where it is not the best."""
        if step != self.best_step:
            write_adapter(self.folder.last_adapter, self.files(step))
        else:  # there may be one of a run that went on from there
            shutil.rmtree(self.folder.last_adapter, ignore_errors=True)

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Restore the best adapter as of this checkpoint; a discarded later step may have written
        another. `load_state_dict` comes before.

        Raises CheckpointError where no good copy of it is left.
        """
        files = checkpoint.best_files or self._find_best(checkpoint)
        self.best_files = files
        if any(_content(self.folder.adapter / name) != data for name, data in files.items()):
            write_adapter(self.folder.adapter, files)

    def _find_best(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """The best adapter's files, for a checkpoint of an earlier version, which lacks them."""
        best = self.folder.checkpoints / checkpoint_name(self.best_step)
        reason = f"{best} does not hold it"
        try:
            found = read_checkpoint(best)
            is_its_own = found.state["validations"]["best_step"] == self.best_step
            if is_its_own and found.best_files is not None:
                return found.best_files
        except CheckpointError as error:
            reason = str(error)
        try:
            adapter = read_adapter(self.folder.adapter)
        except AdapterError as error:
            reason += f"; {error}"
        else:
            if adapter.provenance.get("step") == str(self.best_step):
                names = (WEIGHTS_FILE, CONFIG_FILE)
                return {name: (self.folder.adapter / name).read_bytes() for name in names}
            reason += f"; {self.folder.adapter} holds that of another step"
        raise CheckpointError(
            f"the best adapter of this run, of step {self.best_step}, is lost: {reason}. Resume "
            f"from another checkpoint (--resume CHECKPOINT), or begin a new run with "
            f"--init_adapter {checkpoint.path}"
        )

    def files(self, step: int) -> dict[str, bytes]:
        """What the files of the adapter as it is after `step` hold, by their names."""
        loss = f"{self.losses[step]:.7g}" if step in self.losses else ""
        provenance = {**self.provenance, "step": str(step), "validation_loss": loss}
        return adapter_files(self.model, **self.settings, provenance=provenance)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "scores": {step: asdict(scores) for step, scores in self.scores.items()},
            "best_step": self.best_step,
            "num_worse": self.num_worse,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, whose steps JSON may have made strings."""
        self.losses = {int(step): loss for step, loss in state["losses"].items()}
        names = [field.name for field in fields(Scores)]
        self.scores = {
            int(step): Scores(**{name: values[name] for name in names})
            for step, values in state["scores"].items()
        }
        self.best_step = state["best_step"]
        self.num_worse = state["num_worse"]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
