"""The settings of a training run: every flag of a recipe, its meaning, and the values it accepts.

`Range` and `check_ranges` serve the settings of the other commands, too.
"""

import dataclasses
import inspect
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_engine.keywords import known_keywords

NEWEST = "newest"  # what a bare --resume means

LearningRateSchedule = Literal["linear", "cosine", "constant", "wsd"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts, stated in its type: `Annotated[int, Range(ge=1)]`.

    Infinity and NaN are in no range.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            isinstance(value, Real)
            and abs(value) < float("inf")
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = {
            "at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt
        }
        words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        if not words:
            return "a finite number"
        return f"{self.ge} or more" if words == [f"at least {self.ge}"] else " and ".join(words)


Initialization = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"]


def check_ranges(settings: Any, prefix: str = "--") -> None:
    """Raises ValueError that names the first flag of a dataclass whose value is out of range."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for bounds in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(bounds, Range) and value is not None and value not in bounds:
                raise ValueError(f"{prefix}{field.name} is {value!r}; it must be {bounds}")


@dataclass(frozen=True)
class TrainingConfig:
    """What to train, on what, and how. The docstrings of the fields are the recipes' --help."""

    model: str
    """Captioner to adapt: a Hugging Face Hub name or a folder in Hugging Face's format."""
    revision: str | None = None
    """Revision of a Hub model."""
    train_data_path: str | tuple[str, ...] | None = None
    """Training data: files, folders or patterns (shards/{00000..00575}.tar). Reads JSON, CSV, COCO,
    Karpathy's splits, Flickr, captions beside images, WebDataset tars, Parquet, Hugging Face
    datasets (docs/data.md). Without it, the recipes run the embedded demo."""
    val_data_path: str | tuple[str, ...] | None = None
    """Validation data. Default: the validation split of the training data, else a part of its
    images."""
    data_format: str = "auto"
    """Format of the data. auto: detected from its content."""
    image_field: str | None = None
    """Column or key that holds the images. Default: image, file_name, path, ..."""
    caption_field: str | None = None
    """Column or key that holds the captions. Default: text, caption, captions, ..."""
    image_root: str | None = None
    """Folder that image paths are relative to. Default: the folder of the file, or one near it that
    holds the images."""
    split: str | None = None
    """Split of the training data to train on. Default: train, if there are splits."""
    read_order: Literal["auto", "random", "blocks"] = "auto"
    """Order of images in shards. blocks: a random order that reads the disk in sequence; auto:
    blocks for Parquet above 256 MB, and for tars if reading a random image takes over 2 ms."""
    output_path: str | None = None
    """Folder of the run; must not already hold one. Default: a new numbered folder in runs/."""
    epochs: Annotated[int, Range(ge=1)] = 100
    """Number of passes over the training captions."""
    batch_size: Annotated[int, Range(ge=1)] = 32
    """Captions per micro-batch; per step without --grad_accum_steps, however many processes."""
    lr: Annotated[float, Range(gt=0)] = 1e-5
    """Peak learning rate. LoRA usually needs a higher one than full fine-tuning: try 1e-4 to 5e-4.
    """
    seed: Annotated[int, Range(ge=0, lt=2**63)] = 42
    """Seed of the adapter's initialization, the held-out images, the order of the data, substitutes
    for unreadable images, and dropout."""
    max_steps: Annotated[int | None, Range(ge=1)] = None
    """Maximum number of optimizer steps; the learning rate decays to the last one."""
    grad_accum_steps: Annotated[int, Range(ge=1)] = 1
    """A step has batch_size x grad_accum_steps captions; its loss is that of one large batch, for
    captions of different lengths too."""
    micro_batches: Annotated[int | None, Range(ge=1)] = None
    """Parts of a step that are split across the processes. A run may use any number of processes
    that divides it, with the same result. Default: grad_accum_steps, raised to a multiple of the
    number of processes."""
    lora_rank: Annotated[int, Range(ge=1)] = 8
    """Rank of the LoRA matrices."""
    lora_alpha: Annotated[float, Range(gt=0)] = 32.0
    """LoRA updates are scaled by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Range(ge=0, lt=1)] = 0.1
    """Dropout on the input of the LoRA matrices."""
    lora_targets: tuple[str, ...] = ("attention", "feed_forward")
    """Linear layers to adapt: the groups attention and feed_forward, module names matched as in
    PEFT, or re:REGEX matched against whole module paths."""
    lora_layers: tuple[int, ...] = ()
    """Numbers of the decoder's layers to adapt, such as 8 9 10 11. Default: all."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, NAME=RANK: a group, a module name, or a regular expression that
    matches a module path or the end of it, as in PEFT."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, NAME=ALPHA."""
    use_rslora: bool = False
    """Scale updates by lora_alpha / sqrt(lora_rank) (rsLoRA)."""
    use_dora: bool = False
    """Train the magnitude of each output besides its direction (DoRA)."""
    use_lorafa: bool = False
    """Train the B matrices alone (LoRA-FA): less memory, and half the optimizer's state."""
    init_lora_weights: Initialization = "default"
    """Initial LoRA matrices. pissa and olora: parts of the frozen weights, which are taken out of
    them; eva: principal components of the layers' inputs on the first training images.
    --init_adapter needs none."""
    loraplus_lr_ratio: Annotated[float | None, Range(gt=0)] = None
    """Learning rate of the B matrices, as a multiple of --lr (LoRA+); try 4 to 16. Default: 1."""
    init_adapter: str | None = None
    """Start from the adapter of this run folder, adapter folder or Hub name; its rank, alpha,
    targets and variant replace those given here."""
    weight_decay: Annotated[float, Range(ge=0)] = 0.01
    """AdamW's weight decay on the LoRA matrices and, as in PEFT, DoRA's magnitudes."""
    adam_beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Annotated[float, Range(ge=0, lt=1)] = 0.999
    """AdamW's decay of the mean of squared gradients."""
    lr_schedule: LearningRateSchedule = "linear"
    """Learning rate after the warm-up. linear, cosine: falls over all steps. constant: stays. wsd:
    stays, and falls over the last steps (--decay_ratio); a run can be made longer later, and must
    not stop early (--patience None)."""
    warmup_steps: Annotated[int, Range(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly to --lr."""
    warmup_ratio: Annotated[float | None, Range(ge=0, le=1)] = None
    """Share of the steps over which the learning rate rises, instead of --warmup_steps."""
    decay_ratio: Annotated[float | None, Range(gt=0, le=1)] = None
    """Share of the steps over which the learning rate falls with --lr_schedule wsd. Default: 0.2.
    """
    min_lr: Annotated[float, Range(ge=0)] = 0.0
    """Learning rate that the decay falls towards."""
    ema_decay: Annotated[float | None, Range(gt=0, lt=1)] = None
    """Also keep an exponential moving average of the adapter over steps with this decay, such as
    0.999. It is validated, too, and the best is saved in adapter_ema/. Default: no average."""
    max_grad_norm: Annotated[float, Range(ge=0)] = 1.0
    """Clip gradients to this norm; 0 disables clipping."""
    label_smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Share of each target's probability that is spread over the vocabulary."""
    prompt: str = ""
    """Text that every caption continues, such as "a picture of"; stored with the adapter."""
    max_caption_tokens: Annotated[int, Range(ge=1)] = 64
    """Truncate captions to this many tokens."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of matmuls; LoRA matrices stay fp32. auto: bf16 on CUDA (fp16 on older
    cards), fp32 elsewhere."""
    compile: bool = False
    """Compile the decoder's layers, and on a GPU the encoder's, with torch.compile."""
    cuda_graphs: bool = True
    """On a GPU, record the kernels of a step as a CUDA graph and launch them together."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, more time."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: CUDA if available."""
    num_workers: Annotated[int | None, Range(ge=0, le=1024)] = None
    """Worker processes that load images; 0 loads them in the training process. Default: half of the
    processors, at most 8, shared by the training processes of a machine; 0 on a CPU."""
    num_threads: Annotated[int | None, Range(ge=1, le=1024)] = None
    """Threads of each process for training on a CPU. Default: PyTorch's choice, usually all
    processors; several processes share them."""
    encoder_precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of the frozen encoder alone. auto: that of --precision; bf16 and int8 (on a
    CPU) encode images faster and less exactly; the log gives the error."""
    cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Where to keep the encoder's features, so that each image is encoded once. auto: in GPU
    memory; on disk if reading is faster than encoding, for later runs too; the rest in memory."""
    cache_dir: str | None = None
    """Folder for features on disk, best a local one. Default: $XDG_CACHE_HOME/lora_engine or
    ~/.cache/lora_engine; none for a user without a home folder."""
    cache_dtype: Literal["fp32", "bf16", "int8"] | None = None
    """Number format of stored features. Default: fp32 with --precision fp32, otherwise bf16."""
    cache_limit_gb: Annotated[float, Range(ge=0)] = 50.0
    """Maximum size of the cache folder; images that do not fit are encoded in every epoch."""
    val_fraction: Annotated[float | None, Range(gt=0, lt=1)] = None
    """Fraction of the training images to hold out if there is no validation data. Default: 5 %, at
    most 5,000 images."""
    val_size: Annotated[int | None, Range(ge=1)] = None
    """Number of images to hold out, instead of a fraction."""
    eval_every: Annotated[int | None, Range(ge=1)] = None
    """Optimizer steps between validations. Default: validate after every epoch."""
    log_every: Annotated[int, Range(ge=1)] = 10
    """Optimizer steps between training lines in metrics.jsonl."""
    num_samples: Annotated[int, Range(ge=0)] = 8
    """Validation images whose captions are shown before training and at each validation."""
    eval_captions: Annotated[int, Range(ge=0)] = 200
    """Validation images that are captioned (greedily) before training and at each validation to
    compute CIDEr-D, BLEU and ROUGE-L; 0 computes no scores."""
    best_by: Literal["loss", "cider_d"] = "loss"
    """How to select the best adapter: lowest validation loss or highest CIDEr-D."""
    patience: Annotated[int | None, Range(ge=1)] = None
    """Stop after this many validations in a row without a new best; None: never."""
    save_every: str = "10min"
    """Interval between checkpoints, in optimizer steps (500) or time (10min, 90s, 2h). Checkpoints
    are also written at each new best, at the end, and when the run is interrupted."""
    keep_last: Annotated[int, Range(ge=1)] = 2
    """Number of recent checkpoints to keep, besides the best one."""
    resume: str | None = None
    """Continue the run in --output_path, from its newest checkpoint or from the one given here; if
    there is no run yet, start it. Settings default to those of the run and must not contradict
    them."""
    max_bad_share: Annotated[float, Range(ge=0, le=1)] = 0.05
    """Stop the run if a larger share of the rows, or of their images, cannot be used."""
    worker_timeout: Annotated[float, Range(ge=1)] = 300.0
    """Stop the run after waiting this many seconds for images to load."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send metrics to this tracker. tensorboard and wandb write into the run's folder (wandb
    stays offline without an API key), trackio into its own folder."""
    push_to_hub: str | None = None
    """Upload the finished adapter with its model card to this Hugging Face repository, owner/name.
    A new repository is public unless your account's settings say otherwise."""
    license: str | None = None
    """License of the adapter for its model card, as the Hub spells it: apache-2.0, mit, other."""
    print_config: bool = False
    """Print all settings as JSON and exit."""

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value that is not accepted."""
        check_ranges(self)
        if self.best_by == "cider_d" and not self.eval_captions:
            raise ValueError("--best_by cider_d needs captions to score: --eval_captions is 0")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"--license is {self.license!r}; expected an identifier as the Hub spells it, "
                f"such as apache-2.0, mit, cc-by-4.0 or other"
            )
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(
                "--warmup_steps and --warmup_ratio both set the length of the warm-up: give one of "
                "them"
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"--min_lr {self.min_lr:g} is above --lr {self.lr:g}, from which the rate "
                f"falls; give a lower one"
            )
        if self.min_lr and self.lr_schedule == "constant":
            raise ValueError("--min_lr ends a decay; --lr_schedule constant has none")
        if self.decay_ratio is not None and self.lr_schedule != "wsd":
            raise ValueError(
                f"--decay_ratio belongs to --lr_schedule wsd; {self.lr_schedule} does not use it"
            )
        if self.use_lorafa and self.loraplus_lr_ratio is not None:
            raise ValueError(
                "--loraplus_lr_ratio sets the rates of A and B apart; --use_lorafa trains B alone, "
                "at --lr: give one of them"
            )
        if self.val_fraction is not None and self.val_size is not None:
            raise ValueError(
                "--val_fraction and --val_size both say how many images to hold out: give one of "
                "them"
            )
        if self.resume is not None and self.output_path is None:
            raise ValueError("--resume needs the --output_path of the run to continue")
        for name, values in (
            ("init_lora_weights", ("default", "eva")), ("rank_pattern", ((),)),
            ("alpha_pattern", ((),)), ("lora_layers", ((),)),
        ):
            if self.init_adapter is not None and getattr(self, name) not in values:
                raise ValueError(
                    f"--{name} is for new adapters, --init_adapter continues one: give one of them"
                )
        for name in ("lora_targets", "lora_layers"):
            values = getattr(self, name)
            if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"--{name} has {repeated[0]} twice; give it once")
        self.patterns("rank_pattern")
        self.patterns("alpha_pattern")
        self.save_interval()

    def patterns(self, name: str) -> dict[str, Any]:
        """--rank_pattern or --alpha_pattern as numbers by name."""
        kind = {"rank_pattern": int, "alpha_pattern": float}[name]
        found = {}
        for item in getattr(self, name):
            pattern, _, number = item.rpartition("=")
            if not pattern:
                raise ValueError(
                    f"--{name} is {item!r}; expected NAME=NUMBER, such as attention=16"
                )
            if pattern in found:
                raise ValueError(f"--{name} has {pattern} twice; give it once")
            try:
                found[pattern] = kind(number)
            except ValueError:
                found[pattern] = 0
            if not 0 < found[pattern] < float("inf"):
                expected = "a whole number" if kind is int else "a number"
                raise ValueError(f"--{name} {item}: {number!r} is not {expected} above 0")
        return found

    def as_dict(self) -> dict:
        """Plain values for config.json, without those that concern a single command line."""
        values = dataclasses.asdict(self)
        del values["print_config"], values["resume"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """The inverse of `as_dict`, after JSON. Raises TypeError for other names or types."""
        settings = {**values}
        if "licence" in settings:  # its name in earlier versions
            settings.setdefault("license", settings.pop("licence"))
        complaint = unfit_setting(settings)
        if complaint is not None:
            raise TypeError(complaint.removeprefix("."))
        for name, value in settings.items():
            if isinstance(value, list):  # JSON has no tuples
                settings[name] = tuple(value)
        return cls(**settings)

    def save_interval(self) -> tuple[float, float]:
        """--save_every as (steps, seconds), one of which is infinite."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)?", self.save_every)
        value = float(match[1]) if match else 0.0
        if match is None or value <= 0 or match[2] is None and value != int(value):
            raise ValueError(
                f"--save_every is {self.save_every!r}; expected steps, such as 500, or a time, "
                f"such as 10min, 90s or 2h"
            )
        if match[2] is None:
            return value, float("inf")
        return float("inf"), value * {"s": 1, "min": 60, "h": 3600}[match[2]]


# A keyword of another library gets a hint, as in `lora_engine.train`.
TrainingConfig.__init__ = known_keywords()(TrainingConfig.__init__)  # type: ignore[method-assign]


def unfit_setting(values: Mapping[str, Any]) -> str | None:
    """Describe the first JSON value whose type is not that of its setting; None if all fit."""
    hints = get_type_hints(TrainingConfig)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            expected = inspect.formatannotation(hints[name])
            return f".{name} is {reprlib.repr(value)}, expected {expected}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a field's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        is_number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return is_number and (isinstance(value, float) or abs(value) < 2**63)
    return isinstance(value, hint)


def one_warmup(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a person has given: one length of the warm-up replaces a default of the other.
    """
    if given.get("warmup_ratio") is not None:
        return {"warmup_steps": 0, **given}
    return {"warmup_ratio": None, **given} if "warmup_steps" in given else dict(given)


# --- resuming -------------------------------------------------------------------------------

# A resumed run may change where its files are and what it reports, ...
_MAY_CHANGE = frozenset((
    "model", "train_data_path", "val_data_path", "output_path", "num_workers", "cache",
    "cache_dir", "cache_limit_gb", "log_every", "patience", "save_every", "keep_last",
    "max_bad_share", "worker_timeout", "track", "push_to_hub", "license",
    "precision",  # compared by the number format it resolves to
    # compared by the rows that they select
    "data_format", "image_field", "caption_field", "image_root", "split", "val_fraction",
    "val_size",
))
# ... may become longer, ...
_MAY_GROW = ("epochs", "max_steps")
# ... and may change what affects only the last bits of its results.
_MAY_ROUND = ("device", "num_threads", "compile", "cuda_graphs", "gradient_checkpointing")

# Settings that make a run read, write or send outside its folder, or start processes. They are not
# taken from a run folder, which may be a stranger's, unless the command line or the recipe agrees.
REACHES_OUTSIDE = (
    "model", "revision", "cache", "cache_dir", "cache_limit_gb", "num_workers", "num_threads",
    "track", "push_to_hub",
)


def changes_on_resume(before: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    """Describe the permitted changes from `before`, the settings that the run had so far.

    The content of files is not compared here. Raises ValueError that names each setting that would
    make it a different run.
    """
    now = config.as_dict()
    now = json.loads(json.dumps(now))  # with lists for tuples, as before
    # What earlier versions did, where they had no setting for it.
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    defaults = json.loads(json.dumps(defaults | {"model": None, "read_order": "random"}))
    before = defaults | before
    differing = [
        name for name in now if name not in _MAY_CHANGE and now[name] != before.get(name)
    ]
    refused = [
        f"--{name} {_shown(name, now[name])} (the run has "
        f"{_shown(name, before.get(name))})"
        for name in differing
        if name not in _MAY_ROUND
        and not (name in _MAY_GROW and _grows(before.get(name), now[name]))
    ]
    if refused:
        raise ValueError(
            f"cannot resume the run in {config.output_path} with another {', '.join(refused)}; "
            f"give the same, or start a new run from its adapter: another --output_path, "
            f"--init_adapter {config.output_path} and no --resume"
        )
    return [
        f"--{name} {_shown(name, before.get(name))} -> {_shown(name, now[name])}"
        for name in differing
    ]


def _grows(before: int | None, now: int | None) -> bool:
    """Whether a limit is higher than before; None is no limit."""
    return before is not None and (now is None or now > before)


def _shown(name: str, value: Any) -> str:
    if value in (None, "", []):
        return "all" if name == "lora_layers" else "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
