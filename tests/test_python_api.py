"""From Python: captions of any image as the command prints them, and training with keywords."""

import dataclasses
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from adapters import adapter_folder
from checkpoints import hugging_face, varied
from pictures import caption_of, settings
from PIL import Image

import lora_engine
from lora_engine.__main__ import run_verb
from lora_engine.features.encoder import encode_pixels
from lora_engine.lora.adapter import read_adapter
from lora_engine.lora.injection import lora_parameters
from lora_engine.terminal import escaped
from lora_engine.training import loop as loop_module
from lora_engine.training import python_run
from recipes import finetune

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(data) -> list[Path]:
    return sorted((data / "images").glob("train_*.png"))[:5]


@pytest.fixture(scope="module")
def adapter(blip_folder, tmp_path_factory) -> Path:
    """The adapter of a run folder, that is its adapter/."""
    return adapter_folder(blip_folder, tmp_path_factory.mktemp("run") / "adapter", prompt="a dog")


@pytest.fixture(scope="module")
def captioner(blip_folder, adapter) -> lora_engine.ImageCaptioner:
    return lora_engine.load_captioner(blip_folder, adapter=adapter, device="cpu")


# --- captions -------------------------------------------------------------------------------


def of_command(capsys, *args) -> list[str]:
    capsys.readouterr()
    assert run_verb(["caption", *map(str, args), "--cache", "off", "--device", "cpu"]) == 0
    return [line.partition("\t")[2] for line in capsys.readouterr().out.splitlines()]


def as_printed(captions: list[str]) -> list[str]:
    return [escaped(" ".join(caption.split())) for caption in captions]


@pytest.mark.parametrize("family", ["blip", "vit_gpt2"])
def test_captions_are_those_of_the_command(family, request, tmp_path, pictures, capsys):
    model = request.getfixturevalue(f"{family}_folder")
    folder = adapter_folder(model, tmp_path / "adapter", prompt="a dog")
    captioner = lora_engine.load_captioner(adapter=folder)
    asked = ["--num_beams", 2, "--max_new_tokens", 7, "--min_new_tokens", 3]
    expected = of_command(capsys, "--adapter", folder, *pictures, *asked)
    found = captioner.caption(
        pictures, num_beams=2, max_new_tokens=7, min_new_tokens=3, batch_size=2
    )
    assert as_printed(found) == expected
    asked = ["--adapter", folder, "--encoder_precision", "int8"]
    in_int8 = lora_engine.load_captioner(model, adapter=folder, encoder_precision="int8")
    assert as_printed(in_int8.caption(pictures)) == of_command(capsys, *asked, *pictures)
    sampled = of_command(capsys, "--adapter", folder, *pictures, "--temperature", 2, "--seed", 3)
    found = captioner.caption(pictures, temperature=2.0, seed=3, batch_size=2)
    assert as_printed(found) == sampled
    base = of_command(capsys, "--model", model, *pictures, "--prompt", "a cat")
    assert as_printed(captioner.base.caption(pictures, prompt="a cat")) == base
    assert len(set(expected + base)) > 5


def test_all_kinds_of_images_have_the_captions_of_their_files(captioner, pictures):
    path = pictures[0]
    with Image.open(path) as picture:
        kinds = [path, str(path), path.read_bytes(), picture, np.asarray(picture.convert("RGB"))]
        captions = captioner.caption(kinds)
        assert captions == [captioner.caption(image) for image in kinds]
        assert captions == [captioner(path)] * len(kinds) and captions[0]
        assert captioner.caption(iter(kinds)) == captioner.caption(tuple(kinds)) == captions
    assert captioner.caption([]) == []


def test_several_captions_of_an_image_are_a_list(captioner, pictures):
    settings = {"num_beams": 3, "max_new_tokens": 5, "repetition_penalty": 1.5}
    several = captioner.caption(pictures, num_return_sequences=2, batch_size=2, **settings)
    assert [captions[0] for captions in several] == captioner.caption(pictures, **settings)
    assert all(len(set(captions)) == 2 for captions in several)
    scored = captioner.caption(
        pictures[0], num_return_sequences=2, return_scores=True, **settings
    )
    assert [text for text, _ in scored] == several[0] and scored[0].score != scored[1].score


def test_scores_are_those_of_hugging_faces_beam_search(blip_folder, pictures):
    captioner = lora_engine.load_captioner(blip_folder)
    theirs = hugging_face(blip_folder)
    varied(captioner, theirs, raised=SimpleNamespace(amount=0.8))
    pixels = torch.from_numpy(np.stack([captioner._pixels(path, "") for path in pictures]))
    found = theirs.generate(
        pixel_values=lora_engine.data.pixels.normalize(pixels, captioner.pixels),
        num_beams=3, max_new_tokens=6, output_scores=True, return_dict_in_generate=True,
    )
    captions = captioner.caption(pictures, num_beams=3, max_new_tokens=6, return_scores=True)
    torch.testing.assert_close(
        torch.tensor([score for _, score in captions]), found.sequences_scores,
        rtol=0, atol=1e-5,
    )
    assert [caption.text for caption in captions] == captioner.caption(
        pictures, num_beams=3, max_new_tokens=6
    )
    num_ended = int((found.sequences[:, 1:] == captioner.tokenizer.end_id).any(dim=1).sum())
    assert 0 < num_ended < len(pictures), num_ended


def test_an_image_that_cannot_be_used_is_named_by_its_position(captioner, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:60])
    for bad, words in {
        "nothing.png": "nothing.png: no such file",
        str(tmp_path): "is a folder",
        tmp_path / "broken.png": "damaged or truncated",
        b"abc": "not an image in a known format",
        None: "the image is None, expected a path",
    }.items():
        with pytest.raises(ValueError, match=r"^images\[1\]: ") as refused:
            captioner.caption([pictures[0], bad])
        assert words in str(refused.value) and "\n" not in str(refused.value)
    for image, words in (
        (np.zeros((3, 5, 4), np.uint8), "array.transpose(1, 2, 0)"),
        (torch.zeros(3, 5, 4), "of the type Tensor, expected a path"),
        ({"image": pictures[0]}, "of the type dict, expected a path"),
    ):
        with pytest.raises(ValueError) as refused:
            captioner.caption(image)
        assert words in str(refused.value)


@pytest.mark.parametrize("given, words", [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"top_p": 0.5}, "give temperature 1, too"),
    ({"temperature": 0}, "temperature is 0"),
    ({"temperature": 1.0, "num_beams": 2}, "give one of them"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
])
def test_settings_out_of_range_are_refused(captioner, pictures, given, words):
    with pytest.raises(ValueError, match=words):
        captioner.caption(pictures[0], **given)
    assert not captioner.model.training


# --- captioners and adapters ----------------------------------------------------------------


def test_the_base_shares_the_weights_and_no_adapter(blip_folder, pictures, adapter, capsys):
    captioner = lora_engine.load_captioner(blip_folder)
    before = captioner.caption(pictures)
    lora_engine.load_adapter(captioner.model, str(adapter))
    changed = captioner.caption(pictures)
    assert captioner.base.caption(pictures) == before != changed
    lora_engine.merge(captioner.model)
    assert captioner.caption(pictures) == changed
    assert captioner.base.caption(pictures) == before
    lora_engine.unmerge(captioner.model)
    theirs = dict(captioner.base.model.named_parameters())
    mine = dict(captioner.model.named_parameters())
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_adapters_are_swapped_without_reading_the_base_again(
    blip_folder, pictures, adapter, tmp_path, monkeypatch
):
    other = lora_engine.load_captioner(blip_folder).model
    lora_engine.inject(other, ["crossattention.self.value"], rank=5)
    for matrix in lora_parameters(other).values():
        torch.nn.init.normal_(matrix, std=0.5)
    lora_engine.save_adapter(other, tmp_path / "b", provenance={"prompt": "a cat"})
    names = adapter, tmp_path / "b"
    expected = [lora_engine.load_captioner(blip_folder, adapter=n).caption(pictures) for n in names]
    captioner = lora_engine.load_captioner(blip_folder)
    plain = captioner.caption(pictures, prompt="")
    weights = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}
    encoder = captioner._encoder

    for module in ("models.pretrained", "captioning.adapted_captioner"):
        monkeypatch.setattr(f"lora_engine.{module}.read_checkpoint", None)
    found = []
    for name in names:
        captioner.load_adapter(name)
        found.append(captioner.caption(pictures))
        with pytest.raises(ValueError, match="no adapter at"):
            captioner.load_adapter(tmp_path / "none")
    assert found == expected and captioner.prompt == captioner.base.prompt == "a cat"
    assert captioner.base.caption(pictures, prompt="") == plain
    misfit = tmp_path / "misfit"
    shutil.copytree(tmp_path / "b", misfit)
    text = (misfit / "adapter_config.json").read_text()
    (misfit / "adapter_config.json").write_text(text.replace('"r": 5', '"r": 4'))
    with pytest.raises(ValueError, match="expected"):
        captioner.load_adapter(misfit)
    assert captioner.caption(pictures) == expected[1]
    captioner.unload_adapter()
    assert captioner.caption(pictures, prompt="") == plain and captioner._encoder is encoder
    restored = captioner.model.state_dict()
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in weights.items())


def test_generate_works_on_the_model_as_before(captioner, pictures):
    pixels = torch.from_numpy(captioner._pixels(pictures[0], ""))[None]
    tokenizer = captioner.tokenizer
    prompt_ids = tokenizer.prompt_ids(captioner.prompt)
    features = encode_pixels(captioner.model, pixels, captioner.pixels)
    tokens = lora_engine.generate(
        captioner.model, features, prompt_ids=prompt_ids, end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
    )
    new = tokens[0, len(prompt_ids):]
    text, score = captioner.caption(pictures[0], return_scores=True)
    assert tokenizer.decode(new.tolist()) == text == captioner(pictures[0])
    with torch.no_grad():  # the prompt has no share in the score
        logits = captioner.model.head(captioner.model.decode(tokens[:, :-1], features))
    log_probs = logits[0, len(prompt_ids) - 1 :].log_softmax(dim=-1)
    assert len(prompt_ids) > 1 and tokenizer.end_id not in new[:-1]
    assert score == pytest.approx(float(log_probs.gather(1, new[:, None]).mean()), abs=1e-5)


def test_an_adapter_is_a_folder_a_run_or_a_hub_name(
    captioner, blip_folder, adapter, pictures, monkeypatch
):
    def fetch(name, **settings):
        assert name == "owner/name"
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    expected = captioner.caption(pictures)
    for name in (str(adapter.parent), adapter.parent, "owner/name"):
        assert lora_engine.load_captioner(blip_folder, adapter=name).caption(pictures) == expected
    again = lora_engine.load_captioner(adapter=adapter, prompt="a cat")  # names its base
    assert again.name == str(blip_folder)
    assert again.caption(pictures) == captioner.caption(pictures, prompt="a cat") != expected


def test_an_adapter_of_another_base_is_refused_unless_forced(vit_gpt2_folder, blip_folder,
                                                             tmp_path, adapter):
    changed = tmp_path / "adapter"
    lora_engine.save_adapter(
        lora_engine.load_captioner(blip_folder, adapter=adapter).model, changed,
        provenance={"base_fingerprint": "0" * 64},
    )
    with pytest.raises(ValueError, match="in its weights .* `force=True`"):
        lora_engine.load_captioner(blip_folder, adapter=changed)
    assert lora_engine.load_captioner(blip_folder, adapter=changed, force=True)
    with pytest.raises(ValueError, match="does not fit .*vit_gpt2"):
        lora_engine.load_captioner(vit_gpt2_folder, adapter=adapter, force=True)
    with pytest.raises(ValueError, match="no model to load"):
        lora_engine.load_captioner()


def test_a_saved_adapter_names_its_base(blip_folder, captioner, pictures, tmp_path):
    lora_engine.save_adapter(captioner.model, tmp_path / "saved")
    saved = lora_engine.load_captioner(adapter=tmp_path / "saved", prompt=captioner.prompt)
    assert saved.name == str(blip_folder)
    assert saved.caption(pictures) == captioner.caption(pictures)


def test_saving_replaces_an_adapter_and_keeps_other_files(captioner, tmp_path):
    model = captioner.model
    lora_engine.save_adapter(model, tmp_path / "saved", provenance={"prompt": "a first one"})
    (tmp_path / "saved/notes.txt").write_text("mine")
    lora_engine.save_adapter(model, tmp_path / "saved", provenance={"prompt": "a second one"})
    assert read_adapter(tmp_path / "saved").prompt == "a second one"
    assert (tmp_path / "saved/notes.txt").read_text() == "mine"


def test_a_base_named_relatively_is_not_looked_for_here(captioner, tmp_path, monkeypatch):
    lora_engine.save_adapter(captioner.model, tmp_path / "adapter", base_model="owner/base")
    (tmp_path / "owner/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give it as the model"):
        lora_engine.load_captioner(adapter="adapter")


@pytest.mark.parametrize("name, words", [
    ("generate", "captioner.caption(image)"), ("to", "device="), ("nothing", "no attribute"),
])
def test_what_other_libraries_call_says_what_there_is(captioner, name, words):
    with pytest.raises(AttributeError) as refused:
        getattr(captioner, name)
    assert words in str(refused.value)
    assert not hasattr(captioner, name)


def test_public_names_are_listed_and_their_signatures_are_explicit():
    assert dir(lora_engine) == sorted(lora_engine.__all__)
    functions = [getattr(lora_engine, name) for name in lora_engine.__all__[1:]]
    for function in [*functions, lora_engine.ImageCaptioner.caption]:
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_POSITIONAL not in kinds
        # The settings of `train` are the fields of TrainingConfig.
        assert (inspect.Parameter.VAR_KEYWORD in kinds) == (function is lora_engine.train)


# --- training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(data) -> list[tuple[Image.Image, str]]:
    """The pictures of train.json, in memory."""
    paths = sorted((data / "images").glob("train_*.png"))
    return [(Image.open(path), caption_of(index)) for index, path in enumerate(paths)]


@pytest.fixture(scope="module")
def arguments(blip_folder, data, rows):
    """What `train` is called with, apart from the folder."""
    return {
        "model": blip_folder, "data": rows, "validation": data / "val.json",
        "epochs": 3, "lr": 5e-3, "batch_size": 4, "device": "cpu",
        "config": dataclasses.replace(
            python_run.FINE_TUNING, best_by="loss", eval_captions=2, num_samples=2, log_every=2,
            cache="memory",
        ),
    }


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """A finished run, and the records that its callback got."""
    seen: list[dict] = []
    folder = tmp_path_factory.mktemp("trained") / "run"
    return SimpleNamespace(
        run=lora_engine.train(**arguments, output_path=folder, callback=seen.append), seen=seen
    )


def test_a_run_has_history_scores_adapter_and_captioner(trained, data, blip_folder, pictures):
    run = trained.run
    assert run.summary.best_step > 0
    assert run.history == trained.seen
    assert [line["step"] for line in run.history if line["event"] == "train"] == [2, 3, 4, 6, 8, 9]
    best = next(line for line in run.history
                if line["event"] == "validation" and line["step"] == run.summary.best_step)
    assert {name: best[name] for name in ("loss", "cider_d")} == pytest.approx(
        {name: run.scores[name] for name in ("loss", "cider_d")}
    )
    assert run.adapter == run.folder / "adapter"
    by_hand = lora_engine.load_captioner(blip_folder, adapter=run.folder)
    assert run.captioner.caption(pictures) == by_hand.caption(pictures)
    assert run.captioner is run.captioner
    config = json.loads((run.folder / "config.json").read_text())
    assert config["val_data_path"] == [str(data / "val.json")]
    assert config["train_data_path"] is None and config["warmup_steps"] == 20


def test_show_prints_the_summary_and_in_a_notebook_the_curve(trained, monkeypatch, capsys):
    capsys.readouterr()
    trained.run.show()
    assert capsys.readouterr().out == f"{trained.run.summary}\n"
    shown: list[object] = []
    notebook = ModuleType("IPython")
    notebook.get_ipython = object  # type: ignore[attr-defined]
    notebook.display = SimpleNamespace(display=shown.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    trained.run.show()
    assert shown == [trained.run] and capsys.readouterr().out == ""
    html = trained.run._repr_html_()
    assert html.count("<img") == 3 and "data:image/png;base64,YSBwaWN0dXJl" in html
    assert trained.run.summary.samples[0].reference in html


def test_an_error_in_the_callback_loses_nothing(trained, arguments, tmp_path):
    class Enough(OSError):  # such as a network's: not taken for a full disk
        pass

    def stop(record):
        if record["step"] == 4:
            raise Enough

    path = tmp_path / "run"
    with pytest.raises(Enough) as stopped:
        lora_engine.train(**arguments, output_path=path, callback=stop)
    assert "`resume=True`" in "".join(stopped.value.__notes__)
    assert (path / "checkpoints/step-00000004").is_dir()  # the step whose line it was
    resumed = lora_engine.train(**arguments, output_path=str(path), resume=True)
    timings = {"images_per_s", "data_wait_share"}
    assert [
        {key: line[key] for key in line.keys() - timings} for line in resumed.history
    ] == [{key: line[key] for key in line.keys() - timings} for line in trained.run.history]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (path / "adapter" / name).read_bytes() == (trained.run.adapter / name).read_bytes()


def test_a_config_alone_trains_as_the_recipes_do(blip_folder, data, tmp_path):
    config = settings(blip_folder, data, tmp_path / "run", max_steps=1, eval_captions=0)
    run = lora_engine.train(config)
    again = loop_module.train(dataclasses.replace(config, output_path=str(tmp_path / "again")))
    assert run.summary.losses == again.losses and run.config == config
    with pytest.raises(ValueError, match="already holds a run"):
        lora_engine.train(config, lr=1e-3)


def test_the_defaults_are_those_of_the_recipe_for_fine_tuning():
    assert python_run.FINE_TUNING == finetune.SETTINGS
    assert str(finetune.SETTINGS.lr).replace("0.0002", "2e-4") in lora_engine.train.__doc__


def test_every_setting_is_a_keyword_on_top_of_those_of_the_recipe(monkeypatch):
    monkeypatch.setattr(python_run.loop, "train", lambda config, **_: config)
    run = lora_engine.train(
        data="train.json", use_dora=True, rank_pattern={"attention": np.int64(16)},
        alpha_pattern="attention=64", lora_layers=range(2), warmup_ratio=0.1, patience=None,
    )
    assert run.config == dataclasses.replace(
        finetune.SETTINGS, train_data_path=("train.json",), use_dora=True,
        rank_pattern=("attention=16",), alpha_pattern=("attention=64",), lora_layers=(0, 1),
        warmup_ratio=0.1, warmup_steps=0, patience=None,
    )


@pytest.mark.parametrize("wrong, words", [
    ({"data": None}, "no training data: give data="),
    ({"data": "nothing.json"}, "nothing.json"),
    ({"data": zip([1], [2])}, "expected a list of (image, caption)"),
    ({"validation": 0.1}, "found 0.1, expected a list"),
    ({"val_data": []}, "validation and val_data"),
    ({"lr": "2e-4"}, "lr is '2e-4', expected float"),
    ({"lr": -1.0}, "`lr` is -1.0; it must be above 0"),
    ({"model": Image.new("L", (1, 1))}, "model is an object of the type Image"),
    ({"lora_targets": "atention"}, "close matches: attention"),
    ({"callback": "print"}, "callback is 'print'; expected a function"),
    ({"config": [("a.jpg", "a")]}, "give pairs as data="),
    ({"resume": True, "output_path": None}, "`resume=True` needs the `output_path`"),
])
def test_wrong_arguments_are_answered_in_one_line(arguments, tmp_path, wrong, words):
    with pytest.raises(ValueError) as refused:
        lora_engine.train(**arguments | {"output_path": tmp_path / "run"} | wrong)
    message = str(refused.value)
    assert words in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_images_in_memory_are_not_taken_for_each_other(trained, arguments, rows, tmp_path, capsys):
    lora_engine.train(**arguments | {"validation": rows[:4], "max_steps": 1},
                      output_path=tmp_path / "run")
    assert "also training images" not in capsys.readouterr().err


# --- the notebook ---------------------------------------------------------------------------


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any("NUM_SCENES = 1000" in cell for cell in cells)
    names: dict = {}
    for number, cell in enumerate(cells):
        small = cell.replace("NUM_SCENES = 1000", "NUM_SCENES = 40")
        exec(compile(small, f"cell {number}", "exec"), names)
    run = names["run"]
    losses = list(names["losses"].values())
    assert losses[-1] < losses[0] and losses[-1] == run.history[-1]["loss"]
    assert capsys.readouterr().out.count(str(run.summary)) == 2  # at the end, and `show`
    assert names["again"].caption(names["images"]) == run.captioner.caption(names["images"])
