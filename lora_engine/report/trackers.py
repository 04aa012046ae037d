"""Send a run's metrics to TensorBoard, W&B or Trackio, without ever delaying or failing the run."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol

from lora_engine.report.markdown import escape_markdown, table
from lora_engine.terminal import counted, one_line

logger = logging.getLogger(__name__)

MAX_WAITING = 1000  # events in a slow tracker's queue; further ones are dropped
CLOSE_S = 5.0  # time for a tracker to finish before it is abandoned

PROJECT = "lora_engine"
SAMPLE_COLUMNS = ["image", "reference", "before", "now"]

Rows = Sequence[Sequence[str]]  # of the columns above


class Service(Protocol):
    """One tracker's interface for a run's events."""

    def log_numbers(self, numbers: dict[str, float], step: int | None) -> None: ...

    def log_samples(self, rows: Rows, step: int | None) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """Passes a run's events to a service in a background thread.

    A service that fails is turned off with a warning; one that hangs loses events, and is abandoned
    when the run ends.
    """

    def __init__(self, name: str, start: Callable[[], Service]) -> None:
        self.name = name
        self._waiting: Queue[tuple[str, dict[str, Any]] | None] = Queue(MAX_WAITING)
        self._num_dropped = 0
        self._is_off = False  # set by the thread when the service fails
        self._thread = Thread(target=self._work, args=(start,), daemon=True)
        self._thread.start()

    def record(self, event: str, values: dict[str, Any]) -> None:
        """Pass on an event: numbers by name, or the `rows` of "samples"; both with `step`."""
        if self._is_off:
            return
        try:
            self._waiting.put_nowait((event, values))
        except Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Wait at most CLOSE_S for the events that are still to be sent."""
        if self._is_off:
            return
        deadline_s = time.monotonic() + CLOSE_S
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except Full:
            pass
        self._thread.join(max(deadline_s - time.monotonic(), 0))
        if self._is_off:
            return
        if self._thread.is_alive():
            logger.warning(
                f"--track {self.name} did not finish within {CLOSE_S:g} s; it may lack the run's "
                f"last events"
            )
        elif self._num_dropped:
            logger.warning(
                f"--track {self.name} was too slow: it lacks {counted(self._num_dropped, 'event')}"
            )

    def _work(self, start: Callable[[], Service]) -> None:
        try:
            service = start()
            while (item := self._waiting.get()) is not None:
                event, values = item
                step = values.get("step")
                if event == "samples":
                    service.log_samples(values["rows"], step)
                else:
                    service.log_numbers(_numbers(event, values), step)
            service.finish()
        except BaseException as error:  # SystemExit, too: some libraries exit on errors
            logger.warning(
                f"--track {self.name} is off: {type(error).__name__}: {one_line(error)}"
            )
            self._is_off = True


def check_tracker(name: str) -> None:
    """Raises ValueError, with what to install, for a tracker whose package cannot be imported."""
    if name == "none":
        return
    module, package, _ = _SERVICES[name]
    try:
        import_module(module)
    except Exception as error:  # missing, or incompatible with another package
        raise ValueError(
            f"--track {name} needs the package {name} ({one_line(error)}): "
            f"pip install '{package}'"
        ) from None


def start_tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """Start a tracker for the run in `folder` with these settings; None for "none"."""
    if name == "none":
        return None
    start = _SERVICES[name][2]
    return Tracker(name, lambda: start(folder, dict(settings)))


def _numbers(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """{"train/loss": ...}, without values that are not finite, which are None here."""
    return {
        f"{event}/{name}": value for name, value in values.items()
        if name != "step" and isinstance(value, (int, float))
    }


class _TensorBoard:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def log_numbers(self, numbers: dict[str, float], step: int | None) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, rows: Rows, step: int | None) -> None:
        cells = [[escape_markdown(text) for text in row] for row in rows]
        self.writer.add_text("samples", table(SAMPLE_COLUMNS, cells), step)

    def finish(self) -> None:
        self.writer.close()


class _Run:
    """A run of W&B, or of Trackio, which has the same interface."""

    def __init__(self, run: Any, make_table: Callable[..., Any]) -> None:
        self.run = run
        self.make_table = make_table

    def log_numbers(self, numbers: dict[str, float], step: int | None) -> None:
        self.run.log(numbers, step=step)

    def log_samples(self, rows: Rows, step: int | None) -> None:
        shown = self.make_table(columns=SAMPLE_COLUMNS, data=[list(row) for row in rows])
        self.run.log({"samples": shown}, step=step)

    def finish(self) -> None:
        self.run.finish()


def _start_wandb(folder: Path, settings: dict[str, Any]) -> _Run:
    import wandb

    mode = None  # WANDB_MODE's
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        dir=str(folder),
        config=settings,
        mode=mode,
        # By default it would capture the console, and wait for its server at exit.
        settings=wandb.Settings(console="off", finish_timeout=CLOSE_S - 1),
    )
    return _Run(run, wandb.Table)


def _start_trackio(folder: Path, settings: dict[str, Any]) -> _Run:
    import trackio

    run = trackio.init(project=PROJECT, name=folder.name, config=settings)
    return _Run(run, trackio.Table)


# The module, what pip installs, and the function that starts a run.
_SERVICES: dict[str, tuple[str, str, Callable[[Path, dict[str, Any]], Service]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", _TensorBoard),
    "wandb": ("wandb", "wandb>=0.31", _start_wandb),
    "trackio": ("trackio", "trackio>=0.43", _start_trackio),
}
