"""Why a run stops before its end; Ctrl-C, SIGTERM and SIGHUP, taken where nothing is lost."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # no Windows HUP


class TrainingStopped(RuntimeError):
    """A run that could not go on; what it had reached is in its folder."""


class LoadingStopped(RuntimeError):
    """Loading cannot continue: a loading process has died, loading takes too long, or an image has
    changed since the run began."""


class Interrupted(BaseException):
    """A run that was asked to stop, and did at a point where it can be taken up again.

    Not an Exception, like KeyboardInterrupt: raised while an image is decoded, it must not be taken
    for a fault of the image.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """What a shell gives a program that this signal ended: 130, 143, ..."""
        return 128 + self.number


class StopSignal:
    """Remembers the first signal, for `check` to be asked at points where to stop is safe; while
    this process only waits, a signal is answered where it arrives."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_waiting = False
        self.is_at_once = False  # whether it has come twice

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the context a signal raises Interrupted where it arrives, also in a blocked read.
        """
        self.answer_at_once()
        try:
            yield
        finally:
            self.is_waiting = False

    def answer_at_once(self) -> None:
        """From here on a signal raises Interrupted where it arrives; one that has come, here."""
        self.is_waiting = True
        self.check()

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            with suppress(OSError, RuntimeError):  # no terminal; in the middle of another print
                print(
                    f"\n{signal.Signals(number).name}: stopping after this step, with a "
                    f"checkpoint (again: stop at once)",
                    file=sys.stderr,
                    flush=True,
                )
            if self.is_waiting:
                raise Interrupted(number)
        elif signal.Signals(number).name != "SIGHUP":  # which a closed terminal sends twice
            # A third one ends the process whatever it does.
            signal.signal(number, signal.SIG_DFL)
            self.is_at_once = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def lose_output(self, error: OSError) -> None:
        """Stop as other programs do when a write fails like this: the reader has gone (SIGPIPE), or
        the terminal (SIGHUP)."""
        if self.number is None:
            self.number = signal.SIGPIPE if isinstance(error, BrokenPipeError) else signal.SIGHUP


@contextmanager
def signals_held() -> Iterator[StopSignal]:
    """Within the context signals only set the StopSignal; a second one interrupts.

    A signal that is ignored, as by nohup and in a shell's background jobs, stays ignored. One that
    came too late for any `check` raises Interrupted at the end. Only a process's main thread can
    hold signals: in another one nothing changes.
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
    """For loading processes: a terminal or a batch system signals them, too; who started them
    decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
