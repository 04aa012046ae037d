"""A model folder in Hugging Face's format, found or fetched from the Hub, and its JSON files.

Model folders are untrusted: no code in them is run, and their files are read within limits.
"""

import json
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from lora_engine.files import UnusableFileError, check_file, read_limited
from lora_engine.terminal import one_line


class PretrainedError(ValueError):
    """A checkpoint that cannot be found, read, or understood."""


# Files besides the weights: configuration, tokenizer, preprocessor, index of shards.
SMALL_FILES = ("*.json", "*.txt", "*.model")

_CONFIGURATIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "special_tokens_map.json",
)
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model",
    "chat_template.*",
)
MAX_CONFIG_BYTES = 16 * 2**20
_MAX_VOCABULARY_BYTES = 128 * 2**20


def check_files(folder: Path) -> None:
    """Raises PretrainedError for a file that is not regular, is too large, or names code."""
    try:
        for pattern in _VOCABULARIES:
            for path in folder.glob(pattern):
                if path.exists():
                    check_file(path, max_bytes=_MAX_VOCABULARY_BYTES)
        for name in _CONFIGURATIONS:
            path = folder / name
            if path.exists():
                _refuse_code(path, read_json(path))
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except OSError as error:
        raise PretrainedError(f"cannot read {folder}: {error}") from None


def _refuse_code(path: Path, settings: dict[str, Any]) -> None:
    parts: list[Any] = [settings]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and "auto_map" in part:
            raise PretrainedError(
                f"{path} has auto_map, which names Python code to load the model with; code from "
                f"model folders is never run: choose a model without it"
            )
        if isinstance(part, (dict, list)):
            parts += part.values() if isinstance(part, dict) else part


def read_json(path: Path) -> dict[str, Any]:
    """A configuration; raises PretrainedError, and FileNotFoundError."""
    try:
        settings = json.loads(read_limited(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not a configuration: {error}") from None
    if not isinstance(settings, dict):
        raise PretrainedError(f"{path} is not a configuration: expected a JSON object")
    return settings


def find_folder(name: str, revision: str | None) -> Path:
    """A local folder, or else the cached files of a Hub repository."""
    try:
        is_folder, exists = Path(name).is_dir(), Path(name).exists()
    except (OSError, ValueError) as error:  # too long a name, or a NUL in it
        raise PretrainedError(f"{shortened(name)} is not a valid folder name: {error}") from None
    if is_folder:
        return Path(name)
    if exists or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise PretrainedError(
            f"no model folder at {name!r}; --model takes a folder in Hugging Face's format "
            f"(config.json, model.safetensors, tokenizer and preprocessor files) or a Hub name "
            f"such as Salesforce/blip-image-captioning-base"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The cached files of a Hub repository, fetched if necessary."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]
        )
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]
            )
    # pathlib raises RuntimeError for a user without a home folder, where the cache would be.
    except (OSError, HfHubHTTPError, HFValidationError, RuntimeError) as error:
        at = f" at revision {revision}" if revision else ""
        raise PretrainedError(
            f"there is no folder {name!r} here, and it cannot be fetched{at} from the Hugging Face "
            f"Hub: {one_line(error)} "
            f"Without a network: on a machine that has one, run `hf download {name} --local-dir "
            f"captioner`, copy the folder here and pass --model captioner."
        ) from None
    return Path(folder)
