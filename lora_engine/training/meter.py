"""Losses and speed of a run's steps, read from the device only now and then."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.stopping import Diverged
from lora_engine.training.schedule import Schedule

logger = logging.getLogger(__name__)

MAX_NON_FINITE = 3  # steps in a row
MAX_OVERFLOWS = 20  # steps in a row that fp16 may need to find its loss scale

_EVERY_S = 5.0  # between two reads


class Meter:
    """Losses and speed between two log lines.

    Losses stay on the device until `read` or `settle` takes all of them at once: reading one per
    step would make the CPU wait for the GPU in every step.
    """

    def __init__(
        self, metrics: MetricsLogger, schedule: Schedule, *, has_grad_scaler: bool
    ) -> None:
        self.metrics = metrics
        self.schedule = schedule
        self.has_grad_scaler = has_grad_scaler
        self.num_non_finite = 0  # in a row
        self.num_overflows = 0  # in a row
        self.stop_reason: str | None = None
        self.training_s = 0.0
        self.rate = 0.0
        self._waited_before_s = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new interval; time since the last one, such as a validation, does not count."""
        self.pending: list[tuple[int, Tensor, Tensor, Sequence[str]]] = []
        self.finite: list[tuple[float, float]] = []  # (loss, gradient norm)
        self.num_images = 0
        self.waited_s = 0.0
        self.interval_s = 0.0  # of this interval, before `begin`
        self.begin()

    def begin(self) -> None:
        """Start the clock of an interval that may have begun in an earlier process."""
        self.begin_s = self.read_s = time.perf_counter()

    def add(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        rate: float,
        images: Sequence[str],
        waited_s: float,
    ) -> None:
        """Record a step; `images` are the paths of its rows' images.

        `waited_s` is the time spent waiting for data since the loader was created.
        """
        self.waited_s += waited_s - self._waited_before_s
        self._waited_before_s = waited_s
        self.pending.append((step, loss, grad_norm, images))
        self.rate = rate
        self.num_images += len(images)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the interval so far, so that a resumed run logs the same means."""
        self.read()
        return {
            "finite": self.finite,
            "num_non_finite": self.num_non_finite,
            "num_overflows": self.num_overflows,
            "rate": self.rate,
            "num_images": self.num_images,
            "waited_s": self.waited_s,
            "interval_s": self._interval_s(),
            "training_s": self.training_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.finite = [(loss, norm) for loss, norm in state["finite"]]
        self.num_non_finite = state["num_non_finite"]
        self.num_overflows = state["num_overflows"]
        self.rate = state["rate"]
        self.num_images = state["num_images"]
        self.waited_s = state["waited_s"]
        self.training_s = state["training_s"]
        self.interval_s = state["interval_s"]

    @property
    def is_overdue(self) -> bool:
        """Whether the last read was some seconds ago; an occasional read costs nothing."""
        return time.perf_counter() - self.read_s > _EVERY_S

    def read(self) -> None:
        """Read the losses of the steps since the last call, and show progress.

        Raises TrainingStopped after MAX_NON_FINITE steps in a row that were not finite.
        """
        if self.pending:
            self._read()
        self._stop_if_needed()

    def settle(self, step: int) -> None:
        """`read`, and write a line of metrics.jsonl over the interval that ends with `step`."""
        if self.pending:
            self._read()
        interval_s = self._interval_s()
        if self.finite:
            self.metrics.record(
                "train",
                step=step,
                epoch=step / self.schedule.steps_per_epoch,
                loss=self._mean_loss(),
                learning_rate=self.rate,
                grad_norm=self.finite[-1][1],
                images_per_s=self.num_images / interval_s,
                data_wait_share=self.waited_s / interval_s,
            )
        self.training_s += interval_s
        self.restart()
        self._stop_if_needed()

    def _read(self) -> None:
        pending, self.pending = self.pending, []  # each counts once, whatever fails below
        losses = torch.stack([loss for _, loss, _, _ in pending]).tolist()
        norms = torch.stack([norm for _, _, norm, _ in pending]).float().tolist()
        for (step, _, _, images), loss, norm in zip(pending, losses, norms):
            if math.isfinite(loss) and math.isfinite(norm):
                self.finite.append((loss, norm))
                self.num_non_finite = self.num_overflows = 0
            else:
                self._count_non_finite(step, loss, images)
        self.read_s = time.perf_counter()
        interval_s = self._interval_s()
        self.metrics.progress(
            step=step,
            loss=self._mean_loss(),
            learning_rate=self.rate,
            images_per_s=self.num_images / interval_s,
            data_wait_share=self.waited_s / interval_s,
            remaining_s=(self.training_s + interval_s) / step * (self.schedule.total_steps - step),
        )

    def _interval_s(self) -> float:
        return self.interval_s + time.perf_counter() - self.begin_s

    def _mean_loss(self) -> float:
        if not self.finite:
            return math.nan
        return sum(loss for loss, _ in self.finite) / len(self.finite)

    def _count_non_finite(self, step: int, loss: float, images: Sequence[str]) -> None:
        # fp16: overflowing gradients of a finite loss are the scaler's way to find its scale. It
        # halves from 65536, so that after 17 of them the scale is not to blame.
        by_scaler = self.has_grad_scaler and math.isfinite(loss)
        self.num_overflows += by_scaler
        by_scaler = by_scaler and self.num_overflows <= MAX_OVERFLOWS
        if by_scaler:
            self.metrics.record("skipped_step", step=step, by_grad_scaler=True)
            return
        self.metrics.record(
            "skipped_step", step=step, by_grad_scaler=False, images=list(images)
        )
        self.num_non_finite += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        logger.info(f"step {step}: the {what} is not finite; the step changed nothing")
        if self.num_non_finite == MAX_NON_FINITE:
            self.stop_reason = (
                f"the {what} was not finite in {MAX_NON_FINITE} steps in a row, up to step "
                f"{step}. These steps changed nothing. Try a lower --lr, or --precision bf16 or "
                f"fp32. Images of the last: {_listed(images)}"
            )

    def _stop_if_needed(self) -> None:
        if self.stop_reason is not None:
            raise Diverged(self.stop_reason)


def _listed(images: Sequence[str]) -> str:
    more = f" and {len(images) - 8} more (metrics.jsonl has all)" if len(images) > 8 else ""
    return ", ".join(images[:8]) + more
