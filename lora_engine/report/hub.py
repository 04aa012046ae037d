"""Upload a finished adapter to the Hugging Face Hub."""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

from lora_engine.cli import quoted
from lora_engine.files import replaced_folder
from lora_engine.lora.adapter import CONFIG_FILE, read_adapter
from lora_engine.report.run_folder import RunFolder
from lora_engine.terminal import one_line

logger = logging.getLogger(__name__)

UPLOAD_LIMIT_S = 600.0  # huggingface_hub waits forever for a server that does not answer
TOKEN_LIMIT_S = 10.0  # the token of a browser login may have to be renewed
NO_TOKEN = "there is no Hugging Face token on this machine; `hf auth login` stores one"

T = TypeVar("T")


def check_repository(name: str) -> None:
    """Report at the start of a run what would make `push_adapter` fail at its end.

    Raises ValueError for a name that no repository can have. A missing token is only a warning,
    because there may be one by the end.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"--push_to_hub is {name!r}; expected owner/name, or name for your own account "
            f"({one_line(error)})"
        ) from None
    if not _has_token():
        logger.warning(f"--push_to_hub: {NO_TOKEN}")


def push_adapter(folder: RunFolder, name: str) -> None:
    """Upload the run's best adapter with its model card, and log its address.

    A failure is logged with the command to try again; it never fails the run, whose adapter is
    saved.
    """
    path = folder.hub_adapter  # never suggest to push adapter/, which may name a local folder
    try:
        path = _without_local_paths(folder)
        url = _within(UPLOAD_LIMIT_S, lambda: _upload(path, name))
        logger.info(f"pushed      {url}")
    except Exception as error:  # of the network, the Hub or the disk
        logger.warning(
            f"not pushed to the Hub: {one_line(error)}; to try again: "
            f"hf upload {name} {quoted(str(path))}"
        )


def _without_local_paths(folder: RunFolder) -> Path:
    """The folder to upload: adapter/, or a copy that does not name the base model's local folder.

    PEFT's `PeftModel.from_pretrained` is given the base and does not read that name;
    `AutoPeftModel` would look for the folder on the machine that it runs on. Any other name could
    be somebody else's model on the Hub, so the copy has none.
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
    """Create the repository if necessary, and upload a folder to it -> its address."""
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
    except Exception:  # the token could not be renewed
        return False


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """The result of `call`; raises TimeoutError, and leaves it running, if it takes longer."""
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
