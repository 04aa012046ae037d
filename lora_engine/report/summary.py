"""The outcome of a run, as figures and as the text that is printed at its end."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_engine.captioning.metrics import Scores
from lora_engine.cli import quoted, this_program
from lora_engine.report.metrics_log import duration
from lora_engine.terminal import counted, escaped


@dataclass(frozen=True)
class Sample:
    """A validation image with its captions before training and after a step."""

    image: str
    reference: str
    before: str
    after: str


class BestAverage(NamedTuple):
    """The best moving average of the adapter: its step, loss, and scores if there are any."""

    step: int
    loss: float
    scores: Scores | None


@dataclass(frozen=True)
class TrainingSummary:
    """The outcome of a run; `str` of it is what is printed at the end.

    `losses` are the validation losses (nats per valid target token) by step, from step 0 on;
    `scores` those of the captions, if any were scored. `best_step` is the best by `best_by`,
    "loss" or "cider_d". `seconds` is the wall-clock time of the whole run. `val_flags` tell
    `evaluate` where the validation data is, if it has a path of its own. `average` is the best
    moving average, if there is one.
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
    average: BestAverage | None = None

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
        lines += ["", self._verdict(), *self._better_average()]
        counts = {"row": self.num_skipped_rows, "image": self.num_skipped_images}
        skipped = [counted(number, name) for name, number in counts.items() if number]
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

    def _better_average(self) -> list[str]:
        """Where the moving average is, if it is better than the best adapter."""
        if self.average is None:
            return []
        step, loss, scores = self.average
        name, theirs, is_better = "validation loss", loss, loss < self.losses[self.best_step]
        if self.best_by == "cider_d" and scores is not None and self.best_step in self.scores:
            name, theirs = "CIDEr-D", scores.cider_d
            is_better = theirs > self.scores[self.best_step].cider_d
        path = self.path / "adapter_ema"
        return [
            f"the moving average is better, {name} {theirs:.4f} at step {step}: it is in {path}"
        ] if is_better else []

    def _verdict(self) -> str:
        figures = {"validation loss": self.losses}
        if self.scores:
            figures["CIDEr-D"] = {step: scores.cider_d for step, scores in self.scores.items()}
        # If all are 0, as those of one image are by definition, the lower loss has decided.
        if self.best_by == "cider_d" and any(figures["CIDEr-D"].values()):
            figures = dict(reversed(figures.items()))
        (name, values), *others = figures.items()
        if self.best_step == 0:
            # An adapter whose values are not finite is not saved.
            is_finite = math.isfinite(self.losses[self.last_step])
            return (
                f"The {name} never improved on {values[0]:z.4f} before training (at the end "
                f"{values[self.last_step]:z.4f}), so adapter/ holds the initial adapter"
                f"{' and adapter_last/ the last' if is_finite else ''}. Try another --lr."
            )
        lines = [
            f"best {name} {values[self.best_step]:z.4f} at step {self.best_step} of "
            f"{self.last_step}; before training it was {values[0]:z.4f}"
        ]
        lines += [
            f"{name} {values[self.best_step]:z.4f} at that step, {values[0]:z.4f} before training"
            for name, values in others
        ]
        if self.scores:
            scores = self.scores[self.best_step]
            lines[-1] += (
                f" ({counted(scores.num_images, 'image')}, "
                f"{counted(scores.num_references, 'reference')})"
            )
        return "\n".join(lines)
