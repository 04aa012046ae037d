"""The number of steps of a run, what happens at which step, and the learning-rate curve."""

import math
from dataclasses import dataclass

from lora_engine.config import TrainingConfig


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (1 to total_steps): linear warm-up, then linear decay.

    It rises to `peak` at step `warmup_steps`, is `peak` again at the step after it, and falls
    towards zero, which it would reach one step after the last: no step has a rate of zero.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * (total_steps - step + 1) / max(total_steps - warmup_steps, 1)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run over `num_rows` captions, as `config` says; the first step is 1."""

    config: TrainingConfig
    num_rows: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.config.rows_per_step)

    @property
    def total_steps(self) -> int:
        total = self.config.epochs * self.steps_per_epoch
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def limits(self) -> list[str]:
        """The flags that set the number of steps."""
        steps = {
            "--epochs": self.config.epochs * self.steps_per_epoch,
            "--max_steps": self.config.max_steps,
        }
        return [flag for flag, limit in steps.items() if limit == self.total_steps]

    def position(self, step: int) -> tuple[int, int]:
        """(epochs, steps of the epoch after them) that are done after `step` steps."""
        return divmod(step, self.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.config.lr,
            warmup_steps=self.config.warmup_steps,
            total_steps=self.total_steps,
        )

    def validates(self, step: int) -> bool:
        """Whether a validation is due after `step` steps; it also is before the first step and
        after the last."""
        return step % (self.config.eval_every or self.steps_per_epoch) == 0 or (
            step == self.total_steps
        )

    def logs(self, step: int) -> bool:
        """Whether the losses up to `step` are logged after it."""
        return step % self.config.log_every == 0 or self.validates(step)
