"""A finished adapter goes to the Hugging Face Hub, or stays here with the command to send it."""

import json
import logging
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

from lora_engine.files import replaced_folder
from lora_engine.lora.adapter import CONFIG_FILE, read_adapter
from lora_engine.report.run_folder import RunFolder

UPLOAD_LIMIT_S = 600.0  # huggingface_hub waits for a silent server for ever
TOKEN_LIMIT_S = 10.0  # a token of a browser's login may have to be renewed
NO_TOKEN = "there is no Hugging Face token on this machine; `hf auth login` stores one"

logger = logging.getLogger(__name__)

T = TypeVar("T")


def check_repository(name: str) -> None:
    """Say at the start of a run what would fail at its end.

    Raises ValueError for a name that no repository can have. A missing token is only a warning: it
    may be there by the end.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"--push_to_hub is {name!r}; expected owner/name, or name for your own account "
            f"({_in_a_line(error)})"
        ) from None
    if not _has_token():
        logger.warning(f"--push_to_hub: {NO_TOKEN}")


def push_adapter(folder: RunFolder, name: str) -> None:
    """Upload the run's best adapter with its card; say where it is, or why not and what to type.

    What goes wrong here never fails the run, whose adapter is saved.
    """
    path = folder.hub_adapter  # never advise to push adapter/, which may name a local folder
    try:
        path = _without_local_paths(folder)
        url = _within(UPLOAD_LIMIT_S, lambda: _upload(path, name))
        logger.info(f"pushed      {url}")
    except Exception as error:  # the network, the Hub and the disk have many words for it
        logger.warning(
            f"not pushed to the Hub: {_in_a_line(error)}; to try again: "
            f"hf upload {name} {shlex.quote(str(path))}"
        )


def _without_local_paths(folder: RunFolder) -> Path:
    """The folder to upload: adapter/, or a copy that does not name the base model's folder.

    PEFT's `PeftModel.from_pretrained` is given the base and does not read that name;
    `AutoPeftModel` would look for the folder on whatever machine it runs. Any other name in its
    place could be somebody else's model on the Hub, so that the copy has none.
    """
    adapter = read_adapter(folder.adapter)
    if adapter.base_on_hub is not None:
        return folder.adapter
    with replaced_folder(folder.hub_adapter) as new:
        shutil.copytree(folder.adapter, new, dirs_exist_ok=True)
        config = adapter.config | {"base_model_name_or_path": None}
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder.hub_adapter


def _upload(path: Path, name: str) -> str:
    """Make the repository, if need be, and upload a folder into it -> its address."""
    import huggingface_hub

    if not _has_token():
        raise ValueError(NO_TOKEN)
    repository = huggingface_hub.create_repo(name, exist_ok=True)
    huggingface_hub.upload_folder(
        repo_id=repository.repo_id, folder_path=path, commit_message="LoRA adapter"
    )
    return str(repository)


def _has_token() -> bool:
    import huggingface_hub

    try:
        return _within(TOKEN_LIMIT_S, huggingface_hub.get_token) is not None
    except Exception:  # a renewal that failed leaves none
        return False


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """`call`'s result; raises TimeoutError, and leaves it alone, where that takes longer."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return future.result(limit_s)
    except TimeoutError:
        if future.done():
            raise  # the call's own
        raise TimeoutError(f"no answer within {limit_s:g} s") from None


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
