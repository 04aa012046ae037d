"""Stopping a run early: the exceptions, and signals that wait for a safe point."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # no Windows HUP
ECHO_S = 3.0  # in which torchrun passes a signal on


class TrainingStopped(RuntimeError):
    """A run that cannot continue; its progress is in the run folder."""


class Diverged(TrainingStopped):
    """Losses or gradients are no longer finite."""


class LoadingStopped(RuntimeError):
    """Loading cannot continue: a worker has died, loading takes too long, or an image has changed
    since the run began."""


class Interrupted(BaseException):
    """A run that a signal has stopped at a point from which it can be resumed.

    Not an Exception, like KeyboardInterrupt: raised while an image is decoded, it must not be
    mistaken for an error of the image.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by which shells report this signal: 130, 143, ..."""
        return 128 + self.number


class StopSignal:
    """Remembers the first signal until `check` is called at a point where it is safe to stop; while
    this process only waits, a signal takes effect at once.

    A batch system signals torchrun and its processes, and torchrun passes its own on: what comes
    within `ECHO_S` is no second signal then.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.error: Exception | None = None  # of a callback
        self.received_s = 0.0
        self.is_waiting = False
        self.is_at_once = False  # whether a second signal has come

    def check(self) -> None:
        """Raises Interrupted if a signal has been received, and the error of a callback."""
        if self.error is not None:
            raise self.error
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the context a signal raises Interrupted at once, also in a blocking read."""
        self.answer_at_once()
        try:
            yield
        finally:
            self.is_waiting = False

    def answer_at_once(self) -> None:
        """From now on a signal raises Interrupted at once, and so does one received before."""
        self.is_waiting = True
        self.check()

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.received_s = number, time.monotonic()
            with suppress(OSError, RuntimeError):  # no terminal; within another print
                print(
                    f"\n{signal.Signals(number).name}: stopping after this step, with a "
                    f"checkpoint (repeat to stop at once)",
                    file=sys.stderr,
                    flush=True,
                )
            if self.is_waiting:
                raise Interrupted(number)
        elif "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.received_s < ECHO_S:
            pass
        elif signal.Signals(number).name != "SIGHUP":  # which a closed terminal sends twice
            # A third one kills the process.
            signal.signal(number, signal.SIG_DFL)
            self.is_at_once = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Call what a user has given; if it fails, stop as after a signal, with its error."""
        if self.error is None:
            try:
                callback(*args)
            except Exception as error:
                self.error = error

    def lose_output(self, error: OSError) -> None:
        """Stop after a failed write, as after a signal: the reader (SIGPIPE) or the terminal
        (SIGHUP) is gone."""
        if self.number is None:
            name = "SIGPIPE" if isinstance(error, BrokenPipeError) else "SIGHUP"
            self.number = getattr(signal, name, signal.SIGTERM)  # Windows has neither


@contextmanager
def signals_held() -> Iterator[StopSignal]:
    """Within the context the first signal only sets the StopSignal; a second one interrupts.

    A signal that is ignored, as under nohup and in a shell's background jobs, stays ignored. A
    signal after the last `check` raises Interrupted at the end. Only a process's main thread can
    handle signals: in other threads nothing changes.
    """
    stop = StopSignal()
    before = {}
    if threading.current_thread() is threading.main_thread():
        held = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop.receive) for number in held}
    try:
        yield stop
        stop.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For workers, which a terminal or a batch system signals, too: their parent decides when they
    end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
