"""metrics.jsonl, and what people see meanwhile: a progress bar on a terminal, lines elsewhere."""

import errno
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from lora_engine.captioning.metrics import SCORE_NAMES
from lora_engine.files import append_line, is_still_at, open_to_append
from lora_engine.report.run_folder import keep_lines
from lora_engine.report.run_record import AVERAGE
from lora_engine.report.trackers import Tracker
from lora_engine.stopping import TrainingStopped
from lora_engine.terminal import ConsoleHandler, logging_to

_EVERY_S = 5.0  # between two lines of progress


class MetricsLogger:
    """Appends events to metrics.jsonl and shows progress; within its context, log records too.

    metrics.jsonl is the record of a run: each line is written and flushed when it happens, and
    everything drawn later is derived from it. A `tracker` gets the same events, and `on_record` a
    copy of each line that is written. When the output can no longer be written (its reader has
    gone), `on_lost_output` is called once, and further output is dropped. Of several processes one
    `is_writer`; another one keeps its lines, until it has to `take_over`.
    """

    def __init__(
        self,
        path: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        tracker: Tracker | None = None,
        on_lost_output: Callable[[OSError], None] = lambda error: None,
        on_record: Callable[[dict[str, Any]], None] = lambda line: None,
        is_writer: bool = True,
    ) -> None:
        self.stream: Any = _Output(stream or sys.stdout, on_lost_output)
        self.tracker = tracker
        self._on_record = on_record
        self._path = path
        # Kept open: a step must not lose its line because file descriptors have run out.
        self._file = open_to_append(path) if is_writer else None
        self._lines: list[dict[str, Any]] = []  # of a process that does not write them
        self._total_steps = total_steps
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            file=self.stream,
            disable=not self.stream.isatty(),
        )
        self._handler = _BarHandler(self.stream, _Output(sys.stderr, on_lost_output), self._bar)
        self._open = ExitStack()
        self._last_line_s = time.monotonic()

    def __enter__(self) -> "MetricsLogger":
        self._open.enter_context(logging_to(self._handler))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._open:
            if self.tracker is not None:
                self.tracker.close()
            self._bar.close()
            if self._file is not None:
                self._file.close()

    def record(self, event: str, **values: Any) -> None:
        """Write one line of metrics.jsonl.

        Raises OSError if the line cannot be written, and leaves no part of it; TrainingStopped if
        the file has been removed since the run began.
        """
        line = event_line(event, **values)
        if self._file is None:
            self._lines.append(line)
            return
        if not is_still_at(self._file, self._path):
            raise TrainingStopped(
                f"{self._path} is gone: the run folder was removed or renamed during the run"
            )
        append_line(self._file, (json.dumps(line, allow_nan=False) + "\n").encode())
        self._on_record(dict(line))
        del line["event"]
        self.track(event, **line)

    def forget(self) -> None:
        """Drop the lines kept for `take_over`, which the writer has saved."""
        self._lines.clear()

    def take_over(self) -> None:
        """Write from now on, in place of a process that is gone, and what it has not written."""
        lines, self._lines = self._lines, []
        keep_lines(self._path, lambda line: True)  # the last one may have been cut short
        self._file = open_to_append(self._path)
        written = {
            (line["event"], line["step"])
            for line in map(json.loads, self._path.read_bytes().splitlines())
        }
        for line in lines:
            if (line["event"], line["step"]) not in written:
                append_line(self._file, (json.dumps(line, allow_nan=False) + "\n").encode())

    def track(self, event: str, **values: Any) -> None:
        """Pass an event to the tracker only, if there is one."""
        if self.tracker is not None:
            self.tracker.record(event, values)

    def tick(self, text: str) -> None:
        """Show that work is going on: in the bar, or as a line if the last is seconds old."""
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line_s >= _EVERY_S:
            self._last_line_s = time.monotonic()
            print(text, file=self.stream, flush=True)

    def progress(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        images_per_s: float,
        data_wait_share: float,
        remaining_s: float,
    ) -> None:
        """Move the bar, or print a line if the last one is a few seconds old."""
        state = (
            f"loss {loss:z.4f} | lr {learning_rate:.2e} | {images_per_s:.1f} images/s | "
            f"waiting for data {100 * data_wait_share:.0f} %"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line_s >= _EVERY_S or step == self._total_steps:
            self._last_line_s = time.monotonic()
            left = f"{duration(remaining_s)} left"
            print(f"step {step}/{self._total_steps} | {state} | {left}", file=self.stream,
                  flush=True)


class _BarHandler(ConsoleHandler):
    """Shows log records above the progress bar, if there is one."""

    def __init__(self, stdout: Any, stderr: Any, bar: tqdm) -> None:
        super().__init__()
        self.stdout, self.stderr, self.bar = stdout, stderr, bar

    def write(self, text: str, stream: TextIO) -> None:
        self.bar.clear()
        super().write(text, self.stderr if stream is sys.stderr else self.stdout)
        self.bar.refresh()


class _Output:
    """A stream whose reader may go away during any write, which must not end a step halfway."""

    def __init__(self, stream: TextIO, on_lost: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_lost = on_lost
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., Any], *args: Any) -> None:
        if self._is_lost:
            return
        try:
            act(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a closed terminal
                raise
            self._is_lost = True
            self._on_lost(error)


def event_line(event: str, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, with floats rounded to 7 significant digits.

    A float that is not finite becomes null, because JSON cannot represent it.
    """
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = float(f"{value:.7g}") if math.isfinite(value) else None
    return {"event": event, **values}


def averaged(loss: float, scores: Mapping[str, float]) -> dict[str, float]:
    """The results of the moving average of an adapter, as a validation line names them."""
    results = {"loss": loss} | {name: scores[name] for name in SCORE_NAMES if name in scores}
    return {f"{AVERAGE}{name}": value for name, value in results.items()}


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 42 s, 3 min 05 s, 7 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
