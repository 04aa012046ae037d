"""Pushing: what is uploaded, without local paths, and that failures do not fail the run."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoints import hugging_face
from peft import PeftModel
from pictures import settings, write_pictures

from lora_engine.lora.adapter import CONFIG_FILE, read_adapter
from lora_engine.report import hub
from lora_engine.report.hub import check_repository, push_adapter
from lora_engine.report.run_folder import RunFolder
from lora_engine.training import setup as run_setup
from lora_engine.training.loop import train
from lora_engine.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _a_token(monkeypatch):
    """No test reads the real token of the user."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_made_up")


@pytest.fixture
def uploads(monkeypatch) -> list[SimpleNamespace]:
    """What was uploaded, file by file; nothing leaves the machine."""
    seen = []

    def upload(*, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        seen.append(SimpleNamespace(repository=repo_id, path=Path(folder_path), files=files))

    monkeypatch.setattr(huggingface_hub, "create_repo", made_repository)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return seen


def made_repository(name, *, exist_ok):
    assert exist_ok
    return huggingface_hub.RepoUrl(
        f"https://huggingface.co/{name if '/' in name else f'me/{name}'}"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=8)
    write_pictures(folder, num_images=2, name="val.json")
    return folder


@pytest.fixture
def config(blip_folder, data, tmp_path):
    return settings(blip_folder, data, tmp_path / "run", max_steps=1, push_to_hub="me/mine")


@pytest.fixture(scope="module")
def finished(blip_folder, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    return train(settings(blip_folder, data, run, max_steps=1)).path


@pytest.fixture
def folder(finished, tmp_path) -> RunFolder:
    """A finished run, not pushed."""
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def pushed(caplog) -> Callable[..., str]:
    """Push the adapter of a run -> the one line that is logged."""
    def push(folder: RunFolder, name: str = "me/mine") -> str:
        caplog.clear()
        caplog.set_level(logging.INFO, "lora_engine")
        push_adapter(folder, name)
        line, = caplog.messages
        assert "\n" not in line
        return line

    return push


def give_hub_base(folder: RunFolder) -> None:
    path = folder.adapter / CONFIG_FILE
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "owner/base"}
    path.write_text(json.dumps(config))


# --- the start of a run ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "", "a b", "a/b/c", "/a", "a/", "a--b", "./runs/mine", "https://huggingface.co/a/b", "a\nb",
])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_read(
    config, name, monkeypatch
):
    monkeypatch.setattr(run_setup, "read_rows", lambda config: pytest.fail("read too early"))
    with pytest.raises(ValueError, match="--push_to_hub is .*expected owner/name") as refused:
        train(settings(Path(config.model), Path(), Path(config.output_path), push_to_hub=name))
    assert "\n" not in str(refused.value)


def broken():
    raise RuntimeError("could not renew")


@pytest.mark.parametrize("get_token, warnings", [
    (lambda: "hf_x", 0), (lambda: None, 1), (broken, 1),
])
def test_a_missing_token_is_a_warning_at_the_start(monkeypatch, caplog, get_token, warnings):
    monkeypatch.setattr(huggingface_hub, "get_token", get_token)
    for name in ("owner/name", "name", "Some-Owner/a.b_c-1"):
        caplog.clear()
        check_repository(name)
        assert len(caplog.records) == warnings
        assert all("hf auth login" in record.message for record in caplog.records)
        assert all(record.levelname == "WARNING" for record in caplog.records)


# --- what is uploaded --------------------------------------------------------------------------


def test_a_run_uploads_its_best_adapter_with_the_card_after_everything_is_saved(
    config, uploads, capsys
):
    summary = train(config)
    upload, = uploads
    assert upload.repository == "me/mine"
    assert upload.files.keys() == {
        "README.md", "loss_curve.png", "adapter_config.json", "adapter_model.safetensors"
    }
    local = summary.path / "adapter"
    for name in upload.files.keys() - {CONFIG_FILE}:
        assert upload.files[name] == (local / name).read_bytes()
    assert capsys.readouterr().out.endswith("\npushed      https://huggingface.co/me/mine\n")


def test_no_local_path_is_uploaded_and_the_run_keeps_its_own(pushed, folder, uploads, blip_folder):
    pushed(folder)
    content = b"".join(uploads[0].files.values())
    for path in (folder.path, blip_folder):
        assert str(path).encode() not in content
    assert str(blip_folder).encode() in (folder.adapter / CONFIG_FILE).read_bytes()
    assert uploads[0].path == folder.hub_adapter
    theirs = json.loads(uploads[0].files[CONFIG_FILE])
    ours = json.loads((folder.adapter / CONFIG_FILE).read_text())
    assert theirs == ours | {"base_model_name_or_path": None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_and_this_engine_load_what_was_uploaded(pushed, folder, uploads, blip_folder):
    pushed(folder)
    model = PeftModel.from_pretrained(hugging_face(blip_folder), str(folder.hub_adapter))
    ours = read_adapter(folder.hub_adapter)
    assert ours.base_model is None
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): matrix
        for name, matrix in model.named_parameters() if "lora_" in name
    }
    assert theirs.keys() == ours.matrices.keys()
    assert all(torch.equal(theirs[name], ours.matrices[name]) for name in theirs)


def test_an_adapter_whose_base_is_on_the_hub_is_uploaded_unchanged(pushed, folder, uploads):
    give_hub_base(folder)
    assert pushed(folder, "mine") == "pushed      https://huggingface.co/me/mine"
    assert uploads[0].path == folder.adapter and uploads[0].repository == "me/mine"
    assert json.loads(uploads[0].files[CONFIG_FILE])["base_model_name_or_path"] == "owner/base"
    assert not folder.hub_adapter.exists()


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["create_repo", "upload_folder"])
@pytest.mark.parametrize("error", [
    ConnectionError("no route\nto host"), ValueError("Client Error 403\n\nForbidden"),
    TimeoutError(), OSError(28, "No space left on device"), RuntimeError("x" * 5000),
])
def test_all_failures_are_logged_on_one_line_with_the_command_to_try_again(
    pushed, folder, uploads, monkeypatch, where, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, where, fail)
    line = pushed(folder)
    assert line.startswith("not pushed to the Hub: ") and len(line) < 600
    assert (" ".join(str(error).split())[:200] or "TimeoutError") in line
    assert line.endswith(f"; to try again: hf upload me/mine {folder.hub_adapter}")
    assert (folder.hub_adapter / "README.md").exists() and not uploads


def test_a_full_disk_is_a_failure_like_others(pushed, folder, uploads, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    line = pushed(folder)
    assert "No space left on device" in line and str(folder.adapter) + " " not in line + " "
    assert not folder.hub_adapter.exists() and not uploads


def test_a_run_that_cannot_push_ends_well(config, uploads, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: broken())
    assert train(config).best_step in (0, 1)
    assert "warning: not pushed to the Hub: could not renew" in capsys.readouterr().err


def test_the_command_names_the_adapter_folder_if_that_is_pushed(
    pushed, folder, uploads, monkeypatch
):
    give_hub_base(folder)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kwargs: broken())
    assert pushed(folder).endswith(f"hf upload me/mine {folder.adapter}")


def test_without_a_token_nothing_is_tried(pushed, folder, uploads, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: pytest.fail("tried"))
    assert "`hf auth login` stores one" in pushed(folder)


def test_without_a_network_huggingface_hubs_error_is_logged(pushed, folder):
    """Not replaced: these tests run with HF_HUB_OFFLINE=1."""
    line = pushed(folder)
    assert line.startswith("not pushed to the Hub: ") and "offline" in line.lower()


def test_a_server_that_never_answers_is_abandoned(pushed, folder, uploads, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kwargs: never.wait(20))
    monkeypatch.setattr(hub, "UPLOAD_LIMIT_S", 0.05)
    assert "no answer within 0.05 s; to try again: hf upload" in pushed(folder)
    never.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_a_run_that_does_not_finish_pushes_nothing(config, uploads, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, "update", fail)
    with pytest.raises(type(error)):
        train(config)
    assert (Path(config.output_path) / "adapter" / "README.md").exists() and not uploads
