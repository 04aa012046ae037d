"""What each process of a run takes on, and what must be the same in all of them."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

import lora_engine
from lora_engine.config import TrainingConfig
from lora_engine.devices import dtype_name
from lora_engine.ranks import Ranks, check_equal
from lora_engine.terminal import counted
from lora_engine.training.checkpoint import Checkpoint
from lora_engine.training.trainer import Trainer
from lora_engine.version import __version__

logger = logging.getLogger(__name__)

# These may differ between machines: of the files that they name, only the content must be equal.
_OF_A_MACHINE = frozenset((
    "model", "train_data_path", "val_data_path", "image_root", "init_adapter", "output_path",
    "cache_dir", "device", "num_threads", "num_workers",
))


def with_micro_batches(
    config: TrainingConfig, ranks: Ranks, *, is_resumed: bool
) -> TrainingConfig:
    """The settings with a number of micro-batches that the processes can share out.

    Raises ValueError for a resumed run whose number they cannot share, and for more micro-batches
    than rows in a step.
    """
    given = num_micro_batches(config)
    number = given if is_resumed else -(-given // ranks.size) * ranks.size
    if number % ranks.size:
        fitting = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise ValueError(
            f"the run in {config.output_path} has {number} micro-batches per step, which "
            f"{ranks.size} processes cannot share equally; continue with {fitting} processes"
        )
    if number > config.rows_per_step and not is_resumed:
        raise ValueError(
            f"a step has {counted(config.rows_per_step, 'caption')} "
            f"(--batch_size {config.batch_size} x --grad_accum_steps {config.grad_accum_steps}), "
            f"too few for {number} micro-batches"
            f"{f' of {ranks.size} processes' if ranks.size > 1 else ''}; raise one of them, or "
            f"lower {'the number of processes' if ranks.size > 1 else '--micro_batches'}"
        )
    if ranks.size > 1:
        why = "" if number == given else f", raised from {given} to share them equally"
        logger.info(
            f"{ranks.size} processes share a step of {config.rows_per_step} captions in {number} "
            f"micro-batches{why} (--micro_batches)"
        )
    return config if is_resumed else dataclasses.replace(config, micro_batches=number)


def num_micro_batches(config: TrainingConfig) -> int:
    return config.micro_batches or config.grad_accum_steps


def check_same_settings(
    ranks: Ranks, config: TrainingConfig, checkpoint: Checkpoint | None
) -> None:
    """Raises ValueError that names the process whose code, versions or settings differ.

    Until then processes exchange nothing, because with other settings they might exchange other
    things.
    """
    if ranks.size > 1:
        check_equal(ranks, {
            "lora_engine": f"{__version__} ({_code_digest()})",
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "checkpoint in --output_path": None if checkpoint is None else checkpoint.step,
            **{
                f"--{name}": value for name, value in config.as_dict().items()
                if name not in _OF_A_MACHINE
            },
        })


def check_same_start(ranks: Ranks, trainer: Trainer, fingerprints: Mapping[str, str]) -> None:
    """Raises ValueError that names the process whose device, weights, data or matrices differ."""
    if ranks.size > 1:
        check_equal(ranks, {
            "kind of device": trainer.device.type,
            "compute dtype": dtype_name(trainer.dtype),
            "threads": torch.get_num_threads(),
            **fingerprints,
            "LoRA matrices": trainer.lora.digest(),
        })


def _code_digest() -> str:
    """A digest of the package's own files."""
    folder = Path(lora_engine.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
