"""Checkpoints: a run's state after a step, written completely or not at all.

    checkpoints/step-00000100/
        adapter_model.safetensors, adapter_config.json    PEFT's format: usable as an adapter
        optimizer.safetensors                             AdamW's moments, the moving average
        best_adapter.safetensors                          the best adapter, if it is another one
        best_average.safetensors                          the best averaged adapter, if there is one
        state.json                                        position, settings, fingerprints, history
        manifest.json                                     size and SHA-256 of each of these

No random state is saved: the order of the data, dropout and substitutes are functions of the
position, so that a resumed run equals an uninterrupted one bit for bit.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.config import NEWEST, TrainingConfig
from lora_engine.devices import PRECISIONS
from lora_engine.files import check_file, read_limited, replaced_folder, write_synced
from lora_engine.lora.adapter import (
    CONFIG_FILE,
    OTHER_BASE,
    WEIGHTS_FILE,
    Adapter,
    is_same,
    read_adapter,
)
from lora_engine.lora.tensor_files import Described, read_tensors, tensor_bytes
from lora_engine.report.metrics_log import averaged
from lora_engine.report.run_folder import (
    CHECKPOINTS_FOLDER,
    checkpoint_paths,
    checkpoint_step,
    is_checkpoint_name,
)
from lora_engine.training.checkpoint_state import FORMAT, state_complaint
from lora_engine.training.moving_average import MovingAverage
from lora_engine.training.optim import FlatLoRAParameters

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best_adapter.safetensors"
AVERAGE_FILE = "best_average.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

_FILES = frozenset((WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE, STATE_FILE))
_MAX_JSON_BYTES = 256 * 2**20
_SPARE_BYTES = 32 * 2**20  # for what is small beside adapters: metrics, samples, report


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: the adapter, AdamW's moments, and everything else as JSON.

    `best_files` are the files of the best adapter; None in a checkpoint of an earlier version,
    unless its own adapter is the best. `average_files` are those of the best averaged adapter, if
    the run has a moving average.
    """

    path: Path
    adapter: Adapter
    best_files: dict[str, bytes] | None
    average_files: dict[str, bytes] | None
    moments: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.state["settings"]

    @property
    def is_validated(self) -> bool:
        """Whether the validation after this step has been done."""
        return str(self.step) in self.state["validations"]["losses"]

    def validations(self) -> list[tuple[int, float, dict[str, float]]]:
        """(step, loss, known scores) of each validation so far, as metrics.jsonl has them."""
        def known_scores(validations: dict[str, Any], step: str) -> dict[str, float]:
            scores = validations["scores"].get(step, {})
            return {name: value for name, value in scores.items() if value is not None}

        found, average = self.state["validations"], self.state.get("average_validations")
        return [
            (int(step), loss, known_scores(found, step) | (
                {} if average is None
                else averaged(average["losses"][step], known_scores(average, step))
            ))
            for step, loss in found["losses"].items()
        ]


def write_checkpoint(
    path: Path,
    *,
    adapter_files: Mapping[str, bytes],
    best_files: Mapping[str, bytes],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    average: MovingAverage | None = None,
    average_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint atomically: after a crash there is all of it, or none.

    `adapter_files` are those of `adapter.adapter_files`, `best_files` those of the best adapter,
    `average` is the moving average of the parameters, and `average_files` those of the best
    averaged adapter. Raises OSError, with nothing left behind.
    """
    moments = {name: value.cpu() for name, value in moments_of(optimizer).items()}
    if average is not None:
        moments["average"] = average.values.cpu()
    contents = {
        **adapter_files,
        OPTIMIZER_FILE: tensor_bytes(moments, {}),
        STATE_FILE: _json({"format": FORMAT, **state}),
    }
    if best_files[WEIGHTS_FILE] != adapter_files[WEIGHTS_FILE]:
        contents[BEST_FILE] = best_files[WEIGHTS_FILE]
    if average_files is not None:
        contents[AVERAGE_FILE] = average_files[WEIGHTS_FILE]
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    with replaced_folder(path) as new:
        for name, data in contents.items():
            write_synced(new / name, data)
        write_synced(new / MANIFEST_FILE, _json(manifest))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises CheckpointError, which names the file, if it is not intact."""
    if not path.is_dir() or not is_checkpoint_name(path.name):
        raise CheckpointError(f"{path}: no such folder, expected a checkpoint (step-...)")
    try:
        manifest = _object(path / MANIFEST_FILE)
        if manifest.keys() - {BEST_FILE, AVERAGE_FILE} != _FILES:
            raise CheckpointError(
                f"{path / MANIFEST_FILE} names {', '.join(sorted(manifest))}; expected "
                f"{', '.join(sorted(_FILES))}"
            )
        for name in sorted(manifest):
            _check_file(path / name, manifest[name])
        state = _object(path / STATE_FILE)
        complaint = state_complaint(state, step=checkpoint_step(path))
        if complaint is not None:
            raise CheckpointError(f"{path / STATE_FILE}: {complaint}")
        size = manifest[OPTIMIZER_FILE]["bytes"]
        moments, _ = read_tensors(
            path / OPTIMIZER_FILE, refuse=_refuse_moment, max_bytes=size
        )
        # Windows removes no file that is still mapped.
        moments = {name: moment.clone() for name, moment in moments.items()}
        best_files, average_files = (
            _adapter_files(path, name) if name in manifest else None
            for name in (BEST_FILE, AVERAGE_FILE)
        )
        if best_files is None and state["validations"]["best_step"] == checkpoint_step(path):
            best_files = _adapter_files(path, WEIGHTS_FILE)
        if average_files is None and state["settings"].get("ema_decay") is not None:
            raise CheckpointError(f"{path} lacks {AVERAGE_FILE}, but the run has --ema_decay")
        return Checkpoint(path, read_adapter(path), best_files, average_files, moments, state)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {Path(error.filename).name}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except CheckpointError:
        raise
    except ValueError as error:  # an adapter's or a tensor file's
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _adapter_files(path: Path, weights_file: str) -> dict[str, bytes]:
    """The files of one of the adapters in a checkpoint, which all have the same configuration."""
    read_adapter(path, weights_file=weights_file)  # raises unless it is an adapter
    return {
        name: (path / file).read_bytes()
        for name, file in ((WEIGHTS_FILE, weights_file), (CONFIG_FILE, CONFIG_FILE))
    }


def find_checkpoint(folder: Path, named: Path | None = None) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, or the named one; None if there is none.

    Damaged ones are skipped with a warning. Raises CheckpointError if the named one is damaged, or
    if all of them are.
    """
    if named is not None:
        return read_checkpoint(named)
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            logger.warning(f"skipped a checkpoint: {error}")
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {folder} can be used; a new run in another "
            f"--output_path can start from the best adapter with --init_adapter "
            f"{folder.with_name('adapter')}"
        )
    return None


def remove_old_checkpoints(
    folder: Path, *, keep_last: int, kept_steps: Collection[int | None]
) -> None:
    """Keep the last `keep_last`, the newest of which must be known to be intact, and others of
    `kept_steps`."""
    for path in checkpoint_paths(folder)[:-keep_last]:
        if checkpoint_step(path) not in kept_steps:
            with suppress(OSError):  # the folder may contain other files, and then stays
                for name in (MANIFEST_FILE, BEST_FILE, AVERAGE_FILE, *_FILES):
                    (path / name).unlink(missing_ok=True)
                path.rmdir()


# --- resuming a run --------------------------------------------------------------------------


def checkpoint_to_resume(config: TrainingConfig) -> Checkpoint | None:
    """The checkpoint that --resume asks for; None if there is no run that reached its first step.

    Raises CheckpointError.
    """
    if config.resume is None or config.output_path is None:
        return None
    folder = Path(config.output_path, CHECKPOINTS_FOLDER)
    named = None if config.resume == NEWEST else Path(config.resume)
    known = checkpoint_paths(folder)
    if named is not None and named.resolve() not in [path.resolve() for path in known]:
        paths = ", ".join(map(str, known)) or "none: there are no checkpoints"
        raise CheckpointError(
            f"--resume={named} is not a checkpoint of the run in {config.output_path}; expected "
            f"one of {paths}"
        )
    return find_checkpoint(folder, named)


def check_fingerprints(
    checkpoint: Checkpoint, now: dict[str, str], config: TrainingConfig
) -> list[str]:
    """Compare fingerprints with the run's -> names of those that an earlier version lacks.

    Raises CheckpointError if model or rows are not those of the run.
    """
    words = {
        **OTHER_BASE,
        "training_data": "other training rows",
        "validation_data": "other validation rows",
    }
    before = checkpoint.state["fingerprints"]
    changed = [
        words[name] for name in now if not is_same(before.get(name, now[name]), now[name])
    ]
    if changed:
        raise CheckpointError(
            f"the run in {config.output_path} began with {' and '.join(changed)} than --model "
            f"{config.model} and --train_data_path {config.train_data_path} give now; restore what "
            f"has changed, or begin another run in another --output_path"
        )
    return [name for name in now if name not in before]


def check_dtype(checkpoint: Checkpoint, dtype: torch.dtype, config: TrainingConfig) -> None:
    """Raises CheckpointError if matmuls would run in another dtype than the run's."""
    names = {str(dtype): precision for precision, dtype in PRECISIONS.items()}
    before = checkpoint.state["compute_dtype"]
    if before != str(dtype):
        raise CheckpointError(
            f"cannot resume the run in {config.output_path} with another --precision: "
            f"{config.precision} means {names[str(dtype)]} here, the run has "
            f"{names.get(str(before), before)}; give that one"
        )


def checkpoint_bytes(num_elements: int) -> int:
    """Approximate size of a checkpoint: three adapters, two moments and a moving average of
    `num_elements` each."""
    return 4 * 6 * num_elements + _SPARE_BYTES


# --- the optimizer's state ------------------------------------------------------------------


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state of the flat tensor: exp_avg and exp_avg_sq (N,), step ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in parameters]
    if not all(states):  # before the first step
        zeros = torch.cat([torch.zeros_like(p) for p in parameters])
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}
    averages = {
        name: torch.cat([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq")
    }
    return averages | {"step": states[0]["step"]}


def restore_moments(
    optimizer: torch.optim.Optimizer,
    lora: FlatLoRAParameters,
    checkpoint: Checkpoint,
    average: MovingAverage | None = None,
) -> None:
    """Give the optimizer the moments of a checkpoint, and `average` its values.

    Raises CheckpointError if they do not fit the parameters `lora`.
    """
    shapes = {"exp_avg": lora.values.shape, "exp_avg_sq": lora.values.shape, "step": ()}
    if average is not None:
        shapes["average"] = lora.values.shape
    found = {name: tuple(value.shape) for name, value in checkpoint.moments.items()}
    if found != {name: tuple(shape) for name, shape in shapes.items()}:
        raise CheckpointError(
            f"{checkpoint.path / OPTIMIZER_FILE} holds {found}; this run has {shapes}"
        )
    for name, value in checkpoint.moments.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{checkpoint.path / OPTIMIZER_FILE}: {name} is not finite")
    moments = {name: value.to(lora.values.device) for name, value in checkpoint.moments.items()}
    if average is not None:
        average.values.copy_(moments["average"])
    sizes = [len(group) for group in lora.groups]
    averages = (moments[name].split(sizes) for name in ("exp_avg", "exp_avg_sq"))
    for group, exp_avg, exp_avg_sq in zip(lora.groups, *averages):
        optimizer.state[group] = {
            "step": moments["step"].clone(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq
        }


def _refuse_moment(name: str, described: Described) -> str | None:
    num_axes = {"exp_avg": 1, "exp_avg_sq": 1, "average": 1, "step": 0}
    if name not in num_axes or described.dtype != "F32" or (
        len(described.shape) != num_axes[name]
    ):
        return f"is {described}; expected exp_avg, exp_avg_sq and average, F32 vectors, and step"
    return None


# --- files ----------------------------------------------------------------------------------


def _json(values: Mapping[str, Any]) -> bytes:
    # No trailing newline, so that a truncated file is never valid JSON.
    return json.dumps(values, indent=1).encode()


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_limited(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return value


def _check_file(path: Path, expected: Any) -> None:
    size = check_file(path, max_bytes=2**40)
    wanted = expected.get("bytes") if isinstance(expected, dict) else None
    if size != wanted:
        raise CheckpointError(f"{path} is damaged: it has {size:,} bytes, not {wanted}")
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != expected.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's")


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            yield chunk
