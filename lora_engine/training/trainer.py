"""One training step: forward, backward, the sum over micro-batches, clipping, AdamW."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lora_engine.data.batches import FeatureBatch
from lora_engine.devices import autocast
from lora_engine.lora.injection import lora_layers
from lora_engine.models import CaptioningModel
from lora_engine.ranks import OneProcess, Ranks
from lora_engine.training.cuda_graphs import CudaGraphs
from lora_engine.training.loss import caption_loss
from lora_engine.training.micro_batches import BatchSplitter
from lora_engine.training.moving_average import MovingAverage
from lora_engine.training.optim import FlatLoRAParameters, build_optimizer, set_learning_rate

logger = logging.getLogger(__name__)


class Trainer:
    """Owns what a step changes: LoRA parameters, AdamW's moments, the loss scale, CUDA graphs.

    With `ema_decay`, `average` is the moving average of the parameters.

    A step is `accumulate` over its `num_micro_batches`, which `ranks` share out, then `update`.
    Build the trainer when the model has its adapters and is on `device`; `dtype` is that of
    matmuls.
    """

    def __init__(
        self,
        model: CaptioningModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        lr: float,
        weight_decay: float = 0.01,
        loraplus_lr_ratio: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        ema_decay: float | None = None,
        max_grad_norm: float = 1.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        cuda_graphs: bool = True,
        ranks: Ranks = OneProcess(),
        num_micro_batches: int = 1,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.num_micro_batches = num_micro_batches
        self.device = device
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.lora = FlatLoRAParameters(
            (layer for _, layer in lora_layers(model)), dtype, lr_ratio=loraplus_lr_ratio
        )
        self.optimizer = build_optimizer(
            self.lora, lr=lr, weight_decay=weight_decay, betas=betas
        )
        self.average = None if ema_decay is None else MovingAverage(self.lora, ema_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.splitter = BatchSplitter()
        self.graphs: CudaGraphs | None = None
        if device.type == "cuda" and cuda_graphs:
            if model.decoder.gradient_checkpointing:
                logger.info(
                    "no CUDA graphs with --gradient_checkpointing, which draws dropout twice"
                )
            else:
                self.graphs = CudaGraphs(self._changed_by_a_step, device=device, dtype=dtype)

    def accumulate(
        self,
        batches: Sequence[FeatureBatch],
        step: int,
        *,
        num_targets: int | None = None,
        first: int = 0,
    ) -> Tensor:
        """Sum a step's gradients over its micro-batches -> the step's loss, (), on the device.

        `batches` are this process' micro-batches, from number `first` on; the sum is over those of
        all processes, in order. Every micro-loss is a sum over targets, divided by `num_targets` of
        the whole step (None: these batches are all of it), so that the gradients are those of one
        large batch whatever the captions' lengths. Batches that exceed the GPU's memory are split,
        which changes only the last bits and dropout masks.
        """
        if num_targets is None:
            num_targets = sum(batch.num_targets for batch in batches)
        buffer = self.lora.gradient_and_loss
        weight = torch.full((), 1 / num_targets, dtype=buffer.dtype, device=self.device)
        summation = self.ranks.summation(buffer, self.num_micro_batches)
        micro_step: Callable[..., Tensor] = self.micro_step
        if self.graphs is not None:
            micro_step = partial(self.graphs, self.micro_step)
        for number, batch in enumerate(batches, first):
            is_done = False
            while not is_done:
                try:
                    for part, rows in enumerate(self.splitter.split(batch)):
                        seed_generators(self.seed, step, number, *([part] if part else []))
                        tensors = rows.tensors(self.device)
                        self.lora.loss += micro_step(self.scaler.scale(weight), *tensors)
                    is_done = True
                except torch.OutOfMemoryError:
                    if not self.splitter.shrink(batch):
                        raise
                if not is_done:  # out here nothing refers to the failed attempt's tensors any more
                    self._clear_gradients()
            summation.add()
        summation.finish()
        return self.lora.loss[0] * weight

    def micro_step(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Forward and backward of one micro-batch -> its summed loss, ()."""
        with self.lora.cast_gradients():
            with autocast(self.device, self.dtype):
                loss = caption_loss(self.model, *tensors, label_smoothing=self.label_smoothing)
            loss.backward(weight.to(loss.dtype))
        return loss.detach()

    def update(self, loss: Tensor, *, lr: float) -> Tensor:
        """Clip, step, and clear the gradients -> their norm before clipping, (), on the device.

        A step whose `loss` or gradient is not finite changes neither parameters nor moments. That
        is decided on the device, without waiting for it: fused AdamW takes `found_inf` and does
        nothing where it is 1 (as a GradScaler does, which decides for fp16).
        """
        set_learning_rate(self.optimizer, lr)
        # A GradScaler keeps its state in Python, which a graph would not replay.
        if self.graphs is None or self.scaler.is_enabled():
            return self._step(loss)
        return self.graphs(self._step, loss, or_plainly=True)  # a step cannot be split

    def _step(self, loss: Tensor) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        gradient = self.lora.gradient
        grad_norm = torch.linalg.vector_norm(gradient)
        if self.max_grad_norm:
            gradient.mul_((self.max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        if not self.scaler.is_enabled():
            is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
            self.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        if self.average is not None:
            num_before = self._num_steps.clone()
        self.scaler.step(self.optimizer)
        if self.average is not None:
            self.average.update(self._num_steps, num_before)
        if not self.scaler.is_enabled():
            # A graph's memory is freed when nothing refers to it.
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.scaler.update()
        self.lora.gradient_and_loss.zero_()
        self.lora.refresh()
        return grad_norm

    @property
    def _num_steps(self) -> Tensor:
        """The number of steps that AdamW has taken, (), on the device; it skips some."""
        counts = [state["step"] for state in self.optimizer.state.values() if state]
        return counts[0] if counts else torch.zeros((), device=self.device)

    def _changed_by_a_step(self) -> list[Tensor]:
        cast = [] if self.lora.cast is None else [self.lora.cast]
        average = [] if self.average is None else [self.average.values]
        states = (self.optimizer.state[group] for group in self.lora.groups)
        moments = [moment for state in states for moment in state.values()]
        return [self.lora.values, self.lora.gradient_and_loss, *cast, *average, *moments]

    def _clear_gradients(self) -> None:
        """Undo what an attempt that ran out of memory has begun."""
        self.lora.gradient_and_loss.zero_()
        if self.graphs is not None:
            self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def seed_generators(seed: int, *position: int) -> None:
    """Make dropout a function of the position, (step, micro-batch, part of it if it is split), so
    that a resumed run, and any number of processes, draws the same masks.

    (An explicit generator would break gradient checkpointing and full-graph compilation.)
    """
    sequence = np.random.SeedSequence([seed, *position])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
