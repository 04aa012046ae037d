"""python -m lora_engine VERB: what each does, and what bad input gets."""

import json
import re
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from pictures import json_lines, png_header, write_pictures

import lora_engine
from lora_engine import __main__ as verbs
from lora_engine import cli, merging
from lora_engine.adapter import save_adapter
from lora_engine.annotations import read_annotations
from lora_engine.captioning import Caption, Speaker, caption_pixels
from lora_engine.commands import loading
from lora_engine.images import open_image, to_pixels
from lora_engine.lora import inject, lora_parameters
from lora_engine.pretrained import load_captioner


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=4, name="val.json")
    return folder


# --- python -m lora_engine caption ----------------------------------------------------------


def adapter_folder(model: Path, folder: Path, *, prompt="") -> Path:
    """An adapter with weights that change every caption."""
    captioner = load_captioner(model)
    inject(captioner.model, ["attention"], rank=2)
    torch.manual_seed(1)
    for matrix in lora_parameters(captioner.model).values():
        torch.nn.init.normal_(matrix, std=0.3)
    save_adapter(
        captioner.model, folder, base_model=str(model),
        provenance={"base_fingerprint": captioner.fingerprint, "prompt": prompt},
    )
    return folder


@pytest.fixture(scope="module")
def blip_adapter(blip_folder, tmp_path_factory) -> Path:
    return adapter_folder(blip_folder, tmp_path_factory.mktemp("adapter") / "adapter")


def say(model, image, adapter=None, *, prompt="", **options) -> str:
    captioner = load_captioner(model)
    if adapter is not None:
        lora_engine.load_adapter(captioner.model, adapter)
    pixels = to_pixels(open_image(image), captioner.pixels)[None]
    (caption,), = caption_pixels(
        [Speaker(captioner, prompt)], torch.from_numpy(pixels), device=torch.device("cpu"),
        dtype=torch.float32, **options,
    )
    return " ".join(caption.text.split())


def test_files_and_folders_are_captioned_in_order_on_stdout_and_in_a_file(
    command, data, blip_folder, blip_adapter, tmp_path
):
    folder = tmp_path / "holiday"
    (folder / "deeper").mkdir(parents=True)
    sources = [row.image for row in read_annotations(data / "train.json")]
    for source, name in zip(sources[2:], ("b.png", "ä.PNG", "deeper/c.png")):
        shutil.copy(source, folder / name)
    (folder / "notes.txt").write_text("no image")
    images = [sources[1], folder / "b.png", folder / "deeper/c.png", folder / "ä.PNG"]
    status, out, err = command(
        verbs.run_verb, "caption", "--adapter", blip_adapter, "--out", "captions.jsonl",
        "--batch_size", "3", sources[1], folder,
    )
    assert (status, err) == (0, "")
    expected = [(str(image), say(blip_folder, image, blip_adapter)) for image in images]
    assert [tuple(line.split("\t")) for line in out.splitlines()] == expected
    assert len({caption for _, caption in expected}) > 1
    lines = json_lines(Path("captions.jsonl"))
    assert [line.keys() for line in lines] == 4 * [{"image", "caption"}]
    assert [(x["image"], " ".join(x["caption"].split())) for x in lines] == expected
    assert "ä.PNG" in Path("captions.jsonl").read_text(encoding="utf-8")  # readable as it is
    assert sorted(p.name for p in command.work.iterdir()) == ["captions.jsonl"]


def test_a_model_without_adapter_captions_and_beams_and_lengths_count(
    command, data, blip_folder
):
    image = read_annotations(data / "train.json")[0].image
    arguments = ["caption", "--model", blip_folder, image]
    status, out, _ = command(verbs.run_verb, *arguments)
    assert (status, out) == (0, f"{image}\t{say(blip_folder, image)}\n")
    options = {"num_beams": 3, "max_new_tokens": 5}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    status, beams, _ = command(verbs.run_verb, *arguments, *given)
    assert (status, beams) == (0, f"{image}\t{say(blip_folder, image, **options)}\n")
    assert beams != out


def test_an_adapters_prompt_is_used_and_can_be_replaced(
    command, data, vit_gpt2_folder, tmp_path
):
    image = read_annotations(data / "train.json")[0].image
    adapter = adapter_folder(vit_gpt2_folder, tmp_path / "adapter", prompt="a picture of")
    texts = {}
    for prompt, given in (("a picture of", []), ("the night", ["--prompt", "the night"]),
                          ("", ["--prompt", ""])):
        status, out, _ = command(verbs.run_verb, "caption", "--adapter", adapter, image, *given)
        texts[prompt] = say(vit_gpt2_folder, image, adapter, prompt=prompt)
        assert (status, out) == (0, f"{image}\t{texts[prompt]}\n")
    assert len(set(texts.values())) > 1


def test_a_caption_of_several_lines_is_printed_on_one(command, data, blip_folder, monkeypatch):
    monkeypatch.setattr(
        "lora_engine.captioning.caption_pixels",
        lambda *args, **kwargs: [(Caption("a dog\n on\ta  beach", ended=True),)],
    )
    image = read_annotations(data / "train.json")[0].image
    _, out, _ = command(verbs.run_verb, "caption", "--model", blip_folder, image)
    assert out == f"{image}\ta dog on a beach\n"


@pytest.mark.parametrize("content, reason", [
    (None, "no such file"),
    (b"", "the file is empty"),
    (b"<html>404</html>", "not an image in a known format"),
    ("half", "damaged or truncated"),
    (png_header(60_000, 60_000), "too large"),
])
def test_an_unreadable_image_is_named_and_the_others_are_captioned(
    command, data, blip_folder, tmp_path, content, reason
):
    good = read_annotations(data / "train.json")[0].image
    folder = tmp_path / "images"
    folder.mkdir()
    bad = folder / "bad.png"
    if content is None:
        bad.symlink_to(tmp_path / "gone.png")
    else:
        half = Path(good).read_bytes()[:100]
        bad.write_bytes(half if content == "half" else content)
    shutil.copy(good, folder / "good.png")
    status, out, err = command(
        verbs.run_verb, "caption", "--model", blip_folder, folder, "--out", "captions.jsonl"
    )
    assert status == 1
    assert f"skipped {bad}: " in err and reason in err
    assert out.startswith(f"{folder / 'good.png'}\t") and out.count("\n") == 1
    assert [line["image"] for line in json_lines(Path("captions.jsonl"))] == [
        str(folder / "good.png")
    ]


@pytest.mark.parametrize("args, words", [
    (["captoin"], ["there is no verb 'captoin'", "caption"]),
    (["caption", "--adaptor", "x", "y.png"], ["no flag --adaptor; did you mean --adapter?"]),
    (["caption", "--num_beams", "0", "y.png"], ["--num_beams is 0", "1 or more"]),
    (["caption", "--batch_size", "-1", "y.png"], ["--batch_size is -1"]),
    (["caption", "--max_new_tokens", "0", "y.png"], ["--max_new_tokens is 0"]),
    (["caption", "--num_beams", "two", "y.png"], ["--num_beams", "'two'"]),
    (["caption", "--model", "m", "absent.png"], ["absent.png: no such file or folder"]),
    (["caption", "--model", "m"], ["no images to caption"]),
    (["caption", "."], [".: no images in this folder"]),
])
def test_a_bad_caption_command_is_told_so(refused, args, words):
    refused(verbs.run_verb, *args, words=words)


@pytest.mark.parametrize("args, words", [
    ([], ["give --adapter, --model"]),
    (["--adapter", "absent"], ["absent has no adapter_config.json", "RUN/adapter"]),
    (["--model", "./absent"], ["no model folder at './absent'"]),
    (["--model", "BLIP", "--out", "no/such/x.jsonl"], ["--out no/such/x.jsonl", "no folder"]),
    (["--model", "BLIP", "--out", "."], ["--out . is not a regular file"]),
])
def test_a_caption_command_that_lacks_something_is_told_so(
    refused, data, blip_folder, args, words
):
    image = read_annotations(data / "train.json")[0].image
    args = [str(blip_folder) if arg == "BLIP" else arg for arg in args]
    refused(verbs.run_verb, "caption", image, *args, words=["error: ", *words])


def test_an_adapter_of_the_other_family_is_refused(
    refused, data, blip_adapter, vit_gpt2_folder
):
    refused(
        verbs.run_verb, "caption", "--adapter", blip_adapter, "--model", vit_gpt2_folder,
        read_annotations(data / "train.json")[0].image,
        words=[f"the adapter in {blip_adapter} does not fit this model", "ViTGPT2Captioner"],
    )


def test_an_adapter_on_another_base_model_is_warned_of(
    command, data, blip_adapter, blip_folder, tmp_path
):
    checkpoints.write_blip(tmp_path / "other", seed=5)
    status, out, err = command(
        verbs.run_verb, "caption", "--adapter", blip_adapter, "--model", tmp_path / "other",
        read_annotations(data / "train.json")[0].image,
    )
    assert status == 0 and out.count("\n") == 1
    assert "warning: " in err and "other weights" in err


def test_an_adapters_own_revision_is_loaded(command, data, blip_folder, tmp_path, monkeypatch):
    folder = adapter_folder(blip_folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "some/captioner", "revision": "v1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    asked = []

    def load(name, *, revision):
        asked.append((str(name), revision))
        return load_captioner(blip_folder)

    monkeypatch.setattr(loading, "load_captioner", load)
    image = read_annotations(data / "train.json")[0].image
    for given in ([], ["--revision", "v2"], ["--model", "other/one"]):
        assert command(verbs.run_verb, "caption", "--adapter", folder, image, *given)[0] == 0
    assert asked == [
        ("some/captioner", "v1"), ("some/captioner", "v2"), ("other/one", None)
    ]


def test_help_lists_the_verbs_and_no_verb_is_an_error(command):
    for args, expected in ((["--help"], 0), ([], cli.USAGE_ERROR)):
        status, out, _ = command(verbs.run_verb, *args)
        assert status == expected
        assert "caption" in out and "merge" in out and "VERB --help" in out


# --- python -m lora_engine merge ------------------------------------------------------------


def test_a_merged_folder_captions_as_the_adapter_does(
    command, data, captioner_folder, tmp_path
):
    adapter = adapter_folder(captioner_folder, tmp_path / "adapter")
    status, out, err = command(verbs.run_verb, "merge", "--adapter", adapter, "--out", "merged")
    assert (status, err) == (0, "")
    assert f"of {captioner_folder} with {adapter}" in out
    assert "largest logit difference " in out and "identical on 4 of 4 images" in out
    assert "its prompt" not in out and out.count("\n") == 4
    assert [path.name for path in command.work.iterdir()] == ["merged"]
    images = [row.image for row in read_annotations(data / "train.json")][:3]
    _, expected, _ = command(verbs.run_verb, "caption", "--adapter", adapter, *images)
    _, told, _ = command(verbs.run_verb, "caption", "--model", "merged", *images)
    assert told == expected
    assert told != command(verbs.run_verb, "caption", "--model", captioner_folder, *images)[1]


def test_a_merged_folder_is_compared_on_the_images_and_the_prompt_given(
    command, data, blip_folder, tmp_path, monkeypatch
):
    adapter = adapter_folder(blip_folder, tmp_path / "adapter", prompt="a picture of")
    prompts = []
    compare = merging.compare
    monkeypatch.setattr(merging, "compare", lambda *args, **settings: (
        prompts.append(settings["prompt"]) or compare(*args, **settings)
    ))
    status, out, _ = command(
        verbs.run_verb, "merge", "--adapter", adapter, "--out", "merged", "--images",
        data / "images", read_annotations(data / "train.json")[0].image,
    )
    assert status == 0 and "identical on 17 of 17 images" in out
    assert prompts == ["a picture of"] and "its prompt    'a picture of'" in out


def test_another_base_is_refused_and_can_be_forced(
    command, refused, blip_adapter, blip_folder, tmp_path
):
    checkpoints.write_blip(tmp_path / "other", seed=5)
    given = ["merge", "--adapter", blip_adapter, "--model", tmp_path / "other", "--out", "merged"]
    refused(verbs.run_verb, *given, words=[
        f"error: {blip_adapter} was trained on a base model with other weights than "
        f"{tmp_path / 'other'} has", "--force",
    ])
    status, out, err = command(verbs.run_verb, *given, "--force")
    assert status == 0 and "4 of 4 images" in out
    assert "warning: " in err and "other weights" in err
    assert (command.work / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("args, words", [
    ([], ["--adapter", "--out"]),
    (["--adapter", "ADAPTER"], ["--out"]),
    (["--adapter", "absent", "--out", "merged"], ["absent has no adapter_config.json"]),
    (["--adapter", "ADAPTER", "--out", "no/such"], ["--out no/such", "make it first"]),
    (["--adapter", "ADAPTER", "--out", "ADAPTER", "--model", "./absent"],
     ["already holds files"]),  # told before anything is loaded
    (["--adapter", "ADAPTER", "--out", "BLIP/merged"], ["lies in the base model's folder"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--images", "absent.png"],
     ["absent.png: no such file or folder"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--images", "ADAPTER/adapter_config.json"],
     ["adapter_config.json: not an image"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--model", "VIT_GPT2", "--force"],
     ["does not fit this model", "ViTGPT2Captioner"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--model", "NARROW", "--force"],
     ["does not fit this model", "lora_A is (2, 64), expected (2, 32)"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--forse"], ["did you mean --force"]),
])
def test_a_bad_merge_command_is_told_so(
    refused, blip_adapter, blip_folder, vit_gpt2_folder, tmp_path, args, words
):
    places = {"ADAPTER": blip_adapter, "BLIP": blip_folder, "VIT_GPT2": vit_gpt2_folder,
              "NARROW": tmp_path / "narrow"}
    if "NARROW" in args:
        checkpoints.write_blip(tmp_path / "narrow", text={"hidden_size": 32})
    for name, place in places.items():
        args = [re.sub(rf"^{name}(?=/|$)", str(place), arg) for arg in args]
    refused(verbs.run_verb, "merge", *args, words=words)
