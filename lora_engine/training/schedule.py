"""The number of steps of a run, what happens at which step, and the learning-rate curve."""

import logging
import math
from dataclasses import dataclass

from lora_engine.config import LearningRateSchedule, TrainingConfig

logger = logging.getLogger(__name__)

_DECAY_RATIO = 0.2  # arXiv:2405.18392: 20 % of the steps are enough


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: LearningRateSchedule = "linear",
    min_lr: float = 0.0,
    decay_steps: int | None = None,
) -> float:
    """Rate of optimizer step `step`, 1 to `total_steps`.

    It rises linearly to `peak`: peak step / warmup_steps. With "constant" it stays there. Otherwise
    it falls to `min_lr` over the last `decay_steps`, of which d = 0, 1, ... are done:

        linear   min_lr + (peak - min_lr) (1 - d / decay_steps)
        cosine   min_lr + (peak - min_lr) (1 + cos(pi d / decay_steps)) / 2    arXiv:1608.03983
        wsd      min_lr + (peak - min_lr) (1 - sqrt(d / decay_steps))          arXiv:2404.06395

    By default, all steps after the warm-up decay. For wsd (warm-up, stable, decay) the 1-sqrt
    curve is the one that did best in arXiv:2405.18392. The first step of the decay has the rate
    `peak`, and `min_lr` would be reached one step after the last: no step has a rate of zero.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    length = max(total_steps - warmup_steps if decay_steps is None else decay_steps, 1)
    done = step - 1 - (total_steps - length)
    if schedule == "constant" or done < 0:
        return peak
    if schedule == "linear":
        return min_lr + (peak - min_lr) * (length - done) / length
    if schedule == "cosine":
        return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * done / length)) / 2
    return min_lr + (peak - min_lr) * (1 - math.sqrt(done / length))


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

    def check(self) -> None:
        """Log where the decay of wsd begins; for other schedules, warn of a warm-up that is longer
        than the run, as in a first trial with --max_steps.

        Raises ValueError if there are too few steps for the decay of wsd.
        """
        total, warmup = self.total_steps, self.warmup_steps
        if self.config.lr_schedule != "wsd":
            if warmup > total:
                logger.warning(
                    f"the warm-up of {warmup} steps is longer than the run of {total}: the "
                    f"learning rate only rises, to {self.learning_rate(total):.3g}; lower "
                    f"--warmup_steps, or give --warmup_ratio instead"
                )
            return
        decay, rounding = self._wanted_decay_steps, self.config.warmup_ratio is not None
        if warmup + decay > total + rounding:
            raise ValueError(
                f"the warm-up of {warmup} steps and the decay of {decay} are longer than the run "
                f"of {total}: lower {'--warmup_ratio' if rounding else '--warmup_steps'} or "
                f"--decay_ratio"
            )
        logger.info(
            f"the learning rate falls over the last {self.decay_steps} of {total} steps; the "
            f"checkpoint of step {self.decay_start}, before that, is kept"
        )

    def position(self, step: int) -> tuple[int, int]:
        """(epochs, steps of the epoch after them) that are done after `step` steps."""
        return divmod(step, self.steps_per_epoch)

    @property
    def warmup_steps(self) -> int:
        ratio = self.config.warmup_ratio
        return self.config.warmup_steps if ratio is None else math.ceil(ratio * self.total_steps)

    @property
    def decay_steps(self) -> int:
        """The last steps, over which the learning rate falls."""
        if self.config.lr_schedule == "constant":
            return 0
        left = max(self.total_steps - self.warmup_steps, 0)
        return min(self._wanted_decay_steps, left) if self.config.lr_schedule == "wsd" else left

    @property
    def decay_start(self) -> int:
        """The last step before the decay."""
        return self.total_steps - self.decay_steps

    @property
    def _wanted_decay_steps(self) -> int:
        return math.ceil((self.config.decay_ratio or _DECAY_RATIO) * self.total_steps)

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.config.lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            schedule=self.config.lr_schedule,
            min_lr=self.config.min_lr,
            decay_steps=self.decay_steps,
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
