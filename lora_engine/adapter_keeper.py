"""Which adapters of a run are kept: the best by its validations, and the last."""

from pathlib import Path
from typing import Any

from lora_engine.adapter import save_adapter
from lora_engine.metrics import Scores
from lora_engine.models import CaptionerBody
from lora_engine.run_folder import RunFolder


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
        model: CaptionerBody,
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
        self.num_worse = 0  # validations since the best

    def offer(self, step: int, loss: float, scores: Scores | None) -> bool:
        """Keep the adapter of now if it is the best yet -> whether it is."""
        self.losses[step] = loss
        if scores is not None:
            self.scores[step] = scores
        is_best = step == 0 or self._worth(step) > self._worth(self.best_step)
        self.num_worse = 0 if is_best else self.num_worse + 1
        if is_best:
            self.best_step = step
            self._save(self.folder.adapter, step)
        return is_best

    def _worth(self, step: int) -> float:
        if self.best_by == "loss":
            return -self.losses[step]
        return getattr(self.scores[step], self.best_by)

    def keep_last(self, step: int) -> None:
        """Keep the adapter as it is after `step` too, where it is not the best."""
        if step != self.best_step:
            self._save(self.folder.last_adapter, step)

    def _save(self, path: Path, step: int) -> None:
        loss = f"{self.losses[step]:.7g}" if step in self.losses else ""
        provenance = {**self.provenance, "step": str(step), "validation_loss": loss}
        save_adapter(self.model, path, provenance=provenance, **self.settings)
