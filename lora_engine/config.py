"""The settings of a run: every flag of a recipe, its meaning, and what values it takes."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal


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
    $XDG_CACHE_HOME/lora_engine or ~/.cache/lora_engine."""
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
    max_bad_share: float = 0.05
    """A larger share of rows with unusable images stops the run."""
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
        }
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < float("inf"):
                raise ValueError(f"--{name} is {value}; it must be {lowest} or more")
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

    def as_dict(self) -> dict:
        """Plain values for config.json, without what only concerns the command line."""
        values = dataclasses.asdict(self)
        del values["print_config"]
        return values
