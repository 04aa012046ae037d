"""Training from Python: a few keyword arguments in, a finished run to look at out."""

import base64
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from lora_engine.captioning.image_captioner import ImageCaptioner, load_captioner
from lora_engine.config import (
    NEWEST,
    LearningRateSchedule,
    TrainingConfig,
    one_warmup,
    unfit_setting,
)
from lora_engine.data.python_rows import shown_type
from lora_engine.data.read_pairs import paths_of
from lora_engine.keywords import known_keywords
from lora_engine.ranks import Ranks
from lora_engine.report.gallery import thumbnail
from lora_engine.report.html import Markup, join, tag
from lora_engine.report.run_record import read_records
from lora_engine.report.summary import Sample, TrainingSummary
from lora_engine.training import loop
from lora_engine.training.run import Callback

# The settings of recipes/finetune.py, which a test compares.
FINE_TUNING = TrainingConfig(
    model="Salesforce/blip-image-captioning-base",
    epochs=5,
    batch_size=32,
    lr=2e-4,
    warmup_steps=20,
    init_lora_weights="eva",
    best_by="cider_d",
    patience=3,
)


@known_keywords(TrainingConfig, train_data_path="data", val_data_path="validation")
def train(
    config: TrainingConfig | None = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    validation: Any = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    lr: float | None = None,
    lr_schedule: LearningRateSchedule | None = None,
    warmup_steps: int | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    lora_targets: str | Sequence[str] | None = None,
    output_path: str | Path | None = None,
    resume: bool | str | Path = False,
    seed: int | None = None,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None,
    callback: Callback | None = None,
    family: str | None = None,
    val_data: Any = None,
    ranks: Ranks | None = None,
    **settings: Any,
) -> "TrainedRun":
    """Train an adapter and save it in a run folder, a new one in runs/ unless `output_path` names
    one -> the finished run.

    `data` and `validation` are lists of (image, caption or captions), with images as paths, PIL
    images, bytes of image files or uint8 arrays (height, width, 3); Hugging Face Datasets; or paths
    of any source (docs/data.md). Without `validation`, the data's own validation split is used, or
    a part of its images.

    Every other field of `TrainingConfig` is a keyword, too, such as use_dora=True,
    rank_pattern={"attention": 16}, ema_decay=0.99 or eval_every=50; patience=None switches early
    stopping off. What is not given is as in recipes/finetune.py: BLIP base, 5 epochs, a learning
    rate of 2e-4 that rises over 20 steps and then falls linearly, batches of 32, LoRA of rank 8 and
    alpha 32 with dropout 0.1 on attention and feed-forward layers, initialized by EVA, seed 42, the
    adapter with the best CIDEr-D, and an end after three validations without a better one. With a
    `config`, what is not given is as there, and its defaults are those of the published runs.
    `resume=True` continues the run in `output_path`, with the same arguments as before; a path
    continues from that checkpoint.

    `callback` is called with each line of metrics.jsonl, a dictionary, as it is logged (of several
    processes, in the one that writes). An error in it ends the run as Ctrl-C does, with a
    checkpoint, and is raised again. `family`, `val_data` (an older name of `validation`), `ranks`,
    and what is raised, are those of `loop.train`.
    """
    if config is not None and not isinstance(config, TrainingConfig):
        raise ValueError(
            f"train() got an object of the type {type(config).__name__} as its settings; give "
            f"pairs as data=..., a captioner as model=..., and other settings by name, or in a "
            f"TrainingConfig"
        )
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"train(): model is {shown_type(model)}, expected the folder or the name of a "
            f"captioner, such as captioner.name"
        )
    if val_data is not None and validation is not None:
        raise ValueError("train() got validation and val_data, its older name: give one of them")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {callback!r}; expected a function of one dictionary")
    validation = val_data if validation is None else validation
    given = {
        "model": model, "epochs": epochs, "max_steps": max_steps, "lr": lr,
        "lr_schedule": lr_schedule, "warmup_steps": warmup_steps, "weight_decay": weight_decay,
        "batch_size": batch_size, "lora_rank": lora_rank, "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout, "lora_targets": lora_targets, "output_path": output_path,
        "resume": NEWEST if resume is True else resume or None, "seed": seed, "device": device,
        "precision": precision,
    }
    given = {name: value for name, value in given.items() if value is not None} | settings
    config = _with_settings(config or FINE_TUNING, given)
    if data is not None and config.train_data_path is not None:
        raise ValueError("train() got data and a train_data_path in its settings: give one of them")
    # Paths are settings, which the run records.
    if paths_of(data):
        config, data = dataclasses.replace(config, train_data_path=tuple(paths_of(data))), None
    if paths_of(validation):
        paths = tuple(paths_of(validation))
        config, validation = dataclasses.replace(config, val_data_path=paths), None
    if data is None and config.train_data_path is None:
        raise ValueError(
            "no training data: give data=..., a list of (image, caption), a dataset, or a path"
        )
    summary = loop.train(
        config, family=family, data=data, val_data=validation, ranks=ranks, callback=callback
    )
    return TrainedRun(summary, config)


def _with_settings(config: TrainingConfig, given: Mapping[str, Any]) -> TrainingConfig:
    """The settings with those that are given replaced, and paths as text.

    Raises ValueError for a value of the wrong type.
    """
    settings = vars(config) | one_warmup(given)
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(settings[name], Mapping):
            settings[name] = [f"{key}={_plain(value)}" for key, value in settings[name].items()]
    for name in ("lora_targets", "rank_pattern", "alpha_pattern"):
        if isinstance(settings[name], str):
            settings[name] = [settings[name]]
    for name, value in settings.items():
        plain = _plain(value)
        if isinstance(value, (list, tuple, range)):
            plain = list(map(_plain, value))
        if not isinstance(plain, (str, int, float, list, NoneType)):
            raise ValueError(f"train(): {name} is {shown_type(value)}, which is no setting")
        settings[name] = plain
    complaint = unfit_setting(settings)
    if complaint is not None:
        raise ValueError(f"train(): {complaint.removeprefix('.')}")
    return TrainingConfig.from_dict(settings)


def _plain(value: Any) -> Any:
    """A path as text, and a number of NumPy or a tensor as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """A finished run: `summary` has its losses, scores and sample captions, `config` its settings.

    `str` of it is what the run printed at its end.
    """

    summary: TrainingSummary
    config: TrainingConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.summary.path

    @property
    def adapter(self) -> Path:
        """The folder of the best adapter."""
        return self.folder / "adapter"

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Every logged step and validation, the lines of metrics.jsonl."""
        return read_records(self.folder / "metrics.jsonl", event=str)

    @property
    def scores(self) -> dict[str, float]:
        """The validation loss and the scores of the best adapter, by name."""
        step = self.summary.best_step
        scores = self.summary.scores.get(step)
        return {"loss": self.summary.losses[step]} | ({} if scores is None else scores.as_dict())

    @cached_property
    def captioner(self) -> ImageCaptioner:
        """The captioner with the best adapter, loaded on first use; `base` is the one without."""
        config = self.config
        return load_captioner(
            config.model,
            adapter=self.adapter,
            revision=config.revision,
            device=config.device,
            precision=config.precision,
            encoder_precision=config.encoder_precision,
        )

    def show(self) -> None:
        """Show the loss curve and sample captions in a notebook; elsewhere print the summary."""
        ipython: Any = sys.modules.get("IPython")
        if ipython is not None and ipython.get_ipython() is not None:
            ipython.display.display(self)
        else:
            print(self)

    def __str__(self) -> str:
        return str(self.summary)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows: the loss curve, and a table of sample captions."""
        curve = base64.b64encode(_content(self.folder / "loss_curve.png")).decode()
        heads = [tag("th", name) for name in ("image", "reference", "before", "after")]
        rows = [tag("tr", *heads), *map(_row, self.summary.samples)]
        return join([
            tag("img", src=f"data:image/png;base64,{curve}", alt="loss curve", width=700),
            tag("table", *rows),
        ]).source


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""  # the disk may have been full


def _row(sample: Sample) -> Markup:
    is_file = os.path.isfile(sample.image)
    image = thumbnail(sample.image) if is_file else os.path.basename(sample.image)
    cells = [image, sample.reference, sample.before, sample.after]
    return tag("tr", *(tag("td", cell) for cell in cells))
