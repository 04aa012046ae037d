"""The page of `app`, called as its JavaScript does, by gradio's client; and the command line."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from pictures import write_pictures
from PIL import Image
from torch import nn

from lora_engine.__main__ import run_verb
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.commands.app import AppConfig, serving
from lora_engine.data.image_files import is_image
from lora_engine.demo import captioner_folder
from lora_engine.lora.adapter import save_adapter
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.models.pretrained import load_captioner

try:
    import gradio_client
except ImportError:
    gradio_client = None


def write_adapter(folder: Path, family: str) -> str:
    captioner = load_captioner(captioner_folder(family))
    inject(captioner.model, ["attention"], rank=2)
    torch.manual_seed(0)
    for matrix in lora_parameters(captioner.model).values():
        nn.init.normal_(matrix, std=0.2)
    save_adapter(captioner.model, folder, base_model=captioner_folder(family))
    return str(folder)


# --- the command line -----------------------------------------------------------------------


def test_without_gradio_the_message_says_what_to_install_as_the_documentation_does(
    refused, monkeypatch
):
    monkeypatch.setattr("lora_engine.commands.app.find_spec", lambda name: None)
    install = "pip install -e '.[app]'"
    refused(run_app, words=[f"error: app needs gradio: {install} in the clone of lora_engine"])
    root = Path(__file__).parents[1]
    for page in ("README.md", "docs/captioning.md"):
        assert install in (root / page).read_text(encoding="utf-8")


@pytest.fixture
def installed(monkeypatch):
    """gradio is found, but not imported: what is refused is refused before."""
    monkeypatch.setattr("lora_engine.commands.app.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "gradio", None)


def run_app(args: list[str]) -> int:
    return run_verb(["app", *args])


@pytest.mark.parametrize("flags, words", [
    ([], "no model to load: give a model (--model), an adapter (--adapter), or both"),
    (["--port", "70000"], "--port is 70000"),
    (["--adapter", "a", "--adapter", "a"], "--adapter a a: give each of them once"),
], ids=["no_model", "port", "twice"])
def test_wrong_flags_are_refused(refused, installed, flags, words):
    refused(run_app, *flags, words=[words])


def test_adapters_of_different_bases_are_refused(refused, installed, tmp_path):
    folders = [write_adapter(tmp_path / family, family) for family in ("blip", "vit_gpt2")]
    refused(run_app, "--adapter", folders[0], "--adapter", folders[1],
            words=["error: the adapters were trained on different models"])


# --- the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(gradio's client, name of the adapter) of a page of the demo's captioner and an adapter."""
    if gradio_client is None:
        pytest.skip("needs the extra app")
    adapter = write_adapter(tmp_path_factory.mktemp("app") / "adapter", "blip")
    with serving(AppConfig(adapter=(adapter,))) as url:
        temporary = Path(os.environ["GRADIO_TEMP_DIR"])
        client = gradio_client.Client(url, verbose=False)
        yield client, adapter
        client.close()
    assert not temporary.exists()
    with socket.socket() as port:  # nothing listens any more
        assert port.connect_ex(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))) != 0


def caption(client, paths, references="", folder=None, **settings):
    files = [gradio_client.handle_file(str(path)) for path in paths]
    return client.predict(files, folder, references, **settings, api_name="/caption")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, num_images=3)
    return sorted(path for path in folder.rglob("*") if is_image(path.name))


def test_base_and_adapter_caption_side_by_side_with_scores(page, pictures):
    client, adapter = page
    cards, (result,), images = caption(client, pictures[:1], "a red circle\na circle")
    assert set(result) == {"image", "captions", "scores"} and result["image"] == pictures[0].name
    assert list(result["captions"]) == ["base", adapter]
    assert len(set(result["captions"].values())) == 2
    assert list(result["scores"]["base"]) == ["BLEU-1", "BLEU-4", "ROUGE-L"]
    assert result["captions"]["base"] in cards and "data:image/jpeg" in cards


def test_several_images_have_a_reference_each(page, pictures):
    _, results, _ = caption(page[0], pictures, "a dog\na cat\na bird")
    assert [result["image"] for result in results] == [path.name for path in pictures]
    assert "CIDEr-D" in results[0]["scores"]["base"]


def test_settings_of_generation_apply(page, pictures):
    _, (short,), _ = caption(page[0], pictures[:1], max_new_tokens=2)
    assert len(short["captions"]["base"].split()) == 2
    sampled = [
        caption(page[0], pictures[:1], temperature=2.0, seed=seed)[1][0]["captions"]["base"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_word_of_a_caption_has_a_heat_map(page, pictures):
    client, adapter = page
    _, (result,), _ = caption(client, pictures[:1])
    choices = client.predict(0, adapter, api_name="/words")["choices"]
    assert [word for word, _ in choices] == result["captions"][adapter].split()
    maps = [
        Image.open(client.predict(0, adapter, 1, layer, head, api_name="/heat_map")[0])
        for layer, head in (("mean", "mean"), ("1", "2"))
    ]
    width, height = Image.open(pictures[0]).size
    for picture in maps:
        assert picture.width / picture.height == pytest.approx(width / height, rel=0.02)
    assert maps[0].tobytes() != maps[1].tobytes()


@pytest.mark.parametrize("settings, words", [
    ({"num_beams": 4, "temperature": 1.0}, "temperature samples and num_beams searches"),
    ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens is 9"),
    ({"references": "one\ntwo\nthree"}, "3 reference captions for 2 images"),
    ({"num_beams": 99}, "99"),
])
def test_wrong_settings_are_messages_in_the_page(page, pictures, settings, words):
    with pytest.raises(gradio_client.exceptions.AppError, match=words):
        caption(page[0], pictures[:2], **settings)


def test_unreadable_images_are_messages_in_the_page(page, pictures, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(gradio_client.exceptions.AppError, match="none of the images could be read"):
        caption(page[0], [broken])
    _, results, _ = caption(page[0], [broken, pictures[0]], "one\na dog")
    assert [result["image"] for result in results] == [pictures[0].name]
    with pytest.raises(gradio_client.exceptions.AppError, match="no images"):
        caption(page[0], [])
    with pytest.raises(gradio_client.exceptions.AppError, match="choose at most 32"):
        caption(page[0], [pictures[0]] * 33)


def test_defaults_are_those_of_the_command_line(page):
    fields = {field: getattr(GenerationSettings(), field) or 0 for field in ("num_beams", "top_p")}
    endpoint = page[0].view_api(return_format="dict", print_info=False)["named_endpoints"]
    defaults = {
        parameter["parameter_name"]: parameter["parameter_default"]
        for parameter in endpoint["/caption"]["parameters"]
    }
    assert {name: defaults[name] for name in fields} == fields


def test_the_page_asks_for_nothing_from_elsewhere(page):
    config = page[0].config
    assert not config["analytics_enabled"]
    assert not [sheet for sheet in config.get("stylesheets") or [] if "//" in sheet]
