"""Starts training runs in several processes with torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(
    num_processes: int, args: Sequence[str], *, launcher: Sequence[str] = ()
) -> subprocess.Popen:
    """A launch of `args`, such as -m MODULE, with `launcher` flags; its output is one text."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(num_processes), *launcher, *args,
    ]
    return subprocess.Popen(
        command, env=environ(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def environ() -> dict[str, str]:
    """An environment in which modules of the tests can be run from any folder."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def output_of(launch: subprocess.Popen, *, timeout_s: float = 90) -> str:
    """All that a launch prints, once it has ended."""
    try:
        return launch.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        launch.kill()
        raise
