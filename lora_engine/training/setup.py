"""What a run is made of, from its settings: rows, adapters, datasets, features, loaders."""

import hashlib
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.config import TrainingConfig, changes_on_resume
from lora_engine.data.annotations import places_of, usable_rows
from lora_engine.data.batches import (
    CaptionedImages,
    Collate,
    FeatureBatch,
    load_batches,
)
from lora_engine.data.rows import MAX_ROWS_SHOWN, BadRow, Row
from lora_engine.data.seen_images import DIGESTS_FILE, find_change, read_digests, sample_digests
from lora_engine.data.subsets import evenly_spaced, hold_out
from lora_engine.data.workers import default_num_workers, prefetched_bytes, shared_memory_shortage
from lora_engine.devices import (
    autocast,
    describe,
    disable_tf32,
    resolve_device,
    resolve_dtype,
)
from lora_engine.features.source import FeatureSource, ImageList
from lora_engine.files import check_space
from lora_engine.lora.adapter import load_adapter, read_adapter
from lora_engine.lora.injection import InjectionPlan, cast_frozen, inject, lora_layers
from lora_engine.lora.matmul import describe_kernels
from lora_engine.models import CaptioningModel
from lora_engine.models.pretrained import FAMILIES, Captioner, load_captioner
from lora_engine.report.hub import check_repository
from lora_engine.report.metrics_log import event_line
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.trackers import check_tracker
from lora_engine.stopping import StopSignal
from lora_engine.terminal import one_line, printable
from lora_engine.training.best_adapter import AdapterKeeper
from lora_engine.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_dtype,
    check_fingerprints,
    checkpoint_bytes,
    checkpoint_to_resume,
)
from lora_engine.training.optim import FlatLoRAParameters, build_optimizer
from lora_engine.training.schedule import Schedule
from lora_engine.training.skipped_rows import allowed_failures


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, before it has a folder: the model in its place, and its data.

    `checkpoint` is what it goes on from, `changes` say which settings are others than then.
    `bad_rows` are those of the annotation files that are skipped.
    """

    config: TrainingConfig
    checkpoint: Checkpoint | None
    changes: list[str]
    val_rows: list[Row]
    bad_rows: list[BadRow]
    device: torch.device
    dtype: torch.dtype
    kernels: str
    captioner: Captioner
    fingerprints: dict[str, str]
    plan: InjectionPlan
    train_set: CaptionedImages
    val_set: CaptionedImages
    train_images: ImageList
    val_images: ImageList
    matrices: FlatLoRAParameters
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler

    @property
    def first_step(self) -> int:
        """The step after which it goes on; 0 for a run that begins."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def prepare(config: TrainingConfig, family: str | None = None) -> Prepared:
    """Read and check all that a run needs, the cheapest first; nothing is written yet."""
    config.check()
    checkpoint = checkpoint_to_resume(config, say=_warn)
    changes: list[str] = []
    if checkpoint is None:
        RunFolder.check_free(config.output_path, take_up=config.resume is not None)
    else:
        changes = changes_on_resume(checkpoint.settings, config)
    check_tracker(config.track)
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
    train_rows, val_rows, bad_rows = read_rows(config)
    device = resolve_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dtype = resolve_dtype(config.precision, device)
    disable_tf32()
    kernels = describe_kernels(device, dtype)
    if checkpoint is not None:
        check_dtype(checkpoint, dtype, config)

    captioner = load_captioner(config.model, family=family, revision=config.revision)
    fingerprints = {
        **captioner.fingerprints,
        "training_data": data_fingerprint(train_rows),
        "validation_data": data_fingerprint(val_rows),
    }
    images = [
        path for rows in (train_rows, val_rows) for path in dict.fromkeys(row.image for row in rows)
    ]
    if checkpoint is None:
        digests = sample_digests(images)
    else:
        digests = check_same_run(checkpoint, fingerprints, images, config)
    torch.manual_seed(config.seed)
    plan = add_lora(captioner, config, checkpoint)
    check_room(config, plan)
    train_set = captioned_images(train_rows, captioner, config, substitute=True)
    val_set = captioned_images(val_rows, captioner, config, substitute=False)
    num_train_images = len(train_set.image_paths)
    model = place_model(captioner.model, device, dtype, config)
    matrices = FlatLoRAParameters((layer for _, layer in lora_layers(model)), dtype)
    return Prepared(
        config=config,
        checkpoint=checkpoint,
        changes=changes,
        val_rows=val_rows,
        bad_rows=bad_rows,
        device=device,
        dtype=dtype,
        kernels=kernels,
        captioner=captioner,
        fingerprints=fingerprints,
        plan=plan,
        train_set=train_set,
        val_set=val_set,
        train_images=ImageList(train_set.image_paths, digests[:num_train_images]),
        val_images=ImageList(val_set.image_paths, digests[num_train_images:]),
        matrices=matrices,
        optimizer=build_optimizer(matrices, lr=config.lr, weight_decay=config.weight_decay),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


def _warn(text: str) -> None:
    print(printable(text), file=sys.stderr)


def read_rows(config: TrainingConfig) -> tuple[list[Row], list[Row], list[BadRow]]:
    """The rows to train on, those to validate on, and those of both files that are skipped."""
    if config.train_data_path is None:
        raise ValueError("--train_data_path is missing: a JSON list of {\"text\", \"image\"} rows")
    rows, bad_rows = usable_rows(config.train_data_path, max_bad_share=config.max_bad_share)
    if config.val_data_path is not None:
        train_rows = rows
        val_rows, more = usable_rows(config.val_data_path, max_bad_share=config.max_bad_share)
        bad_rows += more
    else:
        train_rows, val_rows = hold_out(rows, fraction=config.val_fraction, seed=config.seed)
    for path, part in ((config.train_data_path, train_rows), (config.val_data_path, val_rows)):
        _check_images_exist(path or config.train_data_path, part, config.max_bad_share)
    _warn_of_overlap(train_rows, val_rows)
    if config.eval_captions:
        _warn_of_captions_without_words(config, val_rows)
    return train_rows, val_rows, bad_rows


def _warn_of_overlap(train_rows: Sequence[Row], val_rows: Sequence[Row]) -> None:
    images = {row.image for row in val_rows}
    shared = images & {row.image for row in train_rows}
    if shared:
        _warn(
            f"warning: {len(shared):,} of {len(images):,} validation images are trained on, too, "
            f"such as {min(shared)}: the validation loss is too optimistic"
        )


def _warn_of_captions_without_words(config: TrainingConfig, val_rows: Sequence[Row]) -> None:
    """Name the captions that no score can be computed against, by file and line.

    Raises ValueError where none is left and a score is to choose the best adapter.
    """
    wordless = {row for row in val_rows if not has_words(row.text)}
    if not wordless:
        return
    path = config.val_data_path or config.train_data_path
    assert path is not None
    if config.best_by != "loss" and len(wordless) == len(set(val_rows)):
        raise ValueError(
            f"--best_by {config.best_by} needs captions with words to compare, but no validation "
            f"caption of {path} has any"
        )
    places = places_of(path, wordless)
    rest = len(places) - MAX_ROWS_SHOWN
    more = f" and {rest:,} more (lora_engine validate --json FILE lists them)" if rest > 0 else ""
    _warn(
        f"warning: {len(places):,} validation captions have no words to compare and are not "
        f"scored: {', '.join(places[:MAX_ROWS_SHOWN])}{more}"
    )


def _check_images_exist(path: str, rows: Sequence[Row], max_share: float) -> None:
    """Say at once, from 200 of the rows, that the images are not where the file says."""
    looked_at = [rows[i] for i in evenly_spaced(len(rows), 200)]
    missing = [row.image for row in looked_at if not os.path.isfile(row.image)]
    if len(missing) > allowed_failures(len(looked_at), max_share, is_sample=len(rows) > 200):
        raise ValueError(
            f"{path}: {len(missing)} of {len(looked_at)} rows looked at name an image that does "
            f"not exist, more than --max_bad_share {max_share:g}; the first is {missing[0]} (image "
            f"paths are absolute or relative to the annotation file)"
        )


def check_same_run(
    checkpoint: Checkpoint,
    fingerprints: dict[str, str],
    images: Sequence[str],
    config: TrainingConfig,
) -> np.ndarray:
    """The digests of the images (N,), as far as the run that goes on has read them.

    Raises CheckpointError where model, rows or images are not the run's. What an earlier version
    has not recorded is said in one line.
    """
    unknown = check_fingerprints(checkpoint, fingerprints, config)
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
        _warn(
            f"warning: the run in {config.output_path} has no record of its {', '.join(unknown)}, "
            f"so they cannot be checked; they are recorded from now on"
        )
    return digests


def add_lora(
    captioner: Captioner, config: TrainingConfig, checkpoint: Checkpoint | None
) -> InjectionPlan:
    """Inject new adapters, those of --init_adapter, or those that the run goes on from."""
    model = captioner.model
    if checkpoint is not None:
        return load_adapter(model, checkpoint.adapter, dropout=config.lora_dropout)
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
    plan = load_adapter(model, adapter, dropout=config.lora_dropout)
    complaint = adapter.foreign_base(captioner.name, captioner.fingerprints)
    if complaint is not None:
        raise ValueError(
            f"--init_adapter {complaint}; train on its own base ({adapter.base_model})"
        )
    return plan


def captioned_images(
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
    model: CaptioningModel, device: torch.device, dtype: torch.dtype, config: TrainingConfig
) -> CaptioningModel:
    """Put the model where and how it runs, in training mode."""
    cast_frozen(model, dtype)
    model.to(device)
    model.decoder.gradient_checkpointing = config.gradient_checkpointing
    model.train()
    if config.compile:
        _compile(model, device, dtype)
    return model


def _compile(model: CaptioningModel, device: torch.device, dtype: torch.dtype) -> None:
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
        reason = one_line(error)  # the first line names no more than "inductor"
        _warn(f"--compile does not work here ({reason}): training without it")
        for layer in layers:
            layer._compiled_call_impl = None  # what nn.Module.compile sets
    model.zero_grad(set_to_none=True)


def check_room(config: TrainingConfig, plan: InjectionPlan) -> None:
    """Raises ValueError where the disk has no room for what the run will keep."""
    num_kept = config.keep_last + 2  # the best, and one that is being written
    try:
        check_space(
            Path(config.output_path or "runs"),
            needed=num_kept * checkpoint_bytes(plan.num_trainable),
        )
    except OSError as error:
        raise ValueError(f"no room for {num_kept} checkpoints: {error}") from None


def run_folder(parts: Prepared) -> RunFolder:
    """The folder of a run that begins, or goes on."""
    checkpoint, config = parts.checkpoint, parts.config
    if checkpoint is None or config.output_path is None:
        return RunFolder.create(
            config.output_path,
            prefix=FAMILIES[parts.captioner.family].name,
            take_up=config.resume is not None,
        )
    schedule = Schedule(config, len(parts.train_set))
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


def default_cache_dir() -> Path | None:
    """$XDG_CACHE_HOME/lora_engine or ~/.cache/lora_engine; None for a user without a home folder.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # expanduser leaves the "~" where HOME is not set and the user is not in the password database.
    return None if parent.startswith("~") else Path(parent, "lora_engine")


def feature_source(parts: Prepared, *, say: Callable[[str], None]) -> FeatureSource:
    config = parts.config
    paths = {path for part in (parts.train_set, parts.val_set) for path in part.image_paths}
    cache_dir = default_cache_dir() if config.cache_dir is None else Path(config.cache_dir)
    return FeatureSource(
        parts.captioner,
        device=parts.device,
        dtype=parts.dtype,
        num_images=len(paths),
        cache=config.cache,
        cache_dir=cache_dir,
        cache_dtype=config.cache_dtype,
        cache_limit_bytes=config.cache_limit_gb * 1e9,
        say=say,
    )


def loader(
    dataset: CaptionedImages,
    images: ImageList,
    features: FeatureSource,
    captioner: Captioner,
    config: TrainingConfig,
    stop: StopSignal,
) -> Callable[..., Generator[FeatureBatch]]:
    """A function of places, in whose order it gives batches with their images' features.

    `images` are those of the dataset. Close what it gives where it is not exhausted: processes may
    be loading.
    """
    tokenizer = captioner.tokenizer
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
        timeout_s=config.worker_timeout,
        waiting=stop.waiting,
        batch_bytes=_batch_bytes(captioner, config),
    )
    return lambda places, waiting=iter: features.attach(waiting(load(places)), images)


def _batch_bytes(captioner: Captioner, config: TrainingConfig) -> int:
    height, width = captioner.pixels.size
    return config.batch_size * 3 * height * width


def loading_advice(parts: Prepared) -> str | None:
    """What to do about too little shared memory for processes that load training and validation
    images."""
    num_workers = default_num_workers(parts.device, parts.config.num_workers)
    one = prefetched_bytes(num_workers, _batch_bytes(parts.captioner, parts.config))
    return shared_memory_shortage(2 * one)


def adapter_keeper(parts: Prepared, folder: RunFolder) -> AdapterKeeper:
    captioner = parts.captioner
    is_folder = Path(captioner.name).is_dir()
    return AdapterKeeper(
        captioner.model,
        folder,
        base_model=str(Path(captioner.name).resolve()) if is_folder else captioner.name,
        hugging_face_class=FAMILIES[captioner.family].hugging_face_class,
        revision=captioner.revision,
        best_by=parts.config.best_by,
        provenance={
            **{f"{part}_fingerprint": value for part, value in captioner.fingerprints.items()},
            "data_fingerprint": parts.fingerprints["training_data"],
            "label_convention": "each position predicts the next token; one end token",
            "prompt": parts.config.prompt,
        },
    )


def data_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over captions and image names, not over where the images lie."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.text}\0{os.path.basename(row.image)}\n".encode())
    return digest.hexdigest()


def sizes(parts: Prepared) -> dict[str, int]:
    """How much is trained, on how much, for the report."""
    return {
        "num_train_captions": len(parts.train_set),
        "num_train_images": len(parts.train_set.image_paths),
        "num_val_captions": len(parts.val_set),
        "num_val_images": len(parts.val_set.image_paths),
        "num_adapted_modules": len(parts.plan.modules),
        "num_trainable": parts.plan.num_trainable,
        "num_frozen": parts.plan.num_frozen,
    }


def opening(parts: Prepared) -> str:
    config, train_set, val_set = parts.config, parts.train_set, parts.val_set
    cut = train_set.captions.num_truncated
    truncated = f"; {cut:,} captions cut to {config.max_caption_tokens} tokens" if cut else ""
    return "\n".join([
        f"model {config.model} on {describe(parts.device)}, "
        f"{str(parts.dtype).removeprefix('torch.')}: {parts.kernels}",
        f"data {len(train_set):,} training captions of {len(train_set.image_paths):,} images, "
        f"{len(val_set):,} validation captions of {len(val_set.image_paths):,}{truncated}",
        parts.plan.folded(),
    ])
