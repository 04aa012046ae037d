"""The loop: image-caption pairs and a frozen captioner in, a LoRA adapter out.

`train` reads top to bottom as what happens: rows, model, adapters, then step by step

    pixels -> frozen encoder -> features (kept) -> decoder with LoRA -> loss -> gradients -> AdamW

A step is an optimizer step of `grad_accum_steps` micro-steps. Its loss is the sum over all valid
target tokens divided by their number, across micro-steps: 4 x 16 rows are exactly 1 x 64.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_engine.adapter import load_adapter, read_adapter
from lora_engine.adapter_keeper import AdapterKeeper
from lora_engine.annotations import Row, hold_out, read_annotations
from lora_engine.batches import (
    Batch,
    CaptionedImages,
    Collate,
    default_num_workers,
    load_batches,
    training_places,
)
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
from lora_engine.features import FeatureSource, ImageList
from lora_engine.hub import check_repository, push_adapter
from lora_engine.journal import Journal, Meter
from lora_engine.lora import InjectionPlan, cast_frozen, inject, lora_layers
from lora_engine.loss import caption_loss
from lora_engine.model_card import write_model_card
from lora_engine.models import CaptionerBody
from lora_engine.optim import FlatMatrices, build_optimizer, optimizer_step
from lora_engine.pretrained import FAMILIES, Captioner, load_captioner
from lora_engine.loss_curve import draw_loss_curve
from lora_engine.report import write_report
from lora_engine.run_folder import RunFolder, SkippedRows, allowed_failures, environment
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
    train_rows, val_rows = _read_rows(config)
    device = resolve_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dtype = resolve_dtype(config.precision, device)
    kernels = choose_kernels(device, dtype)

    captioner = load_captioner(config.model, family=family, revision=config.revision)
    torch.manual_seed(config.seed)
    plan = _add_lora(captioner.model, config)
    train_set = _dataset(train_rows, captioner, config, substitute=True)
    val_set = _dataset(val_rows, captioner, config, substitute=False)
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
        _feature_source(
            captioner, train_set, val_set, device=device, dtype=dtype, config=config,
            say=journal.say,
        ) as features,
    ):
        folder.write_json("config.json", config.as_dict())
        known = environment(describe(device), dtype, kernels)
        known |= _sizes(train_set, val_set, plan)
        folder.write_json("environment.json", known)
        journal.say(_opening(config, plan, train_set, val_set, device, dtype, kernels))
        journal.say(f"run folder {folder.path}")
        journal.say(features.plan)
        skipped = SkippedRows(
            folder, journal, max_share=config.max_bad_share, num_rows=len(train_set)
        )
        keeper = _adapter_keeper(captioner, folder, train_rows, val_rows, config)
        load_validation = _loader(val_set, features, captioner, config)
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
        load = _loader(train_set, features, captioner, config)
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
        except (OSError, ValueError) as error:
            say(f"warning: {write.func.__name__} failed: {error}")


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


def _read_rows(config: TrainingConfig) -> tuple[list[Row], list[Row]]:
    if config.train_data_path is None:
        raise ValueError("--train_data_path is missing: a JSON list of {\"text\", \"image\"} rows")
    rows = read_annotations(config.train_data_path)
    if config.val_data_path is not None:
        train_rows, val_rows = rows, read_annotations(config.val_data_path)
    else:
        train_rows, val_rows = hold_out(rows, fraction=config.val_fraction, seed=config.seed)
    for path, part in ((config.train_data_path, train_rows), (config.val_data_path, val_rows)):
        _check_images_exist(path or config.train_data_path, part, config.max_bad_share)
    return train_rows, val_rows


def _check_images_exist(path: str, rows: Sequence[Row], max_share: float) -> None:
    """Say at once, from 200 of the rows, that the images are not where the file says."""
    looked_at = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), 200)).astype(int)]
    missing = [row.image for row in looked_at if not os.path.isfile(row.image)]
    if len(missing) > allowed_failures(len(looked_at), max_share, is_sample=len(rows) > 200):
        raise ValueError(
            f"{path}: {len(missing)} of {len(looked_at)} rows looked at name an image that does "
            f"not exist, more than --max_bad_share {max_share:g}; the first is {missing[0]} (image "
            f"paths are absolute or relative to the annotation file)"
        )


def _add_lora(model: CaptionerBody, config: TrainingConfig) -> InjectionPlan:
    if config.init_adapter is None:
        return inject(
            model,
            config.lora_targets,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
        )
    adapter = read_adapter(config.init_adapter)
    if "prompt" in adapter.provenance and adapter.prompt != config.prompt:
        raise ValueError(
            f"the adapter in {config.init_adapter} was trained with --prompt {adapter.prompt!r}, "
            f"this run has {config.prompt!r}; give the same one"
        )
    return load_adapter(model, adapter, dropout=config.lora_dropout)


def _dataset(
    rows: Sequence[Row], captioner: Captioner, config: TrainingConfig, *, substitute: bool
) -> CaptionedImages:
    captions = captioner.tokenizer.encode(
        (row.text for row in rows),
        prompt=config.prompt,
        max_caption_tokens=config.max_caption_tokens,
    )
    images = [row.image for row in rows]
    return CaptionedImages(
        images, captions, captioner.pixels, seed=config.seed, substitute=substitute
    )


def place_model(
    model: CaptionerBody, device: torch.device, dtype: torch.dtype, config: TrainingConfig
) -> CaptionerBody:
    """Put the model where and how it runs, in training mode."""
    cast_frozen(model, dtype)
    model.to(device)
    model.decoder.gradient_checkpointing = (
        config.gradient_checkpointing
    )
    model.train()
    if config.compile:
        _compile(model, device, dtype)
    return model


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


def _adapter_keeper(
    captioner: Captioner,
    folder: RunFolder,
    train_rows: Sequence[Row],
    val_rows: Sequence[Row],
    config: TrainingConfig,
) -> AdapterKeeper:
    is_folder = Path(captioner.name).is_dir()
    return AdapterKeeper(
        captioner.model,
        folder,
        base_model=str(Path(captioner.name).resolve()) if is_folder else captioner.name,
        hugging_face_class=FAMILIES[captioner.family].hugging_face_class,
        revision=captioner.revision,
        best_by=config.best_by,
        provenance={
            "base_fingerprint": captioner.fingerprint,
            "data_fingerprint": _data_fingerprint(train_rows),
            "training_data": _size(train_rows),
            "validation_data": _size(val_rows),
            "label_convention": "each position predicts the next token; one end token",
            "prompt": config.prompt,
        },
    )


def _size(rows: Sequence[Row]) -> str:
    return f"{len(rows):,} captions of {len({row.image for row in rows}):,} images"


def _data_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over captions and image names, not over where the images lie."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.text}\0{os.path.basename(row.image)}\n".encode())
    return digest.hexdigest()


def _compile(model: CaptionerBody, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the decoder's layers, and on a GPU the encoder's, each by itself.

    So the layers of a kind share one compilation; the decoder's hold for all lengths. It is tried
    at once, so that a machine that cannot (no C++ compiler, say) says so in a line and trains
    without.
    """
    layers = list(model.decoder.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    if device.type == "cuda":  # a CPU has its time in the matrix products, which stay as they are
        for layer in model.encoder.layers:
            layer.compile()
            layers.append(layer)
    pixels = torch.zeros(2, 3, *model.encoder.image_size, device=device)
    input_ids = torch.zeros(2, 5, dtype=torch.long, device=device)
    try:
        with autocast(device, dtype):
            with torch.no_grad():
                features = model.encode(pixels)
            model.decode(input_ids, features).sum().backward()
    except Exception as error:  # whatever the compiler's many layers say
        reason = " ".join(str(error).split())[:200]  # the first line names no more than "inductor"
        print(f"--compile does not work here ({reason}): training without it", file=sys.stderr)
        for layer in layers:
            layer._compiled_call_impl = None  # what nn.Module.compile sets
    model.zero_grad(set_to_none=True)


def _feature_source(
    captioner: Captioner,
    *datasets: CaptionedImages,
    device: torch.device,
    dtype: torch.dtype,
    config: TrainingConfig,
    say: Callable[[str], None],
) -> FeatureSource:
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return FeatureSource(
        captioner,
        device=device,
        dtype=dtype,
        num_images=len({path for dataset in datasets for path in dataset.image_paths}),
        cache=config.cache,
        cache_dir=Path(config.cache_dir or Path(user_cache, "lora_engine")),
        cache_dtype=config.cache_dtype,
        cache_limit_bytes=config.cache_limit_gb * 1e9,
        say=say,
    )


def _loader(
    dataset: CaptionedImages, features: FeatureSource, captioner: Captioner, config: TrainingConfig
) -> Callable[..., Iterator[Batch]]:
    """A function of places, in whose order it gives batches with their images' features."""
    tokenizer = captioner.tokenizer
    images = ImageList(dataset.image_paths)
    load = partial(
        load_batches,
        dataset,
        collate=Collate(
            image_size=captioner.pixels.size,
            longest_bucket=tokenizer.max_positions if features.device.type == "cuda" else None,
            prompt_length=len(tokenizer.prompt_ids(config.prompt)),
            pad_id=tokenizer.pad_id,
        ),
        num_workers=default_num_workers(features.device, config.num_workers),
        has_features=partial(features.has, images),
        pin_memory=features.device.type == "cuda",
    )
    return lambda places, waiting=iter: features.attach(waiting(load(places)), images)


def _sizes(
    train_set: CaptionedImages, val_set: CaptionedImages, plan: InjectionPlan
) -> dict[str, int]:
    """How much is trained, on how much, for the report."""
    return {
        "num_train_captions": len(train_set),
        "num_train_images": len(train_set.image_paths),
        "num_val_captions": len(val_set),
        "num_val_images": len(val_set.image_paths),
        "num_adapted_modules": len(plan.modules),
        "num_trainable": plan.num_trainable,
        "num_frozen": plan.num_frozen,
    }


def _opening(
    config: TrainingConfig,
    plan: InjectionPlan,
    train_set: CaptionedImages,
    val_set: CaptionedImages,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
) -> str:
    cut = train_set.captions.num_truncated
    truncated = f"; {cut:,} captions cut to {config.max_caption_tokens} tokens" if cut else ""
    return "\n".join([
        f"model {config.model} on {describe(device)}, {str(dtype).removeprefix('torch.')}: "
        f"{kernels}",
        f"data {len(train_set):,} training captions of {len(train_set.image_paths):,} images, "
        f"{len(val_set):,} validation captions of {len(val_set.image_paths):,}{truncated}",
        plan.folded(),
    ])
