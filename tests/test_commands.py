"""python -m lora_engine VERB: what each command does, and how it answers bad input."""

import csv
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import torch
from adapters import adapter_folder
from pictures import json_lines, png_header, read_annotations, settings, write_pictures
from tars import write_tar

import lora_engine
from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.captioning import adapted_captioner, java_metrics, merging
from lora_engine.captioning.captioner import Caption, caption_features
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.captioning.metrics import References
from lora_engine.commands import evaluate as evaluate_command
from lora_engine.data import image_identity, image_table
from lora_engine.data.images import open_image
from lora_engine.data.pixels import to_pixels
from lora_engine.features import encoder, placement
from lora_engine.features.encoder import encode_pixels
from lora_engine.models.pretrained import load_captioner
from lora_engine.training.loop import train
from recipes import blip_cc3m


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the commands log, whatever handler shows it."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("lora_engine")
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)


# --- python -m lora_engine caption ----------------------------------------------------------


@pytest.fixture(scope="module")
def blip_adapter(blip_folder, tmp_path_factory) -> Path:
    return adapter_folder(blip_folder, tmp_path_factory.mktemp("adapter") / "adapter")


def caption_by_hand(*given, **settings) -> str:
    caption, = captions_by_hand(*given, **settings)
    return " ".join(caption.text.split())


def captions_by_hand(model, image, adapter=None, *, prompt="", **settings) -> list[Caption]:
    captioner = load_captioner(model)
    captioner.prompt = prompt
    if adapter is not None:
        lora_engine.load_adapter(captioner.model, adapter)
    pixels = torch.from_numpy(to_pixels(open_image(image), captioner.pixels)[None])
    features = encode_pixels(captioner.model, pixels, captioner.pixels)
    return caption_features(captioner, features, GenerationSettings(**settings))


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
    expected = [(str(image), caption_by_hand(blip_folder, image, blip_adapter)) for image in images]
    assert [tuple(line.split("\t")) for line in out.splitlines()] == expected
    assert len({caption for _, caption in expected}) > 1
    lines = json_lines(Path("captions.jsonl"))
    assert [line.keys() for line in lines] == 4 * [{"image", "caption"}]
    assert [(x["image"], " ".join(x["caption"].split())) for x in lines] == expected
    assert "ä.PNG" in Path("captions.jsonl").read_text(encoding="utf-8")  # readable as it is
    assert sorted(p.name for p in command.work.iterdir()) == ["captions.jsonl"]


def test_a_model_without_adapter_captions_with_beams_and_lengths(
    command, data, blip_folder
):
    image = read_annotations(data / "train.json")[0].image
    arguments = ["caption", "--model", blip_folder, image]
    status, out, _ = command(verbs.run_verb, *arguments)
    assert (status, out) == (0, f"{image}\t{caption_by_hand(blip_folder, image)}\n")
    options = {"num_beams": 3, "max_new_tokens": 5}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    status, beams, _ = command(verbs.run_verb, *arguments, *given)
    assert (status, beams) == (0, f"{image}\t{caption_by_hand(blip_folder, image, **options)}\n")
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
        texts[prompt] = caption_by_hand(vit_gpt2_folder, image, adapter, prompt=prompt)
        assert (status, out) == (0, f"{image}\t{texts[prompt]}\n")
        assert not prompt or not texts[prompt].startswith(prompt)
    assert len(set(texts.values())) > 1


def test_a_caption_of_several_lines_is_printed_on_one(command, data, blip_folder, monkeypatch):
    monkeypatch.setattr(
        "lora_engine.captioning.captioner.caption_features",
        lambda *args, **kwargs: [Caption("a dog\n on\ta  beach", ended=True)],
    )
    image = read_annotations(data / "train.json")[0].image
    _, out, _ = command(verbs.run_verb, "caption", "--model", blip_folder, image)
    assert out == f"{image}\ta dog on a beach\n"


@pytest.mark.parametrize("verb", [["caption", "image.png"], ["merge", "--out", "merged"]])
@pytest.mark.parametrize("name", ["owner/base", "base", "./base"])
def test_an_adapters_base_is_not_taken_from_the_current_folder(
    refused, data, blip_folder, blip_adapter, tmp_path, verb, name
):
    adapter = shutil.copytree(blip_adapter, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    Path(name).mkdir(parents=True)
    shutil.copy(read_annotations(data / "train.json")[0].image, "image.png")
    refused(
        verbs.run_verb, verb[0], "--adapter", adapter, *verb[1:],
        words=[f"names its base model {name!r}", "path in the current folder", "--model"],
        allowed=["image.png", *Path(name).parts],
    )


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
    (["captoin"], ["there is no verb 'captoin'; did you mean caption?"]),
    (["caption", "--adaptor", "x", "y.png"], ["no flag --adaptor; did you mean --adapter?"]),
    (["caption", "--num_beams", "0", "y.png"], ["--num_beams is 0", "at least 1"]),
    (["caption", "--num_beams", "100000", "y.png"], ["--num_beams is 100000", "at most 1000"]),
    (["caption", "--batch_size", "-1", "y.png"], ["--batch_size is -1"]),
    (["caption", "--max_new_tokens", "0", "y.png"], ["--max_new_tokens is 0"]),
    (["caption", "--num_beams", "two", "y.png"], ["--num_beams", "'two'"]),
    (["caption", "--model", "m", "absent.png"], ["absent.png: no such file or folder"]),
    (["caption", "--model", "m"], ["no images to caption"]),
    (["caption", "."], [".: no images in this folder"]),
])
def test_a_bad_caption_command_is_an_error(refused, args, words):
    refused(verbs.run_verb, *args, words=words)


@pytest.mark.parametrize("args, words", [
    ([], ["give a model (--model), an adapter (--adapter)"]),
    (["--adapter", "absent"], ["no adapter at absent", "RUN/adapter"]),
    (["--model", "./absent"], ["no model folder at './absent'"]),
    (["--model", "BLIP", "--out", "no/such/x.jsonl"], ["--out no/such/x.jsonl", "no folder"]),
    (["--model", "BLIP", "--out", "."], ["--out . is not a regular file"]),
])
def test_a_caption_command_without_a_model_or_folder_is_an_error(
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
        words=[f"{blip_adapter} was trained on ", f" and does not fit {vit_gpt2_folder}; give"],
    )


def test_an_adapter_on_another_base_model_is_refused_and_can_be_forced(
    command, refused, warnings, data, blip_adapter, blip_folder, tmp_path
):
    checkpoints.write_blip(tmp_path / "other", seed=5)
    given = ["--adapter", blip_adapter, "--model", tmp_path / "other"]
    image = read_annotations(data / "train.json")[0].image
    for verb in (["caption", image], ["evaluate", "--data", data / "val.json"]):
        refused(verbs.run_verb, *verb, *given, words=["in its weights", "--force"])
    refused(
        blip_cc3m.main, "--train_data_path", data / "train.json", "--init_adapter", blip_adapter,
        "--model", tmp_path / "other", words=["--init_adapter", "in its weights", "its own base"],
    )
    status, out, err = command(verbs.run_verb, "caption", image, *given, "--force")
    assert status == 0 and out.count("\n") == 1
    assert len(warnings) == 1 and "in its weights" in warnings[0]


def test_an_adapters_own_revision_is_loaded(command, data, blip_folder, tmp_path, monkeypatch):
    folder = adapter_folder(blip_folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "some/captioner", "revision": "v1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    asked = []

    def load(name, *, family, revision):
        asked.append((str(name), revision))
        return load_captioner(blip_folder)

    monkeypatch.setattr(adapted_captioner, "load_captioner", load)
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


# --- input images and output files ----------------------------------------------------------


def images_of(data: Path, count: int) -> list[str]:
    return [row.image for row in read_annotations(data / "train.json")][:count]


def test_images_come_from_patterns_and_from_a_list_on_stdin(
    command, data, blip_folder, monkeypatch
):
    one, two = images_of(data, 2)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{two}\n\n"))
    status, out, _ = command(verbs.run_verb, "caption", "--model", blip_folder, "-", one)
    assert status == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [two, one]
    pattern = str(Path(one).parent / "**" / "train_0[01].png")
    status, out, _ = command(verbs.run_verb, "caption", "--model", blip_folder, pattern)
    assert [line.split("\t")[0] for line in out.splitlines()] == [one, two]


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_images_in_the_output_file_are_not_captioned_again(command, data, blip_folder, name):
    """No line is lost or repeated if the last one is incomplete."""
    images = images_of(data, 4)
    given = ["caption", "--model", blip_folder, "--out", name]
    assert command(verbs.run_verb, *given, *images)[0] == 0
    whole = Path(name).read_bytes()
    kept = whole.splitlines(keepends=True)[: 2 + name.endswith("csv")]
    Path(name).write_bytes(b"".join(kept) + whole.splitlines()[-1][:20])
    status, out, err = command(verbs.run_verb, *given, *images)
    assert status == 0 and "2 of 4 images already have a caption" in err
    assert [line.split("\t")[0] for line in out.splitlines()] == images[2:]
    assert Path(name).read_bytes() == whole
    status, out, err = command(verbs.run_verb, *given, *images)
    assert (status, out) == (0, "") and "4 of 4" in err
    status, out, _ = command(verbs.run_verb, *given, *images[:1], "--overwrite")
    assert out.count("\n") == 1
    assert Path(name).read_bytes() == b"".join(kept[: 1 + name.endswith("csv")])


def test_an_output_file_with_other_content_is_refused(refused, data, blip_folder, tmp_path):
    for name in ("notes.jsonl", "notes.csv"):
        notes = tmp_path / name
        notes.write_text("my notes\nof today\n")
        refused(
            verbs.run_verb, "caption", "--model", blip_folder, *images_of(data, 1), "--out", notes,
            words=[f"--out {notes} does not contain", "--overwrite"],
        )
        assert notes.read_text() == "my notes\nof today\n"


def test_a_failure_before_the_first_caption_changes_no_file(refused, data, tmp_path):
    out = tmp_path / "captions.jsonl"
    out.write_text('{"image": "a.png", "caption": "a"}\n')
    for more in ([], ["--overwrite"]):
        refused(
            verbs.run_verb, "caption", "--model", "./absent", *images_of(data, 1), "--out", out,
            *more, words=["no model folder at './absent'"],
        )
    assert out.read_text() == '{"image": "a.png", "caption": "a"}\n'
    refused(
        verbs.run_verb, "caption", "--model", "./absent", *images_of(data, 1), "--out", "new.csv",
        words=["no model folder"],
    )


def test_captions_are_written_next_to_their_images(command, refused, data, blip_folder, tmp_path):
    for image in images_of(data, 2):
        shutil.copy(image, tmp_path)
    images = sorted(tmp_path.glob("*.png"))
    images[0].with_suffix(".txt").write_text("mine\n")
    given = ["caption", "--model", blip_folder, "--txt", *images]
    status, out, _ = command(verbs.run_verb, *given)
    assert status == 0 and out.count("\n") == 1
    assert images[0].with_suffix(".txt").read_text() == "mine\n"
    caption = images[1].with_suffix(".txt").read_text()
    assert " ".join(caption.split()) == caption_by_hand(blip_folder, images[1])
    command(verbs.run_verb, *given, "--overwrite")
    assert images[0].with_suffix(".txt").read_text() != "mine\n"
    shutil.copy(images[0], images[0].with_suffix(".jpg"))
    refused(
        verbs.run_verb, *given, images[0].with_suffix(".jpg"),
        words=["--txt would write the captions of", "to one file"],
    )


def test_several_adapters_caption_side_by_side(command, data, blip_folder, tmp_path):
    one = adapter_folder(blip_folder, tmp_path / "one")
    two = adapter_folder(blip_folder, tmp_path / "two", prompt="a picture of")
    image, = images_of(data, 1)
    status, out, _ = command(
        verbs.run_verb, "caption", "--adapter", one, "--adapter", two, image, "--out", "both.jsonl"
    )
    captions = [
        caption_by_hand(blip_folder, image, one),
        caption_by_hand(blip_folder, image, two, prompt="a picture of"),
    ]
    assert status == 0 and captions[0] != captions[1]
    assert out == f"{image}\t{one}\t{captions[0]}\n{image}\t{two}\t{captions[1]}\n"
    lines = json_lines(Path("both.jsonl"))
    assert [(line["image"], line["adapter"]) for line in lines] == [
        (image, str(one)), (image, str(two))
    ]


def test_sampled_captions_depend_only_on_the_seed_and_the_image(command, data, blip_folder):
    images = images_of(data, 4)
    given = ["caption", "--model", blip_folder, "--temperature", "1.5", "--top_p", "0.9"]

    def sampled(*more):
        return command(verbs.run_verb, *given, *more)[1].splitlines()

    first = sampled(*images, "--seed", "3")
    assert first == sampled(*images, "--seed", "3", "--batch_size", "3")
    assert first != sampled(*images, "--seed", "4")
    sampled(*images, "--seed", "3", "--out", "captions.jsonl")
    lines = Path("captions.jsonl").read_text().splitlines(keepends=True)
    Path("captions.jsonl").write_text("".join(lines[:2]))
    assert sampled(*images, "--seed", "3", "--out", "captions.jsonl") == first[2:]


def test_several_captions_of_an_image_are_lines_and_a_list(command, data, blip_folder):
    image, = images_of(data, 1)
    given = ["caption", "--model", blip_folder, "--num-beams", "3", "--num-return-sequences", "2"]
    status, out, err = command(verbs.run_verb, *given, image, "--out", "captions.jsonl")
    texts = [
        " ".join(caption.text.split())
        for caption in captions_by_hand(blip_folder, image, num_beams=3, num_return_sequences=2)
    ]
    assert len(set(texts)) == 2
    assert (status, out, err) == (0, "".join(f"{image}\t{text}\n" for text in texts), "")
    line, = json_lines(Path("captions.jsonl"))
    assert list(line) == ["image", "caption", "captions"]
    assert line["caption"] == line["captions"][0]
    assert [" ".join(text.split()) for text in line["captions"]] == texts
    command(verbs.run_verb, *given, image, "--out", "captions.csv")
    rows = list(csv.reader(Path("captions.csv").open(encoding="utf-8")))
    assert rows == [["image", "caption"], *([image, text] for text in texts)]


def write_shards(data: Path, folder: Path) -> list[str]:
    """Four images in two tars, the second without a caption -> their names."""
    sources = [Path(path).read_bytes() for path in images_of(data, 4)]
    write_tar(folder / "0.tar", [
        ("a", {"png": sources[0], "txt": b"a red circle"}), ("b", {"png": sources[1]}),
    ])
    write_tar(folder / "1.tar", [
        (key, {"png": source, "txt": b"a circle"}) for key, source in zip("cd", sources[2:])
    ])
    return [f"{folder}/{name}.png" for name in ("0.tar/a", "0.tar/b", "1.tar/c", "1.tar/d")]


def test_images_of_tars_are_captioned_in_place(command, data, blip_folder, tmp_path):
    names = write_shards(data, tmp_path)
    given = ["caption", "--model", blip_folder, "--out", "captions.jsonl", tmp_path]
    status, out, err = command(verbs.run_verb, *given)
    assert (status, err) == (0, "")
    _, files, _ = command(verbs.run_verb, *given[:3], *images_of(data, 4))
    captions = [line.split("\t")[1] for line in files.splitlines()]
    assert [tuple(line.split("\t")) for line in out.splitlines()] == list(zip(names, captions))
    lines = Path("captions.jsonl").read_text().splitlines(keepends=True)
    Path("captions.jsonl").write_text("".join(lines[:3]))
    status, out, err = command(verbs.run_verb, *given[:-1], tmp_path / "{0,1}.tar")
    assert status == 0 and "3 of 4 images already have a caption" in err
    assert [line["image"] for line in json_lines(Path("captions.jsonl"))] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "work"]


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_captioned(
    command, refused, data, blip_folder, tmp_path
):
    names = write_shards(data, tmp_path)
    (tmp_path / "0.tar").write_bytes(b"none" * 500)
    given = ["caption", "--model", blip_folder, "--out", "captions.jsonl"]
    status, out, err = command(verbs.run_verb, *given, tmp_path)
    assert status == 1 and [line.split("\t")[0] for line in out.splitlines()] == names[2:]
    assert f"skipped {tmp_path}/0.tar: not a tar archive" in err
    assert "1 row could not be used; skipped.jsonl lists them" in err
    (line,) = json_lines(Path("skipped.jsonl"))
    assert line["row"] == f"{tmp_path}/0.tar"
    for name in ("captions.jsonl", "skipped.jsonl"):
        Path(name).unlink()
    refused(verbs.run_verb, *given, tmp_path / "0.tar", words=["0.tar: not a tar archive"])


def test_images_of_annotation_files_are_captioned_with_or_without_a_caption(
    command, refused, data, blip_folder
):
    images = images_of(data, 3)
    rows = [{"text": "", "image": images[1]}, {"text": "a", "image": images[0]},
            {"text": "b", "image": images[0]}, {"text": "c", "image": 7}]
    Path("rows.json").write_text(json.dumps(rows))
    given = ["caption", "--model", blip_folder]
    status, out, err = command(verbs.run_verb, *given, "rows.json")
    assert status == 1 and [line.split("\t")[0] for line in out.splitlines()] == images[1::-1]
    assert f"skipped {command.work / 'rows.json'}:1: row 4: the image is 7" in err
    Path("rows.json").write_text(json.dumps(rows[3:]))
    refused(
        verbs.run_verb, *given, "rows.json", allowed=["rows.json"],
        words=["error: rows.json: JSON list: no image that can be used, first", "the image is 7"],
    )


def test_a_folder_of_images_with_captions_is_a_folder_of_images(
    command, data, blip_folder, tmp_path
):
    for image in images_of(data, 2):
        shutil.copy(image, tmp_path)
    images = sorted(map(str, tmp_path.glob("*.png")))
    Path(images[0]).with_suffix(".txt").write_text("mine\n")
    given = ["caption", "--model", blip_folder, tmp_path]
    status, out, err = command(verbs.run_verb, *given)
    assert (status, err) == (0, "")
    assert [line.split("\t")[0] for line in out.splitlines()] == images
    status, out, err = command(verbs.run_verb, *given, "--txt")
    assert status == 0 and [line.split("\t")[0] for line in out.splitlines()] == images[1:]


def test_data_sets_are_not_captioned_beside_files_or_together_with_files(
    refused, data, blip_folder, tmp_path
):
    write_shards(data, tmp_path)
    given = ["caption", "--model", blip_folder, tmp_path / "0.tar"]
    refused(verbs.run_verb, *given, "--txt", words=["--txt writes beside image files", "use --out"])
    image, = images_of(data, 1)
    refused(verbs.run_verb, *given, image, words=[
        f"{tmp_path}/0.tar is a data set and {image} is not", "one after the other",
    ])


@pytest.mark.parametrize("args, words", [
    (["--temperature", "0"], ["--temperature is 0", "1e-06 or more"]),
    (["--top_p", "0.5"], ["--top_p is for sampling"]),
    (["--temperature", "1", "--top_p", "0"], ["--top_p is 0"]),
    (["--temperature", "1", "--num_beams", "2"], ["give one of them"]),
    (["--min_new_tokens", "40"], ["--min_new_tokens is 40", "(30)"]),
    (["--num_return_sequences", "2"], ["greedy search finds one", "give --num_beams 2, or"]),
    (["--txt", "--num_return_sequences", "2", "--temperature", "1"], ["--txt takes one", "is 2"]),
    (["--length_penalty", "0"], ["--length_penalty ranks beams: give --num_beams 4"]),
    (["--num_workers", "-1"], ["--num_workers is -1"]),
    (["--device", "tpu"], ["--device tpu is not supported"]),
    (["--txt", "--adapter", "a", "--adapter", "b"], ["several --adapter"]),
])
def test_settings_that_do_not_go_together_are_an_error(refused, args, words):
    refused(verbs.run_verb, "caption", "--model", "m", "x.png", *args, words=words)


# --- python -m lora_engine evaluate ---------------------------------------------------------


def test_base_and_adapter_are_scored_side_by_side(command, data, blip_folder, tmp_path):
    adapter = adapter_folder(blip_folder, tmp_path / "adapter")
    status, out, err = command(
        verbs.run_verb, "evaluate", "--adapter", adapter, "--data", data / "train.json",
        "--out", "each.jsonl", "--coco_out", "coco.json",
    )
    assert (status, err) == (0, "")
    rows = read_annotations(data / "train.json")
    lines = json_lines(Path("each.jsonl"))
    assert [(x["image"], x["references"]) for x in lines] == [(r.image, [r.text]) for r in rows]
    for name, given in (("base", None), ("adapter", adapter)):
        captions = [line[name]["caption"] for line in lines]
        assert " ".join(captions[3].split()) == caption_by_hand(blip_folder, rows[3].image, given)
        scores = References([line["references"] for line in lines]).score(captions)
        assert [line[name]["cider_d"] for line in lines] == scores.cider_d.tolist()
        assert f"{scores.corpus.bleu_1:.3f} [" in out
    assert "12 images of" in out and "12 references" in out and "greedy" in out
    assert [line.split()[0] for line in out.splitlines()[4:10]] == [
        "CIDEr-D", "BLEU-4", "ROUGE-L", "BLEU-1", "BLEU-2", "BLEU-3",
    ]
    coco = json.loads(Path("coco.json").read_text())
    assert coco[3] == {"image_id": "images/train_03.png", "caption": lines[3]["adapter"]["caption"]}


def test_settings_of_generation_are_scored_side_by_side(
    command, data, blip_folder, blip_adapter, monkeypatch
):
    from lora_engine.features.encoder import FeatureEncoder

    encoded, encode = [], FeatureEncoder.encode
    monkeypatch.setattr(
        FeatureEncoder, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    status, out, err = command(
        verbs.run_verb, "evaluate", "--adapter", blip_adapter, "--data", data / "val.json",
        "--generate", "num_beams=1", "--generate", "num-beams=3, repetition_penalty=1.5",
        "--max_new_tokens", "5", "--cache", "off", "--out", "each.jsonl",
    )
    assert (status, err) == (0, "") and sum(encoded) == 4
    lines = json_lines(Path("each.jsonl"))
    names = [
        f"{name} {changes}" for changes in ("num_beams=1", "num-beams=3,repetition_penalty=1.5")
        for name in ("base", "adapter")
    ]
    assert list(lines[0]) == ["image", "references", *names]
    image = read_annotations(data / "val.json")[0].image
    for name, adapter, changed in zip(names, (None, blip_adapter) * 2, (
        *2 * ({},), *2 * ({"num_beams": 3, "repetition_penalty": 1.5},)
    )):
        caption = " ".join(lines[0][name]["caption"].split())
        assert caption == caption_by_hand(
            blip_folder, image, adapter, max_new_tokens=5, **changed
        )
    assert "2 settings" in out
    above, below = out.splitlines()[3:5]
    assert above.split() == ["num_beams=1", "num-beams=3,repetition_penalty=1.5"]
    assert below.split() == 2 * ["base", "adapter", "difference"]


def test_adapters_are_scored_side_by_side(command, data, blip_folder, blip_adapter, tmp_path):
    adapters = [blip_adapter, adapter_folder(blip_folder, tmp_path / "other", seed=2)]
    status, out, err = command(
        verbs.run_verb, "evaluate", "--data", data / "val.json", "--out", "each.jsonl",
        *(part for adapter in adapters for part in ("--adapter", adapter)),
    )
    assert (status, err) == (0, "")
    above, below = out.splitlines()[3:5]
    assert above.split() == list(map(str, adapters))
    assert below.split() == ["base", *2 * ["adapter", "difference"]]
    line = json_lines(Path("each.jsonl"))[0]
    named = {"base": None} | {f"adapter {path}": path for path in adapters}
    captions = {name: " ".join(line[name]["caption"].split()) for name in named}
    assert captions == {
        name: caption_by_hand(blip_folder, line["image"], path) for name, path in named.items()
    }
    assert len({*captions.values()}) == 3


def test_coco_annotations_are_read_and_bad_images_counted(
    command, data, blip_folder, tmp_path
):
    for number, image in enumerate(images_of(data, 2)):
        shutil.copy(image, tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"none")
    document = {
        "images": [{"id": 10 + n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [
            {"image_id": 10 + n % 3, "caption": f" caption {n} of it "} for n in range(6)
        ],
    }
    (data / "coco.json").write_text(json.dumps(document))
    status, out, err = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", data / "coco.json",
        "--image_folder", tmp_path, "--coco_out", "out.json", "--out", "each.jsonl",
    )
    assert status == 1
    assert "skipped" in err and "2.png" in err and "1 image could not be read" in err
    assert "2 images of" in out and "4 references" in out and "difference" not in out
    assert [line["image_id"] for line in json.loads(Path("out.json").read_text())] == [10, 11]
    (skipped,) = json_lines(Path("skipped.jsonl"))
    assert skipped["image"].endswith("2.png") and "known format" in skipped["reason"]
    assert json_lines(Path("each.jsonl"))[0]["references"] == ["caption 0 of it", "caption 3 of it"]


def test_rows_without_a_caption_to_score_against_are_named_and_listed(command, data, blip_folder):
    rows = json.loads((data / "train.json").read_text())
    rows = [row | {"image": str(data / row["image"])} for row in rows[:4]]
    rows[1]["text"], rows[2]["text"] = "...", ""
    Path("rows.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "]")
    status, out, err = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", "rows.json",
        "--out", "each.jsonl",
    )
    assert status == 1 and "2 images of" in out
    path = command.work / "rows.json"
    assert f"skipped {path}:3: has no words to compare: '...'\n" in err
    assert f"skipped {path}:4: has no caption\n" in err
    assert "2 rows could not be used; skipped.jsonl lists them\n" in err
    assert [line["row"] for line in json_lines(Path("skipped.jsonl"))] == [
        f"{path}:3", f"{path}:4"
    ]
    assert [line["references"] for line in json_lines(Path("each.jsonl"))] == [
        [rows[0]["text"]], [rows[3]["text"]]
    ]


def test_tars_are_scored(command, data, blip_folder, tmp_path):
    names = write_shards(data, tmp_path)
    status, out, err = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", tmp_path,
        "--out", "each.jsonl", "--coco_out", "coco.json",
    )
    assert status == 1 and "3 images of" in out and "3 references" in out
    assert f"skipped {names[1]}: has no caption\n" in err
    scored = [names[0], *names[2:]]
    lines = json_lines(Path("each.jsonl"))
    assert [(line["image"], line["references"]) for line in lines] == list(
        zip(scored, (["a red circle"], ["a circle"], ["a circle"]))
    )
    assert [line["image_id"] for line in json.loads(Path("coco.json").read_text())] == [
        "0.tar/a.png", "1.tar/c.png", "1.tar/d.png"
    ]


def test_a_folder_of_images_with_captions_is_scored(command, data, blip_folder, tmp_path):
    for image, caption in zip(images_of(data, 3), ("a red circle", "a green one", "")):
        shutil.copy(image, tmp_path)
        (tmp_path / Path(image).name).with_suffix(".txt").write_text(f"{caption}\n")
    images = sorted(map(str, tmp_path.glob("*.png")))
    status, out, err = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", tmp_path,
        "--out", "each.jsonl",
    )
    assert status == 1 and f"skipped {images[2]}: has no caption\n" in err
    assert [(line["image"], line["references"]) for line in json_lines(Path("each.jsonl"))] == [
        (images[0], ["a red circle"]), (images[1], ["a green one"])
    ]


def test_one_split_is_scored_by_default_the_test_split(command, data, blip_folder):
    rows = json.loads((data / "train.json").read_text())
    splits = ["train", "restval", "val", "test"]
    rows = [
        row | {"image": str(data / row["image"]), "split": splits[i % 4]}
        for i, row in enumerate(rows)
    ]
    Path("rows.json").write_text(json.dumps(rows))
    given = ["evaluate", "--model", blip_folder, "--data", "rows.json", "--out", "each.jsonl"]
    for asked, numbers in (
        ([], (3, 7, 11)), (["--split", "test"], (3, 7, 11)),
        (["--split", "validation"], (2, 6, 10)), (["--split", "train"], (0, 1, 4, 5, 8, 9)),
    ):
        status, out, _ = command(verbs.run_verb, *given, *asked)
        assert status == 0 and f"{len(numbers)} images of" in out
        assert [line["image"] for line in json_lines(Path("each.jsonl"))] == [
            rows[number]["image"] for number in numbers
        ]


def test_java_scores_name_what_they_need(refused, data, blip_folder, monkeypatch):
    given = ["evaluate", "--model", blip_folder, "--data", data / "val.json", "--meteor_spice"]
    monkeypatch.setattr(java_metrics, "find_spec", lambda name: None)
    refused(verbs.run_verb, *given, words=["need the package pycocoevalcap", "lora_engine[coco]"])
    monkeypatch.setattr(java_metrics, "find_spec", lambda name: name)
    monkeypatch.setattr(java_metrics.shutil, "which", lambda name: None)
    refused(verbs.run_verb, *given, words=["no `java` was found"])


def test_a_java_program_that_fails_costs_a_warning(
    command, warnings, data, blip_folder, monkeypatch
):
    def score(name, captions, references):
        if name == "spice":
            raise ValueError("SPICE failed: no network")
        return len(captions) / len(references) / 2

    monkeypatch.setattr(evaluate_command, "check_java", lambda: None)
    monkeypatch.setattr(evaluate_command, "java_score", score)
    status, out, err = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", data / "val.json",
        "--meteor_spice",
    )
    assert status == 0 and "METEOR: base 0.500" in out and "CIDEr-D" in out
    assert warnings == ["SPICE failed: no network"]


@pytest.mark.parametrize("args, words", [
    ([], ["--data"]),
    (["--data", "absent.json"], ["absent.json: no such file"]),
    (["--data", "VAL", "--image_folder", "absent"], ["absent: no such folder"]),
    (["--data", "VAL", "--split", "test"], ["--split test: no row", "the splits are val (4 rows)"]),
    (["--data", "VAL", "--data_format", "tra"], ["no format tra; did you mean tar"]),
    (["--data", "VAL", "--out", "no/such.jsonl"], ["--out no/such.jsonl", "create it first"]),
    (["--data", "VAL", "--out", "VAL"], ["val.json would replace the data; give another file"]),
    (["--data", "VAL", "--coco_out", "VAL"], ["--coco_out", "would replace the data"]),
    (["--data", "VAL", "--coco_out", "."], ["--coco_out . is not a regular file"]),
    (["--data", "VAL", "--adapter", "absent"], ["no adapter at absent"]),
    (["--data", "VAL", "--batch_size", "0"], ["--batch_size is 0"]),
    (["--data", "VAL", "--generate", "beams=2"], ["--generate beams=2: there is no setting"]),
    (["--data", "VAL", "--generate", "do_sample=true"], ["temperature=1, turns sampling on"]),
    (["--data", "VAL", "--generate", "max_length=20"], ["it is max_new_tokens here"]),
    (["--data", "VAL", "--generate", "early_stopping=true"], ["with early_stopping=False"]),
    (["--data", "VAL", "--generate", "top_k=2"], ["--generate top_k=2: top_k is for sampling"]),
    (["--data", "VAL", *2 * ["--generate", "num_beams=2"]], ["num_beams=2 is given twice"]),
    (["--data", "VAL", "--coco_out", "x.json", "--generate", "num_beams=2", "--generate",
      "num_beams=3"], ["several --generate"]),
    (["--data", "VAL", "--coco_out", "x.json", "--adapter", "a", "--adapter", "b"],
     ["several --adapter"]),
    (["--data", "VAL", *2 * ["--adapter", "a"]], ["--adapter a a: give each of them once"]),
    (["--data", "VAL", "--num_beams", "2", "--num_return_sequences", "2"],
     ["--num_return_sequences is 2, but one caption of each image is scored"]),
])
def test_a_bad_evaluate_command_is_an_error(refused, data, blip_folder, args, words):
    args = [str(data / "val.json") if arg == "VAL" else arg for arg in args]
    refused(verbs.run_verb, "evaluate", "--model", blip_folder, *args, words=words)


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
    _, merged, _ = command(verbs.run_verb, "caption", "--model", "merged", *images)
    assert merged == expected
    assert merged != command(verbs.run_verb, "caption", "--model", captioner_folder, *images)[1]


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
    command, refused, warnings, blip_adapter, blip_folder, tmp_path
):
    checkpoints.write_blip(tmp_path / "other", seed=5)
    given = ["merge", "--adapter", blip_adapter, "--model", tmp_path / "other", "--out", "merged"]
    refused(verbs.run_verb, *given, words=[
        f"error: {blip_adapter} was trained on a base model ({blip_folder}) that differs from "
        f"{tmp_path / 'other'} in its weights", "--force",
    ])
    status, out, err = command(verbs.run_verb, *given, "--force")
    assert status == 0 and "4 of 4 images" in out
    assert len(warnings) == 1 and "in its weights" in warnings[0]
    assert (command.work / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("args, words", [
    ([], ["--adapter", "--out"]),
    (["--adapter", "ADAPTER"], ["--out"]),
    (["--adapter", "absent", "--out", "merged"], ["no adapter at absent"]),
    (["--adapter", "ADAPTER", "--out", "ADAPTER/adapter_config.json/x/y"],
     ["--out", "adapter_config.json is a file; name a new folder elsewhere"]),
    (["--adapter", "ADAPTER", "--out", "ADAPTER", "--model", "./absent"],
     ["already holds files"]),  # told before anything is loaded
    (["--adapter", "ADAPTER", "--out", "BLIP/merged"], ["is in the base model's folder"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--images", "absent.png"],
     ["absent.png: no such file or folder"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--images", "ADAPTER/adapter_config.json"],
     ["adapter_config.json: not an image"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--model", "VIT_GPT2", "--force"],
     ["was trained on", "does not fit"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--model", "NARROW", "--force"],
     ["was trained on", "does not fit"]),
    (["--adapter", "ADAPTER", "--out", "merged", "--forse"], ["did you mean --force"]),
])
def test_a_bad_merge_command_is_an_error(
    refused, blip_adapter, blip_folder, vit_gpt2_folder, tmp_path, args, words
):
    places = {"ADAPTER": blip_adapter, "BLIP": blip_folder, "VIT_GPT2": vit_gpt2_folder,
              "NARROW": tmp_path / "narrow"}
    if "NARROW" in args:
        checkpoints.write_blip(tmp_path / "narrow", text={"hidden_size": 32})
    for name, place in places.items():
        args = [re.sub(rf"^{name}(?=/|$)", str(place), arg) for arg in args]
    refused(verbs.run_verb, "merge", *args, words=words)


# --- kept features --------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each encoder batch of the commands had, black ones included."""
    sizes: list[int] = []

    def spy(model, pixels, settings):
        sizes.append(len(pixels))
        return encode_pixels(model, pixels, settings)

    monkeypatch.setattr(encoder, "encode_pixels", spy)
    return sizes


@pytest.fixture
def cache_dir(monkeypatch, tmp_path) -> Path:
    """The default cache folder, empty; its disk is faster than any encoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(placement, "read_rate", lambda folder: 1e12)
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", 0)
    return tmp_path / "cache" / "lora_engine"


def test_an_image_is_encoded_once_by_training_captioning_and_evaluating(
    command, data, captioner_folder, cache_dir, encoded, monkeypatch
):
    given = ["--cache", "disk", "--num_workers", "0"]
    train(settings(captioner_folder, data, Path("run"), cache="disk", epochs=1))
    read = []
    read_image_file = image_table.read_image_file
    monkeypatch.setattr(
        image_table, "read_image_file", lambda path: [read.append(path), read_image_file(path)][1]
    )
    encoded.clear()
    evaluated = "evaluate", "--adapter", "run/adapter", "--data", data / "val.json"
    captioned = "caption", "--adapter", "run/adapter", *images_of(data, 12)
    assert command(verbs.run_verb, *evaluated, *given)[0] == 0
    status, kept, _ = command(verbs.run_verb, *captioned, *given)
    assert status == 0 and len(encoded) == 2  # a blank batch each, for the shape of the features
    assert read == []
    status, out, _ = command(verbs.run_verb, *captioned, "--cache", "off", "--num_workers", "0")
    assert status == 0 and out == kept and len(read) == 12
    assert len(list(cache_dir.glob("*/features.bin"))) == 1


def test_many_images_are_kept_on_disk_by_default_and_not_encoded_again(
    command, blip_folder, tmp_path, cache_dir, encoded
):
    write_pictures(tmp_path, num_images=24)
    evaluated = "evaluate", "--model", blip_folder, "--data", tmp_path / "train.json"
    status, first, _ = command(verbs.run_verb, *evaluated)
    assert status == 0 and 2 <= len(encoded) - 24 // encoded[0] <= 6  # batches that are measured
    encoded.clear()
    assert command(verbs.run_verb, *evaluated)[:2] == (0, first)
    assert 2 <= len(encoded) <= 6


def test_for_a_few_images_nothing_is_measured_and_nothing_kept(
    command, data, blip_folder, cache_dir, encoded, monkeypatch
):
    monkeypatch.delattr(placement, "read_rate")
    status, _, err = command(
        verbs.run_verb, "caption", "--model", blip_folder, *images_of(data, 3)
    )
    assert (status, err) == (0, "") and len(encoded) == 1 and not cache_dir.exists()


def test_a_cache_folder_that_cannot_be_used_is_refused_if_asked_for(
    command, refused, data, blip_folder, cache_dir, tmp_path
):
    (tmp_path / "file").touch()
    given = ["caption", "--model", blip_folder, "--cache_dir", tmp_path / "file"]
    refused(
        verbs.run_verb, *given, "--cache", "disk", *images_of(data, 2), "--out", "captions.jsonl",
        words=[f"--cache disk: {tmp_path / 'file'}", "features cannot be kept here"],
    )
    write_pictures(tmp_path, num_images=16)
    status, out, err = command(verbs.run_verb, *given, tmp_path / "images")
    assert (status, err) == (0, "") and out.count("\n") == 16


def test_a_caption_does_not_depend_on_the_other_images(command, data, blip_folder, encoded):
    """Every encoder batch has the same size: with another the last bits could differ."""
    given = "caption", "--model", blip_folder, "--cache", "off"
    images = images_of(data, 6)
    _, together, _ = command(verbs.run_verb, *given, *images, "--batch_size", "4")
    assert together == "".join(command(verbs.run_verb, *given, image)[1] for image in images)
    assert len(set(encoded)) == 1 and len(encoded) == 2 + len(images)
