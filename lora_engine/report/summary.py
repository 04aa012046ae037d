"""The outcome of a run, as figures and as the text that is printed at its end."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from lora_engine.captioning.metrics import Scores
from lora_engine.cli import quoted, this_program
from lora_engine.report.metrics_log import duration
from lora_engine.terminal import escaped


@dataclass(frozen=True)
class Sample:
    """A validation image with its captions before training and after a step."""

    image: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class TrainingSummary:
    """The outcome of a run; `str` of it is what is printed at the end.

    `losses` are the validation losses (nats per valid target token) by step, from step 0 on;
    `scores` those of the captions, if any were scored. `best_step` is the best by `best_by`,
    "loss" or "cider_d". `seconds` is the wall-clock time of the whole run. `val_flags` tell
    `evaluate` where the validation data is, if it has a path of its own.
    """

    path: Path
    losses: dict[int, float]
    scores: dict[int, Scores]
    best_by: str
    best_step: int
    num_skipped_images: int
    num_skipped_rows: int
    samples: tuple[Sample, ...]
    seconds: float
    val_flags: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        return max(self.losses)

    def __str__(self) -> str:
        lines: list[str] = []
        for sample in self.samples:
            lines += [
                escaped(os.path.basename(sample.image)),
                f"  reference  {escaped(sample.reference)}",
                f"  before     {escaped(sample.before)}",
                f"  after      {escaped(sample.after)}",
            ]
        lines += ["", self._verdict()]
        counts = {"rows": self.num_skipped_rows, "images": self.num_skipped_images}
        skipped = [f"{number:,} {name}" for name, number in counts.items() if number]
        if skipped:
            lines.append(
                f"{' and '.join(skipped)} could not be used; {self.path / 'skipped.jsonl'} lists "
                f"them"
            )
        return "\n".join([
            *lines,
            f"adapter     {self.path / 'adapter'}",
            f"loss curve  {self.path / 'loss_curve.png'}",
            f"report      {self.path / 'report.html'}",
            f"took        {duration(self.seconds)}",
            *self._next_commands(),
        ])

    def _next_commands(self) -> list[str]:
        """What may be run next, on this run's own files."""
        images = [quoted(s.image) for s in self.samples if os.path.isfile(s.image)]
        program, adapter = this_program(), quoted(str(self.path / "adapter"))
        lines = [
            f"to caption  {program} caption --adapter {adapter} "
            f"{images[0] if images else 'IMAGE_OR_FOLDER ...'}"
        ]
        if self.val_flags:
            data = quoted(*self.val_flags)
            lines.append(f"to score    {program} evaluate --adapter {adapter} {data}")
        merged = quoted(f"{self.path}-merged")
        return [*lines, f"to merge    {program} merge --adapter {adapter} --out {merged}"]

    def _verdict(self) -> str:
        figures = {"validation loss": self.losses}
        if self.scores:
            figures["CIDEr-D"] = {step: scores.cider_d for step, scores in self.scores.items()}
        if self.best_by == "cider_d":
            figures = dict(reversed(figures.items()))
        (name, values), *others = figures.items()
        if self.best_step == 0:
            # An adapter whose values are not finite is not saved.
            is_finite = math.isfinite(self.losses[self.last_step])
            return (
                f"The {name} never improved on {values[0]:.4f} before training (at the end "
                f"{values[self.last_step]:.4f}), so adapter/ holds the initial adapter"
                f"{' and adapter_last/ the last' if is_finite else ''}. Try another --lr."
            )
        lines = [
            f"best {name} {values[self.best_step]:.4f} at step {self.best_step} of "
            f"{self.last_step}; before training it was {values[0]:.4f}"
        ]
        lines += [
            f"{name} {values[self.best_step]:.4f} at that step, {values[0]:.4f} before training"
            for name, values in others
        ]
        if self.scores:
            scores = self.scores[self.best_step]
            lines[-1] += f" ({scores.num_images} images, {scores.num_references} references)"
        return "\n".join(lines)
