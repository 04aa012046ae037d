"""What a run is made of, from its settings: data, model, adapters, trainer, folder, loaders."""

import dataclasses
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_engine.config import TrainingConfig, changes_on_resume
from lora_engine.data.batches import CaptionedImages, Collate, SampleIndex
from lora_engine.data.read_order import choose_read_order
from lora_engine.data.seen_images import (
    DIGESTS_FILE,
    find_change,
    read_digests,
    sample_digests,
)
from lora_engine.data.workers import (
    default_num_workers,
    prefetched_bytes,
    shared_memory_shortage,
)
from lora_engine.devices import (
    autocast,
    describe,
    disable_tf32,
    dtype_name,
    resolve_device,
    resolve_dtype,
    set_threads,
    use_device,
)
from lora_engine.features.loader import FeatureLoader
from lora_engine.features.precision import EncoderPrecision, cast_weights
from lora_engine.features.sizing import size_up
from lora_engine.features.source import FeatureSource, open_features
from lora_engine.features.store import cache_folder
from lora_engine.files import check_space
from lora_engine.lora.injection import InjectionPlan
from lora_engine.lora.matmul import describe_kernels
from lora_engine.models import CaptioningModel
from lora_engine.models.families import FAMILIES
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.ranks import OneProcess, Ranks
from lora_engine.report.hub import check_repository
from lora_engine.report.metrics_log import event_line
from lora_engine.report.run_facts import variants
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.trackers import check_tracker
from lora_engine.stopping import StopSignal
from lora_engine.terminal import counted, one_line
from lora_engine.training.add_lora import add_lora
from lora_engine.training.best_adapter import BestAdapter
from lora_engine.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_dtype,
    check_fingerprints,
    checkpoint_bytes,
    checkpoint_to_resume,
)
from lora_engine.training.moving_average import MovingAverage
from lora_engine.training.run_data import (
    Rows,
    RunData,
    build_data,
    read_rows,
    warn_of_few_images,
)
from lora_engine.training.schedule import Schedule
from lora_engine.training.shares import (
    check_same_settings,
    check_same_start,
    num_micro_batches,
    with_micro_batches,
)
from lora_engine.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSetup:
    """What a run needs before it has a folder; `checkpoint` is what it resumes from, if it does.

    `begin_s` is the time when preparing it began, on the monotonic clock.
    """

    config: TrainingConfig
    checkpoint: Checkpoint | None
    captioner: Captioner
    plan: InjectionPlan
    data: RunData
    trainer: Trainer
    ranks: Ranks
    begin_s: float

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.captioner.fingerprints | self.data.rows.fingerprints


def prepare(
    config: TrainingConfig,
    family: str | None = None,
    *,
    data: Any = None,
    val_data: Any = None,
    ranks: Ranks = OneProcess(),
) -> RunSetup:
    """Read and check all that a run needs, the cheapest first; the same in all processes.

    Sets torch's threads, TF32, device and seed; writes nothing but the index of a large data set.
    """
    begin_s = time.monotonic()
    config.check()
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        RunFolder.check_free(config.output_path, resume=config.resume is not None)
    else:
        assert config.output_path is not None  # it has a checkpoint
        RunFolder.check_unlocked(Path(config.output_path))
        if config.read_order == "auto":
            order = checkpoint.settings.get("read_order", "random")
            config = dataclasses.replace(config, read_order=order)
        if config.micro_batches is None:  # an earlier version's stays None
            config = dataclasses.replace(
                config, micro_batches=checkpoint.settings.get("micro_batches")
            )
        changes_on_resume(checkpoint.settings, config)  # raises for those that may not change
    check_same_settings(ranks, config, checkpoint)
    config = with_micro_batches(config, ranks, is_resumed=checkpoint is not None)
    if ranks.is_main:
        check_tracker(config.track)
        if config.push_to_hub is not None:
            check_repository(config.push_to_hub)
    with ranks.machine_first():
        rows = read_rows(
            config,
            data=data,
            val_data=val_data,
            is_of_earlier_version=checkpoint is not None and "val_size" not in checkpoint.settings,
        )
    Schedule(config, len(rows.train)).check()
    if config.read_order == "auto":
        config = with_read_order(config, rows, ranks)
    device = resolve_device(config.device, local_rank=ranks.local_rank, local_size=ranks.local_size)
    use_device(device)
    set_threads(config.num_threads, ranks.local_size)
    dtype = resolve_dtype(config.precision, device)
    disable_tf32()
    if checkpoint is not None:
        check_dtype(checkpoint, dtype, config)

    captioner = load_captioner(config.model, family=family, revision=config.revision)
    captioner.prompt = config.prompt
    if checkpoint is None:
        digests = sample_digests(rows.images)
    else:
        digests = check_same_run(checkpoint, captioner, rows, config)
    torch.manual_seed(config.seed)
    plan = add_lora(captioner, config, checkpoint)
    if ranks.is_main:
        check_space_for_run(config, plan)
    with ranks.machine_first():
        run_data = build_data(rows, captioner, config, digests=digests)
    model = place_model(
        captioner.model,
        device,
        dtype,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        encoder_precision=config.encoder_precision,
    )
    trainer = Trainer(
        model,
        device=device,
        dtype=dtype,
        lr=config.lr,
        weight_decay=config.weight_decay,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        betas=(config.adam_beta1, config.adam_beta2),
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
        cuda_graphs=config.cuda_graphs,
        ranks=ranks,
        num_micro_batches=num_micro_batches(config),
    )
    setup = RunSetup(config, checkpoint, captioner, plan, run_data, trainer, ranks, begin_s)
    check_same_start(ranks, trainer, setup.fingerprints)
    warn_of_few_images(rows.val, config)  # after all errors
    return setup


def with_read_order(config: TrainingConfig, rows: Rows, ranks: Ranks) -> TrainingConfig:
    """The settings of a new run, with the read order that suits the storage of its images."""
    order, reason = ranks.gather(choose_read_order(rows.train.images))[0]
    if order == "blocks":
        logger.info(f"images are read in blocks: {reason} (--read_order)")
    return dataclasses.replace(config, read_order=order)


def check_same_run(
    checkpoint: Checkpoint, captioner: Captioner, rows: Rows, config: TrainingConfig
) -> np.ndarray:
    """The digests V16 (N,) of `rows.images`, as far as the resumed run has read them.

    Raises CheckpointError if model, rows or images are not the run's. What an earlier version did
    not record is named in a warning.
    """
    unknown = check_fingerprints(checkpoint, captioner.fingerprints | rows.fingerprints, config)
    images = rows.images
    digests = read_digests(checkpoint.path.parent / DIGESTS_FILE)
    if digests is None:
        unknown.append("images")
        digests = sample_digests(images)
    elif change := find_change(images, digests):
        raise CheckpointError(
            f"the run in {config.output_path} began with other images: {change}; restore what has "
            f"changed, or begin another run in another --output_path"
        )
    if unknown:
        logger.warning(
            f"the run in {config.output_path} has no record of its {', '.join(unknown)}, so they "
            f"cannot be checked; they are recorded from now on"
        )
    return digests


def place_model(
    model: CaptioningModel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    encoder_precision: EncoderPrecision = "auto",
) -> CaptioningModel:
    """Prepare the model for training: frozen weights in `dtype`, on its device, in train mode."""
    cast_weights(model, dtype, encoder_precision)
    model.to(device)
    model.decoder.gradient_checkpointing = gradient_checkpointing
    model.train()
    if compile:
        _compile(model, device, dtype)
    return model


def _compile(model: CaptioningModel, device: torch.device, dtype: torch.dtype) -> None:
    """Compile the decoder's layers, and on a GPU the encoder's, one by one.

    Layers of a kind then share one compilation; the decoder's serves all lengths. Compiling is
    tried at once: if it fails (no C++ compiler, for example), the run logs why and trains without.
    """
    layers = list(model.decoder.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    if device.type == "cuda":  # on a CPU the encoder's time is in matmuls, which stay as they are
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
    except Exception as error:  # the compiler's layers raise many kinds
        logger.warning(f"--compile does not work here ({one_line(error)}): training without it")
        for layer in layers:
            layer._compiled_call_impl = None  # what nn.Module.compile sets
    model.zero_grad(set_to_none=True)


def check_space_for_run(config: TrainingConfig, plan: InjectionPlan) -> None:
    """Raises ValueError if the disk has no space for the checkpoints that the run will keep."""
    num_kept = config.keep_last + 2  # the best, and one that is being written
    num_kept += config.lr_schedule == "wsd"  # the one before the decay
    try:
        check_space(
            Path(config.output_path or "runs"),
            needed=num_kept * checkpoint_bytes(plan.num_trainable),
        )
    except OSError as error:
        raise ValueError(f"no space for {num_kept} checkpoints: {error}") from None


# --- what an open run consists of --------------------------------------------------------------


def run_folder(setup: RunSetup, schedule: Schedule) -> RunFolder:
    """The folder of a new run, or of the run to resume; the main process opens it for all."""
    folder = _opened_folder(setup, schedule) if setup.ranks.is_main else None
    (path, *_) = setup.ranks.gather(None if folder is None else str(folder.path.resolve()))
    setup.ranks.remember(path)
    return folder or RunFolder(Path(path), is_writer=False)


def _opened_folder(setup: RunSetup, schedule: Schedule) -> RunFolder:
    checkpoint, config = setup.checkpoint, setup.config
    if checkpoint is None or config.output_path is None:
        return RunFolder.create(
            config.output_path,
            prefix=FAMILIES[setup.captioner.family].name,
            resume=config.resume is not None,
        )
    return RunFolder.reopen(
        config.output_path,
        step=checkpoint.step,
        is_validated=checkpoint.is_validated,
        validations=[
            event_line(
                "validation", step=step, epoch=step / schedule.steps_per_epoch, loss=loss, **scores
            )
            for step, loss, scores in checkpoint.validations()
        ],
    )


def feature_source(setup: RunSetup) -> FeatureSource:
    """Open the features of all images of the run, kept as the settings ask."""
    config, data = setup.config, setup.data
    return open_features(
        setup.captioner,
        device=setup.trainer.device,
        dtype=setup.trainer.dtype,
        num_images=len(data.rows.images),
        cache=config.cache,
        cache_dir=cache_folder(config.cache_dir),
        cache_dtype=config.cache_dtype,
        cache_limit_bytes=config.cache_limit_gb * 1e9,
        encoder_precision=config.encoder_precision,
        ranks=setup.ranks,
    )


def feature_loader(
    dataset: CaptionedImages,
    order: Iterable[list[SampleIndex]],
    *,
    features: FeatureSource,
    captioner: Captioner,
    config: TrainingConfig,
    stop: StopSignal,
    local_size: int = 1,
) -> FeatureLoader:
    """The batches of a dataset in an order, loaded as the settings ask, by one of `local_size`
    processes on this machine."""
    tokenizer = captioner.tokenizer
    return FeatureLoader(
        dataset,
        order,
        features=features,
        collate=Collate(
            image_size=captioner.pixels.size,
            longest_bucket=tokenizer.max_positions if features.device.type == "cuda" else None,
            prompt_length=len(tokenizer.prompt_ids(captioner.prompt)),
            pad_id=tokenizer.pad_id,
        ),
        num_workers=default_num_workers(features.device, config.num_workers, local_size),
        timeout_s=config.worker_timeout,
        waiting=stop.waiting,
        batch_bytes=config.batch_size * captioner.pixels.num_bytes,
    )


def best_adapter(
    setup: RunSetup, folder: RunFolder, average: MovingAverage | None = None
) -> BestAdapter:
    """The tracker of a run's best adapter, or best average, with what its files record about the
    run."""
    captioner = setup.captioner
    is_folder = Path(captioner.name).is_dir()
    return BestAdapter(
        captioner.model,
        folder,
        average=average,
        by=setup.config.best_by,
        base_model=str(Path(captioner.name).resolve()) if is_folder else captioner.name,
        hugging_face_class=captioner.hugging_face_class,
        revision=captioner.revision,
        provenance={
            **{f"{part}_fingerprint": value for part, value in captioner.fingerprints.items()},
            "data_fingerprint": setup.fingerprints["training_data"],
            "label_convention": "each position predicts the next token; one end token",
            "prompt": captioner.prompt,
            **({} if average is None else {"ema_decay": f"{average.decay:g}"}),
        },
    )


def sizes(setup: RunSetup) -> dict[str, int]:
    """How much is trained, and on how much, for the report."""
    data, plan = setup.data, setup.plan
    return {
        "num_train_captions": len(data.train_set),
        "num_train_images": len(data.train_set.image_paths),
        "num_val_captions": len(data.val_set),
        "num_val_images": len(data.val_set.image_paths),
        "num_adapted_modules": len(plan.modules),
        "num_trainable": plan.num_trainable,
        "num_frozen": plan.num_frozen,
    }


def log_opening(setup: RunSetup, folder: RunFolder, features: FeatureSource) -> None:
    """Log what is trained on what, and where."""
    config, trainer, found = setup.config, setup.trainer, sizes(setup)
    cut = setup.data.train_set.captions.num_truncated
    limit = counted(config.max_caption_tokens, "token")
    truncated = f"; {counted(cut, 'caption')} cut to {limit}" if cut else ""
    logger.info(
        f"model {config.model} on {describe(trainer.device)}, "
        f"{dtype_name(trainer.dtype)}: "
        f"{describe_kernels(trainer.device, trainer.dtype)}"
    )
    for name in dict.fromkeys([setup.data.rows.train.name, setup.data.rows.val.name]):
        logger.info(f"data {name}")
    logger.info(
        f"data {counted(found['num_train_captions'], 'training caption')} of "
        f"{counted(found['num_train_images'], 'image')}, "
        f"{counted(found['num_val_captions'], 'validation caption')} of "
        f"{found['num_val_images']:,}{truncated}"
    )
    logger.info(setup.plan.grouped())
    if kinds := variants(config.as_dict()):
        logger.info(f"variant {', '.join(kinds)}")
    logger.info(f"run folder {folder.path}")
    train_set = setup.data.train_set
    local_size = setup.ranks.local_size
    num_workers = default_num_workers(trainer.device, config.num_workers, local_size)
    for line in size_up(
        features,
        setup.captioner,
        train_set.images.table,
        num_captions=len(train_set),
        num_tokens=int(np.median(train_set.captions.lengths)),
        num_loaders=num_workers,
        num_processes=setup.ranks.size,
    ):
        logger.info(line)
    one_loader = prefetched_bytes(
        num_workers, config.batch_size * setup.captioner.pixels.num_bytes
    )
    # Each process loads training and validation rows.
    if (shortage := shared_memory_shortage(2 * local_size * one_loader)) is not None:
        logger.warning(shortage)
