"""Running what dies, or is signalled, in a process of its own."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a child ended: its exit status (negative: the signal that killed it), and its output."""

    status: int
    output: str


def in_child(function: Callable[[], int | None], log: Path, *, timeout_s: float = 60) -> Ended:
    """Run `function` in a fork of this process, with `log` as its stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run_and_exit(function, log)
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Ended(
                os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            )
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise TimeoutError(f"the child did not end: {log.read_text(errors='replace')}")
        time.sleep(0.01)


def _run_and_exit(function: Callable[[], int | None], log: Path) -> None:
    """Ends without pytest's own cleaning up."""
    status = 70  # like no other
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = function() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
