"""Why a run stops before its end; Ctrl-C and SIGTERM, taken where nothing is lost."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(RuntimeError):
    """A run that could not go on; what it had reached is in its folder."""


class LoadingStopped(RuntimeError):
    """Data that comes no more: a loading process has died, or does not answer, or an image has
    changed."""


class Interrupted(Exception):
    """A run that was asked to stop, and did at a point where it can be taken up again."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.advice = ""

    @property
    def status(self) -> int:
        """What a shell gives a program that this signal ended: 130 or 143."""
        return 128 + self.number


class StopSignal:
    """Remembers the first signal, for `check` to be asked at points where to stop is safe."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_at_once = False  # whether it has come twice

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def checked(self, load: Callable[..., Iterator[T]]) -> Callable[..., Iterator[T]]:
        """The same loader, with a check before each batch that it gives."""
        def batches(*args) -> Iterator[T]:
            for batch in load(*args):
                self.check()
                yield batch

        return batches

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            # A third one ends the process whatever it does.
            signal.signal(number, signal.SIG_DFL)
            self.is_at_once = True
            raise KeyboardInterrupt
        self.number = number
        print(
            f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint "
            f"(again: stop at once)",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def signals_held() -> Iterator[StopSignal]:
    """Within the context SIGINT and SIGTERM only set the StopSignal; a second one interrupts.

    Only a process's main thread can do so: in another one nothing changes.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For loading processes: a terminal or a batch system signals them, too; who started them
    decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
