"""An exponential moving average of the LoRA parameters over the steps of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lora_engine.training.optim import FlatLoRAParameters


class MovingAverage:
    """`values` are the average of the flat parameters of `lora`. The n-th step changes them by

        values += (1 - d) (lora.values - values),    d = min(decay, (1 + n) / (10 + n))

    as TensorFlow's ExponentialMovingAverage does with num_updates: a constant d would keep the
    values before training in the average for long.
    """

    def __init__(self, lora: FlatLoRAParameters, decay: float) -> None:
        self.lora = lora
        self.decay = decay
        self.values = lora.values.detach().clone()

    def update(self, num_steps: Tensor, num_before: Tensor) -> None:
        """Add the parameters after a step, which was the step `num_steps`, (), on the device.

        A step that was skipped, after which the number of steps is that before it, adds nothing.
        """
        decay = ((1 + num_steps) / (10 + num_steps)).clamp_max(self.decay)
        self.values.lerp_(self.lora.values.detach(), (num_steps - num_before) * (1 - decay))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the model has the average as its parameters."""
        parameters = self.lora.values.detach()
        before = parameters.clone()
        try:
            parameters.copy_(self.values)
            self.lora.refresh()
            yield
        finally:
            parameters.copy_(before)
            self.lora.refresh()
