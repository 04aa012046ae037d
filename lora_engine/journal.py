"""What a run says: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from lora_engine.batches import Batch

MAX_NON_FINITE = 3  # steps in a row
_EVERY_S = 5.0  # between two plain lines


class TrainingStopped(RuntimeError):
    """A run that could not go on; what it had reached is in its folder."""


class Journal:
    """Appends events to metrics.jsonl and shows progress on a stream.

    metrics.jsonl is the truth about a run: each line is written and flushed when it happens, and
    everything drawn later is derived from it.
    """

    def __init__(self, path: Path, *, total_steps: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._file = open(path, "a", encoding="utf-8")
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            file=self.stream,
            disable=not self.stream.isatty(),
        )
        self._last_line_s = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()

    def record(self, event: str, **values: Any) -> None:
        """Write one line of metrics.jsonl; floats in as many digits as carry meaning."""
        rounded = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        self._file.write(json.dumps({"event": event, **rounded}) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """A line for people, above the bar if there is one."""
        if self._bar.disable:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def progress(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        images_per_s: float,
        data_wait_share: float,
        remaining_s: float,
    ) -> None:
        """Move the bar, or print a line if the last one is a few seconds old."""
        state = (
            f"loss {loss:.4f} | lr {learning_rate:.2e} | {images_per_s:.1f} images/s | "
            f"waiting for data {100 * data_wait_share:.0f} %"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line_s >= _EVERY_S or step == self._total_steps:
            self._last_line_s = time.monotonic()
            left = f"{duration(remaining_s)} left"
            print(f"step {step}/{self._total_steps} | {state} | {left}", file=self.stream,
                  flush=True)


class Meter:
    """Losses and speed between two log lines.

    Losses stay on the device until `settle` reads them all at once: reading one a step would make
    the processor wait for the GPU in every step.
    """

    def __init__(
        self, journal: Journal, *, total_steps: int, steps_per_epoch: int, has_grad_scaler: bool
    ) -> None:
        self.journal = journal
        self.has_grad_scaler = has_grad_scaler
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.num_non_finite = 0  # in a row
        self.training_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval; what came between, a validation, does not count."""
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.rate = 0.0
        self.num_images = 0
        self.waited_s = 0.0
        self.begin_s = time.perf_counter()

    def wait_for(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        begin_s = time.perf_counter()
        received = [next(batches) for _ in range(count)]
        self.waited_s += time.perf_counter() - begin_s
        return received

    def add(
        self, step: int, loss: Tensor, grad_norm: Tensor, rate: float, num_images: int
    ) -> None:
        self.pending.append((step, loss, grad_norm))
        self.rate = rate
        self.num_images += num_images

    def settle(self) -> None:
        """Read and record the steps since the last call.

        Raises TrainingStopped after MAX_NON_FINITE steps in a row that were not finite.
        """
        if not self.pending:
            return
        losses = torch.stack([loss for _, loss, _ in self.pending]).tolist()
        norms = torch.stack([norm for _, _, norm in self.pending]).float().tolist()
        interval_s = time.perf_counter() - self.begin_s
        self.training_s += interval_s
        finite = []
        for (step, _, _), loss, norm in zip(self.pending, losses, norms):
            if math.isfinite(loss) and math.isfinite(norm):
                finite.append((loss, norm))
                self.num_non_finite = 0
            else:
                self._count_non_finite(step, loss, norm)
        if finite:
            mean_loss = sum(loss for loss, _ in finite) / len(finite)
            self._write(step, mean_loss, finite[-1][1], interval_s)
        self.restart()

    def _write(self, step: int, loss: float, grad_norm: float, interval_s: float) -> None:
        images_per_s = self.num_images / interval_s
        self.journal.record(
            "train",
            step=step,
            epoch=step / self.steps_per_epoch,
            loss=loss,
            learning_rate=self.rate,
            grad_norm=grad_norm,
            images_per_s=images_per_s,
            data_wait_share=self.waited_s / interval_s,
        )
        self.journal.progress(
            step=step,
            loss=loss,
            learning_rate=self.rate,
            images_per_s=images_per_s,
            data_wait_share=self.waited_s / interval_s,
            remaining_s=self.training_s / step * (self.total_steps - step),
        )

    def _count_non_finite(self, step: int, loss: float, norm: float) -> None:
        # fp16: an overflow of the gradients alone is the scaler's way to find its scale.
        by_scaler = self.has_grad_scaler and math.isfinite(loss)
        self.journal.record("skipped_step", step=step, by_grad_scaler=by_scaler)
        if by_scaler:
            return
        self.num_non_finite += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        self.journal.say(f"step {step}: the {what} is not finite; the step changed nothing")
        if self.num_non_finite == MAX_NON_FINITE:
            raise TrainingStopped(
                f"the {what} was not finite in {MAX_NON_FINITE} steps in a row, the last of them "
                f"step {step}; the adapter is as it was before them. Try a lower --lr, or "
                f"--precision bf16 or fp32"
            )


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 42 s, 3 min 05 s, 7 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
