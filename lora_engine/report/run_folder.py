"""The folder of a run and its files; one run never overwrites another.

    config.json        all settings                     samples.jsonl     captions over time
    environment.json   versions and machine             skipped.jsonl     rows that are skipped
    metrics.jsonl      losses; the record of the run    loss_curve.png    drawn from it
    captions.jsonl     scored captions                  report.html       all of it, for people
    adapter/           the best by --best_by            adapter_last/     the last, if not the best
    checkpoints/       to resume from                   .lock             while a run is running
    adapter_ema/       the best moving average, with --ema_decay
    adapter_hub/       adapter/ as it is pushed, if that differs
    tensorboard/, wandb/                                what --track wrote
"""

import json
import logging
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lora_engine.devices import dtype_name
from lora_engine.files import (
    append_line,
    clear_leftovers,
    open_to_append,
    replaced_file,
    replaced_name,
    sync,
    unused_name,
)
from lora_engine.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from lora_engine.terminal import counted
from lora_engine.version import __version__

logger = logging.getLogger(__name__)

# What a run writes: nothing else in its folder is ever changed or removed.
CHECKPOINTS_FOLDER = "checkpoints"
_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")
FILES = frozenset((
    "config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "captions.jsonl",
    "skipped.jsonl", "loss_curve.png", "report.html", ".lock",
))
FOLDERS = frozenset((
    "adapter", "adapter_last", "adapter_ema", "adapter_hub", CHECKPOINTS_FOLDER, "tensorboard",
    "wandb",
))
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md", "loss_curve.png")
_BEFORE_THE_FIRST_LINE = frozenset((
    "config.json", "environment.json", "metrics.jsonl", "skipped.jsonl", ".lock",
))
_OF_A_STEP = ("train", "skipped_step")  # what is logged before its validation


class RunFolder:
    """Paths of a run's files, and methods that write the small ones.

    As a context manager it cleans up if the run fails before its first line of metrics: it removes
    what it wrote to a folder that was empty (`is_new`), and a folder that it created
    (`is_created`). Files of a run are never opened through links. Of several processes one
    `is_writer`; in the others methods that write do nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        is_new: bool = False,
        is_created: bool = False,
        is_writer: bool = True,
    ) -> None:
        self.path = path
        self.is_writer = is_writer
        self.is_new = is_new
        self.is_created = is_created
        self.metrics = path / "metrics.jsonl"
        self.loss_curve = path / "loss_curve.png"
        self.report = path / "report.html"
        self.samples = path / "samples.jsonl"
        self.captions = path / "captions.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.adapter = path / "adapter"
        self.last_adapter = path / "adapter_last"
        self.average_adapter = path / "adapter_ema"
        self.hub_adapter = path / "adapter_hub"
        self.checkpoints = path / CHECKPOINTS_FOLDER
        self._lock = _Lock(path / ".lock")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.is_writer:
            return
        self._lock.release()
        has_begun = self.metrics.exists() and self.metrics.stat().st_size > 0
        if error is not None and has_begun:
            error.add_note(f"the results of the run so far are in {self.path}")
        elif error is not None and self.is_new:
            self._remove()

    def _remove(self) -> None:
        """Remove what a run writes before its first line of metrics; other files stay, and so does
        a folder that existed before."""
        for name in _BEFORE_THE_FIRST_LINE:
            (self.path / name).unlink(missing_ok=True)
        for name in ("tensorboard", "wandb"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        if self.is_created:
            with suppress(OSError):  # it contains other files
                self.path.rmdir()

    def _clear(self) -> None:
        """Remove what a run that ended before its first step has left behind."""
        for name in FILES - {".lock"}:
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.adapter, self.last_adapter, self.average_adapter):
            for name in _ADAPTER_FILES:
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it does not exist, or contains other files
                folder.rmdir()

    @classmethod
    def check_free(
        cls, output_path: str | None, *, resume: bool = False, is_locked: bool = False
    ) -> None:
        """Raises ValueError if a run cannot be created at `output_path`.

        With `resume` the folder may hold a run that ended before its first step; `is_locked` means
        that it has been locked already.
        """
        if output_path is None:
            return
        path = Path(output_path)
        if path.is_symlink() and not path.exists():
            raise ValueError(f"--output_path {path} is a link to a folder that does not exist")
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output_path {path} is a file; name a new folder")
        if not is_locked:
            cls.check_unlocked(path)
        is_empty = not path.is_dir() or _names(path) <= ({".lock"} if is_locked else set())
        if not is_empty and not (resume and _has_no_step(path)):
            what = "a run" if (path / "metrics.jsonl").exists() else "files"
            init = path / "adapter"
            advice = f", or start from its adapter with --init_adapter {init}"
            is_resumable = (path / CHECKPOINTS_FOLDER).is_dir()
            hint = "continue it with --resume, " if is_resumable else ""
            raise ValueError(
                f"--output_path {path} already holds {what}; a run never overwrites anything: "
                f"{hint}choose another folder, or delete it to start again"
                f"{advice if init.is_dir() else ''}"
            )

    @staticmethod
    def check_unlocked(path: Path) -> None:
        """Raises ValueError if another process is training in the folder."""
        _Lock(path / ".lock").check()

    @classmethod
    def is_running(cls, path: str | Path) -> bool:
        """Whether another process is training in the folder, as far as its lock tells."""
        try:
            cls.check_unlocked(Path(path))
        except ValueError:
            return True
        return False

    @classmethod
    def create(
        cls, output_path: str | None, *, prefix: str, resume: bool = False
    ) -> "RunFolder":
        """Create the folder; without a path the next free runs/<prefix>-001, -002, ..."""
        cls.check_free(output_path, resume=resume)
        if output_path is not None:
            path = Path(output_path)
            is_created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, is_new=not any(path.iterdir()), is_created=is_created)._locked()
            clear_leftovers(path, (FILES | FOLDERS).__contains__)
            cls.check_free(output_path, resume=resume, is_locked=True)
            folder._clear()
            return folder
        parent = Path("runs")
        parent.mkdir(exist_ok=True)
        taken = [re.fullmatch(rf"{re.escape(prefix)}-(\d+)", p.name) for p in parent.iterdir()]
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        while True:
            path = parent / f"{prefix}-{number:03d}"
            try:
                path.mkdir()  # another run may take the same number at the same moment
                return cls(path, is_new=True, is_created=True)._locked()
            except FileExistsError:
                number += 1

    @classmethod
    def reopen(
        cls,
        output_path: str,
        *,
        step: int,
        is_validated: bool,
        validations: Sequence[dict[str, Any]],
    ) -> "RunFolder":
        """The folder of a run that continues after `step`, restored to its state at that step.

        Lines logged after `step` are dropped, as they will be logged again; so is the validation of
        `step` unless it `is_validated`. Lines of `validations`, from the checkpoint, that
        metrics.jsonl lacks are restored. Raises ValueError if another process trains in the folder.
        """
        folder = cls(Path(output_path))._locked()
        clear_leftovers(folder.path, (FILES | FOLDERS).__contains__)
        clear_leftovers(folder.checkpoints, is_checkpoint_name)
        set_aside = set_aside_after(folder.checkpoints, step)
        for path in set_aside:
            logger.info(f"no longer part of the run, kept as {path}")
        for path in (folder.metrics, folder.samples):
            keep_lines(path, lambda line: (
                line["step"] < step
                or line["step"] == step and (is_validated or line.get("event") in _OF_A_STEP)
            ))
        keep_lines(
            folder.skipped, lambda line: isinstance(line["row" if "row" in line else "image"], str)
        )
        _complete(folder.metrics, validations)
        return folder

    def _locked(self) -> "RunFolder":
        """Take the lock; raises ValueError if a link or the like has the name of a run's file."""
        for name in FILES | FOLDERS:
            with suppress(FileNotFoundError):
                mode = (self.path / name).lstat().st_mode
                expected = stat.S_ISREG if name in FILES else stat.S_ISDIR
                if not expected(mode):
                    kind = "file" if name in FILES else "folder"
                    raise ValueError(
                        f"{self.path / name} is a link or another special file, expected a plain "
                        f"{kind}: a run never writes through links; remove it"
                    )
        self._lock.take()
        return self

    def take_over(self) -> None:
        """Write from now on, in place of a process that is gone.

        Raises ValueError if that process still holds the folder.
        """
        self._lock.take()
        self.is_writer = True

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        with replaced_file(self.path / name) as new:
            new.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def append(self, path: Path, line: dict[str, Any]) -> None:
        """Add a JSON line to one of the folder's .jsonl files. Raises OSError."""
        if not self.is_writer:
            return
        # A file's name may contain bytes that are not text.
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with open_to_append(path) as file:
            append_line(file, text.encode("utf-8", errors="backslashreplace"))

    def write_adapter(self, path: Path, files: Mapping[str, bytes]) -> None:
        """Write an adapter, given by the contents of its files, to one of the folder's adapters."""
        if self.is_writer:
            write_adapter(path, files)

    def sync(self) -> None:
        """Wait until the log files are on the disk."""
        for path in (self.metrics, self.samples, self.captions, self.skipped):
            if path.exists():
                sync(path)

    def write_lines(self, path: Path, lines: Iterable[dict[str, Any]]) -> None:
        """Replace one of the folder's .jsonl files."""
        if not self.is_writer:
            return
        with replaced_file(path) as new:
            with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _has_no_step(path: Path) -> bool:
    """Whether a folder holds a run that ended before its first step, and nothing else.

    An adapter, captions or a report belong to such a run only if metrics.jsonl has its first
    validation; without it they are remains of a run that got further.
    """
    names = _names(path)
    if "config.json" not in names or names - FILES - FOLDERS:
        return False
    if checkpoint_paths(path / CHECKPOINTS_FOLDER):
        return False
    try:
        lines = (path / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    if any(b'"event": "train"' in line or b"\0" in line for line in lines):
        return False
    is_validated = any(b'"event": "validation"' in line for line in lines)
    return is_validated or names <= _BEFORE_THE_FIRST_LINE


def _names(folder: Path) -> set[str]:
    """Names in a folder, except temporary files of a save that was killed."""
    names = {entry.name for entry in folder.iterdir()}
    return {name for name in names if replaced_name(name) not in FILES | FOLDERS}


def keep_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of a .jsonl file, and a last one that was cut short.

    Where other lines are damaged the file is first copied to `<name>.damaged`.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept, num_damaged = [], 0
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            if is_kept(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):  # not JSON, or not a log line
            num_damaged += 1
    if num_damaged:
        copy = unused_name(path.with_name(f"{path.name}.damaged"))
        shutil.copyfile(path, copy)
        damaged = counted(num_damaged, "damaged line")
        logger.warning(f"{path} has {damaged}; {copy} is a copy of the file")
    if len(kept) < len(lines):
        with replaced_file(path) as new:
            new.write_bytes(b"".join(kept))


def _complete(path: Path, validations: Sequence[dict[str, Any]]) -> None:
    """Restore validations that metrics.jsonl has lost from the checkpoint."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    found = {line["step"] for line in lines if line.get("event") == "validation"}
    lost = [line for line in validations if line["step"] not in found]
    if not lost:
        return
    # Stable: a step's training line stays before its validation.
    lines = sorted([*lines, *lost], key=lambda line: line["step"])
    with replaced_file(path) as new:
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    logger.warning(
        f"{path} was missing or damaged: {counted(len(lost), 'validation')} written again from the "
        f"checkpoint; lines of training steps cannot be"
    )


def checkpoint_paths(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, intact or not."""
    found = [path for path in folder.glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps, so that none of them is resumed from by mistake.

    They are damaged, or the run is resumed from an earlier step.
    """
    return [
        path.rename(unused_name(path.with_name(f"{path.name}.set_aside")))
        for path in checkpoint_paths(folder)
        if checkpoint_step(path) > step
    ]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return _CHECKPOINT_NAME.fullmatch(name) is not None


def checkpoint_step(path: Path) -> int:
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


class _Lock:
    """A file lock that one process holds until it ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> None:
        """Raises ValueError if another process holds it."""
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one folder are not detected
            return
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            # Not flock, whose lock loading processes would inherit: they may outlive a killed run.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise self._held() from None
        except OSError:  # a file system without locks
            pass

    def check(self) -> None:
        """Raises ValueError if another process holds it; several may check at once."""
        try:
            import fcntl

            # Not blocking, in case somebody put a pipe there.
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (ImportError, OSError):  # as `take`; or there is none, or no right to read it
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held() from None
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(file)

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)

    def _held(self) -> ValueError:
        return ValueError(
            f"another process is training in {self.path.parent}; wait for it, or stop it"
        )


def environment(device: str, dtype: torch.dtype, kernels: str) -> dict[str, Any]:
    """What a figure of this run depends on besides its settings, for environment.json."""
    return {
        "lora_engine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "device": device,
        "compute_dtype": dtype_name(dtype),
        "kernels": kernels,
        "threads": torch.get_num_threads(),
    }
