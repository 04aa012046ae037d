"""Command lines: what they do, and what bad input gets: a message, a status, and nothing else."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import checkpoints
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from pictures import json_lines, png_header, write_pictures

import lora_engine
from lora_engine import __main__ as verbs
from lora_engine import cli, merging, training
from lora_engine.adapter import save_adapter
from lora_engine.annotations import read_annotations
from lora_engine.captioning import caption_pixels
from lora_engine.config import TrainingConfig
from lora_engine.images import open_image, to_pixels
from lora_engine.lora import inject, lora_parameters
from lora_engine.pretrained import load_captioner
from recipes import blip_cc3m, vit_gpt2_cc3m

RECIPES = {"blip": blip_cc3m, "vit_gpt2": vit_gpt2_cc3m}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=4, name="val.json")
    return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command line in an empty working folder -> (status, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(training, "draw_loss_curve", lambda *paths: None)

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        capsys.readouterr()
        try:
            status = cli.run(main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    run.work = work
    return run


@pytest.fixture
def refused(command):
    """Asserts that a command line fails with these words, and leaves nothing behind."""

    def check(main, *args, words, status=cli.USAGE_ERROR, allowed=()):
        result, out, err = command(main, *args)
        assert result == status
        told = plain(err)
        for word in words:
            assert str(word) in told, f"{word!r} is not in {told!r}"
        assert out == ""
        assert sorted(p.name for p in command.work.rglob("*")) == sorted(allowed)

    return check


def plain(text: str) -> str:
    """Text without the boxes and line breaks of the command line's help and errors."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def flags(folder: Path | None, data: Path, **changes) -> list[str]:
    """A short run's command line."""
    values = {
        "model": folder, "train_data_path": data / "train.json", "val_data_path": data / "val.json",
        "output_path": "run", "epochs": 1, "batch_size": 4, "lr": 1e-3, "num_workers": 0,
        "device": "cpu", "num_samples": 1,
    } | changes
    given = [(name, value) for name, value in values.items() if value is not None]
    return [str(part) for name, value in given for part in (f"--{name}", value)]


# --- annotations ----------------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    (None, ["rows.json: no such file"]),
    ('[{"text": "a", "image": "b.png"},\n{"text": oops}]', ["rows.json:2: not JSON"]),
    ('{"text": "a", "image": "b.png"}', ["rows.json: ", "expected a JSON list"]),
    ('[\n{"text": "a"}]', ['rows.json:2: row 1: no "image"']),
    ('[\n{"image": "a.png"}]', ['rows.json:2: row 1: no "text"']),
    ("[]", ["rows.json: an empty list"]),
    ('[\n\n{"text": " ", "image": "a.png"}]', ['rows.json:3: row 1: "text" is empty']),
    ('[{"text": "a", "image": "absent.png"}]',
     ["rows.json: 1 of 1 rows looked at name an image that does not exist",
      "--max_bad_share 0.05", "absent.png"]),
])
@pytest.mark.parametrize("which", ["train_data_path", "val_data_path"])
def test_bad_annotations_are_named_by_file_and_line(
    refused, tmp_path, data, blip_folder, text, words, which
):
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    refused(
        blip_cc3m.main, *flags(blip_folder, data, **{which: path}),
        words=["error: ", tmp_path, *words],
    )


def test_one_image_cannot_be_split(refused, tmp_path, data, blip_folder):
    rows = json.loads((data / "train.json").read_text())[:1]
    rows[0]["image"] = str(data / rows[0]["image"])
    (tmp_path / "one.json").write_text(json.dumps(rows))
    refused(
        blip_cc3m.main,
        *flags(blip_folder, data, train_data_path=tmp_path / "one.json", val_data_path=None),
        words=["cannot hold out validation images", "--val_data_path"],
    )


def test_a_validation_file_alone_is_refused(refused, data):
    refused(
        blip_cc3m.main, "--val_data_path", data / "val.json",
        words=["--val_data_path needs a --train_data_path"],
    )


def test_a_run_with_too_many_bad_images_stops_with_its_own_status(
    command, tmp_path, blip_folder
):
    rows = read_annotations(write_pictures(tmp_path, num_images=12))
    write_pictures(tmp_path, num_images=4, name="val.json")
    for row in rows[:6]:
        Path(row.image).write_text("<html>404</html>")
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, tmp_path, batch_size=1))
    assert status == cli.STOPPED and "\nstopped: " in err and "reached is in run" in err
    assert "--max_bad_share 0.05" in err and "run/skipped.jsonl" in err
    assert "not an image in a known format" in err
    listed = json_lines(command.work / "run" / "skipped.jsonl")
    assert listed and {line["image"] for line in listed} <= {row.image for row in rows[:6]}


# --- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize("args, words", [
    (["--batch_sise", "3"], ["there is no flag --batch_sise; did you mean --batch_size?"]),
    (["--batch-sise=3"], ["there is no flag --batch-sise; did you mean --batch_size?"]),
    (["--learning_rate", "1"], ["there is no flag --learning_rate"]),
    (["--no_lr"], ["there is no flag --no_lr"]),
    (["--xyzzy"], ["there is no flag --xyzzy; --help lists all flags"]),
    (["-b", "3"], ["-b"]),
    (["train.json"], ["train.json"]),
    (["--batch_size", "many"], ["--batch_size", "'many'"]),
    (["--lr", "1e-5x"], ["--lr", "'1e-5x'"]),
    (["--lr"], ["--lr", "Missing value"]),
    (["--precision", "fp8"], ["--precision", "'fp8'", "'bf16'"]),
    (["--epochs", "1.5"], ["--epochs", "'1.5'"]),
])
def test_a_flag_that_cannot_be_understood_is_named(refused, args, words):
    refused(blip_cc3m.main, *args, words=words)


@pytest.mark.parametrize("name, value", [
    ("batch_size", 0), ("batch_size", -4), ("epochs", 0), ("grad_accum_steps", 0),
    ("max_steps", 0), ("eval_every", 0), ("log_every", 0), ("lora_rank", 0),
    ("max_caption_tokens", 0), ("seed", -1), ("seed", 2**64), ("warmup_steps", -1),
    ("num_workers", -1), ("num_samples", -1), ("weight_decay", -0.1), ("max_grad_norm", -1),
    ("max_grad_norm", "nan"), ("lr", -1e-5), ("lr", 0), ("lr", "nan"), ("lr", "inf"),
    ("lora_alpha", 0), ("lora_dropout", 1), ("lora_dropout", -0.1), ("label_smoothing", 1),
    ("label_smoothing", "nan"), ("val_fraction", 0), ("val_fraction", 1), ("max_bad_share", 1.5),
    ("max_bad_share", "nan"),
])
def test_a_value_out_of_range_is_named_with_its_range(refused, data, blip_folder, name, value):
    arguments = flags(blip_folder, data, **{name: value})
    refused(blip_cc3m.main, *arguments, words=[f"error: --{name} is {value}", "must be"])


@pytest.mark.parametrize("changes, words", [
    ({"lora_targets": "qeury"}, ["LoRA target 'qeury' matches no linear layer", "query"]),
    ({"lora_targets": "re:encoder.*("}, ["'re:encoder.*('", "not a regular expression"]),
    ({"device": "gpu"}, ["--device 'gpu' is none that this engine runs on: cpu, cuda"]),
    ({"device": "mps"}, ["--device 'mps' is none that this engine runs on"]),
    ({"device": "cuda:99"}, ["--device cuda:99"]),
    ({"max_caption_tokens": 5000}, ["--max_caption_tokens", "5000"]),
    ({"init_adapter": "absent"}, ["absent has no adapter_config.json"]),
    ({"model": "./absent"}, ["no model folder at './absent'", "--model"]),
])
def test_a_setting_that_does_not_fit_is_told_so(refused, data, blip_folder, changes, words):
    refused(blip_cc3m.main, *flags(blip_folder, data, **changes), words=["error: ", *words])


def test_a_captioner_of_the_other_family_is_refused(refused, data, blip_folder, vit_gpt2_folder):
    refused(
        blip_cc3m.main, *flags(vit_gpt2_folder, data),
        words=["'vision-encoder-decoder'", "expected 'blip'", "BlipForConditionalGeneration"],
    )
    refused(
        vit_gpt2_cc3m.main, *flags(blip_folder, data),
        words=["'blip'", "expected 'vision-encoder-decoder'", "VisionEncoderDecoderModel"],
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_hub_name_without_network_says_how_to_use_a_folder(refused, data, monkeypatch, recipe):
    def raise_error(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the files on the Hub, and no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_error)
    name = recipe.PUBLISHED.model
    refused(
        recipe.main, *flags(None, data),
        words=[f"no folder '{name}' here", "cannot be fetched", "no network",
               f"hf download {name}", "--model"],
    )


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    refused, command, data, blip_folder, monkeypatch
):
    (command.work / "run" / "adapter").mkdir(parents=True)
    (command.work / "run" / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(training, "load_captioner", None)
    refused(
        blip_cc3m.main, *flags(blip_folder, data),
        words=["--output_path run already holds a run", "--init_adapter"],
        allowed=["adapter", "metrics.jsonl", "run"],
    )
    refused(  # the demo looks before it draws its scenes
        blip_cc3m.main, "--output_path", "run",
        words=["--output_path run already holds a run"],
        allowed=["adapter", "metrics.jsonl", "run"],
    )


def test_nothing_is_left_where_the_first_validation_fails(command, tmp_path, blip_folder):
    write_pictures(tmp_path, num_images=12)
    rows = read_annotations(write_pictures(tmp_path, num_images=4, name="val.json"))
    for row in rows:
        Path(row.image).write_bytes(b"")
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, tmp_path))
    assert status == cli.USAGE_ERROR
    assert "error: no validation image can be read (4 failed, first " in err
    assert f"{rows[0].image}: the file is empty" in err
    assert list(command.work.iterdir()) == []


# --- what the flags do ----------------------------------------------------------------------


def printed_config(command, main, *args) -> dict:
    status, out, err = command(main, "--print_config", *args)
    assert status == 0 and err == ""
    assert list(command.work.iterdir()) == []
    return json.loads(out)


@pytest.mark.parametrize("recipe, batch_size", [(blip_cc3m, 32), (vit_gpt2_cc3m, 16)])
def test_the_defaults_are_the_published_runs(command, data, recipe, batch_size):
    config = printed_config(command, recipe.main, "--train_data_path", data / "train.json")
    published = {
        "epochs": 100, "batch_size": batch_size, "lr": 1e-5, "seed": 42, "lora_rank": 8,
        "lora_alpha": 32.0, "lora_dropout": 0.1, "lora_targets": ["attention", "feed_forward"],
        "val_fraction": 0.05, "precision": "auto", "compile": False, "output_path": None,
    }
    assert {name: config[name] for name in published} == published
    assert config["model"] == {
        blip_cc3m: "Salesforce/blip-image-captioning-base",
        vit_gpt2_cc3m: "nlpconnect/vit-gpt2-image-captioning",
    }[recipe]
    assert config.keys() == {f.name for f in dataclasses.fields(TrainingConfig)} - {"print_config"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_without_data_the_demos_settings_hold_and_flags_change_them(command, recipe):
    config = printed_config(command, recipe.main, "--epochs", "3")
    assert config["model"] == recipe.DEMO.model != recipe.PUBLISHED.model
    assert (config["epochs"], config["lr"]) == (3, recipe.DEMO.lr)


def test_underscores_and_hyphens_are_one_flag(command):
    values = {"train_data_path": "t.json", "batch_size": "7", "lora_targets": "query",
              "max_grad_norm": "0.5", "eval_every": "3"}
    configs = [
        printed_config(command, blip_cc3m.main, *(
            part for name, value in values.items()
            for part in spell(f"--{name}", value)
        )) for spell in (
            lambda name, value: (name, value),
            lambda name, value: ("--" + name[2:].replace("_", "-"), value),
            lambda name, value: (f"{name}={value}",),
            lambda name, value: ("--" + name[2:].replace("_", "-") + f"={value}",),
        )
    ]
    assert all(config == configs[0] for config in configs)
    assert (configs[0]["batch_size"], configs[0]["lora_targets"]) == (7, ["query"])


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_switches_have_a_yes_and_a_no(command, name):
    for flag, expected in ((f"--{name}", True), (f"--no_{name}", False),
                           (f"--no-{name.replace('_', '-')}", False)):
        assert printed_config(command, blip_cc3m.main, flag)[name] is expected


def test_several_targets_follow_one_flag(command):
    config = printed_config(
        command, blip_cc3m.main, "--lora_targets", "query", "re:.*value", "--lora_rank", "4"
    )
    assert (config["lora_targets"], config["lora_rank"]) == (["query", "re:.*value"], 4)


def docstrings(source: Path, name: str) -> dict[str, str]:
    """The text under each field of a dataclass, by the field's name."""
    body = source.read_text(encoding="utf-8").split(f"class {name}:")[1].split("\n\n\n")[0]
    fields = re.findall(r'^    (\w+):[^\n]*\n    """(.*?)"""', body, re.DOTALL | re.MULTILINE)
    return {field: plain(text) for field, text in fields}


@pytest.mark.parametrize("main, args, source, config", [
    (blip_cc3m.main, ["--help"], "config.py", TrainingConfig),
    (vit_gpt2_cc3m.main, ["-h"], "config.py", TrainingConfig),
    (verbs.run_verb, ["caption", "--help"], "__main__.py", verbs.CaptionConfig),
    (verbs.run_verb, ["merge", "--help"], "__main__.py", verbs.MergeConfig),
])
def test_help_tells_what_every_flag_means(command, main, args, source, config):
    status, out, err = command(main, *args)
    assert status == 0 and err == ""
    told = plain(out)
    meanings = docstrings(Path(lora_engine.__file__).parent / source, config.__name__)
    assert meanings.keys() == {field.name for field in dataclasses.fields(config)}
    for name, meaning in meanings.items():
        assert meaning in told and (name == "images" or f"--{name}" in told), name
    if config is TrainingConfig:
        assert "--no_compile" in told and "The published run" in told


# --- whole commands -------------------------------------------------------------------------


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_trains_and_the_printed_command_captions(
    command, request, data, family
):
    model = request.getfixturevalue(f"{family}_folder")
    status, out, err = command(RECIPES[family].main, *flags(model, data, lr=1e-2))
    assert (status, err) == (0, "")
    assert "best validation loss" in out
    printed = out.strip().splitlines()[-1].split()
    assert Path(printed[2]) == Path(sys.executable)
    assert printed[3:6] == ["-m", "lora_engine", "caption"]
    adapter = Path("run") / "adapter"
    assert printed[6:8] == ["--adapter", str(adapter)]
    sample = json_lines(Path("run") / "samples.jsonl")[-1]
    status, out, err = command(verbs.run_verb, *printed[5:8], sample["image"])
    assert (status, err) == (0, "")
    assert out == f"{sample['image']}\t{' '.join(sample['caption'].split())}\n"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_demo_trains_on_drawn_scenes_as_on_any_data(command, data, monkeypatch, recipe):
    calls = []
    monkeypatch.setattr(training, "train", lambda config, **more: calls.append((config, more)))
    monkeypatch.setattr(
        "lora_engine.demo.scenes.write_scenes",
        lambda folder, **more: (data / "train.json", data / "val.json"),
    )
    status, out, _ = command(recipe.main, "--epochs", "2")
    assert status == 0
    (config, _), = calls
    assert config == dataclasses.replace(
        recipe.DEMO, epochs=2, train_data_path=str(data / "train.json"),
        val_data_path=str(data / "val.json"),
    )
    assert f"--epochs 2 --batch_size {recipe.DEMO.batch_size}" in out
    assert f"--lr {recipe.DEMO.lr:g}" in out


@pytest.mark.parametrize("module", ["recipes.blip_cc3m", "recipes.vit_gpt2_cc3m"])
def test_recipes_run_as_modules(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["program", "--batch_sise", "3"])
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("error: there is no flag --batch_sise")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "captoin"])
    monkeypatch.delitem(sys.modules, "lora_engine.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lora_engine", run_name="__main__")
    assert stop.value.code == cli.USAGE_ERROR
    assert capsys.readouterr().err == "error: there is no verb 'captoin'; known: caption, merge\n"


def test_an_interruption_is_no_traceback(command, data, blip_folder, monkeypatch):
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return training.optimizer_step.real(*args, **kwargs)

    interrupt.real = training.optimizer_step
    monkeypatch.setattr(training, "optimizer_step", interrupt)
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, data))
    assert status == 130 and err == "what the run had reached is in run\ninterrupted\n"
    assert (Path("run") / "adapter").is_dir() and (Path("run") / "adapter_last").is_dir()


# --- python -m lora_engine ------------------------------------------------------------------


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


def say(model, image, adapter=None, **options) -> str:
    captioner = load_captioner(model)
    if adapter is not None:
        lora_engine.load_adapter(captioner.model, adapter)
    pixels = to_pixels(open_image(image), captioner.pixels)[None]
    texts = caption_pixels(
        captioner, np.asarray(pixels), device=torch.device("cpu"), dtype=torch.float32, **options
    )
    return " ".join(texts[0].split())


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
        "lora_engine.captioning.caption_pixels", lambda *args, **kwargs: ["a dog\n on\ta  beach"]
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

    monkeypatch.setattr(verbs, "load_captioner", load)
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


# --- from Python ----------------------------------------------------------------------------


def test_every_public_name_is_importable_and_no_other():
    assert {"inject", "merge", "save_adapter", "load_adapter", "load_captioner", "train",
            "generate"} <= set(lora_engine.__all__)
    for name in set(lora_engine.__all__) - {"__version__"}:
        assert callable(getattr(lora_engine, name))
    assert lora_engine.train is training.train
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        lora_engine.tarin
