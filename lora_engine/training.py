"""The loop: image-caption pairs and a frozen captioner in, a LoRA adapter out.

`train` reads top to bottom as what happens: rows, model, adapters, then step by step

    pixels -> frozen encoder -> features (kept) -> decoder with LoRA -> loss -> gradients -> AdamW

A step is an optimizer step of `grad_accum_steps` micro-steps. Its loss is the sum over all valid
target tokens divided by their number, across micro-steps: 4 x 16 rows are exactly 1 x 64.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lora_engine.batches import Batch, training_places
from lora_engine.config import TrainingConfig
from lora_engine.cuda_graphs import CudaGraphs
from lora_engine.devices import (
    autocast,
    choose_kernels,
    describe,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
)
from lora_engine.evaluation import Validation
from lora_engine.hub import check_repository, push_adapter
from lora_engine.journal import Journal, Meter
from lora_engine.lora import lora_layers
from lora_engine.loss import caption_loss
from lora_engine.loss_curve import draw_loss_curve
from lora_engine.model_card import write_model_card
from lora_engine.models import CaptionerBody
from lora_engine.optim import FlatMatrices, build_optimizer, optimizer_step
from lora_engine.preparation import (
    adapter_keeper,
    add_lora,
    captioned_images,
    feature_source,
    loader,
    opening,
    place_model,
    read_rows,
    sizes,
)
from lora_engine.pretrained import FAMILIES, load_captioner
from lora_engine.report import write_report
from lora_engine.run_folder import RunFolder, SkippedRows, environment
from lora_engine.schedule import learning_rate
from lora_engine.summary import TrainingSummary
from lora_engine.trackers import check_tracker, start_tracker
from lora_engine.validation_captions import ValidationCaptions


def train(config: TrainingConfig, *, family: str | None = None) -> TrainingSummary:
    """Train an adapter as `config` says and leave it in a new run folder.

    `family`, a key of `pretrained.FAMILIES`, refuses models of another kind.

    Raises ValueError (or a named kind of it) for settings, data or a model that cannot be used;
    TrainingStopped when a run under way cannot go on. Before the first validation is through, a
    failure leaves no folder behind.
    """
    begin_s = time.monotonic()
    config.check()
    RunFolder.check_free(config.output_path)
    check_tracker(config.track)
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub, say=partial(print, file=sys.stderr))
    train_rows, val_rows = read_rows(config)
    device = resolve_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dtype = resolve_dtype(config.precision, device)
    kernels = choose_kernels(device, dtype)

    captioner = load_captioner(config.model, family=family, revision=config.revision)
    torch.manual_seed(config.seed)
    plan = add_lora(captioner.model, config)
    train_set = captioned_images(train_rows, captioner, config, substitute=True)
    val_set = captioned_images(val_rows, captioner, config, substitute=False)
    model = place_model(captioner.model, device, dtype, config)
    matrices = FlatMatrices((layer for _, layer in lora_layers(model)), dtype)
    optimizer = build_optimizer(matrices, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    batches_per_epoch = math.ceil(len(train_set) / config.batch_size)
    steps_per_epoch = math.ceil(batches_per_epoch / config.grad_accum_steps)
    total_steps = config.epochs * steps_per_epoch
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    eval_every = config.eval_every or steps_per_epoch

    with (
        RunFolder.create(config.output_path, prefix=FAMILIES[captioner.family].name) as folder,
        Journal(
            folder.metrics,
            total_steps=total_steps,
            tracker=start_tracker(config.track, folder.path, config.as_dict()),
        ) as journal,
        feature_source(
            captioner, train_set, val_set, device=device, dtype=dtype, config=config,
            say=journal.say,
        ) as features,
    ):
        folder.write_json("config.json", config.as_dict())
        known = environment(describe(device), dtype, kernels)
        known |= sizes(train_set, val_set, plan)
        folder.write_json("environment.json", known)
        journal.say(opening(config, plan, train_set, val_set, device, dtype, kernels))
        journal.say(f"run folder {folder.path}")
        journal.say(features.plan)
        skipped = SkippedRows(
            folder, journal, max_share=config.max_bad_share, num_rows=len(train_set)
        )
        keeper = adapter_keeper(captioner, folder, train_rows, config)
        load_validation = loader(val_set, features, captioner, config)
        validation = Validation(
            captioner=captioner,
            dataset=val_set,
            load=load_validation,
            batch_size=config.batch_size,
            keeper=keeper,
            captions=ValidationCaptions(
                captioner,
                val_rows,
                load_validation,
                num_scored=config.eval_captions,
                num_samples=config.num_samples,
                prompt=config.prompt,
                batch_size=config.batch_size,
            ),
            skipped=skipped,
            folder=folder,
            journal=journal,
            device=device,
            dtype=dtype,
        )
        validation.run(step=0, epoch=0.0)
        places = training_places(
            train_set.captions.lengths,
            batch_size=config.batch_size,
            seed=config.seed,
            num_epochs=config.epochs,
        )
        meter = Meter(
            journal,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            has_grad_scaler=scaler.is_enabled(),
        )
        load = loader(train_set, features, captioner, config)
        micro_batches = load(places, waiting=meter.waiting)
        graphs = cuda_graphs_for(matrices, optimizer, device, config, journal.say)
        last_step = 0
        try:
            for step in range(1, total_steps + 1):
                # An epoch's last step takes the micro-batches that are left.
                num_done = (step - 1) % steps_per_epoch * config.grad_accum_steps
                count = min(config.grad_accum_steps, batches_per_epoch - num_done)
                batches = list(islice(micro_batches, count))
                skipped.add(batches)
                loss = accumulate_gradients(
                    model,
                    batches,
                    device=device,
                    dtype=dtype,
                    scaler=scaler,
                    label_smoothing=config.label_smoothing,
                    seed=(config.seed, step),
                    graphs=graphs,
                )
                rate = learning_rate(
                    step,
                    peak=config.lr,
                    warmup_steps=config.warmup_steps,
                    total_steps=total_steps,
                )
                grad_norm = optimizer_step(
                    optimizer,
                    scaler,
                    matrices,
                    loss,
                    lr=rate,
                    max_grad_norm=config.max_grad_norm,
                    graphs=graphs,
                )
                last_step = step
                meter.add(step, loss, grad_norm, rate, sum(len(b.rows) for b in batches))
                validate_now = step % eval_every == 0 or step == total_steps
                if step % config.log_every == 0 or validate_now:
                    meter.settle()
                elif meter.is_overdue:
                    meter.read()
                if validate_now:
                    validation.run(step=step, epoch=step / steps_per_epoch)
                    meter.restart()
                    if config.patience is not None and keeper.num_worse >= config.patience:
                        journal.say(f"stopped: no better for {config.patience} validations")
                        break
            known["total_s"] = time.monotonic() - begin_s
            known["peak_memory_bytes"] = peak_memory_bytes(device)
            folder.write_json("environment.json", known)
        finally:
            keeper.keep_last(last_step)
            _tell(folder, journal.say)
        summary = TrainingSummary(
            path=folder.path,
            losses=keeper.losses,
            scores=keeper.scores,
            best_by=keeper.best_by,
            best_step=keeper.best_step,
            num_skipped_images=skipped.num_images,
            samples=validation.captions.compare(keeper.best_step),
            seconds=time.monotonic() - begin_s,
        )
        journal.say(f"\n{summary}")
        if config.push_to_hub is not None:
            push_adapter(folder, config.push_to_hub, say=journal.say)
    return summary


def _tell(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Draw and write what people read; that it fails neither ends a run nor hides why one ended."""
    for write in (
        partial(draw_loss_curve, folder.metrics, folder.loss_curve),
        partial(write_model_card, folder),
        partial(write_report, [folder.path], folder.report),
    ):
        try:
            write()
        except Exception as error:  # a full disk, a file that somebody changed
            say(f"warning: {write.func.__name__} failed: {type(error).__name__}: {error}")


def accumulate_gradients(
    model: CaptionerBody,
    batches: Sequence[Batch],
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


def cuda_graphs_for(
    matrices: FlatMatrices,
    optimizer: torch.optim.AdamW,
    device: torch.device,
    config: TrainingConfig,
    say: Callable[[str], None],
) -> CudaGraphs | None:
    if device.type != "cuda" or not config.cuda_graphs:
        return None
    if config.gradient_checkpointing:
        say("no CUDA graphs with --gradient_checkpointing, which draws its dropout twice")
        return None

    def changed() -> list[Tensor]:
        cast = [] if matrices.cast is None else [matrices.cast]
        moments = list(optimizer.state[matrices.values].values())
        return [matrices.values, matrices.gradient, *cast, *moments]

    return CudaGraphs(changed, say=say)
