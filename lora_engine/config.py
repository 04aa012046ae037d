"""The settings of a run: every flag of a recipe, its meaning, and what values it takes."""

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NEWEST = "newest"  # what a bare --resume means

# A run that goes on may have other ones: where files lie and what is told (and precision, of which
# the format counts that it comes to), ...
_MAY_CHANGE = frozenset((
    "model", "train_data_path", "val_data_path", "output_path", "num_workers", "cache",
    "cache_dir", "cache_limit_gb", "precision", "log_every", "patience", "save_every", "keep_last",
    "max_bad_share", "worker_timeout", "track", "push_to_hub", "licence",
))
# Of these, what makes a run read, write or send outside its folder, or start processes: never taken
# from a run folder, which may be a stranger's, unless the command line or the recipe says the same.
REACHES_OUTSIDE = (
    "model", "revision", "cache", "cache_dir", "cache_limit_gb", "num_workers", "num_threads",
    "track", "push_to_hub",
)
# ... its length, ...
_MAY_GROW = ("epochs", "max_steps")
# ... and what concerns the last bits alone.
_MAY_ROUND = ("device", "num_threads", "compile", "cuda_graphs", "gradient_checkpointing")


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained on what, and how. The docstrings below are the recipes' --help."""

    model: str
    """Captioner to adapt: a Hugging Face Hub name or a folder in Hugging Face's format."""
    revision: str | None = None
    """Revision of a Hub name."""
    train_data_path: str | None = None
    """Training annotations: a JSON list of {"text": ..., "image": ...}; image paths absolute or
    relative to this file. Without it the embedded demo runs."""
    val_data_path: str | None = None
    """Validation annotations; without them a part of the training images is held out."""
    output_path: str | None = None
    """Folder of the run; must not hold one already. Default: a new numbered folder in runs/."""
    epochs: int = 100
    """Times that every caption is seen."""
    batch_size: int = 32
    """Captions a micro-step."""
    lr: float = 1e-5
    """Peak learning rate. LoRA usually wants more than full fine-tuning: try 1e-4 to 5e-4."""
    seed: int = 42
    """Seed of the adapter's first values, the order of the data, and dropout."""
    max_steps: int | None = None
    """Stop, and end the learning rate's decay, after so many optimizer steps at the latest."""
    grad_accum_steps: int = 1
    """Micro-steps an optimizer step; exact for captions of any lengths."""
    lora_rank: int = 8
    """Rank of every adapter."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.1
    """Dropout on the adapters' inputs."""
    lora_targets: tuple[str, ...] = ("attention", "feed_forward")
    """Linear layers to adapt: the groups attention and feed_forward, module names as PEFT matches
    them, or re:REGEX over whole module paths."""
    init_adapter: str | None = None
    """Start from this adapter folder; its rank, alpha and targets hold, not those given here."""
    weight_decay: float = 0.01
    """AdamW's weight decay on the adapters."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises to --lr."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 clips nothing."""
    label_smoothing: float = 0.0
    """Share of a target's probability that is spread over the vocabulary."""
    prompt: str = ""
    """Words that every caption continues, such as "a picture of"; stored with the adapter."""
    max_caption_tokens: int = 64
    """Longer captions are cut."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format of matrix products; adapters stay fp32. auto: bf16 (else fp16) on CUDA, else fp32."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile."""
    cuda_graphs: bool = True
    """Record the step's kernels on a GPU and launch them at once."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, more time."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; default: CUDA if there is one."""
    num_workers: int | None = None
    """Processes that load images; 0 loads in the training process. Default: half of the
    processors, at most 8, beside a GPU; 0 where they train themselves."""
    num_threads: int | None = None
    """Processors that a CPU trains with. Default: torch's choice, usually all."""
    cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Where the encoder's features of the images are kept, so that each image is encoded once.
    auto: in a GPU's memory and on disk, for later runs too, where that is faster than encoding."""
    cache_dir: str | None = None
    """Folder for features on disk, on a disk of this machine. Default:
    $XDG_CACHE_HOME/lora_engine or ~/.cache/lora_engine; none for a user without a home folder."""
    cache_dtype: Literal["fp32", "bf16", "int8"] | None = None
    """Number format of kept features; default: fp32 with --precision fp32, else bf16."""
    cache_limit_gb: float = 50.0
    """All that may be kept in the cache folder; images beyond it are encoded in every epoch."""
    val_fraction: float = 0.05
    """Part of the training images held out where no --val_data_path is given."""
    eval_every: int | None = None
    """Validate every so many optimizer steps; default: after every epoch."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    num_samples: int = 8
    """Validation images whose captions are shown, at the start and at each validation."""
    eval_captions: int = 200
    """Validation images that are captioned greedily at the start and at each validation, for the
    scores (CIDEr-D, BLEU, ROUGE-L); 0 scores none."""
    best_by: Literal["loss", "cider_d"] = "loss"
    """What makes an adapter the best one: the lowest validation loss or the highest CIDEr-D."""
    patience: int | None = None
    """Stop after so many validations in a row without a new best; default: never."""
    save_every: str = "10min"
    """Write a checkpoint every so many optimizer steps (500), or so often (10min, 90s, 2h); also of
    each new best, at the end, and when the run is asked to stop."""
    keep_last: int = 2
    """Checkpoints that are kept, besides the best one."""
    resume: str | None = None
    """Go on with the run in --output_path, from its newest checkpoint or from the one given here;
    where there is no run yet, begin it. Settings are those of the run: give none, or the same."""
    max_bad_share: float = 0.05
    """A larger share of rows that cannot be used, or whose image cannot, stops the run."""
    worker_timeout: float = 300.0
    """Seconds to wait for images, loaded by other processes or by this one, until the run ends."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics are sent, too: tensorboard and wandb write into the run's folder (wandb is
    offline without an API key), trackio where it keeps all projects."""
    push_to_hub: str | None = None
    """Upload the finished adapter with its model card to this Hugging Face repository, owner/name.
    A repository that is not there yet is made, and public where your account says nothing else."""
    licence: str | None = None
    """Licence of the adapter, for its model card, as the Hub spells it: apache-2.0, mit, other."""
    print_config: bool = False
    """Print all settings as JSON and exit."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value out of range."""
        at_least = {
            "epochs": 1, "batch_size": 1, "grad_accum_steps": 1, "lora_rank": 1, "log_every": 1,
            "max_steps": 1, "eval_every": 1, "max_caption_tokens": 1, "seed": 0, "weight_decay": 0,
            "warmup_steps": 0, "max_grad_norm": 0, "num_samples": 0, "num_workers": 0,
            "num_threads": 1, "cache_limit_gb": 0, "eval_captions": 0, "patience": 1,
            "keep_last": 1, "worker_timeout": 1,
        }
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < float("inf"):
                raise ValueError(f"--{name} is {value}; it must be {lowest} or more")
        for name in ("num_workers", "num_threads"):
            if (getattr(self, name) or 0) > 1024:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at most 1024")
        if self.seed >= 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be below 2**63")
        for name in ("lr", "lora_alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in ("lora_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}; it must be at least 0 and below 1"
                )
        if self.best_by == "cider_d" and not self.eval_captions:
            raise ValueError("--best_by cider_d needs captions to score: --eval_captions is 0")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share is {self.max_bad_share}; it must be from 0 to 1")
        if self.licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.licence):
            raise ValueError(
                f"--licence is {self.licence!r}; expected an identifier as the Hub spells them, "
                f"such as apache-2.0, mit, cc-by-4.0 or other"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction is {self.val_fraction}; it must be between 0 and 1")
        if self.resume is not None and self.output_path is None:
            raise ValueError("--resume needs the --output_path of the run to go on with")
        self.save_interval()

    def as_dict(self) -> dict:
        """Plain values for config.json, without what only concerns one command line."""
        values = dataclasses.asdict(self)
        del values["print_config"], values["resume"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """The settings that `as_dict` gave, as JSON has them. Raises TypeError for others."""
        complaint = unfit_setting(values)
        if complaint is not None:
            raise TypeError(complaint.removeprefix("."))
        return cls(**{**values, "lora_targets": tuple(values.get("lora_targets", ()))})

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


def changes_on_resume(before: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    """What differs from the settings `before` of a run that goes on, and may, in words.

    What files hold is not looked at here. Raises ValueError that names each setting that would make
    it another run.
    """
    now = config.as_dict()
    now["lora_targets"] = list(now["lora_targets"])  # as JSON has it
    differing = [
        name for name in now if name not in _MAY_CHANGE and now[name] != before.get(name)
    ]
    refused = [
        f"--{name} {_shown(now[name])} (the run has {_shown(before.get(name))})"
        for name in differing
        if name not in _MAY_ROUND
        and not (name in _MAY_GROW and _grows(before.get(name), now[name]))
    ]
    if refused:
        raise ValueError(
            f"cannot go on with the run in {config.output_path} with another "
            f"{', '.join(refused)}; give the same, or begin another run in another --output_path"
        )
    return [f"--{name} {_shown(before.get(name))} -> {_shown(now[name])}" for name in differing]


def unfit_setting(values: Mapping[str, Any]) -> str | None:
    """The first of some settings, as JSON has them, that is not of its field's type, in words."""
    hints = get_type_hints(TrainingConfig)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            return f".{name} is {reprlib.repr(value)}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint in (int, float):
        is_number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return is_number and abs(value) < 2**63
    return isinstance(value, hint)


def _grows(before: int | None, now: int | None) -> bool:
    """None is no limit."""
    return before is not None and (now is None or now > before)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
