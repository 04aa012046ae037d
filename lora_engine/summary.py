"""What a run came to, in figures and for people."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_engine.journal import duration


@dataclass(frozen=True)
class Sample:
    """A fixed validation image whose captions are followed through the run."""

    image: str
    reference: str
    before: str
    best: str


@dataclass(frozen=True)
class TrainingSummary:
    """What a run came to; `str` of it is what people read at the end.

    `losses` are the validation losses (nats per valid target token) by step, 0 among them;
    `seconds` is the wall-clock time of everything.
    """

    path: Path
    losses: dict[int, float]
    best_step: int
    num_skipped_images: int
    samples: tuple[Sample, ...]
    seconds: float

    @property
    def last_step(self) -> int:
        return max(self.losses)

    def __str__(self) -> str:
        lines: list[str] = []
        for sample in self.samples:
            lines += [
                os.path.basename(sample.image),
                f"  reference  {sample.reference}",
                f"  before     {sample.before}",
                f"  after      {sample.best}",
            ]
        lines += ["", self._verdict()]
        if self.num_skipped_images:
            lines.append(
                f"{self.num_skipped_images} images could not be used; "
                f"{self.path / 'skipped.jsonl'} lists them"
            )
        return "\n".join([
            *lines,
            f"adapter     {self.path / 'adapter'}",
            f"loss curve  {self.path / 'loss_curve.png'}",
            f"took        {duration(self.seconds)}",
            f"to caption  {_interpreter()} -m lora_engine caption "
            f"--adapter {self.path / 'adapter'} IMAGE_OR_FOLDER ...",
        ])

    def _verdict(self) -> str:
        first, last = self.losses[0], self.losses[self.last_step]
        if self.best_step == 0:
            return (
                f"The validation loss never fell below the {first:.4f} of before training (at the "
                f"end {last:.4f}), so adapter/ holds the one it started from and adapter_last/ the "
                f"last. Try another --lr."
            )
        return (
            f"best validation loss {self.losses[self.best_step]:.4f} at step {self.best_step} of "
            f"{self.last_step}; before training it was {first:.4f}"
        )


def _interpreter() -> str:
    """This Python as a person would type it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
