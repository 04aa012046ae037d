"""Running img2dataset (https://github.com/rom1504/img2dataset), and reading what it has written.

It requires old versions of pandas and others, so it runs in an environment of its own. It is
given a folder with one file of links per shard: the links of shard 7 are those of file 7. For each
shard it writes images, a .parquet with the status of every link, and last NUMBER_stats.json. It
skips shards with such a file when it is started again, so those that are not whole are removed.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.data.formats.arrow_columns import arrow_errors
from lora_engine.data.formats.parquet import EXPECTED, open_parquet

PACKAGE = "img2dataset==1.47.0"  # whose options and files this module knows
OUTPUT_FORMATS = {"tars": "webdataset", "files": "files", "parquet": "parquet"}
NEWEST_PYTHON = (3, 12)  # img2dataset imports imghdr, which Python 3.13 has removed
KEY_DIGITS = 5  # img2dataset's: a shard has a name of at least that many
_OUTPUT = re.compile(r"(\d{5,})(?:\.tar|\.parquet|_stats\.json)?")
_END_OF_TAR = bytes(1024)
_STATS_KEYS = {"count", "successes", "failed_to_download", "failed_to_resize", "status_dict"}
# Ends the process group that it is in when the process that started it is gone, however it ended.
_WATCHDOG = "import os, signal, sys; sys.stdin.read(); os.killpg(0, signal.SIGKILL)"


@dataclass(frozen=True)
class Output:
    """How shards are written: the settings that must not change while a folder is filled."""

    format: str  # of OUTPUT_FORMATS
    image_size: int
    quality: int
    shard_size: int


def find_command() -> list[str]:
    """The command that runs img2dataset on this machine. Raises ValueError if there is none."""
    if not hasattr(os, "killpg"):
        raise ValueError(
            "download runs on Linux and macOS; on Windows use it in WSL, or run img2dataset itself"
        )
    # Packages installed beside this one are found without an activated environment, too.
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    is_suitable = sys.version_info[:2] <= NEWEST_PYTHON
    python = sys.executable if is_suitable else ".".join(map(str, NEWEST_PYTHON))
    choose_python = ["--python", python]
    for name, options in {
        "uvx": [*choose_python, "--from", PACKAGE, "img2dataset"],
        "uv": ["tool", "run", *choose_python, "--from", PACKAGE, "img2dataset"],
        "pipx": ["run", *choose_python, "--spec", PACKAGE, "img2dataset"],
        "img2dataset": [],
    }.items():
        if program := shutil.which(name, path=path):
            return [program, *options]
    raise ValueError(
        "links are downloaded by img2dataset in an environment of its own, which needs uv: "
        "pip install uv (pipx, or an img2dataset on the PATH, would do, too)"
    )


def arguments(
    links: Path, folder: Path, output: Output, *, has_captions: bool, **others: int
) -> list[str]:
    """The flags that download `links`, a folder of JSON Lines, into `folder`.

    others: timeout, retries, processes_count and thread_count.
    """
    flags: dict[str, Any] = {
        "url_list": links,
        "input_format": "jsonl",
        "url_col": "url",
        "output_folder": folder,
        "output_format": OUTPUT_FORMATS[output.format],
        "number_sample_per_shard": output.shard_size,
        "oom_shard_count": KEY_DIGITS,
        "image_size": output.image_size,
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True,
        "encode_format": "jpg",
        "encode_quality": output.quality,
        "incremental_mode": "incremental",
        "enable_wandb": False,
        **({"caption_col": "caption"} if has_captions else {}),
        **others,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


Process = subprocess.Popen


@contextmanager
def running(command: list[str], log: Path) -> Iterator[Process]:
    """Within the context the command runs, with its output in `log`; after it, it is killed.

    Its process group is its own, so that a Ctrl-C reaches only this process, which then kills the
    whole group, worker processes included. If this process is killed, so is the group.
    """
    environment = os.environ | {
        "NO_ALBUMENTATIONS_UPDATE": "1",  # a request to PyPI
        "PYTHONUTF8": "1",  # captions in text files
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("PYTHONPATH", None)  # packages of another environment
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            process_group=0,
        )
    watchdog = None
    try:
        with suppress(PermissionError, ProcessLookupError):  # it has ended already
            watchdog = subprocess.Popen(
                [sys.executable, "-S", "-c", _WATCHDOG], stdin=subprocess.PIPE,
                process_group=process.pid,
            )
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if watchdog is not None:
            watchdog.communicate()


def has_ended(process: Process, wait_s: float) -> bool:
    """Whether the process ends within so many seconds."""
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True


# --- shards ---------------------------------------------------------------------------------


def read_stats(folder: Path, shard: int, output: Output) -> dict[str, Any] | None:
    """The statistics of a shard that is whole, else None."""
    name = f"{shard:0{KEY_DIGITS}}"
    try:
        stats = json.loads((folder / f"{name}_stats.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(stats, dict) or not _STATS_KEYS <= stats.keys():
        return None
    is_whole = _ends_with(folder / f"{name}.parquet", b"PAR1")
    if output.format == "tars":
        is_whole = is_whole and _ends_with(folder / f"{name}.tar", _END_OF_TAR)
    elif output.format == "files":
        is_whole = is_whole and (folder / name).is_dir()
    return stats if is_whole else None


def _ends_with(path: Path, end: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


def remove_unfinished(folder: Path, output: Output) -> None:
    """Remove the files of all shards that are not whole, and img2dataset's temporary files."""
    found = {int(match[1]) for path in folder.iterdir() if (match := _OUTPUT.fullmatch(path.name))}
    remove_shards(folder, {shard for shard in found if read_stats(folder, shard, output) is None})
    shutil.rmtree(folder / "_tmp", ignore_errors=True)


def remove_shards(folder: Path, shards: Collection[int]) -> None:
    """Remove all files of these shards, the statistics first: then a shard is not finished."""
    for path in sorted(folder.iterdir(), key=lambda path: not path.name.endswith(".json")):
        match = _OUTPUT.fullmatch(path.name)
        if match is None or int(match[1]) not in shards:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def downloaded_rows(folder: Path, shard: int, output: Output) -> set[int]:
    """Which links of a whole shard have become images, as numbers of lines, counted from 0."""
    path = folder / f"{shard:0{KEY_DIGITS}}"
    if output.format == "tars":
        with tarfile.open(path.with_suffix(".tar")) as tar:
            names = [member.name for member in tar]
    elif output.format == "files":
        names = os.listdir(path)
    else:
        file = str(path.with_suffix(".parquet"))
        with arrow_errors(file, EXPECTED), open_parquet(file) as parquet:
            rows = parquet.read(columns=["key", "status"]).to_pylist()
        names = [f"{row['key']}.jpg" for row in rows if row["status"] == "success"]
    num_digits = math.ceil(math.log10(output.shard_size))  # of the row, at the end of the key
    return {int(name[:-4][-num_digits:]) for name in names if name.endswith(".jpg")}
