"""Running what dies, or is signalled, in a process of its own."""

import os
import socket
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


def launch(
    num_processes: int, function: Callable[[], int | None], folder: Path, *, timeout_s: float = 60
) -> list[Ended]:
    """Run `function` in forks of this process, which find each other as torchrun's processes do.

    They need no seconds for their imports.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    children: dict[int, int] = {}  # by process ID: the rank
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            size = str(num_processes)
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            }
            _run_and_exit(function, folder / f"rank_{rank}.log")
        children[child] = rank
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while children:
        for child in [*children]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
            raise TimeoutError(f"ranks {[*children.values()]} did not end; logs: {folder}")
        time.sleep(0.01)
    logs = [folder / f"rank_{rank}.log" for rank in range(num_processes)]
    return [
        Ended(statuses[rank], log.read_text(errors="replace")) for rank, log in enumerate(logs)
    ]


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
