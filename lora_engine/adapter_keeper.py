"""Which adapters of a run are kept: the best by validation loss, and the last."""

from pathlib import Path
from typing import Any

from lora_engine.adapter import save_adapter
from lora_engine.models import CaptionerBody
from lora_engine.run_folder import RunFolder


class AdapterKeeper:
    """Keeps the best adapter in the run's adapter/, and the last, where it is another one, in
    adapter_last/.

    `losses` are the validation losses by step. Before training counts too, so that `best_step` 0
    says that nothing has become better. `provenance` is written into every adapter; `settings` go
    to `save_adapter` as they are.
    """

    def __init__(
        self,
        model: CaptionerBody,
        folder: RunFolder,
        *,
        provenance: dict[str, str],
        **settings: Any,
    ) -> None:
        self.model = model
        self.folder = folder
        self.provenance = provenance
        self.settings = settings
        self.losses: dict[int, float] = {}
        self.best_step = 0

    def offer(self, step: int, loss: float) -> bool:
        """Keep the adapter of now if its validation loss is the lowest yet -> whether it is."""
        self.losses[step] = loss
        is_best = step == 0 or loss < self.losses[self.best_step]
        if is_best:
            self.best_step = step
            self._save(self.folder.adapter, step)
        return is_best

    def keep_last(self, step: int) -> None:
        """Keep the adapter as it is after `step` too, where it is not the best."""
        if step != self.best_step:
            self._save(self.folder.last_adapter, step)

    def _save(self, path: Path, step: int) -> None:
        loss = f"{self.losses[step]:.7g}" if step in self.losses else ""
        provenance = {**self.provenance, "step": str(step), "validation_loss": loss}
        save_adapter(self.model, path, provenance=provenance, **self.settings)
