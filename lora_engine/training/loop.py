"""The loop: image-caption pairs and a frozen captioner in, a LoRA adapter out.

`train` reads top to bottom as what happens: rows, model, adapters, then step by step

    pixels -> frozen encoder -> features (kept) -> decoder with LoRA -> loss -> gradients -> AdamW

A step is an optimizer step of `grad_accum_steps` micro-steps. Its loss is the sum over all valid
target tokens divided by their number, across micro-steps: 4 x 16 rows are exactly 1 x 64.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lora_engine.config import TrainingConfig
from lora_engine.data.batches import FeatureBatch, training_order
from lora_engine.devices import autocast, describe, peak_memory_bytes
from lora_engine.features.source import FeatureSource
from lora_engine.models import CaptioningModel
from lora_engine.report.hub import push_adapter
from lora_engine.report.loss_curve import draw_loss_curve
from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.report.model_card import write_model_card
from lora_engine.report.page import write_report
from lora_engine.report.run_folder import RunFolder, environment
from lora_engine.report.summary import TrainingSummary
from lora_engine.report.trackers import start_tracker
from lora_engine.stopping import (
    Interrupted,
    StopSignal,
    TrainingStopped,
    signals_held,
)
from lora_engine.training.best_adapter import AdapterKeeper
from lora_engine.training.cuda_graphs import CudaGraphs
from lora_engine.training.loss import caption_loss
from lora_engine.training.meter import Meter
from lora_engine.training.micro_batches import FittingBatches
from lora_engine.training.optim import FlatLoRAParameters, optimizer_step
from lora_engine.training.run_state import RunState
from lora_engine.training.schedule import Schedule
from lora_engine.training.setup import (
    Prepared,
    adapter_keeper,
    feature_source,
    loader,
    loading_advice,
    opening,
    prepare,
    run_folder,
    sizes,
)
from lora_engine.training.skipped_rows import SkippedRows
from lora_engine.training.validation import Validation
from lora_engine.training.validation_captions import ValidationCaptions

_NUM_SPARE = 8  # file descriptors


def train(config: TrainingConfig, *, family: str | None = None) -> TrainingSummary:
    """Train an adapter as `config` says and leave it in a run folder: a new one, or with
    `config.resume` that of the run which goes on.

    `family`, a key of `pretrained.FAMILIES`, refuses models of another kind.

    Raises ValueError (or a named kind of it) for settings, data or a model that cannot be used;
    TrainingStopped or LoadingStopped when a run under way cannot go on; Interrupted after SIGINT,
    SIGTERM or SIGHUP, and when nobody reads the output any more. A checkpoint of the last whole
    step is written first, unless the optimizer or the log of a step failed halfway. A failure
    before the first validation removes what was written.
    """
    begin_s = time.monotonic()
    parts = prepare(config, family)
    schedule = Schedule(config, len(parts.train_set))
    with (
        run_folder(parts) as folder,
        signals_held() as stop,
        MetricsLogger(
            folder.metrics,
            first_step=parts.first_step,
            total_steps=schedule.total_steps,
            tracker=start_tracker(config.track, folder.path, config.as_dict()),
            lose_output=stop.lose_output,
        ) as metrics,
        feature_source(parts, say=metrics.say) as features,
        ExitStack() as spare,
    ):
        # Where descriptors have run out, the last checkpoint can still be written with these.
        for _ in range(_NUM_SPARE):
            spare.enter_context(open(os.devnull))
        folder.write_json("config.json", config.as_dict())
        known = environment(describe(parts.device), parts.dtype, parts.kernels) | sizes(parts)
        folder.write_json("environment.json", known)
        metrics.say(opening(parts))
        metrics.say(f"run folder {folder.path}")
        metrics.say(features.plan)
        if (advice := loading_advice(parts)) is not None:
            metrics.say(f"warning: {advice}")
        keeper = adapter_keeper(parts, folder)
        skipped = SkippedRows(
            folder, metrics, max_share=config.max_bad_share, num_rows=len(parts.train_set)
        )
        skipped.begin(parts.bad_rows, is_listed=parts.checkpoint is not None)
        load_validation = loader(
            parts.val_set, parts.val_images, features, parts.captioner, config, stop
        )
        validation = Validation(
            captioner=parts.captioner,
            dataset=parts.val_set,
            load=load_validation,
            batch_size=config.batch_size,
            keeper=keeper,
            captions=ValidationCaptions(
                parts.captioner,
                parts.val_rows,
                load_validation,
                num_scored=config.eval_captions,
                num_samples=config.num_samples,
                prompt=config.prompt,
                batch_size=config.batch_size,
            ),
            skipped=skipped,
            folder=folder,
            metrics=metrics,
            device=parts.device,
            dtype=parts.dtype,
        )
        state = RunState(
            parts=parts,
            schedule=schedule,
            folder=folder,
            fitting=FittingBatches(say=metrics.say),
            keeper=keeper,
            captions=validation.captions,
            skipped=skipped,
            meter=Meter(metrics, schedule, has_grad_scaler=parts.scaler.is_enabled()),
            begin_s=begin_s,
            say=metrics.say,
        )
        if parts.checkpoint is not None:
            state.restore(parts.checkpoint)
        try:
            take_steps(parts, schedule, features, validation, state, stop)
            known["total_s"] = state.seconds
            known["peak_memory_bytes"] = peak_memory_bytes(parts.device)
            folder.write_json("environment.json", known)
        except (Exception, Interrupted) as error:
            spare.close()
            _save_last_step(state)
            if isinstance(error, OSError):
                raise TrainingStopped(
                    f"{error}. What was there before is whole. {state.how_to_go_on()}"
                ) from error
            if state.has_begun:
                error.add_note(state.how_to_go_on())
            if state.has_begun and isinstance(error, TrainingStopped):
                is_first = "" if keeper.best_step else " (before training)"
                error.add_note(
                    f"the best adapter so far, of step {keeper.best_step}{is_first}, is in "
                    f"{folder.adapter}"
                )
            raise
        finally:
            if state.has_begun and not stop.is_at_once:
                _tell(folder, keeper, state, metrics.say)
        summary = TrainingSummary(
            path=folder.path,
            losses=keeper.losses,
            scores=keeper.scores,
            best_by=keeper.best_by,
            best_step=keeper.best_step,
            num_skipped_images=skipped.num_images,
            num_skipped_rows=len(parts.bad_rows),
            samples=validation.captions.compare(keeper.best_step),
            seconds=state.seconds,
        )
        metrics.say(f"\n{summary}")
        if config.push_to_hub is not None:
            push_adapter(folder, config.push_to_hub)
        stop.answer_at_once()  # only the cache and the tracker are still to be closed
    return summary


def take_steps(
    parts: Prepared,
    schedule: Schedule,
    features: FeatureSource,
    validation: Validation,
    state: RunState,
    stop: StopSignal,
) -> None:
    """The steps of a run from where its state is, with their validations and checkpoints."""
    config, meter, keeper = parts.config, state.meter, validation.keeper
    if schedule.is_validated(state.step) and state.step not in keeper.losses:
        validation.run(
            step=state.step,
            epoch=state.step / schedule.steps_per_epoch,
            undivided=state.undivided,
        )
    state.save()
    epoch, num_done = schedule.position(state.step)
    places = training_order(
        parts.train_set.captions.lengths,
        batch_size=config.batch_size,
        seed=config.seed,
        num_epochs=config.epochs,
        first_epoch=epoch,
        num_done=num_done,
    )
    load = loader(parts.train_set, parts.train_images, features, parts.captioner, config, stop)
    graphs = cuda_graphs_for(parts.matrices, parts.optimizer, config, state.say)
    meter.begin()
    with closing(load(places, waiting=meter.waiting)) as micro_batches:
        for step in range(state.step + 1, schedule.total_steps + 1):
            stop.check()
            if config.patience is not None and keeper.num_worse >= config.patience:
                state.say(f"stopped: no better for {config.patience} validations")
                break
            batches = list(islice(micro_batches, schedule.num_micro_steps(step)))
            validation.skipped.add(batches)
            loss = state.fitting.run(
                partial(
                    accumulate_gradients,
                    parts.captioner.model,
                    device=parts.device,
                    dtype=parts.dtype,
                    scaler=parts.scaler,
                    label_smoothing=config.label_smoothing,
                    seed=(config.seed, step),
                    graphs=graphs,
                ),
                batches,
                clear=partial(clear_gradients, parts.matrices, graphs),
            )
            rate = schedule.learning_rate(step)
            with state.undivided():
                grad_norm = optimizer_step(
                    parts.optimizer,
                    parts.scaler,
                    parts.matrices,
                    loss,
                    lr=rate,
                    max_grad_norm=config.max_grad_norm,
                    graphs=graphs,
                )
                state.step = step
                meter.add(step, loss, grad_norm, rate, parts.train_set.paths_of(batches))
                if schedule.is_logged(step):
                    meter.settle(step)
                elif meter.is_overdue:
                    meter.read()
            if schedule.is_validated(step):
                validation.run(
                    step=step, epoch=step / schedule.steps_per_epoch, undivided=state.undivided
                )
                meter.restart()
            if keeper.best_step == step or state.is_save_due:
                state.save()
    state.save()


def _save_last_step(state: RunState) -> None:
    """Write a checkpoint when the steps have ended early; that it fails must not hide why."""
    try:
        state.save()
    except TrainingStopped:  # raised again for the same reason
        pass
    except Exception as error:  # a GPU that has failed raises on every call
        state.say(f"warning: no checkpoint of step {state.step}: {error}")


def _tell(
    folder: RunFolder, keeper: AdapterKeeper, state: RunState, say: Callable[[str], None]
) -> None:
    """Write what people read and use; that it fails neither ends a run nor hides why one ended."""
    last = [partial(keeper.keep_last, state.step)] if state.is_whole else []
    for write in (
        *last,
        partial(draw_loss_curve, folder.metrics, folder.loss_curve),
        partial(write_model_card, folder),
        partial(write_report, [folder.path], folder.report),
    ):
        try:
            write()
        except Exception as error:  # a full disk, a file that somebody changed
            say(f"warning: {write.func.__name__} failed: {type(error).__name__}: {error}")


def accumulate_gradients(
    model: CaptioningModel,
    batches: Sequence[FeatureBatch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    label_smoothing: float = 0.0,
    seed: tuple[int, int] = (0, 0),
    graphs: CudaGraphs | None = None,
) -> Tensor:
    """Forward and backward over a step's micro-batches -> the step's loss, (), on the device.

    Every micro-loss is a sum over targets, divided by the number of targets of the whole step, so
    that the gradients are those of one large batch whatever the captions' lengths. The global
    generator is seeded from (`seed`, micro-step), which makes dropout a function of the position
    (an explicit generator would break checkpointing and full-graph compilation).
    """

    def forward_backward(weight: Tensor, *tensors: Tensor) -> Tensor:
        with autocast(device, dtype):
            loss = caption_loss(model, *tensors, label_smoothing=label_smoothing)
        loss.backward(weight.to(loss.dtype))
        return loss.detach()

    num_targets = sum(batch.num_targets for batch in batches)
    accurate = torch.promote_types(dtype, torch.float32)
    weight = torch.full((), 1 / num_targets, dtype=accurate, device=device)
    total = torch.zeros((), dtype=accurate, device=device)
    for micro_step, batch in enumerate(batches):
        position = np.random.SeedSequence([*seed, micro_step])
        torch.manual_seed(int(position.generate_state(1, np.uint64)[0]))
        inputs = scaler.scale(weight), *batch.tensors(device)
        if graphs is None:
            total += forward_backward(*inputs)
        else:
            total += graphs(forward_backward, "forward_backward", *inputs)
    return total * weight


def clear_gradients(matrices: FlatLoRAParameters, graphs: CudaGraphs | None) -> None:
    """Undo what a step that found no memory has begun."""
    matrices.gradient.zero_()
    if graphs is not None:
        graphs.clear()
    if matrices.gradient.is_cuda:
        torch.cuda.empty_cache()


def cuda_graphs_for(
    matrices: FlatLoRAParameters,
    optimizer: torch.optim.AdamW,
    config: TrainingConfig,
    say: Callable[[str], None],
) -> CudaGraphs | None:
    if not matrices.values.is_cuda or not config.cuda_graphs:
        return None
    if config.gradient_checkpointing:
        say("no CUDA graphs with --gradient_checkpointing, which draws its dropout twice")
        return None

    def changed() -> list[Tensor]:
        cast = [] if matrices.cast is None else [matrices.cast]
        moments = list(optimizer.state[matrices.values].values())
        return [matrices.values, matrices.gradient, *cast, *moments]

    return CudaGraphs(changed, say=say)
