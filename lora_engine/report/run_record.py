"""The files of a run folder, finished or not -> a RunRecord."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from lora_engine.files import check_file
from lora_engine.report.series import Series, lowest

_MAX_BYTES = 2**30  # per file: a run folder may come from anyone

# The keys of a validation line that are not scores.
NOT_SCORES = frozenset((
    "event", "step", "epoch", "loss", "num_images", "num_references", "mean_reference_length",
))
AVERAGE = "ema_"  # before the names of the loss and the scores of the moving average


@dataclass(frozen=True)
class CaptionedImage:
    """A validation image with its captions before training and with the best adapter.

    Captions and scores that the run has not written are None.
    """

    image: str
    references: tuple[str, ...]
    before: str | None
    after: str | None
    cider_d_before: float | None = None
    cider_d_after: float | None = None

    @property
    def change(self) -> float | None:
        """By how much training has raised the caption's score."""
        if self.cider_d_before is None or self.cider_d_after is None:
            return None
        return self.cider_d_after - self.cider_d_before


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds; `skipped` maps images, or rows as path:line, to reasons.

    `is_running`: a process is training in the folder.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    images: tuple[CaptionedImage, ...]
    skipped: dict[str, str]
    is_running: bool = False

    def training(self, key: str) -> Series:
        return logged_series(self.metrics, "train", key)

    def validation(self, key: str) -> Series:
        return logged_series(self.validations, "validation", key)

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """The validation lines, which are few, of metrics.jsonl."""
        return [line for line in self.metrics if line["event"] == "validation"]

    @property
    def scores(self) -> list[str]:
        """Names of the scores that validations measured, in the order of their lines."""
        keys = (key for line in self.validations for key in line)
        names = dict.fromkeys(key for key in keys if is_score(key))
        return [name for name in names if self.validation(name).steps]

    @cached_property
    def best_step(self) -> int:
        """The step of the saved adapter: the first with the best validation, else 0."""
        return _best_step(self.validations, self.config)

    @property
    def best_average_step(self) -> int | None:
        """The step of the saved moving average; None for a run without one."""
        if not self.validation(f"{AVERAGE}loss").steps:
            return None
        return _best_step(self.validations, self.config, AVERAGE)

    @cached_property
    def last_step(self) -> int:
        """The last optimizer step in metrics.jsonl."""
        steps = (line.get("step") for line in self.metrics)
        return int(max((step for step in steps if is_number(step)), default=0))

    @property
    def total_steps(self) -> int | None:
        """The number of steps that the settings ask for; None if it is not known yet."""
        total = self.environment.get("total_steps")
        if isinstance(total, int):
            return total
        epochs, max_steps = self.config.get("epochs"), self.config.get("max_steps")
        if not isinstance(epochs, int) or self.steps_per_epoch is None:
            return None
        total = epochs * self.steps_per_epoch
        return min(total, max_steps) if isinstance(max_steps, int) else total

    @property
    def steps_per_epoch(self) -> int | None:
        """A whole number; None before the first step."""
        step_in_epochs = epochs_per_step(self.metrics)
        if step_in_epochs is None or step_in_epochs < 1e-9:
            return None
        return max(round(1 / step_in_epochs), 1)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, early or not, as far as its files tell."""
        if self.is_running:
            return False
        steps = self.validation("loss").steps
        is_complete = bool(steps) and steps[-1] > 0 and steps[-1] >= (self.total_steps or 0)
        return is_complete or "total_s" in self.environment


def read_run(path: str | Path, *, is_running: bool = False) -> RunRecord:
    """Read a run folder. Missing files and truncated last lines are ignored.

    Captions come from captions.jsonl, or else from samples.jsonl, which has only a few images.

    Raises ValueError for a folder that holds no run, and for a damaged file, with its line.
    """
    path = Path(path)
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(_no_run_message(path))
    metrics = read_records(path / "metrics.jsonl", event=str)
    captions = _optional_records(
        path / "captions.jsonl", image=str, references=list, before=str, after=str
    )
    samples = _optional_records(
        path / "samples.jsonl", step=int, image=str, reference=str, caption=str
    )
    skipped = _optional_records(path / "skipped.jsonl", reason=str)
    config = read_object(path / "config.json")
    best_step = _best_step(metrics, config)
    return RunRecord(
        path=path,
        config=config,
        environment=read_object(path / "environment.json"),
        metrics=metrics,
        images=tuple(map(_captioned, captions)) or _sampled(samples, best_step),
        skipped={str(line.get("row", line.get("image"))): line["reason"] for line in skipped},
        is_running=is_running,
    )


def read_records(path: str | Path, **required: type) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without a last line truncated by a crash.

    Raises ValueError, with the line, for any other line that is not a JSON object with the
    `required` keys and types.
    """
    lines = _read(Path(path)).rstrip("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON line: {error}") from None
            break
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:40]}")
        for key, kind in required.items():
            if not isinstance(record.get(key), kind):
                raise ValueError(
                    f"{path}:{number}: expected a {kind.__name__} as {key!r}, found {line[:80]}"
                )
        records.append(record)
    return records


def logged_series(records: list[dict[str, Any]], event: str, key: str) -> Series:
    """The finite values of a key: others are logged as null, or as NaN."""
    found = [
        (record["step"], record[key]) for record in records
        if record["event"] == event
        and is_number(record.get("step")) and is_number(record.get(key))
    ]
    return Series([step for step, _ in found], [value for _, value in found])


def is_score(key: str) -> bool:
    """Whether a key of a validation line is that of a score of the adapter."""
    return key not in NOT_SCORES and not key.startswith(AVERAGE)


def _best_step(metrics: list[dict[str, Any]], config: dict[str, Any], prefix: str = "") -> int:
    metrics = [line for line in metrics if is_number(line.get(f"{prefix}loss"))]
    losses = logged_series(metrics, "validation", f"{prefix}loss")
    scores = logged_series(metrics, "validation", f"{prefix}{config.get('best_by', 'loss')}")
    if config.get("best_by", "loss") != "loss" and scores.steps:
        highest = max(scores.values)
        best = [step for step, value in zip(scores.steps, scores.values) if value == highest]
        loss_of = dict(zip(losses.steps, losses.values))
        losses = Series(best, [loss_of[step] for step in best])
    return lowest(losses)[0] if losses.steps else 0


def epochs_per_step(records: list[dict[str, Any]]) -> float | None:
    """Epochs per step, from the last line that has both; None before the first step."""
    for record in reversed(records):
        step, epoch = record.get("step"), record.get("epoch")
        if is_number(step) and is_number(epoch) and step and epoch:
            return epoch / step
    return None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number that fits into a float."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def _captioned(line: dict[str, Any]) -> CaptionedImage:
    before, after = line.get("cider_d_before"), line.get("cider_d_after")
    return CaptionedImage(
        image=line["image"],
        references=tuple(map(str, line["references"])),
        before=line["before"],
        after=line["after"],
        cider_d_before=before if is_number(before) else None,
        cider_d_after=after if is_number(after) else None,
    )


def _sampled(samples: list[dict[str, Any]], best_step: int) -> tuple[CaptionedImage, ...]:
    """The images of samples.jsonl, with their captions at step 0 and at the best step."""
    captions = {(line["image"], line["step"]): line["caption"] for line in samples}
    references = {line["image"]: line["reference"] for line in samples}
    return tuple(
        CaptionedImage(
            image,
            (reference,),
            before=captions.get((image, 0)),
            after=captions.get((image, best_step)),
        )
        for image, reference in references.items()
    )


def _optional_records(path: Path, **required: type) -> list[dict[str, Any]]:
    return read_records(path, **required) if path.exists() else []


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file. Raises ValueError for a damaged one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _read(path: Path) -> str:
    """Raises ValueError for anything but a regular file, and for a very large one."""
    check_file(path, max_bytes=_MAX_BYTES)
    return path.read_text(encoding="utf-8", errors="replace")


def _no_run_message(path: Path) -> str:
    """Why `path` is not a run, with the runs beside it and in it."""
    if not path.exists():
        return f"{path}: no such folder, expected a run folder"
    if not path.is_dir():
        return f"{path} is a file, expected a run folder"
    nearby = [path.parent, *sorted(path.iterdir())]
    runs = [str(folder) for folder in nearby if (folder / "metrics.jsonl").is_file()]
    advice = "give the --output_path of a training run"
    if runs:
        advice = f"did you mean {' or '.join(runs[:3])}?"
    return f"{path} holds no run (looked for metrics.jsonl in it); {advice}"
