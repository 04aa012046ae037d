"""Where an adapter is: its folder, the folder of a run, or a repository on the Hub."""

import json
import os
import re
from pathlib import Path

from lora_engine.files import read_limited
from lora_engine.lora.adapter_config import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterError
from lora_engine.lora.adapter_weights import BIN_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from lora_engine.terminal import one_line

_LIMITS = {
    CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_WEIGHTS_BYTES, BIN_FILE: MAX_WEIGHTS_BYTES
}


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter: `name` itself, the adapter/ of the run folder `name`, or the cached
    files of the Hub repository owner/name, which are fetched if necessary.

    What exists here comes first. An owner is not asked for on the Hub if it is a folder here, as in
    a mistyped runs/mine. Raises AdapterError if there is no adapter.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise AdapterError(
            f"the adapter is of the type {type(name).__name__}; expected a folder or a Hub name"
        )
    folder = Path(name)
    try:
        exists, is_below = folder.exists(), folder.parent != Path(".") and folder.parent.exists()
    except OSError as error:  # too long a name
        raise AdapterError(f"{str(name)[:80]!r} is not a valid folder name: {error}") from None
    if exists:
        return _in_folder(folder)
    if not is_below and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        return _download(str(name))
    beside = folder.parent if is_below else Path("runs")
    found = sorted(str(path.parent.parent) for path in beside.glob(f"*/adapter/{CONFIG_FILE}"))
    raise AdapterError(
        f"no adapter at {name}: expected a run folder, an adapter folder such as RUN/adapter, or "
        f"owner/name on the Hub" + (f"; there is {', '.join(found[-3:])}" if found else "")
    )


def _in_folder(folder: Path) -> Path:
    if (folder / CONFIG_FILE).exists():
        return folder
    if (folder / "adapter" / CONFIG_FILE).exists():
        return folder / "adapter"
    if (folder / "metrics.jsonl").exists():
        raise AdapterError(f"the run in {folder} has no adapter yet: wait for its first validation")
    if _is_model(folder / "config.json"):
        raise AdapterError(f"{folder} holds a whole model, not an adapter; give it with --model")
    raise AdapterError(
        f"{folder} has no {CONFIG_FILE}; expected a run folder or an adapter folder such as "
        f"RUN/adapter"
    )


def _is_model(path: Path) -> bool:
    try:
        return "model_type" in json.loads(read_limited(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _download(name: str) -> Path:
    """The cached files of an adapter on the Hub. Nothing else of the repository is fetched."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().model_info(name, files_metadata=True).siblings or []
    except Exception:  # of the network: snapshot_download tries the cache then, and says why not
        files = []
    for file in files:
        limit = _LIMITS.get(file.rfilename)
        if limit is not None and (file.size or 0) > limit:
            raise AdapterError(
                f"{file.rfilename} of {name} on the Hub has {file.size:,} bytes; this engine reads "
                f"no more than {limit:,}"
            )
    is_listed = any(file.rfilename == WEIGHTS_FILE for file in files)
    wanted = [file for file in _LIMITS if not (is_listed and file == BIN_FILE)]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network or the Hub, or there is no home folder
        raise AdapterError(
            f"there is no folder {name!r} here, and no adapter can be fetched from the Hugging "
            f"Face Hub: {one_line(error)} "
            f"Without a network: on a machine that has one, run `hf download {name} --local-dir "
            f"adapter`, copy the folder here and pass --adapter adapter."
        ) from None
    if not (folder / CONFIG_FILE).exists():
        raise AdapterError(
            f"{name} on the Hub has no {CONFIG_FILE}; if it is a whole model, give it with --model"
        )
    return folder
